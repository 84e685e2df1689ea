"""Corrupted pyramids against a loop over single images, and neighbors against a sorted list of distances."""

from __future__ import annotations

import torch
from conftest import SCHEDULE, random_tokens
from torch import Tensor

from lightning_mvar import Tokenizer
from lightning_mvar.tokenizer.corruption import Neighbors, corrupt_pyramid

TOKENS = random_tokens(6)
OTHERS = random_tokens(6, seed=1)
REPLACED = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(0)) < 0.3


def replace(targets: Tensor, span: slice) -> Tensor:
    return torch.where(REPLACED[: len(targets), span], OTHERS[: len(targets), span], targets)


def keep(targets: Tensor, span: slice) -> Tensor:
    return targets


def test_a_corrupted_batch_equals_a_loop_over_its_images(tokenizer: Tokenizer) -> None:
    quantizer = tokenizer.quantizer
    corrupted = corrupt_pyramid(quantizer, TOKENS, replace)
    for i in range(len(TOKENS)):
        true, chosen, targets = TOKENS[i].split(SCHEDULE.lengths), [], []
        f_hats = [quantizer.empty(1), *quantizer.f_hats(TOKENS[i : i + 1])]
        f_hat = quantizer.empty(1)
        for k, n in enumerate(SCHEDULE.lengths):
            query = quantizer.codebook(true[k][None]) + quantizer.downsample(f_hats[k] - f_hat, k)
            targets.append(torch.stack([torch.cdist(q[None], quantizer.codebook.weight)[0].argmin() for q in query[0]]))
            positions = range(SCHEDULE.offsets[k], SCHEDULE.offsets[k] + n)
            corrupts = k + 1 < SCHEDULE.num_scales
            picked = [OTHERS[i, p] if corrupts and REPLACED[i, p] else targets[k][j] for j, p in enumerate(positions)]
            chosen.append(torch.stack(picked))
            f_hat = quantizer.accumulate(f_hat, quantizer.codebook(chosen[k][None]), k)
        torch.testing.assert_close(corrupted.inputs[i : i + 1], quantizer.scale_inputs(torch.cat(chosen)[None]))
        assert torch.equal(corrupted.targets[i], torch.cat(targets))


def test_without_replacements_inputs_and_targets_are_those_of_teacher_forcing(tokenizer: Tokenizer) -> None:
    corrupted = corrupt_pyramid(tokenizer.quantizer, TOKENS, keep)
    assert torch.equal(corrupted.targets, TOKENS)
    assert torch.equal(corrupted.inputs, tokenizer.scale_inputs(TOKENS))


def test_targets_repair_errors_that_the_true_tokens_leave(tokenizer: Tokenizer) -> None:
    """One token of the 2 x 2 scale is wrong in each image; the scales after it are the targets or the true tokens."""
    quantizer, wrong = tokenizer.quantizer, SCHEDULE.offsets[1] + 2

    def replace_one(targets: Tensor, span: slice) -> Tensor:
        positions = torch.arange(span.start, span.stop)
        return torch.where(positions == wrong, OTHERS[:, span], targets)

    f, kept = quantizer.decode(TOKENS), TOKENS.clone()
    kept[:, wrong] = OTHERS[:, wrong]
    repaired = corrupt_pyramid(quantizer, TOKENS, replace_one).targets
    repaired[:, wrong] = OTHERS[:, wrong]
    assert (quantizer.decode(repaired) - f).square().mean() < 0.8 * (quantizer.decode(kept) - f).square().mean()


def test_neighbors_are_the_nearest_codes_and_are_drawn_by_their_distance() -> None:
    codebook = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    squared = torch.cdist(codebook, codebook).square()
    nearest = [sorted(set(range(20)) - {i}, key=lambda j: float(squared[i, j]))[:3] for i in range(20)]
    assert Neighbors.find(codebook, 3).codes.tolist() == nearest
    unit = sum(float(squared[i, codes[0]]) for i, codes in enumerate(nearest)) / 20
    tokens, uniforms = torch.full((1, 40_000), 7), torch.rand(1, 40_000, generator=torch.Generator().manual_seed(0))
    for temperature in (None, 0.5):
        drawn = Neighbors.find(codebook, 3, temperature).draw(tokens, uniforms)
        weights = torch.ones(3) if temperature is None else (-squared[7, nearest[7]] / (temperature * unit)).exp()
        frequencies = torch.bincount(drawn[0], minlength=20)[nearest[7]] / 40_000
        torch.testing.assert_close(frequencies, weights / weights.sum(), atol=0.01, rtol=0)


def test_equal_codes_are_the_likeliest_neighbors_of_each_other() -> None:
    """Each code occurs twice; the nearest different one is at distance 1 or, for the last two, 3."""
    twins = torch.tensor([0.0, 1.0, 4.0]).repeat_interleave(2)[:, None]
    table = Neighbors.find(twins.repeat(6, 1), 35, temperature=0.5)  # more than 25 rows
    unit = (1 + 1 + 9) / 3
    squared = (twins.repeat(6, 1) - twins[0]).square()[table.codes[0], 0].double()
    expected = (-squared / (0.5 * unit)).softmax(dim=0).cumsum(dim=0)
    torch.testing.assert_close(table.cumulative[0], expected.float())
    equal = Neighbors.find(torch.ones(5, 2), 3, temperature=0.5)
    torch.testing.assert_close(equal.cumulative, (torch.arange(1, 4) / 3).expand(5, 3))
