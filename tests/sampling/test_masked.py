"""Scales drawn in several steps, against a sampler of one image at a time that runs the full pass for each step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MIXERS, SCHEDULE, random_tokens, tiny_network

from lightning_mvar import MVAR, Tokenizer, generate
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.errors import InputError
from lightning_mvar.models.mvar import Revealed
from lightning_mvar.sampling.guidance import sharpen
from lightning_mvar.sampling.masked import Kept, confidence
from lightning_mvar.sampling.philox import CORRUPTION, ORDER, TOKENS, image_keys, uniform
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import KnownTokens, draw

LABELS = torch.tensor([0, 3, 10])
KINDS = {name: {"mixers": mixers} for name, mixers in MIXERS.items()} | {
    "markov": {"mixers": ("markov_attention",)},
    "mamba_only": {"mixers": ("mamba2",)},
}


def revealing_network(**overrides: object) -> MVAR:
    network = tiny_network(reveal=True, **overrides)
    torch.nn.init.normal_(network.reveal_proj.bias)
    return network


def guided_logits(
    network: MVAR,
    tokenizer: Tokenizer,
    label: int,
    key: torch.Tensor,
    settings: SamplingSettings,
    tokens: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Returns the logits (l, v) of a full pass that reads the tokens (1, l) of coarser scales and where `mask` is."""

    def logits(label: int, tokens: torch.Tensor) -> torch.Tensor:
        revealed = Revealed(tokenizer.quantizer.codebook(tokens), mask)
        return network(torch.tensor([label]), tokenizer.scale_inputs(tokens), revealed)[0]

    strengths = torch.tensor(settings.guide.strengths(network.config))[SCHEDULE.scale_ids, None]
    if settings.guidance_corrupt:
        positions = torch.arange(SCHEDULE.num_tokens)[:, None]
        chance, other = uniform(key[None], positions, 2, CORRUPTION).unbind(-1)
        guide = logits(label, torch.where(chance < settings.guidance_corrupt, (other * 48).long(), tokens))
    else:
        guide = logits(10, tokens)
    return (1 + strengths) * logits(label, tokens) - strengths * guide


@torch.no_grad()
def draw_one_image(
    network: MVAR,
    tokenizer: Tokenizer,
    label: int,
    key: torch.Tensor,
    settings: SamplingSettings,
    known: dict[int, int],
) -> list[int]:
    """Draws an image token by token; `known` has the tokens of a given image by position."""
    tokens, read = torch.zeros(1, SCHEDULE.num_tokens, dtype=torch.int64), torch.zeros(1, SCHEDULE.num_tokens)
    first = list[torch.Tensor]()  # logits of the first step of each scale
    for k, (begin, n) in enumerate(zip(SCHEDULE.offsets, SCHEDULE.lengths, strict=True)):
        kept = {j: token for j, token in known.items() if begin <= j < begin + n}
        total, steps = n - len(kept), min(settings.steps_of(k), n)
        for i in range(steps):
            for j in range(begin, begin + n):
                tokens[0, j], read[0, j] = kept.get(j, 0), j in kept
            logits = guided_logits(network, tokenizer, label, key, settings, tokens, read > 0)
            scale = logits[None, begin : begin + n]
            if i == 0:
                first.append(scale.clone())
            if k > 0:
                shapes = SCHEDULE.shapes[k], SCHEDULE.shapes[k - 1]
                logits[begin : begin + n] = sharpen(scale, first[k - 1], *shapes, settings.guidance_beta)[0]
            numbers, order = (uniform(key[None], i, SCHEDULE.num_tokens, stream)[0] for stream in (TOKENS, ORDER))
            priority = {}
            for j in set(range(begin, begin + n)) - kept.keys():
                tokens[0, j] = draw(logits[None, j : j + 1], numbers[None, j : j + 1], settings)
                priority[j] = float(order[j])
                if settings.order == "confidence":
                    gumbel = -math.log(-math.log(float(order[j].clamp(1e-9, 1 - 1e-7))))
                    temperature = settings.order_temperature * (1 - (i + 1) / steps)
                    priority[j] = float(logits[j].log_softmax(0)[tokens[0, j]]) + temperature * gumbel
            left = min(math.floor(total * math.cos(math.pi / 2 * (i + 1) / steps)), len(priority) - 1)
            chosen = sorted(priority, key=lambda j: -priority[j])[: len(priority) - max(left, 0)]
            kept |= {j: int(tokens[0, j]) for j in chosen}
    return tokens[0].tolist()


@pytest.mark.parametrize("inpaints", [False, True])
@pytest.mark.parametrize("kind", ["var", "mamba_only"])
def test_the_corrupted_guide_reads_corrupted_kept_tokens(kind: str, inpaints: bool, tokenizer: Tokenizer) -> None:
    options = {"guidance": 1.5, "top_k": 20, "steps": 3, "guidance_corrupt": 0.5}
    check_against_full_passes(revealing_network(**KINDS[kind]), tokenizer, options, inpaints)


@pytest.mark.parametrize("steps", [1, (1, 2, 9, 4)])
def test_beta_compares_predictions_of_hidden_tokens(steps: int | tuple[int, ...], tokenizer: Tokenizer) -> None:
    options = {"guidance": 1.5, "top_k": 20, "steps": steps, "guidance_beta": 0.7}
    check_against_full_passes(revealing_network(), tokenizer, options, inpaints=False)


def test_beta_is_refused_where_known_tokens_are_not_predicted(tokenizer: Tokenizer) -> None:
    tokens = random_tokens(3)
    known = KnownTokens(tokens, torch.ones_like(tokens, dtype=torch.bool))
    with pytest.raises(InputError, match="does not predict known tokens: set guidance_beta to 0"):
        generate(revealing_network(), tokenizer, LABELS, known=known, guidance_beta=0.5)
    generate(tiny_network(), tokenizer, LABELS, known=known, guidance_beta=0.5)


