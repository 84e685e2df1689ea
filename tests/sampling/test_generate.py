from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import MIXERS, OBLONG, SCHEDULE, random_tokens, tiny_network
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mvar import MVAR, ScaleSchedule, Tokenizer, TokenizerConfig, generate
from lightning_mvar.bench.launches import count_launches
from lightning_mvar.bench.parts import PartTracker
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.costs import state_bytes
from lightning_mvar.models.parameters import lower_precision
from lightning_mvar.sampling.generate import draw_images, kept_tokens_mask, max_batch_size, teacher_inputs
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import BatchInputs, KnownTokens, ScaleDrawer, draw, gumbel_mixture, truncate
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer

LABELS = torch.tensor([0, 3, 9, 3])
KINDS = {name: {"mixers": mixers} for name, mixers in MIXERS.items()} | {
    "token": {"mixers": ("block_causal_attention",), "prediction": "token"}
}


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> MVAR:
    return tiny_network(**KINDS[request.param])


def test_the_samplers_inputs_equal_the_teacher_forcing_inputs(
    network: MVAR, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = []
    step = type(network).step
    monkeypatch.setattr(type(network), "step", lambda *args: (inputs.append(args[1]), step(*args))[1])
    _, tokens = generate(network, tokenizer, LABELS, guidance=0.0, return_tokens=True)
    assert inputs[0] is None
    torch.testing.assert_close(torch.cat(inputs[1:], dim=1), teacher_inputs(network.config, tokenizer, tokens))


def test_the_input_of_a_token_is_the_code_of_the_previous_token(tokenizer: Tokenizer) -> None:
    tokens, network = random_tokens(2), tiny_network(**KINDS["token"])
    inputs = teacher_inputs(network.config, tokenizer, tokens)
    assert inputs.shape == (2, SCHEDULE.num_tokens - 1, 8)
    for i in range(SCHEDULE.num_tokens - 1):
        assert torch.equal(inputs[1, i], tokenizer.quantizer.codebook.weight[tokens[1, i]])


def test_greedy_tokens_are_the_argmax_of_the_full_pass(network: MVAR, tokenizer: Tokenizer) -> None:
    _, tokens = generate(network, tokenizer, LABELS, guidance=0.0, top_k=1, return_tokens=True)
    logits = network(LABELS, teacher_inputs(network.config, tokenizer, tokens))
    assert torch.equal(logits.argmax(dim=-1), tokens)


def test_guided_greedy_tokens_follow_the_guided_logits_of_the_full_pass(network: MVAR, tokenizer: Tokenizer) -> None:
    _, tokens = generate(network, tokenizer, LABELS, guidance=2.0, top_k=1, return_tokens=True)
    inputs = teacher_inputs(network.config, tokenizer, tokens)
    conditional, unconditional = network(LABELS, inputs), network(torch.full_like(LABELS, 10), inputs)
    by_token = network.config.prediction == "token"
    ratio = 1.0 if by_token else SCHEDULE.scale_ids[None, :, None] / (SCHEDULE.num_scales - 1)
    logits = (1 + 2.0 * ratio) * conditional - 2.0 * ratio * unconditional
    assert torch.equal(logits.argmax(dim=-1), tokens)


def test_images_are_the_decoded_tokens_in_the_unit_range(network: MVAR, tokenizer: Tokenizer) -> None:
    images, tokens = generate(network, tokenizer, LABELS, return_tokens=True)
    torch.testing.assert_close(images, (tokenizer.decode(tokens) + 1) / 2)


def test_an_image_does_not_depend_on_its_batch(network: MVAR, tokenizer: Tokenizer) -> None:
    batch = generate(network, tokenizer, LABELS, generator=image_keys(5, range(4)))
    for i in range(4):
        single = generate(network, tokenizer, LABELS[i : i + 1], generator=image_keys(5, [i]))
        torch.testing.assert_close(single[0], batch[i])
    other_seed = generate(network, tokenizer, LABELS, generator=image_keys(6, range(4)))
    assert (other_seed - batch).abs().max() > 0.01


def test_one_generator_serves_all_images_or_each_its_own(tokenizer: Tokenizer) -> None:
    network = tiny_network()

    def draw_tokens(generator: object) -> torch.Tensor:
        return generate(network, tokenizer, LABELS, generator=generator, return_tokens=True)[1]

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    shared = seeded(1)
    first, second = draw_tokens(shared), draw_tokens(shared)
    assert torch.equal(draw_tokens(seeded(1)), first)
    assert not torch.equal(second, first)
    own = draw_tokens([seeded(seed) for seed in range(4)])
    assert torch.equal(draw_tokens([seeded(seed) for seed in (0, 5, 2, 6)])[[0, 2]], own[[0, 2]])
    torch.manual_seed(1)
    assert torch.equal(draw_tokens(None), first)


class OnlyMeta(TorchDispatchMode):
    """Refuses operations that read a tensor of another device than meta, or move one there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        outputs = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, outputs)):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_meta, function
        return outputs


@pytest.mark.parametrize("options", [{"smooth": False}, {"smooth": True}], ids=str)
def test_drawing_neither_waits_for_the_device_nor_copies_to_it(options: dict[str, object]) -> None:
    """On the meta device no value can be read."""
    schedule = ScaleSchedule((1, 2))
    network = tiny_network(schedule=schedule, depth=1).to("meta")
    quantizer = ResidualQuantizer(schedule, 48, 8, 1).to("meta")
    tokens = torch.zeros(4, schedule.num_tokens, dtype=torch.int64, device="meta")
    batch = BatchInputs(tokens[:, 0], tokens[:, :2], KnownTokens(tokens, tokens > 0))
    with OnlyMeta():
        steps = [*ScaleDrawer(network, quantizer, SamplingSettings(**options)).steps(batch)]
    assert [step.tokens.shape for step in steps] == [(4, 1), (4, 4)]


def test_an_autocast_applies_to_the_network_alone(tokenizer: Tokenizer) -> None:
    network, keys = tiny_network(), image_keys(0, range(4))
    plain = generate(network, tokenizer, LABELS, generator=keys, return_tokens=True)[1]
    with torch.autocast("cpu", torch.bfloat16):
        images, tokens = generate(network, tokenizer, LABELS, generator=keys, return_tokens=True)
    assert not torch.equal(tokens, plain)
    assert torch.equal(images, (tokenizer.decode(tokens) + 1) / 2)


def test_the_states_of_a_batch_beside_a_training_run_are_bounded() -> None:
    d16, d36s = (
        MVARConfig.for_size(size, schedule=ScaleSchedule.for_resolution(side), mixers=("block_causal_attention",))
        for size, side in (("d16", 256), ("d36", 512))
    )
    assert (max_batch_size(d16), max_batch_size(d36s)) == (48, 2)
    assert 2 * 48 * state_bytes(replace(d16, depth=1), torch.float32) * 16 <= 2**33


def test_smooth_sampling_mixes_codes(network: MVAR, tokenizer: Tokenizer) -> None:
    keys = image_keys(0, range(4))
    smooth, plain = (generate(network, tokenizer, LABELS, smooth=smooth, generator=keys) for smooth in (True, False))
    assert smooth.shape == (4, 3, 8, 8)
    assert (smooth - plain).abs().max() > 0.01
    drawer = ScaleDrawer(network, tokenizer.quantizer, SamplingSettings(smooth=True))
    _, codes = drawer.choose(torch.zeros(4, 1, 48), 0, slice(0, 1), BatchInputs(LABELS, keys, None), torch.zeros(4, 1))
    assert torch.cdist(codes[:, 0], tokenizer.quantizer.codebook.weight).amin(dim=1).max() > 0.01


@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.3, 0.96, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 7, 20])
def test_top_k_and_top_p_keep_what_var_keeps(top_k: int, top_p: float) -> None:
    """The masking of VAR's `sample_with_top_k_top_p_`, where 0 turns either off."""
    logits = torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(0)) * 2
    theirs = logits.clone()
    if top_k > 0:
        theirs[theirs < theirs.topk(top_k, dim=-1).values.amin(dim=-1, keepdim=True)] = -torch.inf
    if top_p > 0:
        ascending, order = theirs.sort(dim=-1)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        removed[..., -1] = False
        theirs.masked_fill_(removed.scatter(-1, order, removed), -torch.inf)
    kept, tokens = truncate(logits, top_k, top_p)
    ours = torch.zeros_like(logits).scatter(-1, tokens, kept)
    torch.testing.assert_close(ours / ours.sum(dim=-1, keepdim=True), theirs.softmax(dim=-1))
    for beyond in (21, 2**63):
        assert torch.equal(truncate(logits, beyond, top_p)[0], truncate(logits, 0, top_p)[0])


