"""What is measured: networks of a published size, whole and by part.

Shapes: b images, l tokens, c code dim, d width, h heads, p head dim, n SSM state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_mvar.models.recurrences
import lightning_mvar.sampling.generate
from lightning_mvar.bench.measure import Run
from lightning_mvar.devices import DTYPES, Precision
from lightning_mvar.errors import InputError
from lightning_mvar.models.base import State
from lightning_mvar.models.config import BASELINES, MIXERS, SIZES, MVARConfig
from lightning_mvar.models.costs import META, count_flops, forward_flops, sampling_flops
from lightning_mvar.models.mvar import MVAR, UNDECAYED, Block, MVARState
from lightning_mvar.sampling.generate import generate, image_generators
from lightning_mvar.scales import ScaleSchedule, Shape, lengths_of
from lightning_mvar.tokenizer import Tokenizer, TokenizerConfig
from lightning_mvar.training.optim import OptimizerConfig, build_optimizer


@dataclass(frozen=True)
class Setting:
    """One column of a comparison; the arguments of `lightning-mvar bench` by the same names."""

    size: str = "d16"
    mixer: str = "mvar"
    resolution: int = 256
    batch_size: int = 4
    precision: Precision = "float32"
    depth: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name, known in (("size", SIZES), ("precision", DTYPES)):
            if getattr(self, name) not in known:
                raise InputError(f"bench: {name} {getattr(self, name)!r} is none of {', '.join(known)}")
        unknown = [name for name in self.blocks["mixers"] if name not in MIXERS]
        if unknown:
            raise InputError(
                f"bench: mixer {self.mixer!r} is none of {', '.join(BASELINES)}, and {unknown[0]!r} none to join with "
                f"+: {', '.join(MIXERS)}"
            )
        if self.batch_size < 1 or self.depth < 0:
            raise InputError(f"bench: batch_size {self.batch_size} or depth {self.depth} is too small")
        ScaleSchedule.for_resolution(self.resolution)

    def changed(self, changes: str) -> Setting:
        """With `changes`, such as "mixer=var,size=d24".

        Raises:
            InputError: for anything else.
        """
        types = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        values: dict[str, Any] = {}
        for change in changes.split(","):
            name, _, value = (part.strip() for part in change.partition("="))
            try:
                values[name] = {"true": True, "false": False}[value] if types[name] is bool else types[name](value)
            except (KeyError, ValueError) as error:
                raise InputError(
                    f"--versus {changes}: {change!r} is not NAME=VALUE with a name of {', '.join(types)}"
                ) from error
        return replace(self, **values)

    @property
    def blocks(self) -> dict[str, Any]:
        """What sets the network apart from others of its size."""
        return BASELINES.get(self.mixer) or {"mixers": tuple(self.mixer.split("+"))}

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def network(self) -> MVARConfig:
        config = MVARConfig.for_size(self.size, schedule=self.schedule, **self.blocks)
        return replace(config, depth=self.depth) if self.depth else config

    @property
    def tokenizer(self) -> TokenizerConfig:
        return TokenizerConfig(self.schedule)

    @property
    def schedule(self) -> ScaleSchedule:
        """The published one of the resolution; its last scale alone for a network in raster order."""
        published = ScaleSchedule.for_resolution(self.resolution)
        return ScaleSchedule(published.side_lengths[-1:]) if self.mixer == "ar_raster" else published


class Subject:
    """A network of a configuration on a device, and what can be done with it.

    Args:
        network: its configuration.
        tokenizer: of the tokenizer it samples with.
        batch_size: images at once.
        dtype: what sampling is lowered to; in training, weights are float32 and products in `dtype`.
        device: where.
    """

    def __init__(
        self,
        network: MVARConfig,
        tokenizer: TokenizerConfig,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
    ) -> None:
        self.network_config, self.tokenizer_config = network, tokenizer
        self.batch_size, self.dtype, self.device = batch_size, dtype, device
        self.labels = torch.arange(batch_size, device=device) % network.num_classes

    @cached_property
    def network(self) -> MVAR:
        with torch.device(self.device):
            return MVAR(self.network_config).eval().lower(self.dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        with torch.device(self.device):
            return Tokenizer(self.tokenizer_config).eval().requires_grad_(False).lower(self.dtype)

    def scale_inputs(self, batch_size: int) -> Tensor:
        """Random (b, l - n, c), for the n tokens of the first step."""
        config = self.network_config
        return torch.randn(batch_size, config.num_inputs, config.code_dim, device=self.device)

    def sample(self) -> Tensor:
        """Images (b, 3, H, W), guided."""
        generators = image_generators(0, range(self.batch_size))
        return generate(self.network, self.tokenizer, self.labels, generator=generators)

    @torch.no_grad()
    def step_through(self) -> MVARState:
        """The network's part of sampling alone, guided: 2 b images; its last state."""
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.network_config.num_classes)])
        state = self.network.init_state(labels)
        lengths = self.network_config.step_lengths[1:]
        for inputs in (None, *self.scale_inputs(len(labels)).split(lengths, dim=1)):
            _, state = self.network.step(inputs, state)
        return state

    def parts(self) -> list[tuple[Any, str, str]]:
        """What a profile tells apart; see `Stopwatch.watching`."""
        network, tokenizer = self.network, self.tokenizer
        parts: list[tuple[Any, str, str]] = [
            (lightning_mvar.sampling.generate, "draw", "drawing tokens"),
            (lightning_mvar.models.recurrences, "ssd", "scan"),
            (tokenizer, "decode_features", "decoder"),
            (tokenizer.quantizer, "accumulate", "residual pyramid"),
            (tokenizer.quantizer, "downsample", "residual pyramid"),
            (network, "logits", "head"),
        ]
        for block in network.blocks:
            parts += [(block, "forward", "AdaLN and residuals"), (block.mlp, "forward", "MLP")]
            parts += [(mixer, "forward", type(mixer).__name__) for mixer in block.mixers]  # type: ignore[union-attr]
        return parts

    def training_step(self) -> Run:
        """A function that takes one training step on random tokens (b, l)."""
        network = self.network.float().train()
        optimizer = build_optimizer(network, OptimizerConfig(), undecayed_names=UNDECAYED)
        schedule = self.network_config.schedule
        scale_inputs = self.scale_inputs(self.batch_size)
        shape = (self.batch_size, schedule.num_tokens)
        tokens = torch.randint(self.network_config.vocab_size, shape, device=self.device)

        def step() -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                losses, _ = network(self.labels, scale_inputs, tokens)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad()

        return step


