"""Token shards: format, writing, streaming and verification."""
