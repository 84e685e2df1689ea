"""LPIPS from files in the published formats, with random weights, against the formula written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Pixels
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.tokenizer.perceptual import LPIPS, FeatureDistance, shipped_heads

# torchvision's numbers of VGG16's convolutions with their channels; LPIPS looks at the last of each row.
CONVOLUTIONS = [
    [(0, 3, 64), (2, 64, 64)],
    [(5, 64, 128), (7, 128, 128)],
    [(10, 128, 256), (12, 256, 256), (14, 256, 256)],
    [(17, 256, 512), (19, 512, 512), (21, 512, 512)],
    [(24, 512, 512), (26, 512, 512), (28, 512, 512)],
]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that keep the size of what passes through, and a part of the classifier, which is not read."""
    torch.manual_seed(0)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for number, before, after in (layer for row in CONVOLUTIONS for layer in row):
        state[f"features.{number}.weight"] = torch.randn(after, before, 3, 3) * (2 / (9 * before)) ** 0.5
        state[f"features.{number}.bias"] = torch.randn(after) * 0.1
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


def plain_lpips(x: Tensor, y: Tensor, vgg: Path) -> Tensor:
    """As published: normalize each pixel's features, weight their squared differences, average over pixels, add up."""
    state, heads = (torch.load(path, "cpu", weights_only=True) for path in (vgg, shipped_heads()))
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


def test_it_is_the_published_formula(vgg: Path) -> None:
    torch.manual_seed(1)
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    distance = LPIPS(str(vgg))
    found = distance(x, y)
    assert found.shape == (2,)
    assert found.min() > 0.01
    torch.testing.assert_close(found, plain_lpips(x, y, vgg), rtol=1e-4, atol=1e-6)
    assert distance(x, x).abs().max() == 0


def test_the_gradient_reaches_the_image_alone_and_is_finite_for_a_flat_one(vgg: Path) -> None:
    distance = LPIPS(str(vgg))
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(x, torch.rand(1, 3, 32, 32)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_missing_and_foreign_files_are_named(vgg: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pth does not exist; download it from https"):
        LPIPS("nowhere.pth")
    with pytest.raises(InputError, match=r"vgg\.pth does not fit VGG16: missing features\.0\.weight"):
        LPIPS(str(shipped_heads()))
    with pytest.raises(InputError, match=r"vgg16\.pth is not LPIPS's file of VGG's weights: missing lin0"):
        LPIPS(str(vgg), heads=str(vgg))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match=r"text\.pth is damaged or not a file of plain weights"):
        LPIPS(str(tmp_path / "text.pth"))


def test_any_extractor_makes_a_distance() -> None:
    torch.manual_seed(2)
    x, y = torch.rand(2, 5, 3, 8, 8) * 2 - 1
    a, b = (F.adaptive_avg_pool2d(z / 2 + 0.5, 2).mean(dim=1).flatten(1) for z in (x, y))
    expected = 2 - 2 * F.cosine_similarity(a, b)
    torch.testing.assert_close(FeatureDistance(Pixels())(x, y), expected)
