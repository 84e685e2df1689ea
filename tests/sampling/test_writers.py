"""Writers of sets of images: unfinished sets that other programs have changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.sampling.writers import NpzFile, PngFolder

IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


def test_batches_are_read_back(tmp_path: Path) -> None:
    images = NpzFile(tmp_path / "set.npz", {}, 4, (8, 8))
    images.write([1, 3], IMAGES)
    assert images.missing() == [0, 2]


@pytest.mark.parametrize(
    ("numbers", "images"),
    [
        (np.arange(2), np.zeros((2, 16, 16, 3), np.uint8)),
        (np.arange(2), np.zeros((2, 8, 8, 3))),
        (np.arange(2), np.zeros((), np.uint8)),
        (np.arange(3), IMAGES),
        (np.zeros((2, 2), int), IMAGES),
        (np.array(0), IMAGES),
        (np.array([0.0, 1.0]), IMAGES),
        (np.array([0, 4]), IMAGES),
        (np.array([-1, 0]), IMAGES),
    ],
)
def test_a_batch_of_another_set_is_named(tmp_path: Path, numbers: np.ndarray, images: np.ndarray) -> None:
    target = NpzFile(tmp_path / "set.npz", {}, 4, (8, 8))
    np.savez(tmp_path / "set.npz.partial/00000000.npz", numbers=numbers, images=images)
    with pytest.raises(InputError, match=r"00000000\.npz holds .* images and .* remove it, and its images are drawn"):
        target.missing()


def test_a_class_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    set_of_two = PngFolder(tmp_path / "set", {}, ["ant", "bee"])
    set_of_two.write([0], IMAGES[:1])
    (tmp_path / "set/bee").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="set/bee is a link: remove it, or choose another --out"):
        PngFolder(tmp_path / "set", {}, ["ant", "bee"])
