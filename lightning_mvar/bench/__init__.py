"""Measurements of `lightning-mvar bench`: networks with random weights on this machine."""
