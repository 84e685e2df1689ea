"""Reads all images of a source with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from lightning_mvar.data.images.examples import ImageBatch, ImageSource, batch_loader, batched


def read_images(source: ImageSource, batch_size: int, num_workers: int, progress: str) -> Iterator[ImageBatch]:
    """Yields the batches of a source; prints the names of images that cannot be decoded and skips them."""
    with tqdm(total=len(source), unit="img", desc=progress) as bar:
        for batch in batch_loader(source, batched(range(len(source)), batch_size), num_workers):
            for message in batch.errors:
                tqdm.write(f"skipped: {message}")
            if len(batch.images):
                yield batch
            bar.update(len(batch.images) + len(batch.errors))
