"""Choosing among drafts, compared with plain loops over full passes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MIXERS, SCHEDULE, random_tokens, tiny_network
from test_generate import OnlyMeta
from test_graphs import Recorder
from test_scorer import tiny_scorer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_mvar import MVAR, ScaleSchedule, Tokenizer, generate
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.sampling.costs import sampling_costs
from lightning_mvar.sampling.drafts import Drafts, choose_by_score
from lightning_mvar.sampling.generate import draw_images, teacher_inputs
from lightning_mvar.sampling.graphs import ScaleGraphs
from lightning_mvar.sampling.philox import DRAFTS, TOKENS, image_keys, uniform
from lightning_mvar.sampling.scorer import Scorer, load_scorer, save_scorer
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import BatchInputs, KnownTokens, ScaleDrawer, draw
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer

LABELS = torch.tensor([0, 3, 9, 3])
KEYS = image_keys(5, range(4))


def write_scorer(folder: Path, factor: float, **overrides: object) -> str:
    """Writes a scorer whose scores differ by about `factor` / 3 nats."""
    scorer = tiny_scorer(**overrides)
    with torch.no_grad():
        scorer.out.weight.mul_(factor)
    save_scorer(scorer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_scorer(tmp_path_factory.mktemp("scorer"), 30, quantizer=fingerprint(tokenizer.quantizer))


def drawn_tokens(network: MVAR, tokenizer: Tokenizer, **options: Any) -> Tensor:
    return generate(network, tokenizer, LABELS, generator=KEYS, return_tokens=True, **options)[1]


def best_of(candidates: list[Tensor], scores: list[float], chance: float) -> Tensor:
    """Returns the candidate at which the cumulated softmax of the scores passes `chance`."""
    shares = torch.tensor(scores, dtype=torch.float64).exp()
    cumulated = 0.0
    for candidate, share in zip(candidates, shares / shares.sum(), strict=True):
        cumulated += float(share)
        if chance < cumulated:
            return candidate
    return candidates[-1]


def plain_tokens(network: MVAR, tokenizer: Tokenizer, scorer: Scorer, count: int, scales: list[int]) -> Tensor:
    """Draws tokens (b, l) scale by scale and image by image, without guidance."""
    quantizer, settings = tokenizer.quantizer, SamplingSettings(guidance=0)
    tokens = torch.zeros(len(LABELS), SCHEDULE.num_tokens, dtype=torch.int64)
    for k, (begin, n) in enumerate(zip(SCHEDULE.offsets, SCHEDULE.lengths, strict=True)):
        span = slice(begin, begin + n)
        logits = network(LABELS, teacher_inputs(network.config, tokenizer, tokens))[:, span]
        for i in range(len(LABELS)):
            candidates, scores = [], []
            for number in range(count if k in scales else 1):
                row, stream = (torch.tensor([[number]]), DRAFTS) if number else (torch.tensor([[0]]), TOKENS)
                uniforms = uniform(KEYS[i : i + 1], row, SCHEDULE.num_tokens, stream)[:, 0, span]
                candidate = draw(logits[i : i + 1], uniforms, settings)
                pyramid = torch.cat([tokens[i : i + 1, :begin], candidate, tokens[i : i + 1, begin + n :]], dim=1)
                f_hat = [*quantizer.f_hats(pyramid)][k]
                candidates.append(candidate[0])
                scores.append(float(scorer(f_hat, LABELS[i : i + 1], k)))
            chance = float(uniform(KEYS[i : i + 1], 0, SCHEDULE.num_scales, DRAFTS)[0, k])
            tokens[i, span] = best_of(candidates, scores, chance)
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("mixers", MIXERS.values(), ids=MIXERS)
def test_candidates_are_chosen_as_in_a_plain_loop(mixers: tuple[str, ...], tokenizer: Tokenizer, folder: str) -> None:
    network, drafts = tiny_network(mixers=mixers), {"drafts": 5, "draft_scorer": folder, "draft_scales": [1, 3]}
    expected = plain_tokens(network, tokenizer, load_scorer(folder), 5, [1, 3])
    assert torch.equal(drawn_tokens(network, tokenizer, guidance=0, **drafts), expected)
    assert not torch.equal(drawn_tokens(network, tokenizer, guidance=0), expected)


def test_one_candidate_is_drawn_as_without_a_scorer(network: MVAR, tokenizer: Tokenizer, folder: str) -> None:
    expected = drawn_tokens(network, tokenizer)
    for drafts, scales in ((1, None), (8, [])):
        tokens = drawn_tokens(network, tokenizer, drafts=drafts, draft_scorer=folder, draft_scales=scales)
        assert torch.equal(tokens, expected)


def test_scales_before_the_first_choice_stay_as_they_are(network: MVAR, tokenizer: Tokenizer, folder: str) -> None:
    begin, plain = SCHEDULE.offsets[2], drawn_tokens(network, tokenizer)
    chosen = drawn_tokens(network, tokenizer, drafts=8, draft_scorer=folder, draft_scales=[2])
    assert torch.equal(chosen[:, :begin], plain[:, :begin])
    assert not torch.equal(chosen[:, begin:], plain[:, begin:])


def test_an_image_depends_on_its_own_key_alone(network: MVAR, tokenizer: Tokenizer, folder: str) -> None:
    options: dict[str, Any] = {"drafts": 6, "draft_scorer": folder, "return_tokens": True}
    _, together = generate(network, tokenizer, LABELS, generator=KEYS, **options)
    for i in range(len(LABELS)):
        _, alone = generate(network, tokenizer, LABELS[i : i + 1], generator=KEYS[i : i + 1], **options)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("guidance", [{"guidance_off_from": 2}, {"guidance_corrupt": 0.5}, {"guidance_beta": 1}])
def test_known_tokens_stay_in_every_candidate(guidance: dict[str, Any], tokenizer: Tokenizer, folder: str) -> None:
    given = random_tokens(4)
    known = KnownTokens(given, torch.rand(4, SCHEDULE.num_tokens) < 0.5)
    tokens = drawn_tokens(tiny_network(), tokenizer, drafts=4, draft_scorer=folder, known=known, **guidance)
    assert torch.equal(tokens[known.keep], given[known.keep])


def test_replayed_graphs_choose_as_eager_batches_do(tokenizer: Tokenizer, folder: str) -> None:
    graphs, network = ScaleGraphs(Recorder), tiny_network()
    for seed in (0, 0, 1):
        settings = SamplingSettings(drafts=4, draft_scorer=folder, seed=seed)
        request = (network, tokenizer, LABELS, settings, settings.keys(range(4)))
        assert torch.equal(draw_images(*request, graphs=graphs)[1], draw_images(*request)[1])
    assert len(graphs.scales) == SCHEDULE.num_scales


def test_choosing_neither_waits_for_the_device_nor_copies_to_it() -> None:
    """On the meta device no value can be read."""
    schedule = ScaleSchedule((1, 2))
    network = tiny_network(schedule=schedule, depth=1).to("meta")
    quantizer = ResidualQuantizer(schedule, 48, 8, 1).to("meta")
    settings, scorer = SamplingSettings(drafts=3, draft_scorer="scorer"), tiny_scorer(schedule).to("meta")
    tokens = torch.zeros(4, schedule.num_tokens, dtype=torch.int64, device="meta")
    batch = BatchInputs(tokens[:, 0], tokens[:, :2], None)
    with OnlyMeta():
        steps = [*ScaleDrawer(network, quantizer, settings, scorer=scorer).steps(batch)]
    assert [step.tokens.shape for step in steps] == [(4, 1), (4, 4)]


@torch.no_grad()
def test_costs_include_the_scorer_once_per_candidate(folder: str) -> None:
    network, scorer = tiny_network(), load_scorer(folder)
    with FlopCounterMode(display=False) as counter:
        scorer(torch.zeros(3 * 5, 8, 4, 4), torch.zeros(3 * 5, dtype=torch.int64), 1)  # 3 scales of 5 candidates
    plain, chosen = (
        sampling_costs(SamplingSettings(drafts=count, draft_scorer=folder, draft_scales=[0, 2, 3]), network.config)
        for count in (1, 5)
    )
    assert chosen.token_steps_per_image == plain.token_steps_per_image
    assert chosen.flops_per_sampled_image - plain.flops_per_sampled_image == counter.get_total_flops() > 0


def test_the_choice_follows_the_softmax_of_the_scores() -> None:
    scores, count = torch.tensor([0.3, -1.0, 1.2]), 4000
    chosen = choose_by_score(scores.expand(count, -1), image_keys(0, range(count)), scale=2)
    shares = torch.bincount(chosen, minlength=3) / count
    torch.testing.assert_close(shares, scores.softmax(dim=0), rtol=0, atol=0.03)


def test_a_new_scorer_in_the_same_folder_is_read_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    quantizer, weights = tokenizer.quantizer, []
    for factor in (1, 2):
        drafts = Drafts(2, write_scorer(tmp_path, factor, quantizer=fingerprint(quantizer)))
        os.utime(tmp_path / "config.json", (factor, factor))
        scorer = drafts.load_scorer(quantizer)
        assert scorer is drafts.load_scorer(quantizer)
        assert scorer is not None
        weights.append(scorer.out.weight)
    torch.testing.assert_close(weights[1], 2 * weights[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drafts": 0}, "drafts must be an integer from 1 to 4,096, got 0"),
        ({"drafts": 2.5}, r"drafts must be an integer from 1 to 4,096, got 2\.5"),
        ({"drafts": 2}, "drafts 2 needs a draft_scorer, which `lightning-mvar train-scorer` writes"),
        ({"draft_scales": "12"}, "draft_scales must be a list of scales, got '12'"),
        ({"draft_scales": [1, -1]}, "each of draft_scales must be an integer of at least 0, got -1"),
        ({"drafts": 2, "draft_scorer": "scorer", "smooth": True}, "smooth mixes codes"),
    ],
)
def test_options_that_no_network_can_have_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingSettings(**values)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ({}, {"draft_scales": [0, 4]}, "draft_scales has scale 4, but the network draws 4, counted from 0"),
        ({}, {"draft_scorer": "nowhere"}, r"nowhere has no config\.json: not a scorer"),
        ({"num_classes": 11}, {}, "num_classes is 10 there, 11 in the network"),
        ({"mixers": MIXERS["var"], "prediction": "token"}, {}, "predicts single tokens"),
    ],
)
def test_options_that_do_not_suit_the_network_are_refused(
    variant: dict[str, Any], options: dict[str, Any], message: str, tokenizer: Tokenizer, folder: str
) -> None:
    with pytest.raises(InputError, match=message):
        drawn_tokens(tiny_network(**variant), tokenizer, **{"drafts": 2, "draft_scorer": folder} | options)


def test_unconditional_images_are_refused(tokenizer: Tokenizer, folder: str) -> None:
    with pytest.raises(InputError, match="drafts need classes"):
        generate(tiny_network(), tokenizer, torch.tensor([3, 10]), drafts=2, draft_scorer=folder)


def test_a_scorer_of_another_quantizer_is_refused(tokenizer: Tokenizer, folder: str, tmp_path: Path) -> None:
    message = f"was trained with quantizer {'0' * 16}, but the network uses {fingerprint(tokenizer.quantizer)}"
    with pytest.raises(InputError, match=message):
        drawn_tokens(tiny_network(), tokenizer, drafts=2, draft_scorer=write_scorer(tmp_path, 1))
    lowered = Tokenizer(tokenizer.config).eval()
    lowered.load_state_dict(tokenizer.state_dict())
    lowered.lower(torch.bfloat16)
    assert drawn_tokens(tiny_network(), lowered, drafts=2, draft_scorer=folder).shape == (4, SCHEDULE.num_tokens)


def test_the_check_reads_no_weights(tmp_path: Path) -> None:
    drafts = Drafts(2, write_scorer(tmp_path, 1))
    (tmp_path / "scorer.safetensors").unlink()
    drafts.check(tiny_network().config)


def test_mixed_classes_are_refused_if_there_are_several_drafts(tokenizer: Tokenizer, folder: str) -> None:
    weights = torch.zeros(1, 11)
    weights[0, [2, 5]] = 0.5
    generate(tiny_network(), tokenizer, weights, drafts=1, draft_scorer=folder)
    with pytest.raises(InputError, match="drafts need one class per image"):
        generate(tiny_network(), tokenizer, weights, drafts=2, draft_scorer=folder)
