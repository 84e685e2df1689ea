"""Writes the folder of a finished sweep with known numbers: three mixers, two depths, three seeds."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lightning_mvar.io.hparams import row_summary
from lightning_mvar.models.costs import Costs

MIXERS, DEPTHS, SEEDS = ("mvar", "var", "markov"), ("2", "10"), (0, 1, 2)
SIDES, BATCH, STEPS = (1, 2, 4), 16, (3, 7, 11)
CONDITIONS = {
    "reference": "digits:test",
    "extractor": "DigitsClassifier",
    "extractor_weights": "3180",
    "num_samples": 200,
}
SWEEP_YAML = """# Three mixers at two depths.
fit: --config run.yaml
evaluate: --reference digits:test
axes:
  mixer: [configs/mixer/mvar.yaml, configs/mixer/var.yaml, configs/mixer/markov.yaml]
  model.network.depth: [2, 10]
seeds: [0, 1, 2]
"""

# Per mixer: offset of loss and distance, and their variation over seeds.
OFFSETS = {"mvar": 0.0, "var": 0.1, "markov": 0.02}
NOISE = {"mvar": (0.01, -0.02, 0.03), "var": (0.02, -0.03, 0.03), "markov": (0.03, 0.01, -0.05)}


def loss(mixer: str, depth: str, seed: int, step: int = STEPS[-1]) -> float:
    """Returns the validation loss of a cell at a step."""
    return 2.0 + OFFSETS[mixer] - 0.01 * int(depth) + NOISE[mixer][seed] + 1.0 / (1 + step)


def distance(mixer: str, depth: str, seed: int) -> float:
    return 40.0 + 100 * OFFSETS[mixer] - int(depth) + 50 * NOISE[mixer][seed]


def scale_loss(mixer: str, depth: str, seed: int, side: int) -> float:
    return loss(mixer, depth, seed) * (1 + side / 100)


def parameters(mixer: str, depth: str) -> int:
    return (100_000 + 10_000 * MIXERS.index(mixer)) * int(depth)


def write_sweep(folder: Path) -> Path:
    """Writes all eighteen cells, each finished at its first attempt in 60 seconds."""
    (folder / "cells").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(SWEEP_YAML)
    for mixer in MIXERS:
        for depth in DEPTHS:
            for seed in SEEDS:
                write_cell(folder, mixer, depth, seed)
    return folder


def cell_folder(folder: Path, mixer: str, depth: str, seed: int) -> Path:
    return folder / "cells" / f"{mixer}-depth{depth}-seed{seed}"


def write_cell(folder: Path, mixer: str, depth: str, seed: int) -> None:
    cell = cell_folder(folder, mixer, depth, seed)
    cell.mkdir()
    definition = {"name": cell.name, "axes": {"mixer": mixer, "depth": depth}, "seed": seed}
    commands = [f"fit --seed_everything {seed} --trainer.default_root_dir {cell}", f"evaluate --seed {seed}"]
    write_json(cell / "cell.json", definition | {"commands": commands})
    write_attempts(cell, [0])
    operations = 1_000 * parameters(mixer, depth)
    costs = Costs(parameters(mixer, depth), 3 * operations, 2 * operations, 4096 * int(depth))
    write_json(cell / "costs.json", costs._asdict())
    scores = CONDITIONS | {"seed": seed, "frechet_distance": distance(mixer, depth, seed), "inception_score": 9.0}
    scores |= {"precision": 0.8 + NOISE[mixer][seed], "recall": 0.7, "classifier_accuracy_on_samples": 0.9}
    write_json(cell / "scores.json", [scores])
    write_events(cell / "logs", mixer, depth, seed)


RUN_YAML = """# Networks moved by w, without training of their own.
run: ["export --ckpt_path base/{seed} --out {out}/net{w}"]
evaluate: --ckpt_path {out}/net{w} --reference digits:train
axes: {w: [0, 1, 2]}
seeds: [0, 1, 2]
sampling_seeds: [5, 6]
baseline: w1
compare: [recall]
"""


def recall(w: int, seed: int, sampling_seed: int) -> float:
    return 0.5 + 0.1 * w + NOISE[MIXERS[w]][seed] + (0.01 + 0.001 * seed) * (-1) ** sampling_seed


def write_run_sweep(folder: Path) -> Path:
    """Writes the folder of a finished sweep of commands: three values of w, three seeds, two sampling seeds."""
    (folder / "cells").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(RUN_YAML)
    for w, seed in product(range(3), SEEDS):
        cell = folder / f"cells/w{w}-seed{seed}"
        cell.mkdir()
        definition = {"name": cell.name, "axes": {"w": str(w)}, "seed": seed, "commands": ["export"]}
        write_json(cell / "cell.json", definition)
        write_attempts(cell, [0])
        for sampling_seed in (5, 6):
            scores = CONDITIONS | {"seed": sampling_seed, "recall": recall(w, seed, sampling_seed)}
            write_json(cell / f"scores-{sampling_seed}.json", [scores])
    return folder


def write_events(logs: Path, mixer: str, depth: str, seed: int, tokenizer: str = "outputs/demo/tokenizer") -> None:
    with SummaryWriter(str(logs)) as writer:
        hparams = row_summary({"global_batch": BATCH, "tokenizer": tokenizer, "seed": seed})
        writer._get_file_writer().add_summary(hparams, -1)
        for step in STEPS:
            writer.add_scalar("val/loss", loss(mixer, depth, seed, step), step)
            writer.add_scalar("val/loss_last_scale", 1.1 * loss(mixer, depth, seed, step), step)
            writer.add_scalar("perf/images_per_s", 100 + step, step)
        for side in SIDES:
            writer.add_scalar(f"val_scale_loss/{side}", scale_loss(mixer, depth, seed, side), STEPS[-1])


def write_attempts(cell: Path, codes: list[int | None]) -> None:
    """Writes attempts of one minute each with these exit codes; None for a killed attempt."""
    lines: list[dict[str, Any]] = []
    for number, code in enumerate(codes, start=1):
        lines.append({"attempt": number, "begin": f"2026-11-22T10:0{number}:00"})
        if code == 0:
            lines.append({"attempt": number, "commands": len(json.loads((cell / "cell.json").read_text())["commands"])})
        if code is not None:
            lines.append({"attempt": number, "end": f"2026-11-22T10:0{number + 1}:00", "seconds": 60.0, "code": code})
    (cell / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n")