def check_against_full_passes(network: MVAR, tokenizer: Tokenizer, options: dict[str, Any], inpaints: bool) -> None:
    """Compares a batch, with or without known tokens, with `draw_one_image`."""
    keys, given = image_keys(1, range(3)), random_tokens(3)
    keep = (torch.rand(given.shape, generator=torch.Generator().manual_seed(2)) < 0.4) & inpaints
    known = KnownTokens(given.masked_fill(~keep, -1), keep) if inpaints else None
    _, tokens = generate(network, tokenizer, LABELS, generator=keys, known=known, return_tokens=True, **options)
    for label, key, row, mask, drawn in zip(LABELS.tolist(), keys, given, keep, tokens.tolist(), strict=True):
        kept = {j: int(row[j]) for j in mask.nonzero().flatten().tolist()}
        assert drawn == draw_one_image(network, tokenizer, label, key, SamplingSettings(**options), kept)


@pytest.mark.parametrize("inpaints", [False, True])
@pytest.mark.parametrize(("order", "steps"), [("random", 3), ("confidence", (1, 2, 9, 4)), ("random", 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_those_of_full_passes_over_one_image(
    kind: str, order: str, steps: int | tuple[int, ...], inpaints: bool, tokenizer: Tokenizer
) -> None:
    options = {"guidance": 1.5, "top_k": 20, "top_p": 0.9, "steps": steps, "order": order, "order_temperature": 2.0}
    check_against_full_passes(revealing_network(**KINDS[kind]), tokenizer, options, inpaints)


@pytest.mark.parametrize("mixers", MIXERS.values(), ids=MIXERS)
def test_one_step_draws_what_a_network_without_revealed_tokens_draws(
    mixers: tuple[str, ...], tokenizer: Tokenizer
) -> None:
    network, plain, keys = revealing_network(mixers=mixers), tiny_network(mixers=mixers), image_keys(0, range(3))
    plain.load_state_dict(network.state_dict(), strict=False)
    images = [generate(each, tokenizer, LABELS, generator=keys) for each in (network, plain)]
    assert torch.equal(*images)
    assert not torch.equal(generate(network, tokenizer, LABELS, generator=keys, steps=2), images[0])


def test_an_image_in_several_steps_does_not_depend_on_its_batch(tokenizer: Tokenizer) -> None:
    network, options = revealing_network(), {"steps": 3, "return_tokens": True}
    _, batch = generate(network, tokenizer, LABELS, generator=image_keys(5, range(3)), **options)
    for i in range(3):
        _, single = generate(network, tokenizer, LABELS[i : i + 1], generator=image_keys(5, [i]), **options)
        assert torch.equal(single[0], batch[i])


def test_a_network_that_guides_itself_reads_the_same_kept_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    network = revealing_network()
    save_folder(tmp_path, tokenizer, network)
    options = {"generator": image_keys(0, range(3)), "steps": 3, "return_tokens": True}
    _, guided = generate(network, tokenizer, LABELS, guidance_network=str(tmp_path), **options)
    assert torch.equal(guided, generate(network, tokenizer, LABELS, guidance=0, **options)[1])


@pytest.mark.parametrize("known", [0, 2, 15, 16])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 16])
def test_each_step_keeps_the_tokens_of_highest_priority(steps: int, known: int) -> None:
    """The number that stays hidden is that of MaskGIT's cosine schedule, which keeps at least one token per step."""
    n, generator = 16, torch.Generator().manual_seed(steps)
    tokens, mask = torch.arange(n)[None], torch.arange(n)[None] < known
    kept, hidden = Kept.known(tokens, torch.zeros(1, n, 2), mask), set(range(known, n))
    for i in range(1, steps):
        priority = torch.rand(1, n, generator=generator)
        kept = kept.more(tokens, torch.full((1, n, 2), i), priority, i / steps)
        left = max(0, min(math.floor((n - known) * math.cos(math.pi / 2 * i / steps)), len(hidden) - 1))
        hidden = set(sorted(hidden, key=lambda j: float(priority[0, j]))[:left])
        assert set((~kept.mask[0]).nonzero().flatten().tolist()) == hidden
    assert known > 0 or bool(hidden)  # something is left for the last step


def test_confidence_without_noise_is_the_log_probability_and_noise_is_gumbel() -> None:
    logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = torch.distributions.Categorical(logits=logits).log_prob(tokens)
    torch.testing.assert_close(confidence(logits, tokens, torch.rand(2, 5), 0.0), expected)
    u = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0))
    noise = confidence(torch.zeros(1, 100_000, 1), torch.zeros(1, 100_000, dtype=torch.int64), u, 2.0) / 2
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)


@pytest.mark.parametrize(
    ("network", "steps", "message"),
    [
        ({}, 2, r"steps 2 is too many for this network, which was not trained with network\.reveal: set steps to 1"),
        ({}, (1, 1, 1, 4), "was not trained with"),
        ({"mixers": ("mamba2",), "prediction": "token"}, 2, "which predicts single tokens: set steps to 1"),
        ({"reveal": True}, (1, 2), "steps has 2 numbers, but the network draws 4 scales"),
    ],
)
def test_networks_refuse_steps_that_they_cannot_take(
    network: dict[str, object], steps: int | tuple[int, ...], message: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InputError, match=message):
        generate(tiny_network(**network), tokenizer, LABELS, steps=steps)
    SamplingSettings(steps=(1, 1, 1, 1)).check(tiny_network().config)
