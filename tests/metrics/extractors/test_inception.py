from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.metrics.extractors.inception import InceptionNetwork, InceptionV3, resize_like_tensorflow

OFFICIAL = "weights-inception-2015-12-05-6726825d.pth"

OUTPUTS = """
Conv2d_1a_3x3 32 149 149, Conv2d_2a_3x3 32 147 147, Conv2d_2b_3x3 64 147 147, pool1 64 73 73,
Conv2d_3b_1x1 80 73 73, Conv2d_4a_3x3 192 71 71, pool2 192 35 35,
Mixed_5b 256 35 35, Mixed_5c 288 35 35, Mixed_5d 288 35 35,
Mixed_6a 768 17 17, Mixed_6b 768 17 17, Mixed_6c 768 17 17, Mixed_6d 768 17 17, Mixed_6e 768 17 17,
Mixed_7a 1280 8 8, Mixed_7b 2048 8 8, Mixed_7c 2048 8 8
"""

# The published convolutions: name, outputs, inputs, kernel. In a block, `i` is its inputs and `o` its variable width.
STEM = """
Conv2d_1a_3x3 32 3 3 3, Conv2d_2a_3x3 32 32 3 3, Conv2d_2b_3x3 64 32 3 3, Conv2d_3b_1x1 80 64 1 1,
Conv2d_4a_3x3 192 80 3 3
"""
BLOCK_A = """
branch1x1 64 i 1 1, branch5x5_1 48 i 1 1, branch5x5_2 64 48 5 5, branch3x3dbl_1 64 i 1 1, branch3x3dbl_2 96 64 3 3,
branch3x3dbl_3 96 96 3 3, branch_pool o i 1 1
"""
BLOCK_B = "branch3x3 384 i 3 3, branch3x3dbl_1 64 i 1 1, branch3x3dbl_2 96 64 3 3, branch3x3dbl_3 96 96 3 3"
BLOCK_C = """
branch1x1 192 i 1 1, branch7x7_1 o i 1 1, branch7x7_2 o o 1 7, branch7x7_3 192 o 7 1, branch7x7dbl_1 o i 1 1,
branch7x7dbl_2 o o 7 1, branch7x7dbl_3 o o 1 7, branch7x7dbl_4 o o 7 1, branch7x7dbl_5 192 o 1 7,
branch_pool 192 i 1 1
"""
BLOCK_D = """
branch3x3_1 192 i 1 1, branch3x3_2 320 192 3 3, branch7x7x3_1 192 i 1 1, branch7x7x3_2 192 192 1 7,
branch7x7x3_3 192 192 7 1, branch7x7x3_4 192 192 3 3
"""
BLOCK_E = """
branch1x1 320 i 1 1, branch3x3_1 384 i 1 1, branch3x3_2a 384 384 1 3, branch3x3_2b 384 384 3 1,
branch3x3dbl_1 448 i 1 1, branch3x3dbl_2 384 448 3 3, branch3x3dbl_3a 384 384 1 3, branch3x3dbl_3b 384 384 3 1,
branch_pool 192 i 1 1
"""
BLOCKS = [
    ("Mixed_5b", BLOCK_A, {"i": 192, "o": 32}),
    ("Mixed_5c", BLOCK_A, {"i": 256, "o": 64}),
    ("Mixed_5d", BLOCK_A, {"i": 288, "o": 64}),
    ("Mixed_6a", BLOCK_B, {"i": 288}),
    ("Mixed_6b", BLOCK_C, {"i": 768, "o": 128}),
    ("Mixed_6c", BLOCK_C, {"i": 768, "o": 160}),
    ("Mixed_6d", BLOCK_C, {"i": 768, "o": 160}),
    ("Mixed_6e", BLOCK_C, {"i": 768, "o": 192}),
    ("Mixed_7a", BLOCK_D, {"i": 768}),
    ("Mixed_7b", BLOCK_E, {"i": 1280}),
    ("Mixed_7c", BLOCK_E, {"i": 2048}),
]


def read_table(table: str, sizes: dict[str, int]) -> dict[str, torch.Size]:
    entries = (entry.split() for entry in table.split(","))
    return {name: torch.Size(sizes.get(size) or int(size) for size in shape) for name, *shape in entries}


