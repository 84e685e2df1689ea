"""Token shards: the format, writing, streaming, verifying."""
