"""Sampling of images; drawing, writing and reading of sets of samples."""
