"""Guidance, compared with plain loops over full passes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MIXERS, SCHEDULE, VARIANTS, tiny_network
from torch import Tensor

from lightning_mvar import MVAR, Tokenizer, generate
from lightning_mvar.checkpoints import TrainedModel, save_folder
from lightning_mvar.errors import InputError
from lightning_mvar.sampling.generate import teacher_inputs
from lightning_mvar.sampling.guidance import Guidance, load_guide, sharpen
from lightning_mvar.sampling.philox import CORRUPTION, TOKENS, image_keys, uniform
from lightning_mvar.sampling.sampler import Sampler
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import draw

LABELS = torch.tensor([0, 3, 9, 3])
UNCONDITIONAL = torch.full_like(LABELS, 10)
KEYS = image_keys(5, range(4))
LAST = SCHEDULE.num_scales - 1
KINDS = {name: {"mixers": mixers} for name, mixers in MIXERS.items()} | {
    "token": {"mixers": ("block_causal_attention",), "prediction": "token"}
}
Logits = Callable[[Tensor], Tensor]  # of all positions (b, l, v), given the tokens so far (b, l)


def plain_tokens(network: MVAR, logits: Logits) -> Tensor:
    """Draws tokens (b, l) step by step, each from the logits of a full pass over all tokens before it."""
    uniforms = uniform(KEYS, 0, SCHEDULE.num_tokens, TOKENS)
    tokens = torch.zeros(len(LABELS), SCHEDULE.num_tokens, dtype=torch.int64)
    begin = 0
    for n in network.config.step_lengths:
        span = slice(begin, begin + n)
        tokens[:, span] = draw(logits(tokens)[:, span], uniforms[:, span], SamplingSettings())
        begin += n
    return tokens


def drawn_tokens(network: MVAR, tokenizer: Tokenizer, labels: Tensor = LABELS, **settings: Any) -> Tensor:
    return generate(network, tokenizer, labels, generator=KEYS, return_tokens=True, **settings)[1]


def tokens_of(sampler: Sampler, settings: SamplingSettings) -> Tensor:
    return torch.cat([step.tokens for step in sampler.steps(LABELS, settings, range(4))], dim=1)


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> MVAR:
    return tiny_network(**KINDS[request.param])


def test_the_guide_runs_up_to_the_last_scale_that_it_guides() -> None:
    config = tiny_network().config
    for strength, off_from, expected in (
        (1.5, None, 4),
        (1.5, 2, 2),
        (1.5, 1, 0),  # a number begins with 0
        (1.5, 0, 0),
        ((0.0, 2.0, 0.0, 1.0), 3, 2),
        ((0.0, 2.0, 0.0, 1.0), None, 4),
    ):
        assert Guidance(strength, off_from).num_guided_scales(config) == expected


def strengths_of(guidance: float, network: MVAR) -> Tensor:
    """Returns the strengths (l, 1) of a number: as in VAR's code for scales, constant for single tokens."""
    growing = guidance * SCHEDULE.scale_ids[:, None] / LAST
    return torch.full_like(growing, guidance) if network.config.prediction == "token" else growing


@torch.no_grad()
def test_a_number_guides_as_in_a_plain_loop(network: MVAR, tokenizer: Tokenizer) -> None:
    strengths = strengths_of(1.5, network)

    def logits(tokens: Tensor) -> Tensor:
        inputs = teacher_inputs(network.config, tokenizer, tokens)
        return (1 + strengths) * network(LABELS, inputs) - strengths * network(UNCONDITIONAL, inputs)

    assert torch.equal(drawn_tokens(network, tokenizer, guidance=1.5), plain_tokens(network, logits))


@torch.no_grad()
def test_a_list_guides_each_scale_by_its_number(network: MVAR, tokenizer: Tokenizer) -> None:
    strengths = torch.tensor([1.0, 0.0, 2.0, 0.5])[SCHEDULE.scale_ids, None]

    def logits(tokens: Tensor) -> Tensor:
        inputs = teacher_inputs(network.config, tokenizer, tokens)
        return (1 + strengths) * network(LABELS, inputs) - strengths * network(UNCONDITIONAL, inputs)

    expected = plain_tokens(network, logits)
    assert torch.equal(drawn_tokens(network, tokenizer, guidance=[1, 0, 2, 0.5]), expected)
    assert not torch.equal(drawn_tokens(network, tokenizer, guidance=1.5), expected)


