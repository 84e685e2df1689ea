"""Initial weights from a trained network, adapted to other classes and another schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cached_property

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_mvar.checkpoints import StoredModel, WhichWeights, load_tokenizer, open_trained
from lightning_mvar.checkpoints.training import NetworkRecord
from lightning_mvar.data.classes import Classes, normalized
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import check_finite
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.scales import ScaleSchedule, Shape
from lightning_mvar.tokenizer.tokenizer import Tokenizer

# Fields of a network that may differ from those of its initial weights; all others change the meaning of the weights.
ADAPTABLE = ("schedule", "num_classes", "drop_path", "adaln_gate_init")


class Start:
    """Starting point of a run: random weights, a trained network, or a checkpoint that the run continues.

    Args:
        weights: path of the trained network; None for random weights.
        kind: for a checkpoint, `ema` uses the averaged weights if it has them, `raw` the last ones.
    """

    def __init__(self, weights: str | None, kind: WhichWeights) -> None:
        self.weights, self.kind = weights, kind
        self.continued: NetworkRecord | None = None  # describes the checkpoint, which replaces the trained network

    def continue_from(self, record: NetworkRecord) -> None:
        """Replaces the trained network, if any, by the checkpoint with this description."""
        self.continued = None if self.weights is None else record

    def share(self, strategy: Strategy) -> None:
        """Tells all ranks whether the run continues from a checkpoint; only rank 0 looks for one."""
        if self.weights is not None:
            self.continued = strategy.broadcast(self.continued)

    @cached_property
    def trained(self) -> StoredModel | None:
        return None if self.weights is None else open_trained(self.weights, weights=self.kind)

    @property
    def stored(self) -> StoredModel | None:
        """The trained network; None without one or in a run that continues from a checkpoint."""
        return self.trained if self.continued is None else None

    @property
    def config(self) -> MVARConfig | None:
        """Architecture of the trained network or of the checkpoint."""
        if self.continued is not None:
            return self.continued.network
        return None if self.stored is None else self.stored.config

    @property
    def tokenizer_folder(self) -> str | None:
        """Folder of the tokenizer of the trained network or of the checkpoint; None if unknown."""
        if self.continued is not None:
            return self.continued.tokenizer.path
        return None if self.stored is None else self.stored.tokenizer_folder


class InitialWeights:
    """Weights of a trained network, read block by block into a network that is being built.

    If the classes differ, the embeddings of classes with the same names and of the unconditional class are kept. If the
    schedule differs, the position embeddings of each scale are resized (bicubic), and scale embeddings are kept by
    index. New classes and new scales have random embeddings. Adaptations are logged.

    Args:
        stored: the trained network.
        config: architecture of the network to build.
        class_names: class names of the network to build, in label order.

    Raises:
        InputError: if the architectures differ in more than `ADAPTABLE`; names the first field.
    """

    def __init__(self, stored: StoredModel, config: MVARConfig, class_names: Sequence[str]) -> None:
        self.stored, self.config = stored, config
        for field in fields(MVARConfig):
            ours, theirs = getattr(config, field.name), getattr(stored.config, field.name)
            if field.name not in ADAPTABLE and ours != theirs:
                raise InputError(
                    f"{stored.source} does not fit this run: its {field.name} is {theirs}, not {ours}; leave out "
                    f"network.{field.name}, and use its tokenizer"
                )
        expected = stored.meta_network().state_dict()
        self.shapes = {name: tensor.shape for name, tensor in expected.items()}
        if different := sorted(expected.keys() ^ stored.weights.keys()):
            word = "lacks" if different[0] in expected else "has another weight:"
            raise InputError(f"{stored.source} does not fit its own architecture: it {word} {different[0]}")
        self.adapters: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}  # by name: (stored, initial) -> value
        kept = kept_classes(stored, class_names)
        if kept != list(range(stored.config.num_classes)):
            self.adapters["class_embed.weight"] = lambda value, initial: keep_classes(value, initial, kept)
            names = [name for name, label in zip(class_names, kept, strict=True) if label is not None]
            rank_zero_info(
                f"{stored.source} has {stored.config.num_classes} classes, this network {len(kept)}: the embeddings "
                f"of {len(names)} common classes and of the unconditional class are kept"
            )
        before, after = stored.config.schedule, config.schedule
        if before != after:
            first = (stored.config.step_shapes[0], config.step_shapes[0])
            self.adapters["start_embed"] = lambda value, initial: resize_map(value, *first)
            self.adapters["pos_embed"] = lambda value, initial: resize_positions(value, before, after)
            self.adapters["scale_embed.weight"] = keep_scales
            rank_zero_info(
                f"{stored.source} has side lengths {', '.join(before.names)}, this network {', '.join(after.names)}: "
                f"position embeddings are resized, {min(before.num_scales, after.num_scales)} of "
                f"{after.num_scales} scale embeddings are kept"
            )

    @torch.no_grad()
    def load(self, part: nn.Module, prefix: str) -> None:
        """Fills a block, or everything outside the blocks, with the stored weights; see `build_network`.

        Args:
            part: module with random weights.
            prefix: precedes the names of its weights in the network.

        Raises:
            InputError: if the weights cannot be read or are not finite.
        """
        for name, parameter in part.named_parameters():
            if not name.startswith("blocks."):  # blocks have already been filled and possibly sharded
                value, adapt = self.read(prefix + name), self.adapters.get(prefix + name)
                parameter.copy_(value if adapt is None else adapt(value, parameter.cpu()))

    def read(self, name: str) -> Tensor:
        """Reads one weight as float32; raises InputError if it has another shape or is not finite."""
        source, value, shape = self.stored.source, self.stored.weights[name], self.shapes[name]
        if value.shape != shape or not value.is_floating_point():
            raise InputError(f"{source} has {name} as {value.dtype} {tuple(value.shape)}, not float32 {tuple(shape)}")
        check_finite({name: value}, source)
        return value.float()


def check_tokenizer(
    stored: StoredModel, tokenizer: Tokenizer, path: str, remedy: str = "pass the right one with --model.tokenizer"
) -> None:
    """Checks that a tokenizer is the one with which a network was trained, possibly with another schedule.

    Raises:
        InputError: if it is a different one; the message ends with `remedy`.
    """
    expected, folder = stored.tokenizer_fingerprint, stored.tokenizer_folder
    if expected is None and folder is not None:
        expected = load_tokenizer(folder, stored.config.schedule).fingerprint()
    if expected not in (None, actual := tokenizer.with_schedule(stored.config.schedule).fingerprint()):
        raise InputError(f"{stored.source} was trained with tokenizer {expected}, but {path} holds {actual}: {remedy}")


def kept_classes(stored: StoredModel, names: Sequence[str]) -> list[int | None]:
    """Returns, for each class name, the label of the stored network's class with that name; None for a new class.

    Classes are the same if the lists of names are equal, or if there are equally many and one side only has numbers.
    """
    count = stored.config.num_classes
    if [*names] == stored.class_names:  # a name may occur twice
        return [*range(count)]
    known = Classes(stored.class_names, count)
    numbers = [str(label) for label in range(count)]
    if len(names) == count and ([*names] == numbers or known.aliases == [[number] for number in numbers]):
        return [*range(count)]
    found = [known.labels.get(normalized(name), []) for name in names]
    return [labels[0] if len(labels) == 1 else None for labels in found]


def keep_classes(value: Tensor, initial: Tensor, kept: Sequence[int | None]) -> Tensor:
    """Returns class embeddings (n + 1, d): stored ones (m + 1, d) for kept classes, initial ones for the others."""
    rows = [initial[i] if label is None else value[label] for i, label in enumerate(kept)]
    return torch.stack([*rows, value[-1]])


def keep_scales(value: Tensor, initial: Tensor) -> Tensor:
    """Returns scale embeddings (K, d): the stored ones, then initial ones for further scales."""
    return torch.cat([value[: len(initial)], initial[len(value) :]])


def resize_positions(value: Tensor, before: ScaleSchedule, after: ScaleSchedule) -> Tensor:
    """Resizes position embeddings (1, l, d) scale by scale; further scales are resized from the last stored one."""
    parts, last = value.split(before.lengths, dim=1), before.num_scales - 1
    sources = [min(k, last) for k in range(after.num_scales)]
    resized = [resize_map(parts[k], before.shapes[k], shape) for k, shape in zip(sources, after.shapes, strict=True)]
    return torch.cat(resized, dim=1)


def resize_map(value: Tensor, before: Shape, after: Shape) -> Tensor:
    """Resizes a map (1, h w, d) of embeddings bicubically to another height and width."""
    if before == after:
        return value
    grid = value.mT.unflatten(2, before)  # (1, d, h, w)
    return F.interpolate(grid, size=after, mode="bicubic", align_corners=False).flatten(2).mT
