"""ScaleGraphs: their buffers are static, and what they replay equals what runs without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MIXERS, SCHEDULE, random_tokens, tiny_network
from torch import Tensor

from lightning_mvar import Tokenizer
from lightning_mvar.devices import exact_float32, set_tf32
from lightning_mvar.sampling.generate import draw_images
from lightning_mvar.sampling.graphs import CAPTURING, CudaCapture, ScaleGraphs, graphs_for
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import BatchInputs, KnownTokens, ScaleDrawer, Step

SETTINGS = SamplingSettings()


def tensors_in(value: object) -> list[Tensor]:
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    parts = value if isinstance(value, list | tuple) else []
    return [value] if isinstance(value, Tensor) else [tensor for part in parts for tensor in tensors_in(part)]


class Recorder:
    """Stands in for CUDA graphs: a replay runs the function again and writes into the outputs of the capture."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Callable[[], object]) -> tuple[Callable[[], None], object]:
        outputs = run()
        self.captured += 1
        for tensor in tensors_in(outputs):  # a capture computes nothing
            tensor.fill_(0 if tensor.dtype == torch.int64 else torch.nan)

        def replay() -> None:
            self.replayed += 1
            for buffer, values in zip(tensors_in(outputs), tensors_in(run()), strict=True):
                buffer.copy_(values)

        return replay, outputs


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def graphs(recorder: Recorder) -> ScaleGraphs:
    return ScaleGraphs(lambda: recorder)


@pytest.mark.parametrize("options", [{"smooth": False}, {"smooth": True}], ids=str)
@pytest.mark.parametrize("mixers", [MIXERS["mvar"], MIXERS["var"], ("window_attention", "gated_linear_attention")])
def test_replays_draw_what_eager_batches_draw(
    mixers: tuple[str, ...], options: dict[str, object], tokenizer: Tokenizer, graphs: ScaleGraphs, recorder: Recorder
) -> None:
    network = tiny_network(mixers=mixers)
    for number, seed in enumerate((0, 0, 1)):
        labels = torch.tensor([0, 3, 9, 10]).roll(number)
        given = random_tokens(4, seed=number)
        known, settings = KnownTokens(given, given > 30), SamplingSettings(**options, seed=seed)
        request = (network, tokenizer, labels, settings, settings.keys(range(4 * number, 4 * number + 4)), known)
        for actual, expected in zip(draw_images(*request, graphs=graphs), draw_images(*request), strict=True):
            assert torch.equal(actual, expected)
        assert recorder.replayed == number * SCHEDULE.num_scales
    assert recorder.captured == SCHEDULE.num_scales


@pytest.mark.parametrize(
    "options", [{"guidance_off_from": 2}, {"guidance_corrupt": 0.5}, {"guidance_beta": 0.5}, {"guidance": 0}], ids=str
)
def test_replays_guide_as_eager_batches_do(
    options: dict[str, Any], tokenizer: Tokenizer, graphs: ScaleGraphs, recorder: Recorder
) -> None:
    weaker = None if "guidance_corrupt" in options else tiny_network(depth=1)
    network, guides = tiny_network(), [None] * 3 + [weaker] * 3
    for seed, guide in enumerate(guides):
        settings = SamplingSettings(seed=seed, temperature=0.9, **options)
        request = (network, tokenizer, torch.tensor([0, 3, 9, 10]).roll(seed), settings, settings.keys(range(4)))
        for actual, expected in zip(
            draw_images(*request, graphs=graphs, guide=guide), draw_images(*request, guide=guide), strict=True
        ):
            assert torch.equal(actual, expected)
    batches = 5 if weaker is None else 4  # without the first of each guide
    assert recorder.replayed == batches * SCHEDULE.num_scales


def test_batches_above_half_the_size_use_a_part_and_others_or_other_settings_begin_anew(
    tokenizer: Tokenizer, graphs: ScaleGraphs, recorder: Recorder
) -> None:
    network, replayed = tiny_network(), []
    counts = [4, 3, 2, 3, 2, 1, 1, 4, 4]  # one small batch in between keeps the graphs, the second in a row does not
    for count, settings in [*((count, SETTINGS) for count in counts), (4, SamplingSettings(0.0))]:
        labels, keys = torch.arange(count), image_keys(count, range(count))
        before = recorder.replayed
        images, tokens = draw_images(network, tokenizer, labels, settings, keys, graphs=graphs)
        replayed.append(recorder.replayed > before)
        expected_images, expected_tokens = draw_images(network, tokenizer, labels, settings, keys)
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(images, expected_images)
    assert replayed == [False, True, False, True, False, False, True, False, True, False]


def test_mixed_classes_begin_anew(tokenizer: Tokenizer, graphs: ScaleGraphs, recorder: Recorder) -> None:
    network, labels, keys = tiny_network(), torch.tensor([0, 3]), image_keys(0, range(2))
    weights = torch.nn.functional.one_hot(labels, 11).float()
    replayed = []
    for classes in (labels, labels, weights, weights.flip(0)):
        before = recorder.replayed
        tokens = draw_images(network, tokenizer, classes, SETTINGS, keys, graphs=graphs)[1]
        assert torch.equal(tokens, draw_images(network, tokenizer, classes, SETTINGS, keys)[1])
        replayed.append(recorder.replayed > before)
    assert replayed == [False, True, False, True]