def test_a_list_equal_to_the_strengths_of_a_number_draws_the_same(network: MVAR, tokenizer: Tokenizer) -> None:
    strengths = Guidance(1.5).strengths(network.config)
    expected = generate(network, tokenizer, LABELS, guidance=1.5, generator=KEYS)
    for other in ({"guidance": strengths}, {"guidance": 1.5, "guidance_off_from": SCHEDULE.num_scales}):
        assert torch.equal(generate(network, tokenizer, LABELS, generator=KEYS, **other), expected)


@torch.no_grad()
@pytest.mark.parametrize("corrupt", [0.0, 0.5])
def test_the_guide_is_off_from_a_scale_on(corrupt: float, network: MVAR, tokenizer: Tokenizer) -> None:
    for off_from in range(SCHEDULE.num_scales + 1):
        guided = drawn_tokens(network, tokenizer, guidance_off_from=off_from, guidance_corrupt=corrupt)
        by_strength = [s * (k < off_from) for k, s in enumerate(Guidance(1.5).strengths(network.config))]
        assert torch.equal(guided, drawn_tokens(network, tokenizer, guidance=by_strength, guidance_corrupt=corrupt))
        if off_from == 0:
            assert torch.equal(guided, drawn_tokens(network, tokenizer, guidance=0))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_mixer_goes_on_without_its_guide(variant: dict[str, Any], tokenizer: Tokenizer) -> None:
    """The state of the images alone then continues: as strengths of 0 would, which run the guide to the end."""
    network, strengths = tiny_network(**variant), [0.0, 2.0, 0.0, 0.0]
    dropped = drawn_tokens(network, tokenizer, guidance=strengths)
    assert Guidance(tuple(strengths)).num_guided_scales(network.config) == 2
    assert torch.equal(dropped, drawn_tokens(network, tokenizer, guidance=[0.0, 2.0, 0.0, 1e-30]))


@pytest.mark.parametrize("off_from", range(SCHEDULE.num_scales + 1))
def test_tokens_that_pass_through_the_network(off_from: int, network: MVAR, tokenizer: Tokenizer) -> None:
    passed = []
    handle = network.blocks[0].register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0].shape[:2].numel()))
    drawn_tokens(network, tokenizer, guidance_off_from=off_from)
    handle.remove()
    guided = off_from if strengths_of(1.5, network)[: sum(SCHEDULE.lengths[:off_from])].any() else 0
    assert sum(passed) == len(LABELS) * (SCHEDULE.num_tokens + sum(SCHEDULE.lengths[:guided]))


@torch.no_grad()
def test_a_weaker_network_guides_with_a_state_of_its_own(network: MVAR, tokenizer: Tokenizer, tmp_path: Path) -> None:
    weaker = tiny_network(prediction=network.config.prediction, mixers=MIXERS["var"], depth=1)
    save_folder(tmp_path, tokenizer, weaker)
    strengths = strengths_of(1.5, network)

    def logits(tokens: Tensor) -> Tensor:
        inputs = teacher_inputs(network.config, tokenizer, tokens)
        return (1 + strengths) * network(LABELS, inputs) - strengths * weaker(LABELS, inputs)

    expected = plain_tokens(network, logits)
    assert torch.equal(drawn_tokens(network, tokenizer, guidance_network=str(tmp_path)), expected)
    sampler = Sampler(TrainedModel(network, tokenizer, []), torch.device("cpu"))
    settings = SamplingSettings(guidance_network=str(tmp_path), seed=5)
    assert torch.equal(tokens_of(sampler, settings), expected)
    guide = sampler.guide(settings)
    save_folder(tmp_path, tokenizer, tiny_network(prediction=network.config.prediction, mixers=MIXERS["var"], depth=2))
    assert sampler.guide(settings) is guide  # read once
    assert load_guide(settings.guide, network.config, tokenizer).config.depth == 2  # type: ignore[union-attr]


