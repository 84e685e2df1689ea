"""Where a set of sampled images is written as it is drawn, so that memory is bounded and an interrupted run goes on.

Images are known by their number in the set. A set remembers what it is made by; one that is continued by anything else
is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path

ABOUT = "sampling.json"

Images = NDArray[np.uint8]  # (n, H, W, 3)


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
        self.folder, self.count = folder, count
        record, remedy = folder / ABOUT, "choose another --out, or remove that folder"
        text = json.dumps(about, indent=2) + "\n"
        if record.is_file():
            if record.read_text() != text:
                raise InputError(f"{folder} holds images that were sampled otherwise (see {ABOUT} in it): {remedy}")
            return
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} holds other files: {remedy}")
        with atomic_path(record) as path:
            path.write_text(text)

    def missing(self) -> list[int]:
        """Numbers of the images that are not there yet."""
        return [number for number in range(self.count) if not self.has(number)]

    @abstractmethod
    def has(self, number: int) -> bool: ...

    @abstractmethod
    def write(self, numbers: Sequence[int], images: Images) -> None:
        """Add images; those of a call that is interrupted are there whole or not at all."""

    @abstractmethod
    def read(self, numbers: Sequence[int]) -> Images:
        """Some of the images that are there."""

    @abstractmethod
    def finish(self, labels: NDArray[np.int64]) -> None:
        """Called when all images are there and read; `labels` (n,) are their classes."""


class PngFolder(SampleSet):
    """`folder/CLASS/NUMBER.png`; `class_names` has the class of each image."""

    def __init__(self, folder: Path, about: dict[str, Any], class_names: Sequence[str]) -> None:
        super().__init__(folder, about, len(class_names))
        self.class_names = class_names

    def path(self, number: int) -> Path:
        return self.folder / self.class_names[number] / f"{number:06d}.png"

    def has(self, number: int) -> bool:
        return self.path(number).is_file()

    def write(self, numbers: Sequence[int], images: Images) -> None:
        for number, image in zip(numbers, images, strict=True):
            with atomic_path(self.path(number)) as path:
                Image.fromarray(image).save(path)

    def read(self, numbers: Sequence[int]) -> Images:
        return np.stack([np.asarray(Image.open(self.path(number))) for number in numbers])

    def finish(self, labels: NDArray[np.int64]) -> None:
        pass


class NpzFile(SampleSet):
    """`arr_0` uint8 (n, H, W, 3) and `arr_1` int64 (n,), gathered on the disk beside the file until all are there."""

    def __init__(self, file: Path, about: dict[str, Any], count: int, resolution: int) -> None:
        super().__init__(file.with_name(f"{file.name}.partial"), about, count)
        self.file = file
        self.images = self.array("images.npy", np.uint8, (count, resolution, resolution, 3))
        self.done = self.array("done.npy", np.bool_, (count,))

    def array(self, name: str, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array that lives in a file, zeros at first.

        Raises:
            InputError: if there is no room for it, or the file is damaged.
        """
        path = self.folder / name
        if not path.is_file():
            with atomic_path(path) as temporary:
                np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape).flush()
                if sys.platform == "linux":  # a full disk is to be told here: later it would kill the process
                    with open(temporary, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        try:
            np.lib.format.open_memmap(path, mode="r")  # which says where a file is too short; the next would extend it
            return np.lib.format.open_memmap(path, mode="r+")
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}): remove {self.folder}") from error

    def has(self, number: int) -> bool:
        return bool(self.done[number])

    def write(self, numbers: Sequence[int], images: Images) -> None:
        self.images[list(numbers)] = images
        self.done[list(numbers)] = True  # after the images, so that a kill between the two costs them alone

    def read(self, numbers: Sequence[int]) -> Images:
        return np.asarray(self.images[list(numbers)])

    def finish(self, labels: NDArray[np.int64]) -> None:
        with atomic_path(self.file) as path:
            np.savez(path, arr_0=self.images, arr_1=labels)
        shutil.rmtree(self.folder)
