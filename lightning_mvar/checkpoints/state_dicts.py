"""State dicts of published networks and tokenizers, on their own or inside the checkpoints of trainers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lightning_mvar.checkpoints.published import tokenizer_from_published
from lightning_mvar.errors import InputError
from lightning_mvar.io.hub import locate
from lightning_mvar.io.tensors import StateDict, read_any
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer

PARTS = {  # a key that identifies each part, and the names of the part in published trainers
    "network": ("word_embed.weight", {"mvar_wo_ddp", "var_wo_ddp"}),
    "tokenizer": ("quantize.embedding.weight", {"vae_local"}),
}
WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def load_official_tokenizer(source: str | Path | Mapping[str, Tensor], schedule: ScaleSchedule) -> Tokenizer:
    """Loads a published tokenizer in eval mode; its configuration, except the schedule, follows from keys and shapes.

    Args:
        source: a .pth or .safetensors file, its name on the Hub, or a state dict with the published keys.
        schedule: scale schedule to use it with; the weights do not contain it.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of the published tokenizer.
    """
    state, name = read_published_state(source, "tokenizer")
    return tokenizer_from_published(state, schedule, name)


def read_published_state(source: str | Path | Mapping[str, Tensor], part: str) -> tuple[StateDict, str]:
    """Returns a flat state dict and a name for messages, from a file or a dictionary in memory.

    Weights may be anywhere in nested dictionaries, as trainers save them: `trainer`, `model`, `state_dict`, `ema`.
    Weights under the part's own name take precedence, then averaged ones. Prefixes of wrapped or compiled modules are
    removed, as is a prefix such as `model.`. Other contents are ignored.

    Raises:
        InputError: if the file cannot be read or holds no named tensors.
    """
    name, content = f"the {part} state dict", cast(Any, source)
    if isinstance(source, str | Path):
        name, content = str(source), read_any(locate(source).path)
    mark, own_names = PARTS[part]
    places = [*state_dicts(content)]
    if not places:
        raise InputError(f"{name} is not a state dict of a published {part}")
    places.sort(key=lambda place: (own_names.isdisjoint(place[0]), not any("ema" in str(key) for key in place[0])))
    marked = [state for _, state in places if any(f".{key}".endswith(f".{mark}") for key in state)]
    state = marked[0] if marked else places[0][1]
    prefix = next((key.removesuffix(mark) for key in state if f".{key}".endswith(f".{mark}")), "")
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}, name


def state_dicts(content: Any) -> Iterator[tuple[tuple[Any, ...], StateDict]]:
    """Yields the path and the named tensors of each nested dictionary that has any, outermost first."""
    pending: list[tuple[tuple[Any, ...], Any]] = [((), content)]
    seen: set[int] = set()  # dictionaries of a file may refer to each other
    for path, values in pending:
        if isinstance(values, Mapping) and id(values) not in seen:
            seen.add(id(values))
            pending.extend(((*path, key), part) for key, part in values.items())
            named = [key for key, part in values.items() if isinstance(key, str) and isinstance(part, Tensor)]
            if named:
                yield path, {WRAPPERS.sub("", key): values[key] for key in named}
