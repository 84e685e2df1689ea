"""LPIPS with random weights, read from files in the published formats, against the formula in plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Pixels
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.tokenizer.perceptual import LPIPS, FeatureDistance, bundled_heads

# torchvision's layer indices of VGG16's convolutions, with their channels; LPIPS uses the output of each row.
CONVOLUTIONS = [
    [(0, 3, 64), (2, 64, 64)],
    [(5, 64, 128), (7, 128, 128)],
    [(10, 128, 256), (12, 256, 256), (14, 256, 256)],
    [(17, 256, 512), (19, 512, 512), (21, 512, 512)],
    [(24, 512, 512), (26, 512, 512), (28, 512, 512)],
]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes random weights that preserve activation scale, and a part of the classifier, which must be ignored."""
    torch.manual_seed(0)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for number, in_channels, out_channels in (layer for row in CONVOLUTIONS for layer in row):
        state[f"features.{number}.weight"] = (
            torch.randn(out_channels, in_channels, 3, 3) * (2 / (9 * in_channels)) ** 0.5
        )
        state[f"features.{number}.bias"] = torch.randn(out_channels) * 0.1
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


def reference_lpips(x: Tensor, y: Tensor, vgg: Path) -> Tensor:
    """Normalizes features per pixel, weights squared differences, averages over pixels and sums over layers."""
    state, heads = (torch.load(path, "cpu", weights_only=True) for path in (vgg, bundled_heads()))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((z - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for z in (x, y))
    total = torch.zeros(len(x))
    for i, row in enumerate(CONVOLUTIONS):
        if i:
            x, y = F.max_pool2d(x, 2, 2), F.max_pool2d(y, 2, 2)
        for number, _, _ in row:
            weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
            x, y = (F.relu(F.conv2d(z, weight, bias, padding=1)) for z in (x, y))
        difference = (F.normalize(x, dim=1) - F.normalize(y, dim=1)) ** 2
        total += F.conv2d(difference, heads[f"lin{i}.model.1.weight"]).mean(dim=(1, 2, 3))
    return total


def test_lpips_equals_the_published_formula(vgg: Path) -> None:
    torch.manual_seed(1)
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    distance = LPIPS(str(vgg))
    actual = distance(x, y)
    assert actual.shape == (2,)
    assert actual.min() > 0.01
    torch.testing.assert_close(actual, reference_lpips(x, y, vgg), rtol=1e-4, atol=1e-6)
    assert distance(x, x).abs().max() == 0


def test_the_gradient_reaches_only_the_image_and_is_finite_for_a_constant_one(vgg: Path) -> None:
    distance = LPIPS(str(vgg))
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(x, torch.rand(1, 3, 32, 32)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_missing_and_foreign_files_are_rejected_by_name(vgg: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pth does not exist; download it from https"):
        LPIPS("nowhere.pth")
    with pytest.raises(InputError, match=r"vgg\.pth does not fit VGG16: missing features\.0\.weight"):
        LPIPS(str(bundled_heads()))
    with pytest.raises(InputError, match=r"vgg16\.pth is not LPIPS's weight file for VGG: missing lin0"):
        LPIPS(str(vgg), heads=str(vgg))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match=r"text\.pth is damaged or not a file of plain weights"):
        LPIPS(str(tmp_path / "text.pth"))


def test_feature_distance_works_with_any_extractor() -> None:
    torch.manual_seed(2)
    x, y = torch.rand(2, 5, 3, 8, 8) * 2 - 1
    a, b = (F.adaptive_avg_pool2d(z / 2 + 0.5, 2).mean(dim=1).flatten(1) for z in (x, y))
    expected = 2 - 2 * F.cosine_similarity(a, b)
    torch.testing.assert_close(FeatureDistance(Pixels())(x, y), expected)
