"""Image sources, token shards and the loaders that read them."""
