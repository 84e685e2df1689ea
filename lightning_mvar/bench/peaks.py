"""Peak rates of GPUs, from the vendors' data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Peak rates of a GPU: bfloat16 matrix products without sparsity, in FLOP/s, and memory bandwidth, in bytes/s."""

    flops_per_s: float
    bytes_per_s: float


# By words in the name that CUDA reports. The first match wins, so specific names come first.
PEAKS = {
    "B200": Peak(2250e12, 8.0e12),
    "GH200": Peak(989e12, 4.0e12),
    "H200": Peak(989e12, 4.8e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "A100-SXM4-80GB": Peak(312e12, 2.04e12),
    "A100 80GB PCIe": Peak(312e12, 1.94e12),
    "A100": Peak(312e12, 1.56e12),
    "L40S": Peak(362e12, 0.864e12),
    "L40": Peak(181e12, 0.864e12),
    "L4": Peak(121e12, 0.3e12),
    "A10G": Peak(70e12, 0.6e12),
    "A10": Peak(125e12, 0.6e12),
    "A40": Peak(150e12, 0.696e12),
    "RTX A6000": Peak(155e12, 0.768e12),
    "RTX 6000 Ada": Peak(364e12, 0.96e12),
    "RTX 5090": Peak(209e12, 1.79e12),
    "RTX 4090": Peak(165e12, 1.01e12),
    "RTX 3090": Peak(71e12, 0.936e12),
}


def peak_of(name: str) -> Peak | None:
    """Returns the peak rates of the GPU that CUDA calls `name`; None if unknown."""
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
