"""Shared fixtures and helpers: a tiny network and tokenizer, token shards, image folders, feature extractors."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

# Triton reads it when it is imported: on a CPU its kernels run in its interpreter, in the workers of xdist too.
os.environ.setdefault("TRITON_INTERPRET", str(int("cuda" not in sys.argv)))

import lightning.pytorch  # noqa: F401 (here, because its log handler writes to the stderr of the import, for good)
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mvar import MVAR, MVARConfig, ScaleSchedule, Tokenizer, TokenizerConfig
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.data.tokens.manifest import Manifest, shard_name
from lightning_mvar.data.tokens.shards import write_shard

CLASSES = ["dark", "light", "mixed"]
SCHEDULE = ScaleSchedule((1, 2, 3, 4))
OBLONG = ScaleSchedule((1, (1, 2), 3, (3, 6)))  # 30 tokens, like SCHEDULE
MIXERS = {"mvar": ("scale_attention", "mamba2"), "var": ("block_causal_attention",)}
VARIANTS = [
    {"mixers": MIXERS["mvar"]},
    {"mixers": MIXERS["mvar"], "qk_norm": False},
    {"mixers": MIXERS["var"]},
    {"mixers": MIXERS["var"], "shared_adaln": True},
    {"mixers": ("mamba2",)},
    {"mixers": ("mamba2", "scale_attention"), "parallel": True},
    {"mixers": (("scale_attention", "mamba2"), ("scale_attention",))},
    {"mixers": ("window_attention", "mamba2")},
    {"mixers": ("scale_mamba", "mamba2")},
    {"mixers": ("scale_attention", "markov_attention")},
    *({"mixers": ("scale_attention", across)} for across in ("mamba1", "gated_linear_attention", "linear_attention")),
    *({"scan_order": order} for order in ("column", "alternating", "both")),
    {"mixers": ("mamba1",), "scan_order": "both"},
    {"mixers": ("gated_linear_attention",), "scan_order": "alternating"},
    {"mixers": ("block_causal_attention",), "prediction": "token"},
    {"mixers": ("mamba2", "markov_attention", "linear_attention"), "prediction": "token"},
]


def pytest_configure(config: pytest.Config) -> None:
    """Hides all GPUs from this process and its children unless only tests marked `cuda` are selected.

    All other tests compare results that are exact on a CPU alone. Runs before anything asks for a GPU, which is when
    CUDA reads the variable. Garbage collection is off until all tests are collected: the imports leave little garbage.
    """
    gc.disable()
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, which only `pytest -m cuda` can see")


LONGEST_FILES = [  # tens of seconds each
    *("test_resume.py", "test_sweep.py", "test_tokenizer_strategies.py", "test_strategies.py", "test_notebooks.py"),
    *("test_sample.py", "test_starting.py", "test_evaluate.py", "test_training_configs.py", "test_configs.py"),
    *("test_costs.py", "test_launchers.py", "test_tokenize.py", "test_serve.py", "test_lit_tokenizer.py"),
    *("test_errors.py", "test_background.py", "test_bench.py", "test_mamba2_kernels.py", "test_page.py"),
    *("test_export.py", "test_python_users.py", "test_checkpoint.py", "test_fuzz.py"),
    *("test_objectives.py", "test_weights.py", "test_muon.py"),
]


def pytest_runtest_teardown() -> None:
    """Removes what Lightning leaves in the environment of a process that starts ranks, which looks like a rank then."""
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the longest files first, so that no process of xdist works long after the others have ended."""
    place = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """Exempts all that is imported from garbage collection, which every in-process run of Lightning asks for."""
    gc.enable()
    gc.collect()
    gc.freeze()


def tiny_network(schedule: ScaleSchedule = SCHEDULE, **overrides: object) -> MVAR:
    """Builds a network of depth 2 and width 64, whose weights are large enough that every part affects the output."""
    torch.manual_seed(0)
    config = {"depth": 2, "width": 64, "heads": 2, "vocab_size": 48, "code_dim": 8, "num_classes": 10}
    network = MVAR(MVARConfig(schedule, **(config | {"head_dim": 32} | overrides)))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 / parameter.shape[-1] ** 0.25)
    return network.eval()


@pytest.fixture(params=MIXERS)
def network(request: pytest.FixtureRequest) -> MVAR:
    return tiny_network(mixers=MIXERS[request.param])


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Tokenizer of 8 x 8 images and 4 x 4 features."""
    torch.manual_seed(1)
    config = TokenizerConfig(SCHEDULE, 48, 8, channels=8, multipliers=(1, 2), blocks=1, num_phi=3)
    tokenizer = Tokenizer(config).eval().requires_grad_(False)
    tokenizer.quantizer.codebook.weight.copy_(torch.randn(48, 8))
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_folder(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token shards of 52 samples, for tests that only read them."""
    folder = tmp_path_factory.mktemp("shards")
    write_token_shards(folder, tokenizer.fingerprint(), [20, 20, 12])
    return str(folder)


def random_tokens(count: int, seed: int = 0, vocab_size: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count, SCHEDULE.num_tokens), generator=generator)


