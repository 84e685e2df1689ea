"""CUDA graphs of sampling: one per scale, captured from the same code that runs without them.

Without graphs, a batch of any size takes thousands of kernel launches, and the host needs longer to launch them than a
fast GPU to run them. A captured scale is a single launch.
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
from lightning_mvar.sampling.steps import BatchInputs, KnownTokens, Progress, ScaleDrawer, Step

T = TypeVar("T")
# Records the launches of a function; returns a function that replays them, and the outputs, which a replay overwrites.
Capture = Callable[[Callable[[], T]], tuple[Callable[[], object], T]]

CAPTURING = Lock()  # PyTorch captures one graph at a time in a process


class CudaCapture:
    """Captures functions as CUDA graphs in one memory pool, to be replayed in the order of capture."""

    def __init__(self, device: torch.device) -> None:
        # A separate stream: by default, all captures share one on the device of the process's first capture.
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], T]) -> tuple[Callable[[], object], T]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: meanwhile, other threads (loaders, NCCL, the web page) may pin memory or query events.
        capture = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        with CAPTURING, torch.cuda.device(self.device), capture:
            outputs = run()
        return graph.replay, outputs


class CapturedScale(NamedTuple):
    """A scale of all images of the captured batch size."""

    launch: Callable[[], object]
    step: Step  # overwritten by each launch


class ScaleGraphs:
    """Draws batches by replaying one graph per scale.

    The first batch with a network and settings runs without graphs, because compiling kernels and filling caches cannot
    be captured. The second batch is captured. A later batch that fills more than half of the captured size is replayed,
    which costs as much as a full batch. A larger batch starts over. A smaller one runs without graphs, and the second
    one in a row starts over. Weights must not move, but may change.

    Args:
        capture: makes the capturing function for a new set of graphs; see `Capture`.
    """

    def __init__(self, capture: Callable[[], Capture[tuple[Step, Progress]]]) -> None:
        self.new_capture = capture
        self.lock = Lock()
        self.kind: object = None  # drawer, input kinds and precision that the graphs hold for; None before any batch
        self.buffers: BatchInputs | None = None  # inputs that the graphs read
        self.scales: list[CapturedScale] = []
        self.was_small = False  # whether the previous batch was too small to be replayed

    def steps(self, drawer: ScaleDrawer, batch: BatchInputs) -> Iterator[Step]:
        """Draws all scales of a batch, coarse to fine, as `ScaleDrawer.steps` does.

        A batch of another thread runs without graphs while one is being drawn.
        """
        if not self.lock.acquire(blocking=False):
            yield from drawer.steps(batch)
            return
        try:
            yield from self.steps_in_turn(drawer, batch)
        finally:
            self.lock.release()

    @torch.no_grad()
    def steps_in_turn(self, drawer: ScaleDrawer, batch: BatchInputs) -> Iterator[Step]:
        count = len(batch.labels)
        drawer = replace(drawer, settings=replace(drawer.settings, seed=0))  # no scale reads the seed
        kind = drawer, batch.labels.ndim, batch.known is None, precision_settings(batch.labels.device.type)
        size = len(self.buffers.labels) if self.buffers is not None and kind == self.kind else 0
        is_small = 2 * count <= size
        is_first, self.was_small = is_small and not self.was_small, is_small
        if is_first:
            yield from drawer.steps(batch)
            return
        if is_small or count > size or self.buffers is None:
            # Free the memory of the old graphs before drawing.
            self.kind, self.buffers, self.scales, self.was_small = None, None, [], False
            yield from drawer.steps(batch)
            self.kind, self.buffers = kind, clone_inputs(batch)
            return
        for buffer, values in zip(input_tensors(self.buffers), input_tensors(batch), strict=True):
            buffer[:count].copy_(values)  # the other rows keep earlier inputs, whose results are dropped
        if not self.scales:
            self.scales = self.capture(drawer, self.buffers)
        for scale in self.scales:
            step = self.replay(scale)
            yield Step(step.tokens[:count].clone(), step.f_hat[:count].clone())

    def replay(self, scale: CapturedScale) -> Step:
        """Launches a scale; returns its step, valid until the next batch."""
        scale.launch()
        return scale.step

    def capture(self, drawer: ScaleDrawer, buffers: BatchInputs) -> list[CapturedScale]:
        """Captures all scales of a batch.

        Tensors that one scale passes to the next are freed once the next is captured: replays run in the same order, so
        they may overwrite them.
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
    """Returns graphs for a network on CUDA; None if its steps cannot be captured or would need too many graphs.

    A network that predicts single tokens would need a graph per token; a sharded one gathers its weights in between.
    """
    weight = network.head.weight
    if not weight.is_cuda or network.config.prediction == "token" or isinstance(network, FSDPModule):
        return None
    return ScaleGraphs(lambda: CudaCapture(weight.device))


def precision_settings(device: str) -> tuple[object, ...]:
    """Returns the global settings that affect the precision of a network; a graph keeps those of its capture."""
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return autocast, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def input_tensors(batch: BatchInputs) -> list[Tensor]:
    return [batch.labels, batch.keys, *(batch.known or ())]


def clone_inputs(batch: BatchInputs) -> BatchInputs:
    labels, keys, *known = (tensor.clone(memory_format=torch.contiguous_format) for tensor in input_tensors(batch))
    return BatchInputs(labels, keys, KnownTokens(*known) if known else None)
