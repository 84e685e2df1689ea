"""Counts of launches, copies and waits, against operations whose counts are known, and bounds for the networks."""

import pytest
import torch
from conftest import MIXERS, SCHEDULE, tiny_network

from lightning_mvar import TokenizerConfig
from lightning_mvar.bench.launches import Counts, count_launches, count_sampling, count_training
from lightning_mvar.bench.parts import PartTracker
from lightning_mvar.bench.subjects import Subject

CPU, META = torch.device("cpu"), torch.device("meta")
TOKENIZER = TokenizerConfig(SCHEDULE, 48, 8, channels=8, multipliers=(1, 2), blocks=1, num_phi=3)
# per block of PyTorch operations: in sampling per scale, and in the forward pass of a training step
MOST_LAUNCHES = {"mvar": (70, 80), "var": (25.5, 32)}


def test_views_and_allocations_launch_nothing() -> None:
    x = torch.ones(4, 6)
    with count_launches(CPU, PartTracker()) as counter:
        x.view(2, 12).t()[0].expand(3, 2)
        torch.empty(3)
        x.detach().split(2)
    assert list(counter.by_part.values()) == [Counts()]


def test_launches_are_counted_in_the_innermost_part_backward_pass_included() -> None:
    x, w = torch.ones(4, 6, requires_grad=True), torch.ones(6, 6)
    tracker = PartTracker()
    with count_launches(CPU, tracker) as counter:
        with tracker.part("outer"):
            with tracker.part("inner"):
                y = x @ w
            y = y.exp().sum()
        y.backward()
    assert counter.by_part["inner"] == Counts(launches=1)
    assert counter.by_part["outer"] == Counts(launches=2)
    assert counter.by_part["the rest"] == Counts(launches=3)  # ones, times exp, times w; the sum's gradient is a view


def test_reading_numbers_and_masking_wait() -> None:
    x, mask = torch.arange(4), torch.tensor([True, False, True, True])
    for wait in (
        lambda: x[1].item(),
        lambda: x[mask],
        lambda: bool((x > 2).any()),
        mask.nonzero,
        lambda: x[mask.nonzero()],
    ):
        with count_launches(CPU, PartTracker()) as counter:
            wait()
        assert counter.by_part["the rest"].waits == 1
    with count_launches(CPU, PartTracker()) as counter:
        x[torch.tensor([0, 2])].where(mask[:2], 1)
    assert counter.by_part["the rest"].waits == 0


def test_work_of_other_devices_does_not_count_but_copies_do() -> None:
    with count_launches(META, PartTracker()) as counter:
        x = torch.ones(4).exp()
        x.to(META).copy_(x)
    assert counter.by_part == {"the rest": Counts(copies=2)}


@pytest.mark.cuda
def test_copies_to_the_host_wait_unless_told_not_to() -> None:
    x = torch.ones(4, device="cuda")
    with count_launches(x.device, PartTracker()) as counter:
        x.cpu()
        x.to("cpu", non_blocking=True)
    assert counter.by_part == {"the rest": Counts(copies=2, waits=1)}


@pytest.mark.parametrize("mixer", MIXERS)
def test_blocks_launch_no_more_than_their_bounds_and_nothing_waits(mixer: str) -> None:
    subject = Subject(tiny_network(mixers=MIXERS[mixer]).config, TOKENIZER, 3)
    block_parts = {name for *_, name in subject.block_parts()}
    sampling, training = count_sampling(subject), count_training(subject)
    launches = [sum(run[part].launches for part in block_parts & run.keys()) for run in (sampling, training)]
    depth, scales = subject.network_config.depth, SCHEDULE.num_scales
    in_sampling, in_training = MOST_LAUNCHES[mixer]
    assert launches[0] <= in_sampling * depth * scales
    assert launches[1] <= in_training * depth
    assert sum(counts.waits for run in (sampling, training) for counts in run.values()) == 0
