"""Networks that read some tokens of the scale that they predict."""

from __future__ import annotations

import pytest
import torch
from conftest import MIXERS, SCHEDULE, random_tokens, tiny_network

from lightning_mvar import MVAR, MVARConfig, Tokenizer
from lightning_mvar.errors import InputError
from lightning_mvar.models.mvar import Revealed

KINDS = {name: {"mixers": mixers} for name, mixers in MIXERS.items()} | {
    "markov": {"mixers": ("markov_attention",)},
    "mamba_only": {"mixers": ("mamba2",)},
    "both_orders": {"mixers": ("mamba2",), "scan_order": "both"},
    "shared_adaln": {"mixers": MIXERS["var"], "shared_adaln": True},
}
LABELS = torch.tensor([0, 3, 10])


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> MVAR:
    return revealing_network(**KINDS[request.param])


def revealing_network(**overrides: object) -> MVAR:
    network = tiny_network(reveal=True, **overrides)
    torch.nn.init.normal_(network.reveal_proj.bias)
    return network


def inputs_of(tokens: torch.Tensor, tokenizer: Tokenizer, mask: torch.Tensor) -> tuple[torch.Tensor, Revealed]:
    return tokenizer.scale_inputs(tokens), Revealed(tokenizer.quantizer.codebook(tokens), mask)


def random_mask(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, SCHEDULE.num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.5


@torch.no_grad()
def test_steps_that_are_run_again_equal_the_full_pass(network: MVAR, tokenizer: Tokenizer) -> None:
    """Each scale runs with other revealed tokens first, which must not change the state from which it is run again."""
    inputs, revealed = inputs_of(random_tokens(3), tokenizer, random_mask())
    full = network(LABELS, inputs, revealed)
    state, logits = network.init_state(LABELS), []
    parts = zip(
        (None, *inputs.split(SCHEDULE.lengths[1:], dim=1)),
        *(part.split(SCHEDULE.lengths, dim=1) for part in revealed),
        strict=True,
    )
    for scale_inputs, codes, mask in parts:
        network.step(scale_inputs, state, Revealed(codes + 1, ~mask))
        step_logits, state = network.step(scale_inputs, state, Revealed(codes, mask))
        logits.append(step_logits)
    assert full.abs().max() > 1  # a comparison of zeros would prove nothing
    assert (torch.cat(logits, dim=1) - full).abs().max() < 1e-4


@torch.no_grad()
def test_only_revealed_tokens_change_logits_of_their_own_scale(network: MVAR, tokenizer: Tokenizer) -> None:
    tokens, mask = random_tokens(3), random_mask()
    before = network(LABELS, *inputs_of(tokens, tokenizer, mask))
    for begin, n in zip(SCHEDULE.offsets[1:], SCHEDULE.lengths[1:], strict=True):
        end, at = begin + n, begin + n // 2
        for shown in (False, True):
            mask[:, at] = shown
            before, changed = network(LABELS, *inputs_of(tokens, tokenizer, mask)), tokens.clone()
            changed[:, at] = (changed[:, at] + 1) % 48
            moved = (network(LABELS, *inputs_of(changed, tokenizer, mask)) - before).abs().amax(dim=(0, 2)) > 0
            assert not moved[:begin].any()
            assert moved[begin:end].any() == shown
            assert moved[end:].all()


@torch.no_grad()
def test_all_tokens_hidden_is_the_plain_pass(network: MVAR, tokenizer: Tokenizer) -> None:
    inputs, revealed = inputs_of(random_tokens(3), tokenizer, random_mask())
    hidden = Revealed(torch.full_like(revealed.codes, 1e30), torch.zeros_like(revealed.mask))
    assert torch.equal(network(LABELS, inputs, hidden), network(LABELS, inputs))
    assert not torch.equal(network(LABELS, inputs, revealed), network(LABELS, inputs))


@torch.no_grad()
def test_an_untrained_network_does_not_see_what_is_revealed(tokenizer: Tokenizer) -> None:
    config = MVARConfig(SCHEDULE, 2, 64, 2, 48, 8, 10, head_dim=32, reveal=True)
    inputs, revealed = inputs_of(random_tokens(3), tokenizer, random_mask())
    network = MVAR(config).eval()
    assert torch.equal(network(LABELS, inputs, revealed), network(LABELS, inputs))


def test_the_projection_of_revealed_codes_is_trained(tokenizer: Tokenizer) -> None:
    network = MVAR(MVARConfig(SCHEDULE, 2, 64, 2, 48, 8, 10, head_dim=32, reveal=True))
    losses, _ = network.score(LABELS, *inputs_of_scores(tokenizer))
    losses.mean().backward()
    assert network.reveal_proj.weight.grad.abs().sum(dim=0).min() > 0
    assert network.reveal_proj.bias.grad.abs().sum() > 0


def inputs_of_scores(tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor, float, Revealed]:
    tokens = random_tokens(3)
    inputs, revealed = inputs_of(tokens, tokenizer, random_mask())
    return inputs, tokens, 0.0, revealed


@torch.no_grad()
def test_scores_are_those_of_the_logits(tokenizer: Tokenizer) -> None:
    network = revealing_network()
    inputs, tokens, _, revealed = inputs_of_scores(tokenizer)
    expected = -network(LABELS, inputs, revealed).log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(network.score(LABELS, inputs, tokens, 0.0, revealed)[0], expected)


def test_other_networks_have_no_parameters_for_revealed_tokens() -> None:
    plain, revealing = (dict(tiny_network(reveal=reveal).named_parameters()) for reveal in (False, True))
    assert revealing.keys() - plain.keys() == {"reveal_proj.weight", "reveal_proj.bias"}


def test_single_tokens_cannot_be_revealed() -> None:
    with pytest.raises(InputError, match=r"network\.reveal needs scales of several tokens; set network\.prediction"):
        tiny_network(mixers=("mamba2",), prediction="token", reveal=True)
