"""Images in, token shards out and in again."""
