"""The progress bar of drawing: it moves at each scale, and counts complete batches exactly."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import SCHEDULE, tiny_network

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import TrainedModel
from lightning_mvar.sampling.progress import DrawingBar
from lightning_mvar.sampling.sampler import Drawing, Sampler
from lightning_mvar.sampling.settings import SamplingSettings


@pytest.mark.parametrize(("guidance", "passes"), [(0.0, [1, 1, 1, 1]), ([1.0, 1.0, 0.0, 0.0], [2, 2, 1, 1])])
def test_the_bar_moves_at_each_scale_by_its_share(
    tokenizer: Tokenizer, guidance: float | list[float], passes: list[int]
) -> None:
    sampler = Sampler(TrainedModel(tiny_network(), tokenizer, []), torch.device("cpu"))
    drawing = Drawing(sampler, torch.arange(3), 1, SamplingSettings(guidance=guidance))
    seen: list[float] = []
    with DrawingBar(4, 1, file=io.StringIO(), mininterval=0) as bar:
        drawing.advance = lambda images: (bar.advance(images), seen.append(bar.n))  # type: ignore[func-returns-value]
        drawing.draw(drawing.labels, [0, 1, 2])
        bar.complete(3)
        assert bar.n == 4
    work = [n * length for n, length in zip(passes, SCHEDULE.lengths, strict=True)]
    total = sum(work) + SCHEDULE.num_tokens
    assert seen == pytest.approx([1 + 3 * sum(work[: k + 1]) / total for k in range(len(work))])
    drawing.advance = seen.append
    seen.clear()
    drawing.draw_tokens(drawing.labels, [0, 1, 2])
    assert sum(seen) == pytest.approx(3)


def test_the_bar_shows_whole_images_and_never_more_than_all() -> None:
    shown = io.StringIO()
    with DrawingBar(10, 0, file=shown, mininterval=0, desc="sample") as bar:
        bar.advance(2.5)
        assert "sample:  25%" in shown.getvalue()
        assert "| 2/10 [" in shown.getvalue()
        bar.advance(100)
        assert bar.n == 10
        bar.complete(4)
        assert bar.n == 4
