"""`demo`: the whole path on the embedded digits, through the public command line, one stage after the other."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mvar.commands.parsing import call
from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path

ROOT = Path("outputs/demo")
CONFIGS = Path("configs/experiment")
LAST_CHECKPOINT = "checkpoints/last.ckpt"


@dataclass
class Stage:
    """One command, what it leaves behind, and the checkpoint that it can go on from."""

    name: str
    command: str
    product: Path
    checkpoint: Path | None = None

    @property
    def record(self) -> Path:
        """Written when the stage has finished: its command and how long it took."""
        return ROOT / "stages" / f"{self.name}.json"

    def finished(self) -> bool:
        if not (self.product.exists() and self.record.is_file()):
            return False
        return bool(json.loads(self.record.read_text())["command"] == self.command)


STAGES = [
    Stage(
        "train_tokenizer",
        f"train-tokenizer --config {CONFIGS}/digits_tokenizer.yaml",
        ROOT / "tokenizer/config.json",
        ROOT / "tokenizer" / LAST_CHECKPOINT,
    ),
    *[
        Stage(
            f"tokenize_{split}",
            f"tokenize --images digits:{images} --tokenizer {ROOT}/tokenizer --out {ROOT}/shards/{split}",
            ROOT / f"shards/{split}/manifest.json",
        )
        for split, images in (("train", "train"), ("val", "test"))
    ],
    Stage(
        "fit", f"fit --config {CONFIGS}/digits.yaml", ROOT / "mvar" / LAST_CHECKPOINT, ROOT / "mvar" / LAST_CHECKPOINT
    ),
    Stage(
        "export", f"export --ckpt_path {ROOT}/mvar/{LAST_CHECKPOINT} --out {ROOT}/export", ROOT / "export/config.json"
    ),
    Stage(
        "sample",
        f"sample --ckpt_path {ROOT}/export --per_class 100 --seed 0 --guidance 0.3 --top_p 0.98 "
        f"--out {ROOT}/samples.npz --grid {ROOT}/grid.png --strip {ROOT}/strip.png",
        ROOT / "samples.npz",
    ),
    Stage(
        "evaluate",
        f"evaluate --samples {ROOT}/samples.npz --reference digits:test --floor digits:train "
        f"--tokenizer {ROOT}/tokenizer --json {ROOT}/scores.json",
        ROOT / "scores.json",
    ),
]


def demo() -> None:
    """Train a tokenizer and a network on the embedded digits, sample and score, in outputs/demo.

    A stage that has finished is skipped; an interrupted one goes on where it stopped. `make demo-clean` forgets all.
    """
    if not CONFIGS.is_dir():
        raise InputError(f"{CONFIGS} is not here: run the demo in the root of a clone of the project")
    begin = time.monotonic()
    for number, stage in enumerate(STAGES):
        if stage.finished():
            print(f"[{stage.name}] finished before, skipped")
            continue
        for later in STAGES[number:]:  # what was made from an older product is out of date
            later.record.unlink(missing_ok=True)
        run_stage(stage)
    write_metrics()
    print(f"\ndone in {time.monotonic() - begin:.0f} s; look at")
    for name in ("grid.png", "strip.png", "metrics.json"):
        print(f"  {ROOT / name}")
    tensorboard = Path(sys.executable).with_name("tensorboard")
    print(f"curves and pictures: {tensorboard} --logdir {ROOT}")


def run_stage(stage: Stage) -> None:
    """Run the stage's command, and record that and how long it took; exits with the command's code if it fails."""
    words = shlex.split(stage.command)
    if stage.checkpoint is not None and stage.checkpoint.is_file():
        words += ["--ckpt_path", str(stage.checkpoint)]
    print(f"[{stage.name}] lightning-mvar {shlex.join(words)}", flush=True)
    begin = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "lightning_mvar", *words], check=False).returncode
    if code:
        sys.exit(code)
    with atomic_path(stage.record) as path:
        path.write_text(json.dumps({"command": stage.command, "seconds": time.monotonic() - begin}) + "\n")


def write_metrics() -> None:
    """Gather metrics.json: the scores, the last value of the interesting curves, the time of each stage."""
    metrics = json.loads((ROOT / "scores.json").read_text())[0]
    metrics |= {f"tokenizer_{tag}": value for tag, value in last_scalars(ROOT / "tokenizer/logs", "codebook_usage")}
    metrics |= {f"tokenizer_{tag}": value for tag, value in last_scalars(ROOT / "tokenizer/logs", "val/")}
    metrics |= dict(last_scalars(ROOT / "mvar/logs", "val/")) | dict(last_scalars(ROOT / "mvar/logs", "train/"))
    for stage in STAGES:
        metrics[f"{stage.name}_s"] = json.loads(stage.record.read_text())["seconds"]
    with atomic_path(ROOT / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")


def last_scalars(logs: Path, prefix: str) -> list[tuple[str, float]]:
    """The last value of every TensorBoard scalar whose tag starts with `prefix`."""
    events = EventAccumulator(str(logs))
    events.Reload()
    return [(tag, events.Scalars(tag)[-1].value) for tag in events.Tags()["scalars"] if tag.startswith(prefix)]


def main(argv: list[str]) -> None:
    call(demo, argv)
