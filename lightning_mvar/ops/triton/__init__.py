"""Triton kernels for CUDA, each beside a PyTorch reference in `ops`.

Only `ops.kernels` imports them, on machines with CUDA and Triton. Tests run the same kernels on a CPU in Triton's
interpreter. Products of float32 inputs are IEEE float32, never TF32, and nothing is autotuned by timing: the same
inputs give the same result in every process.
"""
