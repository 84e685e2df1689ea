"""Subjects of the benchmarks: networks of published sizes, as a whole and by part.

Shapes: b images, l tokens, c code dim, d width, h heads, p head dim, n SSM state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_mvar.ops.mamba2
import lightning_mvar.sampling.steps
from lightning_mvar.bench.measure import Run
from lightning_mvar.bench.parts import Part
from lightning_mvar.cli.tables import Record
from lightning_mvar.devices import DTYPES, Precision
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.models.base import State
from lightning_mvar.models.config import BASELINES, MIXERS, SIZES, MVARConfig
from lightning_mvar.models.costs import META, count_flops, forward_flops
from lightning_mvar.models.mvar import MVAR, Block, MVARState
from lightning_mvar.models.parameters import UNDECAYED, lower_precision
from lightning_mvar.sampling.generate import draw_images
from lightning_mvar.sampling.graphs import ScaleGraphs, graphs_for
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.scales import ScaleSchedule, Shape, lengths_of
from lightning_mvar.tokenizer import Tokenizer, TokenizerConfig
from lightning_mvar.training.optim import OptimizerConfig, build_optimizer


@dataclass(frozen=True)
class Setting:
    """One column of a comparison; its fields, except `narrow`, are arguments of `lightning-mvar bench`.

    A `narrow` network has width 64 and a decoder with 32 channels, so it runs the same operations faster.
    """

    size: str = "d16"
    mixer: str = "mvar"
    resolution: int = 256
    batch_size: int = 4
    precision: Precision = "float32"
    depth: int = 0
    compile: bool = False
    graphs: bool = True
    narrow: bool = False
    guidance_off_from: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("size", SIZES), ("precision", DTYPES)):
            if getattr(self, name) not in known:
                raise InputError(f"bench: {name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        unknown = [name for name in self.blocks["mixers"] if name not in MIXERS]
        if unknown:
            raise InputError(
                f"bench: mixer {self.mixer!r} is unknown; choose one of {', '.join(BASELINES)}, or replace "
                f"{unknown[0]!r} by mixers joined with +: {', '.join(MIXERS)}"
            )
        require_in("[1, inf)", "bench: ", batch_size=self.batch_size)
        require_in("[0, inf)", "bench: ", depth=self.depth)
        ScaleSchedule.for_resolution(self.resolution)
        self.sampling.check(self.network)

    def with_changes(self, changes: str) -> Setting:
        """Returns a copy with `changes`, such as "mixer=var,size=d24".

        Raises:
            InputError: if `changes` is malformed, or has an unknown name or an invalid value.
        """
        current = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "narrow"}
        types = {name: int if value is None else type(value) for name, value in current.items()}
        values: dict[str, Any] = {}
        for change in changes.split(","):
            name, _, value = (part.strip() for part in change.partition("="))
            try:
                values[name] = {"true": True, "false": False}[value] if types[name] is bool else types[name](value)
            except (KeyError, ValueError) as error:
                raise InputError(
                    f"--versus {changes}: {change!r} is not NAME=VALUE; the names are {', '.join(types)}"
                ) from error
        return replace(self, **values)

    @property
    def blocks(self) -> dict[str, Any]:
        """Returns the config options that distinguish the network from others of its size."""
        return BASELINES.get(self.mixer) or {"mixers": tuple(self.mixer.split("+"))}

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def network(self) -> MVARConfig:
        config = MVARConfig.for_size(self.size, schedule=self.schedule, **self.blocks)
        config = replace(config, width=64, heads=1) if self.narrow else config
        return replace(config, depth=self.depth) if self.depth else config

    @property
    def tokenizer(self) -> TokenizerConfig:
        return TokenizerConfig(self.schedule, channels=32 if self.narrow else TokenizerConfig.channels)

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(guidance_off_from=self.guidance_off_from)

    @property
    def schedule(self) -> ScaleSchedule:
        """Returns the published schedule of the resolution; only its last scale for a network in raster order."""
        published = ScaleSchedule.for_resolution(self.resolution)
        return ScaleSchedule(published.side_lengths[-1:]) if self.mixer == "ar_raster" else published


class Subject:
    """A network and a tokenizer with random weights, and the runs to measure with them.

    Args:
        network: configuration of the network.
        tokenizer: configuration of the tokenizer it samples with.
        batch_size: images per batch.
        dtype: dtype of sampling; in training, weights are float32 and matrix products use `dtype`.
        device: device of both.
        graphs: whether to sample with CUDA graphs, if the device is a GPU.
        sampling: settings to sample with.
    """

    def __init__(
        self,
        network: MVARConfig,
        tokenizer: TokenizerConfig,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
        graphs: bool = False,
        sampling: SamplingSettings = SamplingSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self.network_config, self.tokenizer_config, self.with_graphs = network, tokenizer, graphs
        self.sampling = sampling
        self.batch_size, self.dtype, self.device = batch_size, dtype, device
        self.labels = torch.arange(batch_size, device=device) % network.num_classes

    @cached_property
    def network(self) -> MVAR:
        with torch.device(self.device):
            return lower_precision(MVAR(self.network_config).eval(), self.dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        with torch.device(self.device):
            return Tokenizer(self.tokenizer_config).eval().requires_grad_(False).lower(self.dtype)

    @cached_property
    def graphs(self) -> ScaleGraphs | None:
        return graphs_for(self.network) if self.with_graphs else None

    def scale_inputs(self, batch_size: int) -> Tensor:
        """Returns random inputs (b, l - n, c); n is the number of tokens of the first step."""
        config = self.network_config
        return torch.randn(batch_size, config.num_inputs, config.code_dim, device=self.device)

    def sample(self) -> Tensor:
        """Samples images (b, 3, H, W)."""
        labels = torch.arange(self.batch_size) % self.network_config.num_classes
        keys = self.sampling.keys(range(self.batch_size))
        return draw_images(self.network, self.tokenizer, labels, self.sampling, keys, graphs=self.graphs)[0]

    @torch.no_grad()
    def before_last_step(self) -> tuple[Tensor | None, MVARState]:
        """Runs all steps but the last on random inputs; returns the inputs (b, n, c) of the last, and its state."""
        config, inputs, state = self.network_config, None, self.network.init_state(self.labels)
        for n in config.step_lengths[1:]:
            _, state = self.network.step(inputs, state)
            inputs = torch.randn(self.batch_size, n, config.code_dim, device=self.device)
        return inputs, state

    def parts(self) -> list[Part]:
        """Returns the parts that a profile distinguishes."""
        network, tokenizer = self.network, self.tokenizer
        outside: list[Part] = [
            (lightning_mvar.sampling.steps, "draw", "drawing tokens"),
            (tokenizer, "decode_features", "decoder"),
            (tokenizer.quantizer, "accumulate", "residual pyramid"),
            (tokenizer.quantizer, "downsample", "residual pyramid"),
            (network, "logits", "head"),
        ]
        return [*outside, *self.block_parts()]

    def block_parts(self) -> list[Part]:
        """Returns the parts inside blocks."""
        parts: list[Part] = [(lightning_mvar.ops.mamba2, "ssd", "scan")]
        for block in self.network.blocks:
            parts.append((block, "forward", "AdaLN and residuals"))
            parts += [(layer, "forward", "MLP") for layer in block.mlp]  # type: ignore[union-attr]
            parts += [(mixer, "forward", type(mixer).__name__) for mixer in block.mixers]  # type: ignore[union-attr]
        return parts

    def training_step(self) -> TrainingStep:
        return TrainingStep(self)


class TrainingStep:
    """A training step of a subject on random tokens (b, l): forward and backward pass, clipping and AdamW."""

    def __init__(self, subject: Subject) -> None:
        self.subject, config = subject, subject.network_config
        self.network = subject.network.float().train()
        self.optimizer = build_optimizer(self.network, OptimizerConfig(), undecayed_names=UNDECAYED)
        self.scale_inputs = subject.scale_inputs(subject.batch_size)
        shape = (subject.batch_size, config.schedule.num_tokens)
        self.tokens = torch.randint(config.vocab_size, shape, device=subject.device)

    def __call__(self) -> None:
        subject = self.subject
        with torch.autocast(subject.device.type, subject.dtype, enabled=subject.dtype != torch.float32):
            losses, _ = self.network.score(subject.labels, self.scale_inputs, self.tokens)
        losses.mean().backward()
        self.update()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_subject(setting: Setting, device: torch.device) -> Subject:
    shape = setting.network, setting.tokenizer, setting.batch_size
    return Subject(*shape, setting.dtype, device, setting.graphs, setting.sampling)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def setting_record(what: str, setting: Setting, device: torch.device) -> Record:
    return {
        "what": what,
        **asdict(setting),
        "depth": setting.network.depth,
        "device": device_name(device),
        "torch": torch.__version__,
    }


def flops_per_image(network: MVARConfig, tokenizer: TokenizerConfig) -> dict[str, int]:
    """Counts FLOPs per image: `forward` (teacher-forced pass), `decoder` and `encoder`."""
    codec = Subject(network, tokenizer, 1, device=META).tokenizer
    f_hat, images = codec.quantizer.empty(1), torch.empty(1, 3, *tokenizer.shape, device=META)
    return {
        "forward": forward_flops(network),
        "decoder": count_flops(lambda: codec.decode_features(f_hat)),
        "encoder": count_flops(lambda: codec.features(images)),
    }


def run_with_state(mixer: nn.Module, x: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
    """Runs a mixer over tokens x (b, l, d) scale by scale with carried state."""
    state: State = None
    outputs = []
    for k, part in enumerate(x.split(lengths_of(shapes), dim=1)):
        y, state = mixer(part, shapes[k : k + 1], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def rerun_prefix(mixer: nn.Module, x: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
    """Runs a mixer over tokens x (b, l, d) without state: at each scale, over all tokens up to it."""
    outputs, end = [], 0
    for k, n in enumerate(lengths_of(shapes)):
        end += n
        y, _ = mixer(x[:, :end], shapes[: k + 1], None)
        outputs.append(y[:, end - n :])
    return torch.cat(outputs, dim=1)


def block_operations(config: MVARConfig, x: Tensor) -> Iterator[tuple[str, Run, bool]]:
    """Yields (name, run, is training) for the operations of one block on tokens x (b, l, d).

    Training runs the block, its mixers and the scan with their backward passes; sampling runs Mamba with and without
    carried state.
    """
    with x.device:
        block = Block(config, 0).to(x.dtype)
    cond = torch.randn(len(x), config.width, device=x.device, dtype=x.dtype)
    shapes = config.step_shapes

    def forward_backward(call: Run) -> Run:
        return lambda: call().float().square().mean().backward()  # type: ignore[attr-defined]

    x = x.requires_grad_()
    yield "block", forward_backward(lambda: block(x, cond, shapes)[0]), True
    yield "mlp", forward_backward(lambda: block.mlp(x)), True
    for name, mixer in zip(config.mixers_of(0), block.mixers, strict=True):
        yield name, forward_backward(lambda mixer=mixer: mixer(x, shapes)[0]), True  # type: ignore[misc]
    if "mamba2" in config.mixers_of(0):
        mamba = block.mixers[config.mixers_of(0).index("mamba2")]
        yield "scan", forward_backward(scan(config, x)), True
        yield "mamba2, state carried", torch.no_grad()(lambda: run_with_state(mamba, x, shapes)), False
        yield "mamba2, prefix recomputed", torch.no_grad()(lambda: rerun_prefix(mamba, x, shapes)), False


def scan(config: MVARConfig, x: Tensor) -> Run:
    """Returns a run of the scan on random inputs, with the shapes it has for tokens x (b, l, d)."""
    b, l, _ = x.shape
    p, n = config.head_dim, config.state_dim
    h = config.expand * config.width // p

    def random(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.randn(*shape, device=x.device, dtype=dtype).requires_grad_()

    u, B, C = random(b, l, h, p), random(b, l, n), random(b, l, n)
    dt = random(b, l, h, dtype=torch.float32)
    A = torch.linspace(-16, -1, h, device=x.device)
    return lambda: lightning_mvar.ops.mamba2.ssd(u, F.softplus(dt), A, B, C)[0]
