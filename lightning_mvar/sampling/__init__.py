"""Samplers, and sets of sampled images: drawn, written and read."""
