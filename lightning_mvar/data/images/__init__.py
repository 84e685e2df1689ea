"""Labeled images: sources, decoding, crops, batches."""
