"""`demo`: runs all stages on the embedded digits, one after the other, through the public command line."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mvar.io.configs import find_config, with_included
from lightning_mvar.io.json_files import write_json
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.sweeps.processes import run_and_wait

ROOT = Path("outputs/demo")
CONFIGS = Path("configs/experiment")
DRAWING = "--guidance 0.45 --guidance_off_from 4 --top_p 0.98 --device cpu"  # the scorer is trained for it
LAST_CHECKPOINT = "checkpoints/last.ckpt"


@dataclass
class Stage:
    """One command of the demo.

    Args:
        name: name of the stage.
        command: its command line.
        output: folder or file that only this stage writes.
        product: path in `output` that the next stages need.
    """

    name: str
    command: str
    output: Path
    product: str = ""

    @property
    def record(self) -> Path:
        """File written when the stage has finished: its identity and duration."""
        return ROOT / "stages" / f"{self.name}.json"

    @property
    def identity(self) -> str:
        """The command, and the content of its configuration files and of those that they include."""
        files = [Path(find_config(word)) for word in self.command.split() if word.endswith(".yaml")]
        return "\n".join([self.command, *(path.read_text() for file in files for path in with_included(file))])

    def finished(self) -> bool:
        """Returns whether the stage has finished with the current command and configuration."""
        if not ((self.output / self.product).exists() and self.record.is_file()):
            return False
        return bool(json.loads(self.record.read_text())["identity"] == self.identity)

    def clear(self) -> None:
        """Removes the output of the stage, finished or not."""
        self.record.unlink(missing_ok=True)
        for path in (self.output, self.output.with_name(f"{self.output.name}.partial")):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)


STAGES = [
    Stage(
        "train_tokenizer",
        f"train-tokenizer --config {CONFIGS}/digits_tokenizer.yaml --resume",
        ROOT / "tokenizer",
        "config.json",
    ),
    *[
        Stage(
            f"tokenize_{split}",
            f"tokenize --images {source} --tokenizer {ROOT}/tokenizer --out {ROOT}/shards/{split} --device cpu",
            ROOT / "shards" / split,
            "manifest.json",
        )
        for split, source in (("train", "digits:train --views 9"), ("val", "digits:test"))
    ],
    Stage(
        "fit",
        f"fit --config {CONFIGS}/digits.yaml --trainer.default_root_dir {ROOT}/mvar --resume",
        ROOT / "mvar",
        LAST_CHECKPOINT,
    ),
    Stage(
        "export",
        f"export --ckpt_path {ROOT}/mvar/{LAST_CHECKPOINT} --out {ROOT}/export",
        ROOT / "export",
        "config.json",
    ),
    Stage(
        "sample_own",
        f"sample --ckpt_path {ROOT}/export --tokens {ROOT}/own --per_class 100 --seed 1 {DRAWING}",
        ROOT / "own",
        "manifest.json",
    ),
    Stage(
        "train_scorer",
        f"train-scorer --tokenizer {ROOT}/tokenizer --real {ROOT}/shards/train --own {ROOT}/own --steps 300 "
        f"--out {ROOT}/scorer --device cpu",
        ROOT / "scorer",
        "config.json",
    ),
    Stage(
        "sample",
        f"sample --ckpt_path {ROOT}/export --per_class 100 --seed 0 {DRAWING} --drafts 4 "
        f"--draft_scorer {ROOT}/scorer --out {ROOT}/samples.npz --grid {ROOT}/grid.png --strip {ROOT}/strip.png",
        ROOT / "samples.npz",
    ),
    Stage(
        "evaluate",
        f"evaluate --samples {ROOT}/samples.npz --reference digits:test --floor digits:train "
        f"--reconstructions {ROOT}/tokenizer --json {ROOT}/scores.json --device cpu",
        ROOT / "scores.json",
    ),
]


def demo() -> None:
    """Trains a tokenizer and a network on the embedded digits, then samples and evaluates, in outputs/demo.

    All stages run on the CPU, whatever GPUs the machine has. Finished stages are skipped and an interrupted one
    resumes. The settings are in configs/experiment, in the working directory or else in the package.
    """
    begin = time.monotonic()
    with lock_folder(ROOT, "demo", "working directory"):
        for number, stage in enumerate(STAGES):
            if stage.finished():
                print(f"[{stage.name}] already finished, skipped")
                continue
            if stage.record.is_file():  # finished with another command or configuration: it cannot resume
                stage.clear()
            for later in STAGES[number + 1 :]:  # because their inputs change
                later.clear()
            run_stage(stage)
        write_metrics()
    print(f"\ndone in {time.monotonic() - begin:.0f} s; look at")
    for name in ("grid.png", "strip.png", "metrics.json"):
        print(f"  {ROOT / name}")
    tensorboard = Path(sys.executable).with_name("tensorboard")
    print(f"curves and images: {tensorboard} --logdir {ROOT}")


def run_stage(stage: Stage) -> None:
    """Runs the stage's command and writes its record; exits with the command's code if it fails."""
    words = stage.command.split()
    print(f"[{stage.name}] lightning-mvar {' '.join(words)}", flush=True)
    begin = time.monotonic()
    code = run_and_wait(words)
    if code:
        sys.exit(code)
    write_json(stage.record, {"identity": stage.identity, "seconds": time.monotonic() - begin})


def write_metrics() -> None:
    """Writes metrics.json: the scores, the last values of the main curves and the duration of each stage."""
    metrics = json.loads((ROOT / "scores.json").read_text())[0]
    tokenizer = last_scalars(ROOT / "tokenizer/logs", ("codebook_usage", "val/"))
    metrics |= {f"tokenizer_{tag}": value for tag, value in tokenizer.items()}
    metrics |= last_scalars(ROOT / "mvar/logs", ("val/", "train/"))
    for stage in STAGES:
        metrics[f"{stage.name}_s"] = json.loads(stage.record.read_text())["seconds"]
    write_json(ROOT / "metrics.json", metrics)


def last_scalars(logs: Path, prefixes: tuple[str, ...]) -> dict[str, float]:
    """Returns the last value of each TensorBoard scalar whose tag starts with one of the prefixes."""
    events = EventAccumulator(str(logs))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith(prefixes)}
