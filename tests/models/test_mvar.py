import math
from collections.abc import Callable
from dataclasses import fields
from itertools import accumulate

import pytest
import torch
from conftest import MIXERS, OBLONG, SCHEDULE, VARIANTS, tiny_network

from lightning_mvar import MVAR, MVARConfig, ScaleSchedule
from lightning_mvar.errors import InputError
from lightning_mvar.models.attention import Attention
from lightning_mvar.models.base import Mixer
from lightning_mvar.models.config import INTRA_SCALE_MIXERS, SIZES, NetworkOptions
from lightning_mvar.models.parameters import lower_precision
from lightning_mvar.scales import Shape

# Published counts in millions, vocabulary 4,096, code dim 32, 1,000 classes, QK-norm on.
PARAMETERS = {
    "mvar": {"d12": 198.4, "d16": 464.2, "d20": 900.5, "d24": 1550.1, "d30": 3017.1, "d32": 3658.7},
    "var": {"d12": 133.2, "d16": 310.3, "d20": 600.9, "d24": 1033.4, "d30": 2010.0},
}
WITHIN_SCALES = [{"mixers": ()}, {"mixers": ("scale_attention",)}, {"mixers": ("window_attention", "scale_mamba")}]


def network_inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 11, (batch,), generator=generator)
    return labels, torch.randn(batch, SCHEDULE.num_tokens - 1, 8, generator=generator)


def stepwise_logits(network: MVAR, labels: torch.Tensor, scale_inputs: torch.Tensor) -> torch.Tensor:
    """Returns the packed logits of one `step` call per scale or token."""
    state, logits = network.init_state(labels), []
    for part in (None, *scale_inputs.split(network.config.step_lengths[1:], dim=1)):
        step_logits, state = network.step(part, state)
        logits.append(step_logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("mixer", "size"), [(m, s) for m, counts in PARAMETERS.items() for s in counts])
def test_sizes_have_the_published_parameter_counts(mixer: str, size: str) -> None:
    with torch.device("meta"):
        network = MVAR(MVARConfig.for_size(size, mixers=MIXERS[mixer]))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == PARAMETERS[mixer][size]


def test_drop_path_follows_the_depth() -> None:
    for name, depth in SIZES.items():
        assert MVARConfig.for_size(name).drop_path == pytest.approx(0.1 * depth / 24)
    rates = [MVARConfig.for_size("d12").drop_path_of(i) for i in range(12)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.05, 12))


@pytest.mark.parametrize("schedule", [SCHEDULE, OBLONG])
@pytest.mark.parametrize("variant", VARIANTS + WITHIN_SCALES, ids=str)
@torch.no_grad()
def test_steps_equal_the_full_pass(variant: dict[str, object], schedule: ScaleSchedule) -> None:
    network, inputs = tiny_network(schedule, **variant), network_inputs()
    full = network(*inputs)
    assert full.dtype == torch.float32
    assert full.abs().max() > 1  # a comparison of zeros would prove nothing
    assert (stepwise_logits(network, *inputs) - full).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS + WITHIN_SCALES, ids=str)
@torch.no_grad()
def test_tokens_of_a_step_change_only_logits_of_later_steps(variant: dict[str, object]) -> None:
    """Changes the inputs of step k + 1 and later, through which the tokens of step k enter."""
    network, (labels, scale_inputs) = tiny_network(**variant), network_inputs()
    before = network(labels, scale_inputs)
    for start in list(accumulate(network.config.step_lengths))[:-1]:
        changed = scale_inputs.clone()
        changed[:, start - 1 :] += 1.0
        after = network(labels, changed)
        assert torch.equal(before[:, :start], after[:, :start])
        assert (before[:, start:] - after[:, start:]).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("variant", VARIANTS + WITHIN_SCALES, ids=str)
