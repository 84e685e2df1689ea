"""CUDA graphs of sampling: one per scale, captured from the very code that runs without them.

Without them, a batch of any size is thousands of kernel launches, for which a host needs longer than a fast GPU does to
run them. A captured scale is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_mvar.models.mvar import MVAR
from lightning_mvar.sampling.steps import Batch, KnownTokens, Progress, ScaleDrawer, Step

T = TypeVar("T")
# Records what a function launches; returns what replays it, and the function's outputs, which each replay rewrites.
Capture = Callable[[Callable[[], T]], tuple[Callable[[], object], T]]

CAPTURING = Lock()  # PyTorch captures one graph at a time in a process


class CudaCapture:
    """Captures functions as CUDA graphs of one memory pool, to be replayed in the order of capture."""

    def __init__(self, device: torch.device) -> None:
        # By default, all captures share a stream on the device of the process's first.
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], T]) -> tuple[Callable[[], object], T]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads pin memory or ask for events meanwhile (loaders, NCCL, the page).
        capture = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        with CAPTURING, torch.cuda.device(self.device), capture:
            outputs = run()
        return graph.replay, outputs


class CapturedScale(NamedTuple):
    """A scale of all images of the captured batch size."""

    launch: Callable[[], object]
    step: Step  # rewritten by each launch


class ScaleGraphs:
    """Draws batches by replaying one graph per scale.

    The first batch of a network and settings runs without graphs: kernels are compiled and caches filled, which no
    graph can capture. The second is captured. A smaller batch then occupies a part of the captured size, if more than
    half of it: a replay costs as much as a full batch. A larger batch begins anew, and so does the second in a row that
    is too small; the first runs without graphs. Weights must stay where they are, but may change.

    Args:
        capture: returns a function that captures, for each set of graphs; see `Capture`.
    """

    def __init__(self, capture: Callable[[], Capture[tuple[Step, Progress]]]) -> None:
        self.new_capture = capture
        self.lock = Lock()
        self.kind: object = None  # what the graphs are captured for; None before the first batch
        self.buffers: Batch | None = None  # what the graphs read
        self.scales: list[CapturedScale] = []
        self.was_small = False  # whether the batch before was too small to be replayed

    def steps(self, drawer: ScaleDrawer, batch: Batch) -> Iterator[Step]:
        """Draws all scales of a batch, coarse to fine, as `ScaleDrawer.steps` does.

        While one batch is being drawn, another one, of another thread for example, runs without graphs.
        """
        if not self.lock.acquire(blocking=False):
            yield from drawer.steps(batch)
            return
        try:
            yield from self.steps_in_turn(drawer, batch)
        finally:
            self.lock.release()

    @torch.no_grad()
    def steps_in_turn(self, drawer: ScaleDrawer, batch: Batch) -> Iterator[Step]:
        count = len(batch.labels)
        drawer = replace(drawer, settings=replace(drawer.settings, seed=0))  # which no scale reads
        kind = drawer, batch.labels.ndim, batch.known is None, precision_on(batch.labels.device.type)
        size = len(self.buffers.labels) if self.buffers is not None and kind == self.kind else 0
        is_small = 2 * count <= size
        is_first, self.was_small = is_small and not self.was_small, is_small
        if is_first:
            yield from drawer.steps(batch)
            return
        if is_small or count > size or self.buffers is None:
            # Frees the memory of other graphs.
            self.kind, self.buffers, self.scales, self.was_small = None, None, [], False
            yield from drawer.steps(batch)
            self.kind, self.buffers = kind, copy_of(batch)
            return
        for buffer, values in zip(tensors_of(self.buffers), tensors_of(batch), strict=True):
            buffer[:count].copy_(values)  # the other rows keep earlier images, which nobody looks at
        if not self.scales:
            self.scales = self.capture(drawer, self.buffers)
        for scale in self.scales:
            step = self.replay(scale)
            yield Step(step.tokens[:count].clone(), step.f_hat[:count].clone())

    def replay(self, scale: CapturedScale) -> Step:
        """Launches a scale; returns what it draws, valid until the next batch."""
        scale.launch()
        return scale.step

    def capture(self, drawer: ScaleDrawer, buffers: Batch) -> list[CapturedScale]:
        """Captures all scales of a batch.

        What a scale leaves to the next is freed once that is captured: replays in the same order may overwrite it.
        """
        capture, scales = self.new_capture(), []
        progress: Progress | None = None
        for k in range(drawer.model.config.schedule.num_scales):

            def run(k: int = k, before: Progress | None = progress) -> tuple[Step, Progress]:
                return drawer.draw_scale(k, buffers, before or drawer.begin(buffers))

            launch, (step, progress) = capture(run)
            scales.append(CapturedScale(launch, step))
        return scales


def graphs_for(network: MVAR) -> ScaleGraphs | None:
    """Returns graphs for a network on CUDA; None if no graph can hold its steps, or too many would be needed.

    A network that predicts single tokens needs a graph for each, and a sharded one gathers its weights in between.
    """
    weight = network.head.weight
    if not weight.is_cuda or network.config.prediction == "token" or isinstance(network, FSDPModule):
        return None
    return ScaleGraphs(lambda: CudaCapture(weight.device))


def precision_on(device: str) -> tuple[object, ...]:
    """Returns the settings, outside the network, that decide in which precision it computes; a graph keeps its own."""
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return autocast, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def tensors_of(batch: Batch) -> list[Tensor]:
    return [batch.labels, batch.keys, *(batch.known or ())]


def copy_of(batch: Batch) -> Batch:
    labels, keys, *known = (tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors_of(batch))
    return Batch(labels, keys, KnownTokens(*known) if known else None)
