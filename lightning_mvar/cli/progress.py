"""Reading all images of a source, with a bar."""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from lightning_mvar.data.images.examples import ImageBatch, ImageSource, image_loader
from lightning_mvar.errors import InputError


def read_images(source: ImageSource, batch_size: int, num_workers: int, progress: str) -> Iterator[ImageBatch]:
    """Every batch of a source that has a readable image; the others are named."""
    with tqdm(total=len(source), unit="img", desc=progress) as bar:
        for batch in image_loader(source, batch_size, num_workers):
            for message in batch.errors:
                tqdm.write(f"skipped: {message}")
            if len(batch.images):
                yield batch
            bar.update(len(batch.images) + len(batch.errors))


def check_reading(batch_size: int, num_workers: int) -> None:
    if batch_size < 1 or num_workers < 0:
        raise InputError("--batch_size must be at least 1, --num_workers not negative")