@torch.no_grad()
def test_mixers_reach_the_expected_scales(variant: dict[str, object]) -> None:
    """The input of the second scale affects its own scale, the next one, or all later ones."""
    network, (labels, scale_inputs) = tiny_network(**(variant | {"depth": 1})), network_inputs()
    changed = scale_inputs.clone()
    start, end = SCHEDULE.offsets[1], SCHEDULE.offsets[2]
    changed[:, start - 1 : end - 1] += 1.0
    moved = (network(labels, scale_inputs) - network(labels, changed)).abs().amax(dim=(0, 2)) > 0
    reached = {SCHEDULE.scale_ids[i].item() for i in moved.nonzero().flatten()}
    names = set(network.config.mixers_of(0))
    if network.config.prediction == "token" or names - INTRA_SCALE_MIXERS - {"markov_attention"}:
        assert reached == {1, 2, 3}
    else:
        assert reached == ({1, 2} if "markov_attention" in names else {1})


def test_parallel_mixers_read_the_input_of_the_block() -> None:
    """Sequential and parallel blocks agree only if the first mixer's gate is closed."""
    labels, scale_inputs = network_inputs()
    networks = [tiny_network(parallel=parallel, depth=1) for parallel in (False, True)]
    assert not torch.allclose(*(network(labels, scale_inputs) for network in networks), atol=1e-3)
    for network in networks:
        d = network.config.width
        torch.nn.init.zeros_(network.blocks[0].adaln.weight[:d])
        torch.nn.init.zeros_(network.blocks[0].adaln.bias[:d])
    torch.testing.assert_close(*(network(labels, scale_inputs) for network in networks))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_each_parameter_gets_a_gradient(variant: dict[str, object]) -> None:
    network = tiny_network(**variant)
    network(*network_inputs()).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_autocast_stays_close_in_logits_and_gradients(variant: dict[str, object], dtype: torch.dtype) -> None:
    network, inputs = tiny_network(**variant), network_inputs()
    for name, parameter in network.named_parameters():
        if name.endswith("decay_log"):  # over a chunk, the decay would overflow float16
            torch.nn.init.zeros_(parameter)
    logits = network(*inputs)
    gradients = torch.autograd.grad(logits.square().mean(), list(network.parameters()))
    with torch.autocast("cpu", dtype):
        half = network(*inputs)
    half_gradients = torch.autograd.grad(half.square().mean(), list(network.parameters()))
    tolerance = 8 * torch.finfo(dtype).eps
    assert (half - logits).norm() < tolerance * logits.norm()
    for a, e in zip(half_gradients, gradients, strict=True):
        assert a.dtype == torch.float32
        assert (a - e).norm() < 8 * tolerance * e.norm()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_a_half_precision_network_stays_close(variant: dict[str, object]) -> None:
    network, inputs = tiny_network(**variant), network_inputs()
    logits = network(*inputs)
    lowered = lower_precision(network, torch.bfloat16)(*inputs)
    assert 0 < (lowered - logits).norm() < 8 * torch.finfo(torch.bfloat16).eps * logits.norm()


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1", "gated_linear_attention", "linear_attention"])
@pytest.mark.parametrize("schedule", [SCHEDULE, OBLONG])
@torch.no_grad()
def test_scan_orders_equal_a_raster_scan_of_reordered_tokens(mixer: str, schedule: ScaleSchedule) -> None:
    """Column order equals transposing each scale; `both` averages forward and backward scans."""

    def make_mixer(order: str) -> Mixer:
        return tiny_network(schedule, mixers=(mixer,), scan_order=order, depth=1).blocks[0].mixers[0]

    def transform_maps(
        x: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor], shapes: tuple[Shape, ...]
    ) -> torch.Tensor:
        maps = zip(x.split(schedule.lengths, dim=1), shapes, strict=True)
        return torch.cat([transform(part.unflatten(1, shape)).flatten(1, 2) for part, shape in maps], dim=1)

    lying = tuple((width, height) for height, width in schedule.shapes)
    x = torch.randn(2, schedule.num_tokens, 64, generator=torch.Generator().manual_seed(0))
    raster = make_mixer("raster")
    rows, _ = raster(x, schedule.shapes)
    transposed, _ = raster(transform_maps(x, lambda t: t.transpose(1, 2), schedule.shapes), lying)
    columns, _ = make_mixer("column")(x, schedule.shapes)
    assert not torch.allclose(columns, rows)
    torch.testing.assert_close(columns, transform_maps(transposed, lambda t: t.transpose(1, 2), lying))
    backwards, _ = raster(transform_maps(x, lambda t: t.flip(1, 2), schedule.shapes), schedule.shapes)
    both, _ = make_mixer("both")(x, schedule.shapes)
    torch.testing.assert_close(both, (rows + transform_maps(backwards, lambda t: t.flip(1, 2), schedule.shapes)) / 2)


