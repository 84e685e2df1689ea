"""Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC 2011) in integer operations of torch.

Each number depends only on a key and a counter, not on batch size, order or device. torch has no unsigned 32-bit
products, so words are int64 in [0, 2^32); products wrap, which leaves their 64 bits intact.

| counter word | tokens                      | noise of `smooth`     | keys of images         | corrupted prefix      |
|--------------|-----------------------------|-----------------------|------------------------|-----------------------|
| 0            | position in the image, // 4 | code, // 4            | image number, low word | 0                     |
| 1            | 0                           | position in the image | its high word          | position in the image |
| 3            | TOKENS                      | NOISE                 | KEYS                   | CORRUPTION            |
| key          | of the image                | of the image          | the seed               | of the image          |

The first draft of a scale uses the numbers of `tokens`. The other drafts use the same words with stream DRAFTS and the
index of the draft, from 1, as word 1; index 0 is used to choose a draft of each scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Word = Tensor | int

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of words 0 and 2
INCREMENTS = 0x9E3779B9, 0xBB67AE85  # of the key after each round
ROUNDS = 10
MASK = 2**32 - 1
TOKENS, NOISE, KEYS, CORRUPTION, DRAFTS = 0, 1, 2, 3, 5  # streams; other numbers would change the images of a seed


def philox(counter: Sequence[Word], key: Sequence[Word]) -> list[Any]:
    """Returns the four random words of each counter; words are int64 in [0, 2^32) and broadcast."""
    a, b, c, d = counter
    for i in range(ROUNDS):
        low, high = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        # b, d and the key have garbage above their 32 bits; the mask removes it before the next product.
        a, c = (high >> 32 ^ b ^ key[0] + i * INCREMENTS[0]) & MASK, (low >> 32 ^ d ^ key[1] + i * INCREMENTS[1]) & MASK
        b, d = high, low
    return [a, b & MASK, c, d & MASK]


def uniform(keys: Tensor, rows: Tensor | int, columns: int, stream: int) -> Tensor:
    """Draws uniform numbers in [0, 1), multiples of 2^-24, identical on every device.

    Args:
        keys: (b, 2) int64 key of each image.
        rows: (n, 1) int64 indices of the rows to draw, or the index of a single row.
        columns: numbers per row.
        stream: TOKENS, NOISE, CORRUPTION or DRAFTS.

    Returns:
        (b, n, columns) float32; (b, columns) for one row.
    """
    words = keys if isinstance(rows, int) else keys[:, None]  # (b, 2) or (b, 1, 2)
    blocks = torch.arange(-(-columns // 4), device=keys.device)
    numbers = torch.stack(philox((blocks, rows, 0, stream), words.split(1, dim=-1)), dim=-1)
    return (numbers.flatten(-2)[..., :columns] >> 8).float() * 2**-24


def image_keys(seed: int, numbers: Iterable[int]) -> Tensor:
    """Returns the key (b, 2) int64 of each image number: two words of the seed's own stream."""
    number = torch.tensor([*numbers], dtype=torch.int64)
    return torch.stack(philox((number & MASK, number >> 32, 0, KEYS), (seed & MASK, seed >> 32))[:2], dim=1)
