"""Published networks as feature extractors; see `lightning_mvar.metrics` for what an extractor is."""
