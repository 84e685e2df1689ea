"""State dicts in the format of the published code, with weights computed by tests/parity/recipe.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from parity.recipe import BUFFERS, tensor

from lightning_mvar import ScaleSchedule

FOLDER = Path(__file__).parent / "parity"
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
SCHEDULE = ScaleSchedule((1, 2, 3, 4))


def official_weights(shapes: dict[str, list[int]], schedule: ScaleSchedule) -> dict[str, torch.Tensor]:
    weights = {}
    for key, shape in shapes.items():
        if key == "lvl_1L":
            weights[key] = schedule.scale_ids[None]
        elif key.rsplit(".", 1)[-1] in BUFFERS:
            weights[key] = torch.zeros(shape)
        else:
            weights[key] = torch.from_numpy(tensor(key, tuple(shape)))
    return weights


def published(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the state dicts of network and tokenizer in the format of the published code."""
    reference = json.loads((FOLDER / f"{case}.json").read_text())
    return official_weights(reference["official_keys"], SCHEDULE), official_weights(reference["vqvae_keys"], SCHEDULE)
