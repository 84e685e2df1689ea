"""Writers of sets of sampled images: written as they are drawn, so memory is bounded and an interrupted run can resume.

An image is identified by its number in the set, and any process may add any image. A set records how it was drawn;
continuing it with other settings is an error.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_mvar.data.images.names import visible
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.json_files import write_json
from lightning_mvar.io.npz import NpzArray, write_npz
from lightning_mvar.sampling.readers import METADATA_FILE, NpzSamples, read_metadata
from lightning_mvar.scales import Shape

MAX_ENCODERS = 16  # threads per process
PixelArray = NDArray[np.uint8]  # (n, H, W, 3)


class SampleSet(ABC):
    """Set of images that is written image by image, in any order.

    Args:
        folder: folder of the unfinished set, or of the images themselves.
        metadata: everything that determines the images, JSON-serializable.
        count: number of images in the set.

    Raises:
        InputError: if the folder holds other files or another set.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], count: int) -> None:
        self.folder, self.metadata, self.count = folder, metadata, count
        self.claim()

    def claim(self) -> None:
        """Records in the folder how the images are drawn, or checks the record of an earlier run."""
        # Listed before the record is read: other processes write the record first, then images.
        others = self.folder.is_dir() and any(visible(self.folder.iterdir()))
        record = self.folder / METADATA_FILE
        if record.is_file():
            self.require_same(read_metadata(record), self.folder)
            return
        if others:
            raise InputError(f"{self.folder} holds other files: choose another --out or remove that folder")
        write_json(record, self.metadata)

    def require_same(self, metadata: dict[str, Any], path: Path) -> None:
        """Raises InputError that names the first difference between `metadata` and this set's."""
        for name in self.metadata | metadata:
            theirs, ours = metadata.get(name), self.metadata.get(name)
            if theirs != ours:
                raise InputError(
                    f"{path} holds images that were sampled with other settings ({name} {theirs}, not {ours}): choose "
                    f"another --out or remove it"
                )

    @abstractmethod
    def missing(self) -> list[int]:
        """Returns the numbers of the images that have not been written, ascending."""

    @abstractmethod
    def write(self, numbers: Sequence[int], images: PixelArray) -> None:
        """Writes images, possibly in the background; see `flush`.

        Each file is written atomically, so an interruption leaves no partial file.
        """

    @abstractmethod
    def flush(self) -> None:
        """Waits until all images are written; raises an error that occurred in the background."""

    @abstractmethod
    def finish(self, labels: NDArray[np.int64]) -> None:
        """Completes the set, given the classes of its images, `labels` (n,); called by one process, once all exist."""