def test_orders_and_mixers_alternate_over_blocks() -> None:
    network = tiny_network(mixers=(("scale_attention", "mamba2"), ("mamba1",)), scan_order="alternating", depth=4)
    kinds = [[type(mixer).__name__ for mixer in block.mixers] for block in network.blocks]
    assert kinds == [["ScaleAttention", "Mamba2"], ["Mamba1"]] * 2
    assert [block.mixers[-1].orders for block in network.blocks] == [("raster",), ("column",)] * 2
    assert network.config.mixer_summary == "scale_attention, mamba2 / mamba1"
    sparse = tiny_network(mixers=(("mamba2",), ("scale_attention",)), scan_order="alternating", depth=6)
    orders = [block.mixers[0].orders for block in sparse.blocks[::2]]
    assert orders == [("raster",), ("column",), ("raster",)]
    assert (network.config.mixer_period, sparse.config.mixer_period) == (2, 4)


def test_attention_supports_any_width() -> None:
    assert tiny_network(mixers=("scale_attention",), width=48, head_dim=64)(*network_inputs()).shape == (3, 30, 48)


@torch.no_grad()
def test_scale_mamba_sees_its_complete_scale() -> None:
    mixer = tiny_network(mixers=("scale_mamba",), depth=1).blocks[0].mixers[0]
    x = torch.randn(1, SCHEDULE.num_tokens, 64, generator=torch.Generator().manual_seed(0))
    start, end = SCHEDULE.offsets[2], SCHEDULE.offsets[3]
    for token in (start, end - 1):
        changed = x.clone()
        changed[:, token] += 1.0
        moved = (mixer(x, SCHEDULE.shapes)[0] - mixer(changed, SCHEDULE.shapes)[0]).abs().sum(dim=(0, 2)) > 0
        assert moved.nonzero().flatten().tolist() == list(range(start, end))


def test_the_class_affects_each_token(network: MVAR) -> None:
    labels, scale_inputs = network_inputs()
    with torch.no_grad():
        difference = network(labels, scale_inputs) - network((labels + 1) % 11, scale_inputs)
    assert difference.abs().amax(dim=2).min() > 0