def flops_per_image(network: MVARConfig, tokenizer: TokenizerConfig) -> dict[str, int]:
    """Counted operations: `forward` of a teacher-forced pass, `sampling` of the guided steps, and of the `decoder`."""
    decoder = Subject(network, tokenizer, 1, device=META).tokenizer
    f_hat = decoder.quantizer.empty(1)
    return {
        "forward": forward_flops(network),
        "sampling": sampling_flops(network),
        "decoder": count_flops(lambda: decoder.decode_features(f_hat)),
    }


def carried(mixer: nn.Module, x: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
    """A mixer over tokens x (b, l, d), scale by scale, with its state handed on."""
    state: State = None
    outputs = []
    for k, part in enumerate(x.split(lengths_of(shapes), dim=1)):
        y, state = mixer(part, shapes[k : k + 1], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def prefix_rerun(mixer: nn.Module, x: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
    """The same without a state: at every scale, the mixer over all tokens so far."""
    outputs, end = [], 0
    for k, n in enumerate(lengths_of(shapes)):
        end += n
        y, _ = mixer(x[:, :end], shapes[: k + 1], None)
        outputs.append(y[:, end - n :])
    return torch.cat(outputs, dim=1)


def operations(config: MVARConfig, x: Tensor) -> Iterator[tuple[str, Run, bool]]:
    """Name, what to run on tokens x (b, l, d) of one block, and whether it is what a training step does.

    The scan and the mixers with their backward pass, and Mamba in sampling with and without its state.
    """
    with x.device:
        block = Block(config, 0, 0.0).to(x.dtype)
    cond = torch.randn(len(x), config.width, device=x.device, dtype=x.dtype)
    shapes = config.step_shapes

    def both_ways(call: Run) -> Run:
        return lambda: call().float().square().mean().backward()  # type: ignore[attr-defined]

    x = x.requires_grad_()
    yield "block", both_ways(lambda: block(x, cond, shapes)[0]), True
    yield "mlp", both_ways(lambda: block.mlp(x)), True
    for name, mixer in zip(config.mixers_of(0), block.mixers, strict=True):
        yield name, both_ways(lambda mixer=mixer: mixer(x, shapes)[0]), True  # type: ignore[misc]
    if "mamba2" in config.mixers_of(0):
        mamba = block.mixers[config.mixers_of(0).index("mamba2")]
        yield "scan", both_ways(scan(config, x)), True
        yield "mamba2, state carried", torch.no_grad()(lambda: carried(mamba, x, shapes)), False
        yield "mamba2, prefix run again", torch.no_grad()(lambda: prefix_rerun(mamba, x, shapes)), False


def scan(config: MVARConfig, x: Tensor) -> Run:
    """The scan on random inputs of the size that x (b, l, d) gives it."""
    b, l, _ = x.shape
    p, n = config.head_dim, config.state_dim
    h = config.expand * config.width // p

    def random(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.randn(*shape, device=x.device, dtype=dtype).requires_grad_()

    u, B, C = random(b, l, h, p), random(b, l, n), random(b, l, n)
    dt = random(b, l, h, dtype=torch.float32)
    A = torch.linspace(-16, -1, h, device=x.device)
    return lambda: lightning_mvar.models.recurrences.ssd(u, F.softplus(dt), A, B, C)[0]