class PngFolder(SampleSet):
    """Set of images in `folder/CLASS/NUMBER.png`; `class_names` has one entry per image.

    Threads encode a batch while the next one is drawn, because encoding on one core is slower than drawing on a GPU.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], class_names: Sequence[str]) -> None:
        self.class_names = class_names
        super().__init__(folder, metadata, len(class_names))
        self.encoders = ThreadPoolExecutor(min(MAX_ENCODERS, len(os.sched_getaffinity(0))))
        self.pending: list[Future[None]] = []

    def claim(self) -> None:
        """Also refuses class folders that are links, which could lead out of `folder`."""
        if link := next((path for name in set(self.class_names) if (path := self.folder / name).is_symlink()), None):
            raise InputError(f"{link} is a link: remove it, or choose another --out")
        super().claim()

    def path(self, number: int) -> Path:
        return self.folder / self.class_names[number] / f"{number:06d}.png"

    def missing(self) -> list[int]:
        return [number for number in range(self.count) if not self.path(number).is_file()]

    def write(self, numbers: Sequence[int], images: PixelArray) -> None:
        self.flush()  # so that at most one batch waits
        self.pending = [self.encoders.submit(self.save, *item) for item in zip(numbers, images, strict=True)]

    def save(self, number: int, image: NDArray[np.uint8]) -> None:
        with atomic_path(self.path(number)) as path:
            Image.fromarray(image).save(path)

    def flush(self) -> None:
        pending, self.pending = self.pending, []
        try:
            for future in pending:
                future.result()
        finally:  # after an error or interruption, cancel the tasks that have not started
            for future in pending:
                future.cancel()

    def finish(self, labels: NDArray[np.int64]) -> None:
        for leftover in self.folder.rglob(".*.tmp.png"):  # from a process that was killed while writing
            leftover.unlink()


def partial_folder(file: Path) -> Path:
    """Returns the folder for the batches of an incomplete npz file."""
    return file.with_name(f"{file.name}.partial")


class NpzFile(SampleSet):
    """Npz file of `arr_0` uint8 (n, H, W, 3), `arr_1` int64 (n,) and `about` (the metadata as JSON).

    Until it is complete, each batch is a file in a folder next to it, so processes on several machines can add batches.
    """

    def __init__(self, file: Path, metadata: dict[str, Any], count: int, shape: Shape) -> None:
        self.file, self.shape = file, (count, *shape, 3)
        super().__init__(partial_folder(file), metadata, count)
        self.require_space()

    def require_space(self) -> None:
        """Raises InputError unless the disk has space for the missing batches and the file assembled from them."""
        if self.file.is_file():
            return
        written = sum(path.stat().st_size for path in visible(self.folder.glob("*.npz")))
        needed, free = 2 * math.prod(self.shape) - written, shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"drawing {self.file} takes {needed / 1e9:,.1f} GB, the batches and the file, but its disk has "
                f"{free / 1e9:,.1f} GB free: draw fewer images, or use another disk"
            )

    def claim(self) -> None:
        if self.file.is_file():
            self.require_same(NpzSamples(self.file).metadata, self.file)
        else:
            super().claim()

    def written(self) -> dict[int, tuple[Path, int]]:
        """Maps the number of each written image to its batch file and row."""
        rows: dict[int, tuple[Path, int]] = {}
        for path in sorted(visible(self.folder.glob("*.npz"))):
            rows |= {number: (path, row) for row, number in enumerate(self.numbers_in(path))}
        return rows

    def numbers_in(self, path: Path) -> list[int]:
        """Returns the numbers of the images in a batch file.

        Raises:
            InputError: if it is damaged, or holds images of another set.
        """
        numbers, images = NpzArray(path, "numbers"), NpzArray(path, "images")
        fits = numbers.dtype.kind in "iu" and numbers.shape == images.shape[:1] and images.shape[1:] == self.shape[1:]
        found = numbers.read().tolist() if fits and images.dtype == np.uint8 else []
        if not found or not 0 <= min(found) <= max(found) < self.count:
            raise InputError(
                f"{path} holds {images.dtype} {images.shape} images and {numbers.dtype} {numbers.shape} numbers, not "
                f"numbered uint8 images {self.shape[1:]} of this set: remove it, and its images are drawn again"
            )
        return found

    def missing(self) -> list[int]:
        if self.file.is_file():
            return []
        written = self.written()
        return [number for number in range(self.count) if number not in written]

    def write(self, numbers: Sequence[int], images: PixelArray) -> None:
        with atomic_path(self.folder / f"{numbers[0]:08d}.npz") as path:
            np.savez(path, numbers=np.array(numbers), images=images)

    def flush(self) -> None:
        """Nothing waits: a batch is one file, written at once."""

    def finish(self, labels: NDArray[np.int64]) -> None:
        if not self.file.is_file():
            others = {"arr_1": labels, "about": np.array(json.dumps(self.metadata))}
            write_npz(self.file, "arr_0", self.in_order(), self.shape, others)
        shutil.rmtree(self.folder, ignore_errors=True)

    def in_order(self) -> Iterator[PixelArray]:
        """Yields the images (H, W, 3) by ascending number."""
        written = self.written()
        batch = lru_cache(maxsize=4)(lambda path: NpzArray(path, "images").read())
        for number in range(self.count):
            path, row = written[number]
            yield batch(path)[row]