def random_image(size: tuple[int, int] = (8, 8), seed: int = 0) -> Image.Image:
    """Returns an image of width and height `size`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def stack_images(images: list[Image.Image]) -> np.ndarray:
    """Returns (n, H, W, 3) int64, which is safe to subtract."""
    return np.stack([np.asarray(image) for image in images]).astype(int)


def storages_of(values: object) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the results computed under it that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages_of((args, kwargs))}
        for storage in storages_of(results):
            if storage._cdata not in given and storage.device.type != "meta":  # no view of a weight
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return results

    def bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the maximum error relative to the largest expected magnitude."""
    actual, expected = actual.detach().float(), expected.detach().float()
    return float((actual - expected).abs().max() / expected.abs().max())


def write_token_shards(folder: Path, fingerprint: str, sizes: list[int], classes: int = 10) -> Manifest:
    """Writes one shard per entry of `sizes`; the first token of sample i is i % 48, which reveals the order."""
    manifest = Manifest(
        list(SCHEDULE.side_lengths), 48, [str(c) for c in range(classes)], fingerprint, "test", sum(sizes), max(sizes)
    )
    begin = 0
    for index, size in enumerate(sizes):
        tokens = random_tokens(size, seed=index).numpy().astype(np.uint16)
        ids = np.arange(begin, begin + size)
        tokens[:, 0] = ids % 48
        shard = write_shard(folder / shard_name(index), tokens, ids % classes, [f"image{i}" for i in ids])
        manifest.shards.append(shard)
        begin += size
    manifest.save(folder)
    return manifest


def write_images(root: Path, per_class: int = 6) -> None:
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(80 * label, 80 * label + 90, (10, 14, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Folder of two classes of 40 x 20 images, with all suffixes and one nested folder."""
    rng = np.random.default_rng(0)
    for name in ("b/1.png", "b/2.jpg", "a/deep/3.jpeg", "a/4.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "a/notes.txt").write_text("not an image")
    return tmp_path


class Pixels(nn.Module):
    """Feature extractor of 8 x 8 images: the gray value of each quadrant."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pool(images).mean(dim=1).flatten(1) * self.weight


class Brightness(nn.Module):
    """Classifier of ten classes: the brighter an image, the higher its class."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -(images.mean(dim=(1, 2, 3))[:, None] * 20 - torch.arange(10) - 5).square()


class Projection(nn.Module):
    """One-layer feature extractor of 8 x 8 images; counts its calls."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, self.num_features)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(nn.functional.adaptive_avg_pool2d(images, 8).flatten(1))


RUN_YAML = """
trainer: {{accelerator: cpu, max_steps: 12, val_check_interval: 4, check_val_every_n_epoch: null, log_every_n_steps: 1,
  default_root_dir: run, enable_progress_bar: false, enable_model_summary: false, num_sanity_val_steps: 0,
  gradient_clip_val: 2.0,
  logger: {{class_path: lightning.pytorch.loggers.TensorBoardLogger,
            init_args: {{save_dir: "${{trainer.default_root_dir}}", name: "", version: logs}}}},
  callbacks: [{{class_path: lightning_mvar.callbacks.Checkpoint,
                init_args: {{dirpath: "${{trainer.default_root_dir}}/checkpoints", every_n_train_steps: 3}}}},
              {{class_path: lightning_mvar.callbacks.SamplesCallback, init_args: {{classes: 3, per_class: 2}}}},
              {{class_path: lightning_mvar.callbacks.FIDCallback,
                init_args: {{extractor: {{class_path: conftest.Pixels}}, reference: images, num_samples: 7,
                             batch_size: 3}}}}]}}
model: {{tokenizer: {tokenizer}, ema_decay: 0.9, optimizer: {{base_lr: 0.05}},
  network: {{schedule: {{side_lengths: [1, 2, 3, 4]}}, vocab_size: 48, code_dim: 8, num_classes: 10, depth: 2,
             width: 32, heads: 2, head_dim: 16}}}}
data: {{train: shards, val: shards, batch_size: 16}}
"""


@pytest.fixture
def run_folder(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> Path:
    """Folder in which `fit --config run.yaml` trains for twelve steps: four epochs of three batches."""
    prepare_run(tmp_path, tokenizer, tokenizer_folder)
    return tmp_path


@pytest.fixture
def plain_run_folder(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> Path:
    """Folder like `run_folder`, but without samples and scores, and with short validations, so it is faster."""
    prepare_run(tmp_path, tokenizer, tokenizer_folder, draws=False)
    return tmp_path


def prepare_run(folder: Path, tokenizer: Tokenizer, tokenizer_folder: Path, draws: bool = True) -> None:
    """Writes a run.yaml with its shards and images; without `draws`, validations are one batch and draw no samples."""
    write_token_shards(folder / "shards", tokenizer.fingerprint(), [20, 20, 12])
    write_images(folder / "images")
    text = RUN_YAML.format(tokenizer=tokenizer_folder)
    begin, end = text.index("{class_path: lightning_mvar.callbacks.SamplesCallback"), text.index("]}\nmodel")
    plain = (text[:begin] + text[end:]).replace("trainer: {", "trainer: {limit_val_batches: 1, ")
    (folder / "run.yaml").write_text(text if draws else plain)


def scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the (step, value) pairs of each TensorBoard scalar, except timings (`perf/`)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def pictures(logs: Path, tag: str) -> list[bytes]:
    """Returns the encoded TensorBoard images of a tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"images": 0})
    events.Reload()
    return [event.encoded_image_string for event in events.Images(tag)]
