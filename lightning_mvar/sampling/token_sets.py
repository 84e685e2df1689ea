"""Tokens of sampled images as token shards, for training and evaluation like those of `tokenize`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_mvar.data.images.names import visible
from lightning_mvar.data.tokens.manifest import MANIFEST, SAMPLED, Manifest
from lightning_mvar.data.tokens.mapped import SampleReader
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.writing import ShardFolder
from lightning_mvar.devices import is_first_rank, rank_and_world_size
from lightning_mvar.errors import InputError
from lightning_mvar.sampling.progress import DrawingBar
from lightning_mvar.sampling.sampler import Drawing, NumberedImages, drawn_pixels

# A set has about SHARDS shards: enough to divide among processes, and an interruption loses little.
SHARDS = 64
MIN_SHARD_SIZE, MAX_SHARD_SIZE = 100, 10_000


class TokenSet:
    """Tokens of a set of images, in a folder of token shards.

    The set has the first sample of each class, then the second of each, so every part of it is balanced. The key of a
    sample is the number of its image. All ranks must call each method.

    Args:
        folder: folder of the shards.
        drawing: the set.
        metadata: everything that determines the samples, see `draw_set`.

    Raises:
        InputError: if the folder holds other files.
    """

    def __init__(self, folder: Path, drawing: Drawing, metadata: dict[str, Any]) -> None:
        if is_first_rank() and not (folder / MANIFEST).is_file() and any(visible(folder.iterdir())):
            raise InputError(f"{folder} holds other files: choose another --tokens or remove that folder")
        self.drawing = drawing
        numbers = torch.arange(len(drawing.labels)).view(-1, drawing.per_class)
        self.order = numbers.T.flatten()  # (n,) number of the image of each sample
        self.shards = ShardFolder(folder, self.plan(metadata), "--tokens")

    def plan(self, metadata: dict[str, Any]) -> Manifest:
        """Returns the manifest, without shards yet."""
        count, sampler = len(self.order), self.drawing.sampler
        source = SAMPLED + " ".join(f"{name}={value}" for name, value in metadata.items())
        return Manifest(
            side_lengths=list(sampler.network.config.schedule.side_lengths),
            vocab_size=sampler.network.config.vocab_size,
            class_names=[*sampler.class_names] or [aliases[-1] for aliases in sampler.classes.aliases],
            tokenizer=metadata["network_tokenizer"],
            source=source,
            num_images=count,
            shard_size=min(max(-(-count // SHARDS), MIN_SHARD_SIZE), MAX_SHARD_SIZE),
            order=sha256(self.order.numpy().tobytes()).hexdigest(),
            listing=sha256(source.encode()).hexdigest(),
            precision=metadata["dtype"],
        )

    def fill(self, batch_size: int) -> None:
        """Draws the missing shards, each rank a share, and completes the folder."""
        size, drawing = self.shards.plan.shard_size, self.drawing
        numbers_of = {index: self.order[index * size : (index + 1) * size] for index in self.shards.missing()}
        rank, world_size = rank_and_world_size()
        suffix = f" (rank {rank} of {world_size})" if world_size > 1 else ""
        total = sum(map(len, numbers_of.values()))
        with DrawingBar(total, 0, desc=f"sample tokens{suffix}", disable=rank > 0) as bar:
            drawing.advance = bar.advance
            for index, numbers in numbers_of.items():
                tokens = []
                for part in numbers.split(batch_size):
                    drawn = drawing.draw_tokens(drawing.labels[part], part.tolist())
                    tokens.append(drawn.cpu().numpy().astype(np.uint16))
                    bar.complete(len(part))
                keys = [f"{number:06d}" for number in numbers.tolist()]
                self.shards.write(index, np.concatenate(tokens), drawing.labels[numbers].numpy(), keys)
        self.shards.finish()

    def batches(self, numbers: list[int], batch_size: int) -> Iterator[NumberedImages]:
        """Decodes this rank's share of the images with the given numbers; all tokens must have been drawn."""
        rank, world_size = rank_and_world_size()
        samples = self.order.argsort()[numbers].sort().values  # in the order in which they are stored
        source = LocalShards(self.shards.folder)
        manifest = source.manifest()
        fetch = partial(source.fetch, verify=False)  # `ShardFolder.missing` has verified the existing shards
        with closing(SampleReader(manifest, range(len(manifest.shards)), fetch, {}, ahead=1)) as reader:
            for part in samples.split(batch_size)[rank::world_size] if numbers else ():
                tokens = torch.from_numpy(reader.read(part.numpy())[0].astype(np.int64))
                yield self.order[part].tolist(), drawn_pixels(self.drawing.sampler.decode(tokens))
