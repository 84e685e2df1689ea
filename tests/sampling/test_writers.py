"""Writers of sets of images: unfinished sets that other programs have changed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_mvar.errors import InputError, Interrupted
from lightning_mvar.sampling.draw import fill
from lightning_mvar.sampling.writers import NpzFile, PngFolder

IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


def test_pictures_are_encoded_in_the_background_with_the_bytes_of_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    target, save, threads = PngFolder(tmp_path / "set", {}, ["a", "b", "a", "b", "a"]), PngFolder.save, set()
    monkeypatch.setattr(PngFolder, "save", lambda *args: (threads.add(get_ident()), save(*args))[1])
    target.write([3, 0], pictures[[3, 0]])
    target.write([1, 2, 4], pictures[[1, 2, 4]])
    assert (tmp_path / "set/b/000003.png").is_file()  # at most one batch waits
    target.flush()
    assert target.missing() == []
    assert get_ident() not in threads
    for number, name in enumerate("ababa"):
        buffer = BytesIO()
        Image.fromarray(pictures[number]).save(buffer, "png")
        assert (tmp_path / f"set/{name}/{number:06d}.png").read_bytes() == buffer.getvalue()


def test_an_error_of_an_encoder_is_raised_by_the_next_call(tmp_path: Path) -> None:
    target = PngFolder(tmp_path / "set", {}, ["a", "b"])
    (tmp_path / "set/b").write_text("no folder")
    target.write([0, 1], IMAGES)
    with pytest.raises(InputError, match=r"cannot write .*set/b/000001\.png"):
        target.flush()
    target.write([0], IMAGES[:1])
    target.flush()
    assert target.missing() == [1]


def test_an_interruption_is_not_replaced_by_the_error_of_an_encoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def batches(*parts: Any) -> Iterator[Any]:
        yield [0, 1], IMAGES
        raise Interrupted(signal.SIGINT, "interrupted")

    target = PngFolder(tmp_path / "set", {}, ["a", "b"])
    (tmp_path / "set/b").write_text("no folder")
    drawing: Any = SimpleNamespace()  # draws nothing
    with pytest.raises(Interrupted):
        fill(target, drawing, batches, 2)
    assert target.missing() == [1]
    assert "set/b/000001.png" in caplog.text


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