def test_a_network_that_guides_itself_is_not_guided(network: MVAR, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_folder(tmp_path, tokenizer, network)
    for off_from in (None, 2):
        guided = drawn_tokens(network, tokenizer, guidance_off_from=off_from, guidance_network=str(tmp_path))
        assert torch.equal(guided, drawn_tokens(network, tokenizer, guidance=0))


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"num_classes": 9}, "its num_classes is 9, not 10"),
        ({"prediction": "token", "mixers": ("block_causal_attention",)}, "its prediction is token, not scale"),
        ({}, "it predicts tokens of another tokenizer"),
        ({"names": list("abcdefghij")}, "its class names differ"),
    ],
)
def test_networks_that_cannot_guide_are_refused(
    difference: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    names = difference.pop("names", [])
    other = deepcopy(tokenizer)
    if not difference and not names:
        other.quantizer.codebook.weight[3, 2] += 0.1
    save_folder(tmp_path, other, tiny_network(depth=1, **difference), names)
    guidance = Guidance(1.5, network=str(tmp_path))
    with pytest.raises(InputError, match=f"cannot guide: {message}"):
        load_guide(guidance, tiny_network().config, tokenizer, list("0123456789"))


def test_a_guide_of_a_tokenizer_with_fewer_phi_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fewer = Tokenizer(replace(tokenizer.config, num_phi=1)).eval()
    fewer.quantizer.load_state_dict(tokenizer.quantizer.state_dict(), strict=False)
    save_folder(tmp_path, fewer, tiny_network(depth=1))
    with pytest.raises(InputError, match="it predicts tokens of another tokenizer"):
        load_guide(Guidance(1.5, network=str(tmp_path)), tiny_network().config, tokenizer)


@pytest.mark.parametrize("off", [{"guidance": 0}, {"guidance": [0, 0, 1, 1], "guidance_off_from": 2}], ids=str)
def test_a_guide_that_guides_no_scale_is_not_read(off: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    off |= {"guidance_network": str(tmp_path / "missing")}
    network = tiny_network()
    assert torch.equal(drawn_tokens(network, tokenizer, **off), drawn_tokens(network, tokenizer, guidance=0))
    settings = SamplingSettings(**off, seed=5)
    assert "guidance_network" not in settings.metadata()
    sampler = Sampler(TrainedModel(network, tokenizer, []), torch.device("cpu"))
    assert torch.equal(tokens_of(sampler, settings), drawn_tokens(network, tokenizer, guidance=0))
    with pytest.raises(InputError, match="missing"):
        drawn_tokens(network, tokenizer, guidance_network=off["guidance_network"])


def test_there_is_one_guide() -> None:
    with pytest.raises(InputError, match="give guidance_network or guidance_corrupt, not both"):
        SamplingSettings(guidance_network="weak", guidance_corrupt=0.5)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_corrupted_prefix_is_that_of_replaced_tokens(share: float, network: MVAR, tokenizer: Tokenizer) -> None:
    chance, other = uniform(KEYS, torch.arange(SCHEDULE.num_tokens)[:, None], 2, CORRUPTION).unbind(-1)
    strengths = strengths_of(1.5, network)

    def logits(tokens: Tensor) -> Tensor:
        corrupted = torch.where(chance < share, (other * 48).long(), tokens)
        own, guide = (network(LABELS, teacher_inputs(network.config, tokenizer, each)) for each in (tokens, corrupted))
        return (1 + strengths) * own - strengths * guide

    assert 0.5 * share < (chance < share).float().mean() <= 1.5 * share
    assert torch.equal(drawn_tokens(network, tokenizer, guidance_corrupt=share), plain_tokens(network, logits))


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_beta_moves_the_logits_of_a_scale_away_from_those_before(strength: float, tokenizer: Tokenizer) -> None:
    network = tiny_network()
    strengths = strengths_of(strength, network)

    def logits(tokens: Tensor) -> Tensor:
        inputs = teacher_inputs(network.config, tokenizer, tokens)
        guided = (1 + strengths) * network(LABELS, inputs) - strengths * network(UNCONDITIONAL, inputs)
        scales = guided.split(SCHEDULE.lengths, dim=1)
        moved = [scales[0]]
        for k in range(1, SCHEDULE.num_scales):
            moved.append(1.7 * scales[k] - 0.7 * enlarged(scales[k - 1], SCHEDULE.shapes[k - 1], SCHEDULE.shapes[k]))
        return torch.cat(moved, dim=1)

    drawn = drawn_tokens(network, tokenizer, guidance=strength, guidance_beta=0.7)
    assert torch.equal(drawn, plain_tokens(network, logits))


def enlarged(values: Tensor, shape: tuple[int, int], larger: tuple[int, int]) -> Tensor:
    """Interpolates (b, n, v) bilinearly between the centers of its cells, in plain loops."""
    grid, result = values.unflatten(1, shape), []
    for row in range(larger[0]):
        for column in range(larger[1]):
            value = torch.zeros_like(values[:, 0])
            for i in range(shape[0]):
                for j in range(shape[1]):
                    y = min(max((row + 0.5) * shape[0] / larger[0] - 0.5, 0), shape[0] - 1)
                    x = min(max((column + 0.5) * shape[1] / larger[1] - 0.5, 0), shape[1] - 1)
                    value += max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * grid[:, i, j]
            result.append(value)
    return torch.stack(result, dim=1)


def test_maps_are_enlarged_between_the_centers_of_cells_also_if_oblong() -> None:
    logits, before = torch.randn(2, 15, 4), torch.randn(2, 6, 4)
    expected = logits + 0.5 * (logits - enlarged(before, (2, 3), (3, 5)))
    torch.testing.assert_close(sharpen(logits, before, (3, 5), (2, 3), 0.5), expected)


@torch.no_grad()
def test_the_temperature_divides_the_logits_of_each_scale(network: MVAR, tokenizer: Tokenizer) -> None:
    temperatures = [0.5, 1.0, 2.0, 0.8]
    divisors = torch.tensor(temperatures)[SCHEDULE.scale_ids, None]

    def logits(tokens: Tensor) -> Tensor:
        return network(LABELS, teacher_inputs(network.config, tokenizer, tokens)) / divisors

    drawn = drawn_tokens(network, tokenizer, guidance=0, temperature=temperatures)
    assert torch.equal(drawn, plain_tokens(network, logits))
    cold = drawn_tokens(network, tokenizer, guidance=0, temperature=1e-3)
    assert torch.equal(cold, drawn_tokens(network, tokenizer, guidance=0, top_k=1))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"guidance_corrupt": 0.5}, {"guidance": 0}], ids=str)
