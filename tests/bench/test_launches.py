"""Counts of launches, copies and waits, against operations whose counts are known, and bounds for the networks."""

import pytest
import torch
from conftest import MIXERS, SCHEDULE, tiny_network

from lightning_mvar import TokenizerConfig
from lightning_mvar.bench.launches import Counts, count_launches, count_sampling, count_training
from lightning_mvar.bench.parts import PartTracker
from lightning_mvar.bench.subjects import Subject
from lightning_mvar.ops.kernels import KERNELS, triton_kernels

CPU, META = torch.device("cpu"), torch.device("meta")
TOKENIZER = TokenizerConfig(SCHEDULE, 48, 8, channels=8, multipliers=(1, 2), blocks=1, num_phi=3)
# In sampling per block and scale, and in a training step of two blocks.
MOST_LAUNCHES = {"mvar": (69.5, 694), "var": (25.25, 362)}  # of PyTorch operations
MOST_LAUNCHES_ON_GPUS = {"mvar": (16.75, 226), "var": (12.25, 224)}  # with Triton kernels


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


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes CPU tensors take the code of GPUs; its Triton kernels are launched, but do nothing."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *_, **__: None)
    for name, kernel in triton_kernels("cpu").items():
        monkeypatch.setitem(KERNELS, name, kernel)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def launches_of(mixer: str) -> tuple[float, int]:
    """Returns the launches per block and scale in sampling, and those of a training step; checks that nothing waits."""
    subject = Subject(tiny_network(mixers=MIXERS[mixer]).config, TOKENIZER, 1)
    sampling, training = count_sampling(subject), count_training(subject)
    assert sum(counts.waits for run in (sampling, training) for counts in run.values()) == 0
    block_parts = {name for *_, name in subject.block_parts()}
    in_blocks = sum(counts.launches for part, counts in sampling.items() if part in block_parts)
    calls = subject.network_config.depth * SCHEDULE.num_scales
    return in_blocks / calls, sum(counts.launches for counts in training.values())


@pytest.mark.parametrize("mixer", MIXERS)
def test_blocks_launch_no_more_than_their_bounds_and_nothing_waits(mixer: str) -> None:
    for launches, most in zip(launches_of(mixer), MOST_LAUNCHES[mixer], strict=True):
        assert launches <= most


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_block_of_mvar_launches_at_most_two_fifths_more_than_one_of_var_on_a_gpu() -> None:
    launches = {mixer: launches_of(mixer) for mixer in MIXERS}
    for mixer, bounds in MOST_LAUNCHES_ON_GPUS.items():
        for count, most in zip(launches[mixer], bounds, strict=True):
            assert count <= most
    assert launches["mvar"][0] <= 1.4 * launches["var"][0]


def test_a_triton_kernel_is_one_launch() -> None:
    pytest.importorskip("triton")
    x = torch.ones(1, 2, 16)
    with count_launches(CPU, PartTracker()) as counter:
        triton_kernels("cpu")["modulate"](x, x[:, :1], x[:, :1], 1e-6, x.dtype)
    assert counter.by_part["the rest"].launches == 3  # ones, and the kernel twice: first as a probe
