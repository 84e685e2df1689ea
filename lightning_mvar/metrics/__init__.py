"""Scores of generated images, on any feature extractor.

An extractor is an `nn.Module` with an int attribute `num_features` that maps images (b, 3, H, W) float32 in [0, 1] to
features (b, num_features).
"""
