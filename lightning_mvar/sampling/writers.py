"""Where a set of sampled images is written as it is drawn, so that memory is bounded and an interrupted run goes on.

Images are known by their number in the set, and any process may add any of them. A set remembers how it is drawn; one
that is continued otherwise is refused.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_mvar.data.images.files import visible
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.npz import read_npz, write_npz
from lightning_mvar.sampling.readers import ABOUT, NpzSamples, read_about
from lightning_mvar.scales import Shape

PixelArray = NDArray[np.uint8]  # (n, H, W, 3)


class SampleSet(ABC):
    """Images that are there, and those still to be drawn.

    Args:
        folder: where unfinished work, or the images themselves, are.
        about: what decides the images, as JSON can hold it.
        count: images in the set.

    Raises:
        InputError: if the folder holds something else.
    """

    def __init__(self, folder: Path, about: dict[str, Any], count: int) -> None:
        self.folder, self.about, self.count = folder, about, count
        self.claim()

    def claim(self) -> None:
        """Write down in the folder how the images are drawn, or go on where that is written; see above."""
        # Looked at before the record: other processes write the record first, then images.
        others = self.folder.is_dir() and any(visible(self.folder.iterdir()))
        record = self.folder / ABOUT
        if record.is_file():
            self.require_same(read_about(record), self.folder)
            return
        if others:
            raise InputError(f"{self.folder} holds other files: choose another --out, or remove that folder")
        with atomic_path(record) as path:
            path.write_text(json.dumps(self.about, indent=2) + "\n")

    def require_same(self, about: dict[str, Any], where: Path) -> None:
        """Raise InputError, naming what differs, unless `about` is that of this set."""
        for name in self.about | about:
            theirs, ours = about.get(name), self.about.get(name)
            if theirs != ours:
                raise InputError(
                    f"{where} holds images that were sampled otherwise ({name} {theirs}, not {ours}): choose another "
                    f"--out, or remove it"
                )

    @abstractmethod
    def missing(self) -> list[int]:
        """Numbers of the images that are not there yet, ascending."""

    @abstractmethod
    def write(self, numbers: Sequence[int], images: PixelArray) -> None:
        """Add images; those of a call that is interrupted are there whole or not at all."""

    @abstractmethod
    def finish(self, labels: NDArray[np.int64]) -> None:
        """Called by one process when all images are there; `labels` (n,) are their classes."""


class PngFolder(SampleSet):
    """`folder/CLASS/NUMBER.png`; `class_names` has the class of each image."""

    def __init__(self, folder: Path, about: dict[str, Any], class_names: Sequence[str]) -> None:
        super().__init__(folder, about, len(class_names))
        self.class_names = class_names

    def path(self, number: int) -> Path:
        return self.folder / self.class_names[number] / f"{number:06d}.png"

    def missing(self) -> list[int]:
        return [number for number in range(self.count) if not self.path(number).is_file()]

    def write(self, numbers: Sequence[int], images: PixelArray) -> None:
        for number, image in zip(numbers, images, strict=True):
            with atomic_path(self.path(number)) as path:
                Image.fromarray(image).save(path)

    def finish(self, labels: NDArray[np.int64]) -> None:
        for leftover in self.folder.rglob(".*.tmp.png"):  # of a process that was killed while it wrote
            leftover.unlink()


class NpzFile(SampleSet):
    """`arr_0` uint8 (n, H, W, 3), `arr_1` int64 (n,) and `about` (JSON), gathered batch by batch in a folder beside it.

    Batches are files of their own, so that processes on several machines may add them.
    """

    def __init__(self, file: Path, about: dict[str, Any], count: int, shape: Shape) -> None:
        self.file, self.shape = file, (count, *shape, 3)
        super().__init__(file.with_name(f"{file.name}.partial"), about, count)

    def claim(self) -> None:
        if self.file.is_file():
            self.require_same(NpzSamples(self.file).about, self.file)
        else:
            super().claim()

    def places(self) -> dict[int, tuple[Path, int]]:
        """The batch that holds each image that is there, and its place in it."""
        found: dict[int, tuple[Path, int]] = {}
        for path in sorted(visible(self.folder.glob("*.npz"))):
            numbers = read_npz(path, ["numbers"])["numbers"].tolist()
            found |= {number: (path, place) for place, number in enumerate(numbers)}
        return found

    def missing(self) -> list[int]:
        if self.file.is_file():
            return []
        there = self.places()
        return [number for number in range(self.count) if number not in there]

    def write(self, numbers: Sequence[int], images: PixelArray) -> None:
        with atomic_path(self.folder / f"{numbers[0]:08d}.npz") as path:
            np.savez(path, numbers=np.array(numbers), images=images)

    def finish(self, labels: NDArray[np.int64]) -> None:
        if not self.file.is_file():
            others = {"arr_1": labels, "about": np.array(json.dumps(self.about))}
            write_npz(self.file, "arr_0", self.in_order(), self.shape, others)
        shutil.rmtree(self.folder, ignore_errors=True)

    def in_order(self) -> Iterator[PixelArray]:
        """Each image (H, W, 3)."""
        places = self.places()
        batch = lru_cache(maxsize=4)(lambda path: read_npz(path, ["images"])["images"])
        for number in range(self.count):
            path, place = places[number]
            yield batch(path)[place]