@pytest.mark.parametrize(
    ("counts", "captured"), [([8, 8, 1, 1, 1], [8, 8, 8, 1, 1]), ([8, 8, 2, 2, 1], [8, 8, 8, 2, 2])]
)
def test_the_second_small_batch_in_a_row_begins_anew_at_its_size(
    counts: list[int], captured: list[int], graphs: ScaleGraphs, tokenizer: Tokenizer
) -> None:
    network, sizes = tiny_network(), []
    for count in counts:
        request = network, tokenizer, torch.arange(count), SETTINGS, image_keys(0, range(count))
        draw_images(*request, graphs=graphs)
        assert graphs.buffers is not None
        sizes.append(len(graphs.buffers.labels))
    assert sizes == captured


def test_another_precision_of_products_begins_anew(
    tokenizer: Tokenizer, graphs: ScaleGraphs, recorder: Recorder
) -> None:
    def replays(context: AbstractContextManager[None]) -> bool:
        before = recorder.replayed
        with context:
            request = network, tokenizer, torch.arange(2), SETTINGS, image_keys(0, range(2))
            tokens = draw_images(*request, graphs=graphs)[1]
            assert torch.equal(tokens, draw_images(*request)[1])
        return recorder.replayed > before

    @contextmanager
    def tf32() -> Iterator[None]:
        with exact_float32():  # restores the settings
            set_tf32(True)
            yield

    network = tiny_network()
    bfloat16, float16 = (partial(torch.autocast, "cpu", dtype) for dtype in (torch.bfloat16, torch.float16))
    contexts = [nullcontext, nullcontext, bfloat16, bfloat16, float16, tf32, tf32, nullcontext]
    expected = [False, True, False, True, False, False, True, False]
    assert [replays(context()) for context in contexts] == expected


def test_captures_use_a_stream_of_their_device_and_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins take the arguments of torch.cuda's functions."""
    captured = []

    class Capture:
        def __init__(
            self, graph: object, pool: object = None, stream: object = None, capture_error_mode: str = "global"
        ) -> None:
            self.arguments = pool, stream, capture_error_mode

        def __enter__(self) -> None:
            captured.append((*self.arguments, CAPTURING.locked()))

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    capture = CudaCapture(torch.device("cuda:1"))
    assert [capture(lambda: 5)[1] for _ in range(2)] == [5, 5]
    assert captured == [("pool", "stream of cuda:1", "thread_local", True)] * 2
    assert not CAPTURING.locked()


def test_steps_stay_as_drawn_and_a_batch_in_between_runs_without_graphs(
    tokenizer: Tokenizer, graphs: ScaleGraphs
) -> None:
    drawer = ScaleDrawer(tiny_network(), tokenizer.quantizer, SETTINGS)
    batches = [BatchInputs(torch.tensor([2, 5]), image_keys(seed, range(2)), None) for seed in range(3)]
    expected = [[*drawer.steps(batch)] for batch in batches]
    assert_same_steps(graphs.steps(drawer, batches[0]), expected[0])
    together = zip(*(graphs.steps(drawer, batch) for batch in batches[1:]), strict=True)
    for k, drawn in enumerate([*together]):
        assert_same_steps(iter(drawn), [expected[1][k], expected[2][k]])
    kept = [*graphs.steps(drawer, batches[1])]
    assert_same_steps(graphs.steps(drawer, batches[2]), expected[2])
    assert_same_steps(iter(kept), expected[1])
    abandoned = graphs.steps(drawer, batches[1])
    next(abandoned)
    abandoned.close()
    assert_same_steps(graphs.steps(drawer, batches[2]), expected[2])


def assert_same_steps(actual: Iterator[Step], expected: list[Step]) -> None:
    for step, other in zip([*actual], expected, strict=True):
        assert torch.equal(step.tokens, other.tokens)
        assert torch.equal(step.f_hat, other.f_hat)


def test_weights_that_change_in_place_are_used(tokenizer: Tokenizer, graphs: ScaleGraphs) -> None:
    network, keys = tiny_network(), image_keys(0, range(2))
    request = (network, tokenizer, torch.tensor([2, 5]), SETTINGS, keys)
    for _ in range(2):
        draw_images(*request, graphs=graphs)
    with torch.no_grad():
        network.head.bias.add_(torch.linspace(0, 3, 48))
    assert torch.equal(draw_images(*request, graphs=graphs)[1], draw_images(*request)[1])


def test_networks_on_the_cpu_have_no_graphs() -> None:
    assert graphs_for(tiny_network()) is None


@pytest.mark.cuda
@pytest.mark.parametrize("mixer", MIXERS)
def test_replays_on_a_gpu_draw_what_eager_batches_draw(mixer: str, tokenizer: Tokenizer) -> None:
    network, on_gpu = tiny_network(mixers=MIXERS[mixer]).cuda(), deepcopy(tokenizer).cuda()
    graphs = graphs_for(network)
    assert graphs is not None
    for seed in range(3):  # the first batch runs eagerly, the second is captured
        settings = SamplingSettings(seed=seed)
        request = (network, on_gpu, torch.tensor([0, 3, 9]).roll(seed), settings, settings.keys(range(3)))
        (images, tokens), (expected_images, expected_tokens) = (
            draw_images(*request, graphs=graphs),
            draw_images(*request),
        )
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(images, expected_images, rtol=1e-4, atol=1e-5)
