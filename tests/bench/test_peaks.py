"""Peak rates by the names that CUDA reports."""

import pytest

from lightning_mvar.bench.peaks import PEAKS, peak_of


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_model(name: str, key: str) -> None:
    assert peak_of(name) == PEAKS[key]


@pytest.mark.parametrize("name", ["cpu", "NVIDIA RTX A1000", "NVIDIA GeForce GTX 1080"])
def test_an_unknown_gpu_has_none(name: str) -> None:
    assert peak_of(name) is None