def test_draws_have_the_truncated_distribution() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5]).expand(1, 40_000, 5)
    uniforms = torch.rand(1, 40_000, generator=torch.Generator().manual_seed(0))
    counts = (
        torch.bincount(draw(logits, uniforms, SamplingSettings(top_k=3, top_p=1.0)).flatten(), minlength=5) / 40_000
    )
    expected = torch.tensor([2.0, -torch.inf, 1.0, -torch.inf, 1.5]).softmax(dim=0)
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_uniforms_draw_a_token_within_top_k_and_top_p(uniform: float) -> None:
    logits = torch.randn(1, 50, 30, generator=torch.Generator().manual_seed(0)) * 3
    tokens = draw(logits, torch.full((1, 50), uniform), SamplingSettings(top_k=20, top_p=0.7))
    kept, order = truncate(logits, 20, 0.7)
    dense = torch.zeros_like(logits).scatter(-1, order, kept)
    assert (dense.gather(-1, tokens[..., None]) > 0).all()


def test_the_gumbel_mixture_sharpens_with_the_scale() -> None:
    logits, uniforms = torch.randn(2, 6, 12), torch.rand(2, 6, 12)
    coarse, fine = (
        gumbel_mixture(logits, uniforms, ratio, SamplingSettings(top_k=5, top_p=1.0)) for ratio in (0.0, 1.0)
    )
    for weights in (coarse, fine):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 6))
        assert ((weights > 0).sum(dim=-1) <= 5).all()
    assert fine.amax(dim=-1).mean() > coarse.amax(dim=-1).mean()


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([11], {}, r"classes in \[0, 10\]"),
        ([], {}, "classes in"),
        ([1], {"guidance": -1.0}, "guidance"),
        ([1], {"top_p": 1.5}, "top_p must be a number from 0 to 1, got 1.5"),
        ([1], {"generator": [torch.Generator()] * 2}, "2 generators for 1 labels"),
        ([1], {"generator": image_keys(0, range(2))}, r"keys of 1 images must be \(1, 2\) int64, got \(2, 2\)"),
    ],
)
def test_invalid_arguments_are_refused(
    tokenizer: Tokenizer, labels: list[int], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate(tiny_network(), tokenizer, torch.tensor(labels, dtype=torch.int64), **settings)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_may_be_integers_of_any_type(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    network = tiny_network(num_classes=300)
    expected = generate(network, tokenizer, LABELS, generator=image_keys(0, range(4)))
    labels = LABELS.to(dtype)
    assert torch.equal(generate(network, tokenizer, labels, generator=image_keys(0, range(4))), expected)
    for wrong in (LABELS.float(), LABELS.bool(), LABELS.to(torch.complex64), LABELS[None]):
        with pytest.raises(InputError, match=r"labels must be \(b,\) integers, classes in"):
            generate(network, tokenizer, wrong)


def test_a_tokenizer_of_another_schedule_is_refused() -> None:
    other = Tokenizer(TokenizerConfig(ScaleSchedule((1, 4)), 48, 8, 8, (1, 2), 1))
    with pytest.raises(InputError, match="does not fit the network: schedule"):
        generate(tiny_network(), other, LABELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_lower_precision_keeps_decays_and_codes_exact_and_the_rest_close(
    network: MVAR, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    network, tokenizer = deepcopy(network), deepcopy(tokenizer)  # shared with other tests
    tokens = torch.arange(4 * SCHEDULE.num_tokens).view(4, -1) % 48
    inputs, decoded = teacher_inputs(network.config, tokenizer, tokens), tokenizer.decode(tokens)
    logits = network(LABELS, inputs)
    float32_names = ("A_log", "dt_bias", "log", "head.weight", "head.bias", "head_adaln.weight", "head_adaln.bias")
    exact = {name: p.clone() for name, p in network.named_parameters() if name.endswith(float32_names)}
    lower_precision(network, dtype)
    tokenizer.lower(dtype)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, exact[name]) if name in exact else parameter.dtype == dtype
    assert torch.equal(teacher_inputs(network.config, tokenizer, tokens), inputs)
    tolerance = 4 * torch.finfo(dtype).eps
    assert (network(LABELS, inputs) - logits).norm() < tolerance * logits.norm()
    assert 0 < (tokenizer.decode(tokens) - decoded).norm() < 0.03 * decoded.norm()
    images, drawn = generate(network, tokenizer, LABELS, return_tokens=True)
    assert images.dtype == torch.float32
    assert torch.equal(images, tokenizer.decode(drawn) / 2 + 0.5)


@pytest.mark.parametrize("smooth", [False, True])
def test_keeping_nothing_is_sampling_and_keeping_everything_is_reconstruction(
    network: MVAR, tokenizer: Tokenizer, smooth: bool
) -> None:
    given = random_tokens(4, seed=3)

    def sample(keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        known = None if keep is None else KnownTokens(given, keep)
        generators = image_keys(0, range(4))
        return generate(
            network, tokenizer, LABELS, generator=generators, known=known, smooth=smooth, return_tokens=True
        )

    nothing = torch.zeros_like(given, dtype=torch.bool)
    for actual, expected in zip(sample(nothing), sample(None), strict=True):
        assert torch.equal(actual, expected)
    images, tokens = sample(~nothing)
    assert torch.equal(tokens, given)
    torch.testing.assert_close(images, (tokenizer.decode(given) + 1) / 2)


def test_drawn_tokens_are_conditioned_on_kept_tokens(network: MVAR, tokenizer: Tokenizer) -> None:
    """Greedily drawn tokens are the argmax of a full pass over drawn and kept tokens."""
    given, keep = random_tokens(4, seed=3), torch.rand(4, SCHEDULE.num_tokens) < 0.5
    _, tokens = generate(
        network, tokenizer, LABELS, guidance=0.0, top_k=1, known=KnownTokens(given, keep), return_tokens=True
    )
    assert torch.equal(tokens[keep], given[keep])
    argmax = network(LABELS, teacher_inputs(network.config, tokenizer, tokens)).argmax(dim=-1)
    assert torch.equal(tokens[~keep], argmax[~keep])


def test_a_batch_does_not_wait_for_known_tokens(network: MVAR, tokenizer: Tokenizer) -> None:
    given, keys, waits = random_tokens(4), image_keys(0, range(4)), []
    for known in (None, KnownTokens(given, given > 30)):
        with count_launches(torch.device("cpu"), PartTracker()) as counter:
            draw_images(network, tokenizer, LABELS, SamplingSettings(), keys, known)
        waits.append(sum(counts.waits for counts in counter.by_part.values()))
    assert waits[0] == waits[1]


def test_known_tokens_that_do_not_fit_are_refused(tokenizer: Tokenizer) -> None:
    given = random_tokens(4)
    keep = torch.zeros_like(given, dtype=torch.bool)
    for known, message in (
        (KnownTokens(given, keep[:1]), r"must both be \(4, 30\), got \(4, 30\) and \(1, 30\)"),
        (KnownTokens(given, keep.float()), "must be int64, and their keep mask bool, got torch.int64 and torch.float"),
        (KnownTokens(given.int(), keep), "must be int64, and their keep mask bool, got torch.int32 and torch.bool"),
        (KnownTokens(torch.where(given == given.max(), 48, 3), keep), r"must be in \[0, 47\], .* got 3 to 48"),
        (KnownTokens(torch.where(given == given.max(), -1, 3), keep), r"must be in \[0, 47\], .* got -1 to 3"),
    ):
        with pytest.raises(InputError, match=message):
            generate(tiny_network(), tokenizer, LABELS, known=known)


def test_a_token_is_kept_if_more_than_half_of_its_cell_is() -> None:
    left = torch.zeros(12, 12, dtype=torch.bool)
    left[:, :6] = True
    parts = kept_tokens_mask(SCHEDULE, left).split(SCHEDULE.lengths)
    assert [
        part.view(side, side).int().sum(dim=0).tolist() for part, side in zip(parts, (1, 2, 3, 4), strict=True)
    ] == [
        [1],  # the token of a 1 x 1 scale is kept if any pixel is
        [2, 0],
        [3, 0, 0],  # the middle column of three is half kept
        [4, 4, 0, 0],
    ]
    oblong = kept_tokens_mask(OBLONG, left[:6]).split(OBLONG.lengths)
    assert [part.int().tolist() for part in oblong] == [[1], [1, 0], [1, 0, 0] * 3, [1, 1, 1, 0, 0, 0] * 3]
    assert not kept_tokens_mask(SCHEDULE, torch.zeros(12, 12, dtype=torch.bool)).any()
    assert kept_tokens_mask(SCHEDULE, torch.ones(12, 12, dtype=torch.bool)).all()


@pytest.mark.parametrize("inpainting", [True, False])
@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_a_centered_box_keeps_the_tokens_that_var_keeps(resolution: int, inpainting: bool) -> None:
    """VAR's get_edit_mask and replace_embedding (demo_zero_shot_edit.ipynb) for the box from 1/4 to 3/4 of the side.

    At sides 6, 10 and 18 the edges of the box halve cells.
    """
    schedule = ScaleSchedule.for_resolution(resolution)
    last = schedule.side_lengths[-1]
    box = torch.zeros(last, last)
    box[last // 4 : last * 3 // 4, last // 4 : last * 3 // 4] = 1
    kept_cells = 1 - box if inpainting else box
    pixels = kept_cells.bool().repeat_interleave(16, 0).repeat_interleave(16, 1)
    parts = kept_tokens_mask(schedule, pixels).split(schedule.lengths)
    for side, kept in zip(schedule.side_lengths, parts, strict=True):
        cells = F.interpolate(kept_cells[None, None], size=(side, side), mode="bilinear", align_corners=False) > 0.5
        assert torch.equal(kept.view(side, side), cells[0, 0] if side > 1 else torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.cuda
def test_sampling_on_a_gpu_waits_for_nothing(network: MVAR, tokenizer: Tokenizer) -> None:
    """Neither the host's labels and random keys nor any scale make it wait; reading the images is up to the caller."""
    network, tokenizer = network.cuda(), deepcopy(tokenizer).cuda()
    generate(network, tokenizer, LABELS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        generate(network, tokenizer, LABELS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
