"""Labelled images: sources, decoding, crops, batches."""
