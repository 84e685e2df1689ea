"""Tensor operations that know nothing of networks: the state-space scan and attention over packed scales."""
