"""Progress bar for drawing images that advances with every scale of a batch."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

FORMAT = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


class DrawingBar(tqdm):
    """Counts drawn images, including the finished share of a batch in progress.

    The rate is the mean since the start, because scales take unequal times.

    Args:
        count: total number of images.
        done: images that were drawn before.
        options: other options of tqdm.
    """

    def __init__(self, count: int, done: int, **options: Any) -> None:
        super().__init__(total=count, initial=done, unit="img", bar_format=FORMAT, smoothing=0, miniters=0, **options)
        self.count, self.completed = count, done

    def advance(self, images: float) -> None:
        """Counts a part of a batch in progress, expressed as a number of images."""
        self.update(min(images, self.count - self.n))

    def complete(self, images: int) -> None:
        """Counts a complete batch of images, instead of its parts."""
        self.completed = min(self.completed + images, self.count)
        self.update(self.completed - self.n)