def test_weights_mix_the_embeddings_of_classes(options: dict[str, Any], network: MVAR, tokenizer: Tokenizer) -> None:
    weights = torch.nn.functional.one_hot(LABELS, 11).float()
    assert torch.equal(
        drawn_tokens(network, tokenizer, labels=weights, **options), drawn_tokens(network, tokenizer, **options)
    )
    mixed = deepcopy(network)
    mixed.class_embed.weight[4] = 0.7 * network.class_embed.weight[3] + 0.3 * network.class_embed.weight[8]
    weights[1] = 0.7 * weights[1] + 0.3 * torch.eye(11)[8]
    expected = drawn_tokens(mixed, tokenizer, labels=torch.tensor([0, 4, 9, 3]), **options)
    assert torch.equal(drawn_tokens(network, tokenizer, labels=weights, **options), expected)


def test_weights_that_mix_nothing_are_refused(tokenizer: Tokenizer) -> None:
    for wrong in (torch.full((2, 11), 0.1), torch.eye(10), torch.tensor([[-0.5, 1.5, *[0.0] * 9]]), torch.zeros(0, 11)):
        with pytest.raises(InputError, match=r"weights of classes must be \(b, 11\), non-negative with sum 1, got"):
            generate(tiny_network(), tokenizer, wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": [1.0, 2.0]}, "guidance has 2 numbers, but the network draws 4 scales: give one for each"),
        ({"guidance_off_from": 5}, "guidance_off_from 5 is too large: the network draws 4 scales"),
        ({"temperature": [1.0] * 5}, "temperature has 5 numbers, but the network draws 4 scales"),
    ],
)
def test_settings_of_another_schedule_are_refused(settings: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        generate(tiny_network(), tokenizer, LABELS, **settings)


def test_beta_needs_scales(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="guidance_beta compares scales, but this network predicts single tokens"):
        generate(tiny_network(**KINDS["token"]), tokenizer, LABELS, guidance_beta=0.5)
