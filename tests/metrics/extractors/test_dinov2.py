"""DINOv2 with random weights in the published format, against the formula in plain torch and float64."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.metrics.extractors import dinov2
from lightning_mvar.metrics.extractors.dinov2 import DINOv2, DINOv2Network
from lightning_mvar.metrics.extractors.preprocessing import preprocess

WIDTH, DEPTH, HEADS = 12, 2, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def published_shapes(d: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every key in facebookresearch's file."""
    block = {
        **{f"{norm}.{kind}": (d,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")},
        "attn.qkv.weight": (3 * d, d),
        "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "mlp.fc1.weight": (4 * d, d),
        "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,),
        "ls1.gamma": (d,),
        "ls2.gamma": (d,),
    }
    return {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1370, d),
        "mask_token": (1, d),
        "patch_embed.proj.weight": (d, 3, 14, 14),
        "patch_embed.proj.bias": (d,),
        **{f"blocks.{i}.{key}": shape for i in range(depth) for key, shape in block.items()},
        "norm.weight": (d,),
        "norm.bias": (d,),
    }


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(WIDTH, DEPTH)
    return {key: 0.5 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture
def network(weights: dict[str, Tensor]) -> DINOv2Network:
    network = DINOv2Network(WIDTH, DEPTH, HEADS)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def cubic(x: float) -> float:
    """The bicubic kernel of torch's interpolate, a = -0.75."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def interpolated_positions(grid: Tensor) -> Tensor:
    """Resizes (37, 37, d) to (16, 16, d) with the offset: output i is sampled at (i + 0.5) 37 / 16.1 - 1/2."""
    matrix = torch.zeros(16, 37, dtype=torch.float64)
    for i in range(16):
        position = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(math.floor(position) - 1, math.floor(position) + 3):
            matrix[i, min(max(j, 0), 36)] += cubic(position - j)
    return torch.einsum("ia,jb,abd->ijd", matrix, matrix, grid)


def reference_features(pixels: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Maps normalized pixels (3, 224, 224) to features (d,), one patch, head and token at a time."""
    w = {key: tensor.double() for key, tensor in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        return (
            deviation / (deviation.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    kernel = w["patch_embed.proj.weight"].flatten(1)
    positions = interpolated_positions(w["pos_embed"][0, 1:].view(37, 37, -1))
    tokens = [w["cls_token"][0, 0] + w["pos_embed"][0, 0]]
    for i in range(16):
        for j in range(16):
            patch = pixels[:, 14 * i : 14 * i + 14, 14 * j : 14 * j + 14].double().flatten()
            tokens.append(kernel @ patch + w["patch_embed.proj.bias"] + positions[i, j])
    x = torch.stack(tokens)
    for i in range(DEPTH):
        name = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
        heads = []
        for columns in torch.arange(WIDTH).chunk(HEADS):
            scores = q[:, columns] @ k[:, columns].T / (WIDTH / HEADS) ** 0.5
            heads.append(scores.softmax(-1) @ v[:, columns])
        x = x + linear(torch.cat(heads, -1), f"{name}.attn.proj") * w[f"{name}.ls1.gamma"]
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + linear(hidden, f"{name}.mlp.fc2") * w[f"{name}.ls2.gamma"]
    return norm(x[0], "norm")


def test_features_equal_an_independent_computation(network: DINOv2Network, weights: dict[str, Tensor]) -> None:
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = torch.stack(
        [reference_features(pixels, weights) for pixels in preprocess(images, (224, 224), MEAN, STD)]
    )
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing
        features = network(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected.float(), rtol=1e-4, atol=1e-4)


def test_features_equal_those_of_timm(network: DINOv2Network, weights: dict[str, Tensor]) -> None:
    """At 224 x 224 with our position embedding: timm interpolates without the offset, and antialiased."""
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    theirs = timm.create_model("vit_large_patch14_dinov2", img_size=224, num_classes=0, **sizes).eval()
    state = {name: tensor for name, tensor in weights.items() if name != "mask_token"}
    theirs.load_state_dict(state | {"pos_embed": network.position_embedding()})
    images = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(preprocess(images, (224, 224), MEAN, STD))
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)


def test_the_published_file_fits_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real network has the real keys, shapes and number of weights; a small one is loaded."""
    with torch.device("meta"):
        state = DINOv2Network().state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == published_shapes(1024, 24)
    assert sum(tensor.numel() for tensor in state.values()) == 304_368_640
    monkeypatch.setattr(dinov2.DINOv2Network.__init__, "__defaults__", (WIDTH, DEPTH, HEADS))
    shapes = published_shapes(WIDTH, DEPTH)
    path, good = tmp_path / "dinov2.pth", {key: torch.ones(shape) for key, shape in shapes.items()}
    torch.save(good, path)
    loaded = DINOv2(str(path))
    assert loaded.num_features == WIDTH
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.save(good | {"register_tokens": torch.zeros(1, 4, WIDTH)}, path)
    with pytest.raises(InputError, match=r"dinov2\.pth does not fit DINOv2: unexpected register_tokens"):
        DINOv2(str(path))
