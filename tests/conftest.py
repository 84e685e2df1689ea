"""What the tests share: a tiny network and tokenizer, token shards, a folder of pictures, a feature extractor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lightning_mvar import MVAR, MVARConfig, ScaleSchedule, Tokenizer, TokenizerConfig
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.data.tokens.shards import Manifest, shard_name, write_shard

CLASSES = ["dark", "light", "mixed"]
SCHEDULE = ScaleSchedule((1, 2, 3, 4))
OBLONG = ScaleSchedule((1, (1, 2), 3, (3, 6)))  # as many tokens
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


def tiny_network(schedule: ScaleSchedule = SCHEDULE, **overrides: object) -> MVAR:
    """Depth 2, width 64, weights large enough that every part matters to the output."""
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
    """8 x 8 images, features 4 x 4."""
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


def random_tokens(count: int, seed: int = 0, vocab_size: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count, SCHEDULE.num_tokens), generator=generator)


def write_token_shards(folder: Path, fingerprint: str, sizes: list[int], classes: int = 10) -> Manifest:
    """Shards of `sizes` samples; the first token of sample i is i, so that an order can be read off."""
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
    """Two classes of 40 x 20 pictures, every suffix, one of them in a folder of its own."""
    rng = np.random.default_rng(0)
    for name in ("b/1.png", "b/2.jpg", "a/deep/3.jpeg", "a/4.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "a/notes.txt").write_text("not an image")
    return tmp_path


class Pixels(nn.Module):
    """A feature extractor of 8 x 8 images: the grey value of each quarter."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pool(images).mean(dim=1).flatten(1) * self.weight


class Brightness(nn.Module):
    """A classifier of ten classes: the brighter an image, the higher its class."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -(images.mean(dim=(1, 2, 3))[:, None] * 20 - torch.arange(10) - 5).square()


class Projection(nn.Module):
    """A one-layer feature extractor of 8 x 8 images."""

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
                init_args: {{extractor: {{class_path: conftest.Pixels}}, reference: images, num_samples: 13,
                             batch_size: 3}}}}]}}
model: {{tokenizer: {tokenizer}, ema_decay: 0.9, optimizer: {{base_lr: 0.05}},
  network: {{schedule: {{side_lengths: [1, 2, 3, 4]}}, vocab_size: 48, code_dim: 8, num_classes: 10, depth: 2,
             width: 32, heads: 2, head_dim: 16}}}}
data: {{train: shards, val: shards, batch_size: 16}}
"""


@pytest.fixture
def run_folder(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> Path:
    """A folder in which `fit --config run.yaml` trains for twelve steps, four epochs of three batches."""
    prepare_run(tmp_path, tokenizer, tokenizer_folder)
    return tmp_path


@pytest.fixture
def plain_run_folder(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> Path:
    """The same without samples and scores, for what has nothing to do with them."""
    prepare_run(tmp_path, tokenizer, tokenizer_folder, draws=False)
    return tmp_path


def prepare_run(folder: Path, tokenizer: Tokenizer, tokenizer_folder: Path, draws: bool = True) -> None:
    """Write a run.yaml and what it names; without `draws` it is a faster one that draws nothing while training."""
    write_token_shards(folder / "shards", tokenizer.fingerprint(), [20, 20, 12])
    write_images(folder / "images")
    text = RUN_YAML.format(tokenizer=tokenizer_folder)
    begin, end = text.index("{class_path: lightning_mvar.callbacks.SamplesCallback"), text.index("]}\nmodel")
    (folder / "run.yaml").write_text(text if draws else text[:begin] + text[end:])


def scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves as it shows them, steps and values, but for those of the time that things took."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def pictures(logs: Path, tag: str) -> list[bytes]:
    """TensorBoard's images, encoded."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"images": 0})
    events.Reload()
    return [event.encoded_image_string for event in events.Images(tag)]