@pytest.mark.parametrize("images", [1, 2, 3])
def test_scoring_matches_full_logits_without_saving_them(
    network: MVAR, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    labels, scale_inputs = network_inputs()
    b, l, v = 3, SCHEDULE.num_tokens, network.config.vocab_size
    tokens = torch.arange(b * l).view(b, l) % v
    logits = network(labels, scale_inputs)
    tokens[:, ::3] = logits.argmax(-1)[:, ::3]
    expected = torch.stack([-logits[i].log_softmax(-1)[range(l), tokens[i]] for i in range(b)])
    weights = torch.linspace(-1, 1, b * l).view(b, l)
    gradients = torch.autograd.grad((expected * weights).sum(), list(network.parameters()))

    monkeypatch.setattr("lightning_mvar.models.scoring.LOGITS_AT_ONCE", images * l * v)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        losses, correct = network.score(labels, scale_inputs, tokens)
    assert not any(shape[-1:] == (v,) and len(shape) > 1 for shape in saved)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(correct, (logits.argmax(-1) == tokens).float())
    assert 0 < correct.mean() < 1
    score_gradients = torch.autograd.grad((losses * weights).sum(), list(network.parameters()))
    for a, e in zip(score_gradients, gradients, strict=True):
        torch.testing.assert_close(a, e)


def test_initial_weights_have_the_specified_std() -> None:
    torch.manual_seed(0)
    config = MVARConfig(ScaleSchedule((1, 2, 3)), 4, 256, 4, 512, 32, 100, adaln_gate_init=1e-3)
    network = MVAR(config)
    std, output = math.sqrt(1 / (3 * 256)), 1 / math.sqrt(8)
    block = network.blocks[1]
    attention, mamba = block.mixers
    expected = [
        (network.class_embed.weight, std),
        (network.pos_embed, std),
        (network.head.weight, 0.02 * std),
        (network.head_adaln.weight, 0.5 * std),
        (block.adaln.weight[:512], 1e-3 * std),
        (block.adaln.weight[512:], 0.5 * std),
        (attention.qkv.weight, std),
        (attention.proj.weight, std * output),
        (block.mlp[0].weight, std),
        (block.mlp[2].weight, std * output),
        (mamba.in_proj.weight, std),
        (mamba.out_proj.weight, std),
        (mamba.conv1d.weight, 0.02),
    ]
    for weight, expected_std in expected:
        assert float(weight.detach().std()) == pytest.approx(expected_std, rel=0.05)
    for bias in (network.head.bias, block.adaln.bias, attention.q_bias, attention.proj.bias, mamba.conv1d.bias):
        assert not bias.any()
    assert attention.qk_scale_log.tolist() == pytest.approx([math.log(4)] * 4)
    decay, dt = mamba.A_log.exp(), torch.nn.functional.softplus(mamba.dt_bias)
    assert 1 <= decay.min() < decay.max() <= 16
    assert dt.min() * 1.001 >= 1e-3
    assert dt.max() <= 0.1001
    assert (mamba.D == 1).all()


def test_initial_weights_of_a_shared_adaln() -> None:
    torch.manual_seed(0)
    config = {"mixers": ("block_causal_attention",), "shared_adaln": True, "adaln_gate_init": 1e-3}
    network = MVAR(MVARConfig(ScaleSchedule((1, 2, 3)), 4, 256, 4, 512, 32, 100, **config))
    table = torch.cat([block.adaln_table for block in network.blocks]).detach()  # (depth, 1, 6, d)
    assert float(table[:, :, :2].std()) == pytest.approx(1e-3 / 16, rel=0.05)
    assert float(table[:, :, 2:].std()) == pytest.approx(0.5 / 16, rel=0.05)
    assert float(network.shared_adaln.weight.detach().std()) == pytest.approx(math.sqrt(1 / (3 * 256)), rel=0.05)
    assert not network.shared_adaln.bias.any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_init_weights_reaches_each_parameter_of_a_meta_network(variant: dict[str, object]) -> None:
    """`to_empty` leaves garbage, so init_weights must reach each parameter."""
    with torch.device("meta"):
        network = MVAR(MVARConfig(SCHEDULE, 2, 64, 2, 48, 8, 10, **variant))
    network.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(torch.nan)
    network.init_weights()
    assert [name for name, p in network.named_parameters() if not p.isfinite().all()] == []


def test_the_qk_norm_scale_is_capped_at_100() -> None:
    attention = tiny_network().blocks[0].mixers[0]
    assert isinstance(attention, Attention)
    x = torch.randn(1, 30, 64)
    outputs = []
    for value in (math.log(100.0), 50.0):
        torch.nn.init.constant_(attention.qk_scale_log, value)
        outputs.append(attention(x, SCHEDULE.shapes)[0])
    torch.testing.assert_close(*outputs)


def test_drop_path_keeps_the_mean_and_drops_complete_branches() -> None:
    network = tiny_network(drop_path=0.25).train()
    assert network.eval().draw_drop_path(torch.zeros(2)) == [None, None]
    first, last = network.train().draw_drop_path(torch.zeros(4000))
    assert first is not None
    assert last is not None
    assert (first == 1).all()
    assert last.shape == (4000, 1, 3, 1)
    assert torch.equal(last.unique(), torch.tensor([0, 1 / 0.75]))
    torch.testing.assert_close(last.mean(0).flatten(), torch.ones(3), atol=0.05, rtol=0)
    block, x, cond = network.blocks[1], torch.randn(2, 30, 64), torch.randn(2, 64)
    drops_all = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 3, 1)
    dropped, _ = block(x, cond, SCHEDULE.shapes, drop_path=drops_all)
    kept, _ = block(x, cond, SCHEDULE.shapes)
    assert torch.equal(dropped[0], x[0])
    assert torch.equal(dropped[1], kept[1])


