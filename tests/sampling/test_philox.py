"""Philox: the published test vectors, numpy's generator, and independence of images, scales and uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_mvar.sampling.philox import NOISE, TOKENS, image_keys, philox, uniform


@pytest.mark.parametrize(
    ("counter_and_key", "expected"),
    [
        ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter_and_key: str, expected: str) -> None:
    """The lines `philox4x32 10` of kat_vectors in Random123."""
    words = [torch.tensor([int(word, 16)]) for word in counter_and_key.split()]
    assert " ".join(f"{int(word):08x}" for word in philox(tuple(words[:4]), tuple(words[4:]))) == expected


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The definition, in Python's integers."""
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = q >> 32 ^ b ^ k0, q % 2**32, p >> 32 ^ d ^ k1, p % 2**32
    return [a, b, c, d]


def test_uniform_numbers_follow_the_definition() -> None:
    keys = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, (3, 2)))
    tokens, noise = uniform(keys, 0, 30, TOKENS), uniform(keys, torch.tensor([[5], [9]]), 7, NOISE)
    assert (tokens.shape, noise.shape, tokens.dtype) == ((3, 30), (3, 2, 7), torch.float32)
    for i, key in enumerate(keys.tolist()):
        for column in range(30):
            word = plain_philox([column // 4, 0, 0, TOKENS], key)[column % 4]
            assert tokens[i, column].item() == (word >> 8) / 2**24
        for row, position in enumerate((5, 9)):
            word = plain_philox([1, position, 0, NOISE], key)[2]
            assert noise[i, row, 6].item() == (word >> 8) / 2**24


def test_each_seed_and_image_number_has_its_own_key_whatever_the_others() -> None:
    keys = image_keys(5, range(1000))
    assert len({*map(tuple, keys.tolist())}) == 1000
    assert torch.equal(image_keys(5, [999, 2**40, 0])[[0, 2]], keys[[999, 0]])
    seeds = [image_keys(seed, [0]) for seed in (0, 1, 2**31, 2**32, 2**62, 2**63 - 1)]
    assert len({tuple(key[0].tolist()) for key in seeds}) == 6
    assert 0 <= keys.min() < keys.max() < 2**32


def test_numbers_are_uniform_and_uncorrelated_between_images_and_positions() -> None:
    numbers = uniform(image_keys(0, range(500)), 0, 400, TOKENS).double()
    assert 0 <= numbers.min() < numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.003)
    bins = torch.bincount((numbers * 16).long().flatten(), minlength=16) / numbers.numel()
    torch.testing.assert_close(bins, torch.full((16,), 1 / 16), atol=2e-3, rtol=0)
    for matrix in (numbers, numbers.T):
        correlations = torch.corrcoef(matrix).fill_diagonal_(0)
        assert correlations.abs().max() < 6 / matrix.shape[1] ** 0.5
