"""Counts of a run's kernel launches, copies between devices, and host waits for the device.

Without CUDA graphs, small batches and networks are bound by launches, not by arithmetic. Each call of a computing
operator counts as one launch on any device, though some operators (sort, top-k) launch several kernels on a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mvar.bench.parts import PartTracker
from lightning_mvar.bench.subjects import Setting, Subject, device_name, make_subject
from lightning_mvar.cli.tables import Record

aten = torch.ops.aten
ALLOCATIONS = ("empty", "new_empty", "_unsafe_view", "resize_", "set_", "record_stream")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # the host waits if an index is a mask


@dataclass
class Counts:
    """Launches, copies and waits of one part of a run."""

    launches: int = 0
    copies: int = 0
    waits: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.launches + other.launches, self.copies + other.copies, self.waits + other.waits)


class LaunchCounter(TorchDispatchMode):
    """Counts operators and Triton kernels that compute on a device while it is entered; `by_part` has the counts.

    Views and allocations do not count. Operators replayed by CUDA graphs or compiled by torch.compile are not seen.
    """

    def __init__(self, device: torch.device, tracker: PartTracker) -> None:
        super().__init__()
        self.device, self.tracker = device, tracker
        self.by_part: dict[str, Counts] = defaultdict(Counts)

    @property
    def counts(self) -> Counts:
        """Counts of the innermost part that is running."""
        return self.by_part[self.tracker.innermost or "the rest"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counts.launches
        result = func(*args, **(kwargs or {}))
        if self.counts.launches > before:  # a custom operator; its Triton kernels have been counted
            return result
        name = func.overloadpacket.__name__
        if func.is_view or func.namespace == "prim" or name.startswith(ALLOCATIONS):
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in inputs + outputs}
        if self.device.type not in devices:
            return result
        counts = self.counts
        if name in ("copy_", "_to_copy") and len(devices) > 1:
            counts.copies += 1
            counts.waits += outputs[0].is_cpu and not self.is_non_blocking(name, args, kwargs)
            return result
        counts.launches += 1
        counts.waits += makes_host_wait(name, args)
        return result

    @staticmethod
    def is_non_blocking(name: str, args: Any, kwargs: Any) -> bool:
        return bool((kwargs or {}).get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))


def makes_host_wait(operator: str, args: Any) -> bool:
    """Returns whether the host waits for a GPU because it needs the result of an operator, or the result's shape."""
    masks = (torch.bool, torch.uint8)
    return operator in WAITS or (operator in INDEXING and any(t is not None and t.dtype in masks for t in args[1]))


@contextmanager
def count_launches(device: torch.device, tracker: PartTracker) -> Iterator[LaunchCounter]:
    """Counts the operators and Triton kernels that run on `device`, by the part that `tracker` reports."""
    counter = LaunchCounter(device, tracker)
    with counting_triton(counter), counter:
        yield counter


@contextmanager
def counting_triton(counter: LaunchCounter) -> Iterator[None]:
    """Counts launches of Triton kernels, which bypass torch's dispatcher."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:  # without Triton there are no such kernels
        yield
        return

    def counted(run: Any) -> Any:
        def call(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            counter.counts.launches += 1
            return run(kernel, *args, **kwargs)

        return call

    originals = [(owner, owner.run) for owner in (JITFunction, InterpretedFunction)]
    for owner, run in originals:
        owner.run = counted(run)
    try:
        yield
    finally:
        for owner, run in originals:
            owner.run = run


def count_sampling(subject: Subject) -> dict[str, Counts]:
    """Counts launches by part while sampling a batch of guided images, after a batch that fills caches."""
    subject.sample()
    tracker = PartTracker()
    with tracker.instrument(subject.parts()), count_launches(subject.device, tracker) as counter:
        subject.sample()
    return dict(counter.by_part)


def count_training(subject: Subject) -> dict[str, Counts]:
    """Counts launches by part in a training step, after a step that allocates gradients and moments."""
    step = subject.training_step()
    step()
    tracker = PartTracker()
    parts = [*subject.parts(), (Tensor, "backward", "backward pass"), (step, "update", "optimizer")]
    with tracker.instrument(parts), count_launches(subject.device, tracker) as counter:
        step()
    return dict(counter.by_part)


def measure_launches(setting: Setting, device: torch.device) -> list[Record]:
    """Counts launches by part in sampling and in training; on a CPU, the network is narrow.

    `launches_per_block_and_scale` is per block in training, and per block and scale in sampling.
    """
    subject = make_subject(replace(setting, narrow=device.type == "cpu", graphs=False), device)
    block_parts = {name for *_, name in subject.block_parts()}
    runs = {"sample": (count_sampling, len(subject.network_config.step_lengths)), "train": (count_training, 1)}
    records = []
    for run, (count, steps) in runs.items():
        by_part = count(subject)
        in_blocks = sum((counts for part, counts in by_part.items() if part in block_parts), Counts())
        for part, counts in (by_part | {"all blocks": in_blocks, "total": sum(by_part.values(), Counts())}).items():
            record = {"run": run, "size": setting.size, "mixer": setting.mixer, "batch_size": setting.batch_size}
            record |= {"device": device_name(device), "part": part, **asdict(counts)}
            if part in block_parts or part == "all blocks":
                record["launches_per_block_and_scale"] = counts.launches / subject.network_config.depth / steps
            records.append(record)
    return records