def test_drop_path_rises_linearly_over_the_blocks() -> None:
    """Published rates: 0 in the first block, 0.1 D / 24 in the last."""
    config = MVARConfig.for_size("d24")
    assert [config.drop_path_of(i) for i in range(24)] == pytest.approx([0.1 * i / 23 for i in range(24)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 3}, "not a multiple of network.heads"),
        ({"mixers": ("attention",)}, "unknown mixer 'attention'; choose from scale_attention"),
        ({"mixers": (("mamba2",), ("mamba3",))}, "unknown mixer 'mamba3'; choose from scale_attention"),
        ({"depth": 1, "mixers": (("mamba2",), ("mamba3",))}, "unknown mixer 'mamba3'; choose from scale_attention"),
        ({"mixers": "mamba2"}, "must be a list of names or a list of such lists, got 'mamba2'"),
        ({"mixers": ("mamba2", ("mamba1",))}, "must be a list of names or a list of such lists"),
        (
            {"mixers": ("scale_attention",), "scan_order": "both"},
            "scan_order both needs one of gated_linear_attention, .* in network.mixers",
        ),
        (
            {"mixers": (("mamba2",), ()), "shared_adaln": True},
            "shared_adaln needs the same number of mixers in each block",
        ),
        ({"prediction": "token"}, "scale_attention needs complete scales"),
        ({"prediction": "token", "mixers": ("mamba2",), "scan_order": "both"}, "scan_order both needs complete scales"),
        ({"prediction": "image"}, "network.prediction must be one of scale, token, got 'image'"),
        ({"scan_order": "spiral"}, "network.scan_order must be one of raster, column, .* got 'spiral'"),
        ({"window": 4}, "odd and positive, got 4"),
        ({"width": 48, "head_dim": 64}, "head_dim 64"),
        ({"depth": 0}, "network.depth must be in"),
    ],
)
def test_invalid_configurations_are_rejected(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_network(**overrides)


def test_network_options_are_the_fields_of_the_config_all_unset() -> None:
    options, config = fields(NetworkOptions), fields(MVARConfig)
    assert [option.name for option in options] == [field.name for field in config]
    for option, field in zip(options, config, strict=True):
        assert option.default is None, option.name
        assert option.type == f"{field.type} | None"
    assert NetworkOptions().complete() == MVARConfig()


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(InputError, match="there is no size d13; choose from d12, d16, d20"):
        MVARConfig.for_size("d13")


def test_kernels_are_looked_for_when_a_network_comes_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for them initializes CUDA, which may be full or belong to others while this one runs on a CPU."""
    found: list[str] = []
    monkeypatch.setattr("lightning_mvar.models.mvar.look_for_kernels", lambda: found.append("kernels"))
    network = tiny_network().to(torch.bfloat16)
    assert found == []
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    network.to(torch.float32)
    assert found == ["kernels"]
    tiny_network()
    assert found[1:]