def published_shapes() -> dict[str, torch.Size]:
    """Returns the shape of every key in the published files, except the counters."""
    convolutions = read_table(STEM, {})
    for block, table, sizes in BLOCKS:
        convolutions |= {f"{block}.{name}": shape for name, shape in read_table(table, sizes).items()}
    shapes = {"fc.weight": torch.Size([1008, 2048]), "fc.bias": torch.Size([1008])}
    for name, shape in convolutions.items():
        shapes[f"{name}.conv.weight"] = shape
        shapes |= {f"{name}.bn.{key}": shape[:1] for key in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def constant_weights() -> dict[str, Tensor]:
    """Returns a state dict with the published keys and shapes; each tensor is one expanded number, to save memory."""
    return {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(published_shapes().items())}


def random_weights() -> dict[str, Tensor]:
    """Returns random weights that keep activations in range, so that every weight matters."""
    generator = torch.Generator().manual_seed(0)

    def draw(key: str, shape: torch.Size) -> Tensor:
        if key.endswith((".conv.weight", "fc.weight")):
            return torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        if key.endswith(("bn.weight", "running_var")):
            return torch.rand(shape, generator=generator) + 0.5
        return torch.randn(shape, generator=generator) * 0.2

    return {key: draw(key, shape) for key, shape in published_shapes().items()}


def resize_by_matrices(images: Tensor, height: int, width: int) -> Tensor:
    """TensorFlow 1's resize in float64: row i of a matrix holds the weight of each input pixel in output pixel i."""

    def matrix(old: int, new: int) -> Tensor:
        rows = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            lower, remainder = divmod(i * old, new)
            rows[i, lower] += 1 - remainder / new
            rows[i, min(lower + 1, old - 1)] += remainder / new
        return rows

    return matrix(images.shape[2], height) @ images.double() @ matrix(images.shape[3], width).T


class Reference:
    """Reference features in float64, computed from the state dict; `wrong` names a block whose pooling is wrong."""

    def __init__(self, weights: dict[str, Tensor], wrong: str = "") -> None:
        self.weights = {key: tensor.double() for key, tensor in weights.items()}
        self.wrong = wrong

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        x = F.conv2d(x, self.weights[f"{name}.conv.weight"], stride=stride, padding=padding)
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (self.weights[f"{name}.bn.{key}"].view(-1, 1, 1) for key in keys)
        return ((x - mean) / (variance + 0.001).sqrt() * scale + shift).clamp(min=0)

    def pool(self, x: Tensor, name: str) -> Tensor:
        if name == "Mixed_7c" != self.wrong:
            return F.max_pool2d(x, 3, stride=1, padding=1)
        total = F.avg_pool2d(x, 3, stride=1, padding=1, divisor_override=1)
        count = F.avg_pool2d(torch.ones_like(x), 3, stride=1, padding=1, divisor_override=1)
        return total / (9 if name == self.wrong else count)

    def block_a(self, x: Tensor, name: str) -> Tensor:
        five = self.conv(self.conv(x, f"{name}.branch5x5_1"), f"{name}.branch5x5_2", padding=2)
        three = self.conv(self.conv(x, f"{name}.branch3x3dbl_1"), f"{name}.branch3x3dbl_2", padding=1)
        three = self.conv(three, f"{name}.branch3x3dbl_3", padding=1)
        pooled = self.conv(self.pool(x, name), f"{name}.branch_pool")
        return torch.cat([self.conv(x, f"{name}.branch1x1"), five, three, pooled], dim=1)

    def block_b(self, x: Tensor, name: str) -> Tensor:
        three = self.conv(x, f"{name}.branch3x3", stride=2)
        double = self.conv(self.conv(x, f"{name}.branch3x3dbl_1"), f"{name}.branch3x3dbl_2", padding=1)
        double = self.conv(double, f"{name}.branch3x3dbl_3", stride=2)
        return torch.cat([three, double, F.max_pool2d(x, 3, stride=2)], dim=1)

    def block_c(self, x: Tensor, name: str) -> Tensor:
        wide, tall = (0, 3), (3, 0)
        seven = self.conv(self.conv(x, f"{name}.branch7x7_1"), f"{name}.branch7x7_2", padding=wide)
        seven = self.conv(seven, f"{name}.branch7x7_3", padding=tall)
        double = self.conv(x, f"{name}.branch7x7dbl_1")
        for number, padding in ((2, tall), (3, wide), (4, tall), (5, wide)):
            double = self.conv(double, f"{name}.branch7x7dbl_{number}", padding=padding)
        pooled = self.conv(self.pool(x, name), f"{name}.branch_pool")
        return torch.cat([self.conv(x, f"{name}.branch1x1"), seven, double, pooled], dim=1)

    def block_d(self, x: Tensor, name: str) -> Tensor:
        three = self.conv(self.conv(x, f"{name}.branch3x3_1"), f"{name}.branch3x3_2", stride=2)
        seven = self.conv(self.conv(x, f"{name}.branch7x7x3_1"), f"{name}.branch7x7x3_2", padding=(0, 3))
        seven = self.conv(seven, f"{name}.branch7x7x3_3", padding=(3, 0))
        seven = self.conv(seven, f"{name}.branch7x7x3_4", stride=2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)

    def block_e(self, x: Tensor, name: str) -> Tensor:
        def fork(y: Tensor, branch: str) -> list[Tensor]:
            wide = self.conv(y, f"{name}.{branch}a", padding=(0, 1))
            return [wide, self.conv(y, f"{name}.{branch}b", padding=(1, 0))]

        three = fork(self.conv(x, f"{name}.branch3x3_1"), "branch3x3_2")
        double = self.conv(self.conv(x, f"{name}.branch3x3dbl_1"), f"{name}.branch3x3dbl_2", padding=1)
        pooled = self.conv(self.pool(x, name), f"{name}.branch_pool")
        double = torch.cat(fork(double, "branch3x3dbl_3"), dim=1)
        return torch.cat([self.conv(x, f"{name}.branch1x1"), *three, double, pooled], dim=1)

    def features(self, pixels: Tensor) -> Tensor:
        """Maps pixels (b, 3, H, W) in 0 to 255 to (b, 2048) float64; stores the sFID features (b, 17 * 17 * 7)."""
        x = resize_by_matrices(pixels, 299, 299) / 128 - 1
        x = self.conv(self.conv(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3")
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3", padding=1), 3, stride=2)
        x = F.max_pool2d(self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, stride=2)
        for letter in "bcd":
            x = self.block_a(x, f"Mixed_5{letter}")
        x = self.block_b(x, "Mixed_6a")
        for letter in "bcde":
            x = self.block_c(x, f"Mixed_6{letter}")
            if letter == "d":
                self.spatial = torch.stack([x[:, channel] for channel in range(7)], dim=-1).flatten(1)
        x = self.block_d(x, "Mixed_7a")
        x = self.block_e(self.block_e(x, "Mixed_7b"), "Mixed_7c")
        return x.flatten(2).mean(dim=2)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


@pytest.fixture(scope="module")
def network(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> InceptionV3:
    path = tmp_path_factory.mktemp("inception") / OFFICIAL
    torch.save(weights, path)
    network = InceptionV3(str(path))
    path.unlink()  # 96 MB
    return network


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(256, (1, 3, 60, 41), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def features(network: InceptionV3, pixels: Tensor) -> Tensor:
    return network(pixels / 255)


def distance(a: Tensor, b: Tensor) -> float:
    """Returns the maximum absolute difference, relative to the standard deviation of `b`."""
    return float((a - b).abs().max() / b.std())


def test_every_layer_has_the_published_output_shape() -> None:
    network = InceptionNetwork().eval().requires_grad_(False)
    shapes = {}

    def record_shape(name: str) -> Callable:
        return lambda module, inputs, output: shapes.update({name: tuple(output.shape[1:])})

    for name, layer in network.named_children():
        layer.register_forward_hook(record_shape(name))
    assert network(torch.rand(1, 3, 299, 299)).shape == (1, network.num_features)
    assert shapes == read_table(OUTPUTS, {})


def test_the_table_of_keys_has_the_published_number_of_weights() -> None:
    """Keras counts 23,851,784 with 1000 classes: convolutions, classifier, and three vectors per batch norm."""
    shapes = published_shapes()
    assert len(shapes) == 94 * 5 + 2
    convolutions = sum(shape.numel() for key, shape in shapes.items() if key.endswith("conv.weight"))
    channels = sum(shape[0] for key, shape in shapes.items() if key.endswith("running_mean"))
    assert convolutions + 3 * channels + 2049 * 1000 == 23_851_784


@pytest.mark.parametrize("count", [None, 7])
def test_the_published_files_load_with_and_without_counters(count: int | None, tmp_path: Path) -> None:
    weights = constant_weights()
    norms = {key.removesuffix(".weight") for key in weights if key.endswith("bn.weight")}
    counters = {f"{norm}.num_batches_tracked": torch.tensor(count) for norm in norms} if count else {}
    torch.save(weights | counters, tmp_path / OFFICIAL)
    network = InceptionV3(str(tmp_path / OFFICIAL))
    loaded = {key: tensor for key, tensor in network.state_dict().items() if "num_batches" not in key}
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_counters_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    weights = constant_weights()
    counters = {"Mixed_7c.branch_pool.bn.num_batches_tracked": torch.tensor(7)}
    for path, state in ((tmp_path / "a.pth", weights), (tmp_path / "b.pth", weights | counters)):
        torch.save(state, path)
    a, b = (fingerprint(InceptionV3(str(tmp_path / name))) for name in ("a.pth", "b.pth"))
    assert a == b


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / OFFICIAL
    with pytest.raises(InputError, match=r"6726825d\.pth does not exist; download it from https://github\.com/\S+$"):
        InceptionV3(str(path))
    weights = constant_weights()
    key = "Mixed_7b.branch3x3dbl_3b.conv.weight"
    changes = {
        f"missing {key}": {name: tensor for name, tensor in weights.items() if name != key},
        f"{key} is .*, not ": weights | {key: weights[key].transpose(2, 3)},
        r"unexpected AuxLogits\.fc\.bias": weights | {"AuxLogits.fc.bias": torch.zeros(1)},
    }
    for message, state in changes.items():
        torch.save(state, path)
        with pytest.raises(InputError, match=f"does not fit InceptionV3: {message}"):
            InceptionV3(str(path))


def test_features_and_logits_equal_an_independent_computation(
    network: InceptionV3, weights: dict[str, Tensor], pixels: Tensor, features: Tensor
) -> None:
    reference = Reference(weights)
    expected = reference.features(pixels)
    spatial = network.features_and_spatial(pixels / 255)[1]
    assert spatial.shape == (1, network.num_spatial)
    assert distance(spatial, reference.spatial) < 3e-5
    assert features.dtype == torch.float32
    assert expected.std() > 0.1
    assert distance(features, expected) < 3e-5
    assert distance(network.logits(features), expected @ weights["fc.weight"].double().T) < 3e-5


@pytest.mark.parametrize("block", ["Mixed_5b", "Mixed_6e", "Mixed_7b", "Mixed_7c"])
def test_wrong_pooling_in_one_block_changes_the_features(
    weights: dict[str, Tensor], pixels: Tensor, features: Tensor, block: str
) -> None:
    assert distance(features, Reference(weights, wrong=block).features(pixels)) > 5e-3


def test_images_are_rounded_to_8_bits(network: InceptionV3, pixels: Tensor, features: Tensor) -> None:
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(2)) - 0.5
    assert torch.equal(network((pixels + noise * 0.9) / 255), features)


def test_autocast_changes_nothing(network: InceptionV3, pixels: Tensor, features: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = network(pixels / 255)
        logits = network.logits(under_autocast)
    assert torch.equal(under_autocast, features)
    assert torch.equal(logits, network.logits(features))


def test_convolutions_on_a_gpu_do_not_use_tf32(
    network: InceptionV3, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_tf32 = []
    layer = network.get_submodule("Mixed_7c")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with layer.register_forward_hook(lambda *_: allow_tf32.append(torch.backends.cudnn.allow_tf32)):
        network(pixels / 255)
        assert allow_tf32 == [False]
        assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 4), (9, 9)),
        ((9, 9), (4, 4)),
        ((5, 8), (13, 3)),
        ((32, 7), (31, 20)),
        ((1, 6), (4, 6)),
        ((256, 64), (299, 299)),
    ],
)
def test_resize_equals_the_loop(old: tuple[int, int], new: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *old, generator=torch.Generator().manual_seed(0)) * 255
    torch.testing.assert_close(
        resize_like_tensorflow(images, new).double(), resize_by_matrices(images, *new), rtol=0, atol=5e-3
    )


def test_resize_aligns_the_first_pixels() -> None:
    image = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]])
    doubled = torch.tensor([[0.0, 2, 4, 4], [4, 6, 8, 8], [8, 10, 12, 12], [8, 10, 12, 12]])
    assert torch.equal(resize_like_tensorflow(image, (4, 4))[0, 0], doubled)
    assert torch.equal(resize_like_tensorflow(doubled[None, None], (2, 2)), image)
    photo = torch.rand(1, 3, 299, 299)
    assert torch.equal(resize_like_tensorflow(photo, (299, 299)), photo)
