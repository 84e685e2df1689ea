import copy
import math
from collections import Counter

import pytest
import torch
from conftest import SCHEDULE
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mvar import ScaleSchedule, Tokenizer, TokenizerConfig
from lightning_mvar.errors import InputError
from lightning_mvar.tokenizer.autoencoder import GroupNorm, ResidualBlock
from lightning_mvar.tokenizer.tokenizer import DECODER_MAP_BYTES


@pytest.mark.parametrize(
    "sides", [(1, 2, 3, 4), (1, 3, 6), (2, 4), (8,), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), ((1, 2), (3, 7))]
)
@torch.no_grad()
def test_shapes_and_ranges_for_each_schedule(sides: tuple[int, ...]) -> None:
    tokenizer = Tokenizer(TokenizerConfig(ScaleSchedule(sides), 32, 4, 8, (1, 2), 1, 2)).eval()
    schedule, shape = tokenizer.config.schedule, tokenizer.config.shape
    assert shape == tuple(2 * side for side in schedule.shapes[-1])
    tokens = tokenizer.encode(torch.rand(2, 3, *shape) * 2 - 1)
    assert tokens.shape == (2, schedule.num_tokens)
    assert tokens.dtype == torch.int64
    images = tokenizer.decode(tokens)
    assert images.shape == (2, 3, *shape)
    assert images.abs().max() <= 1
    assert tokenizer.scale_inputs(tokens).shape == (2, tokens.shape[1] - schedule.first, 4)


@torch.no_grad()
def test_the_last_decoded_step_is_the_image(tokenizer: Tokenizer) -> None:
    tokens = torch.randint(0, 48, (2, 30))
    *_, last = tokenizer.decode_steps(tokens)
    assert torch.equal(last, tokenizer.decode(tokens))


@torch.no_grad()
def test_large_batches_are_decoded_in_parts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(5 * tokenizer.config.schedule.num_tokens).view(5, -1) % tokenizer.config.vocab_size
    expected_images, sizes = tokenizer.decode(tokens), []
    hook = tokenizer.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    map_bytes = 4 * tokenizer.config.channels * tokenizer.config.multipliers[0] * math.prod(tokenizer.config.shape)
    for images, expected in ((1, [1] * 5), (2, [2, 2, 1]), (5, [5])):
        monkeypatch.setitem(DECODER_MAP_BYTES, "cpu", images * map_bytes + 1)
        sizes.clear()
        torch.testing.assert_close(tokenizer.decode(tokens), expected_images)
        assert sizes == expected
    hook.remove()


def test_the_published_size_has_the_published_downsampling() -> None:
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig())
    assert tokenizer.config.shape == (256, 256)
    assert round(sum(p.numel() for p in tokenizer.parameters()) / 1e6) == 109


def test_the_fingerprint_depends_on_weights_and_configuration(tokenizer: Tokenizer) -> None:
    other = Tokenizer(tokenizer.config)
    other.load_state_dict(tokenizer.state_dict())
    assert other.fingerprint() == tokenizer.fingerprint()
    with torch.no_grad():
        other.decoder.conv_out.bias[0] += 1e-3
    assert other.fingerprint() != tokenizer.fingerprint()


def test_images_of_another_size_are_rejected(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"takes images \(b, 3, 8, 8\), got \(1, 3, 16, 16\)"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("invalid", [{"vocab_size": 0}, {"multipliers": ()}, {"vocab_size": 70_000}])
def test_invalid_configurations_are_rejected(invalid: dict[str, object]) -> None:
    with pytest.raises(InputError):
        TokenizerConfig(**invalid)


@pytest.mark.parametrize(("device", "channels_last"), [("cpu", True), ("meta", False)])
def test_weights_in_half_precision_have_channels_last_on_a_cpu_alone(device: str, channels_last: bool) -> None:
    config = TokenizerConfig(SCHEDULE, 48, 8, channels=8, multipliers=(1, 2), blocks=1, num_phi=3)
    tokenizer = Tokenizer(config).to(device).lower(torch.bfloat16).lower_encoder(torch.bfloat16)
    for weight in (tokenizer.decoder.conv_out.weight, tokenizer.encoder.conv_out.weight):
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert tokenizer.quantizer.codebook.weight.dtype == tokenizer.quantizer.phi[0].weight.dtype == torch.float32


def test_a_lowered_encoder_gives_features_near_those_in_float32(tokenizer: Tokenizer) -> None:
    images = torch.rand(3, 3, *tokenizer.config.shape) * 2 - 1
    lowered = copy.deepcopy(tokenizer).lower_encoder(torch.bfloat16)
    with torch.no_grad():
        expected, features = tokenizer.features(images), lowered.features(images)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0)


def test_activation_checkpointing_recomputes_norms_but_no_convolution() -> None:
    """And leaves all gradients as they are."""
    torch.manual_seed(0)
    block, x = ResidualBlock(8, 16, groups=4), torch.randn(2, 8, 6, 6)
    gradients, calls = [], []
    for _ in range(2):
        names: list[str] = []
        with Calls(names):
            leaf = x.clone().requires_grad_()
            block(leaf).square().sum().backward()
        gradients.append([leaf.grad, *(parameter.grad for parameter in block.parameters())])
        calls.append(Counter(names))
        block.zero_grad()
        block.enable_activation_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    plain, recomputed = calls
    assert recomputed["native_group_norm"] == 2 * plain["native_group_norm"] == 4
    assert recomputed["convolution"] == plain["convolution"] == 3
    assert recomputed["convolution_backward"] == plain["convolution_backward"] == 3


class Calls(TorchDispatchMode):
    """Appends the names of the operations that run."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.cuda
def test_norms_keep_their_dtype_under_autocast_on_a_gpu() -> None:
    norm, x = GroupNorm(4, 16).cuda(), torch.randn(2, 16, 8, 8, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm(x.float()), atol=0.03, rtol=0.02)
