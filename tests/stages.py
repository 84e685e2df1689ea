"""All stages from a folder of images to an exported network, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_images

from lightning_mvar.cli import run

TOKENIZER_YAML = """
trainer: {accelerator: cpu, max_steps: 4, val_check_interval: 2, check_val_every_n_epoch: null, log_every_n_steps: 1,
  default_root_dir: tok, enable_progress_bar: false, enable_model_summary: false,
  logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger,
           init_args: {save_dir: "${trainer.default_root_dir}", name: "", version: logs}},
  callbacks: [{class_path: lightning_mvar.callbacks.ReconstructionsCallback},
              {class_path: lightning_mvar.callbacks.ThroughputCallback}]}
model: {tokenizer: {schedule: {side_lengths: [1, 2, 4]}, vocab_size: 24, code_dim: 4, channels: 8,
                    multipliers: [1, 2], blocks: 1, num_phi: 2}, revive_every: 2}
data: {train: images, val: images, resolution: 8, batch_size: 6}
"""
FIT_YAML = """
trainer: {accelerator: cpu, max_steps: 4, val_check_interval: 2, check_val_every_n_epoch: null, log_every_n_steps: 1,
  default_root_dir: run, enable_progress_bar: false, enable_model_summary: false,
  logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger,
           init_args: {save_dir: "${trainer.default_root_dir}", name: "", version: logs}},
  callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint,
               init_args: {dirpath: "${trainer.default_root_dir}/checkpoints", save_last: true, monitor: val/fid}},
              {class_path: lightning_mvar.callbacks.SamplesCallback, init_args: {per_class: 2}},
              {class_path: lightning_mvar.callbacks.ThroughputCallback},
              {class_path: lightning_mvar.callbacks.FIDCallback,
               init_args: {extractor: {class_path: conftest.Pixels}, reference: images, num_samples: 7,
                           batch_size: 4}}]}
model: {tokenizer: tok, network: {schedule: {side_lengths: [1, 2, 4]}, vocab_size: 24, code_dim: 4, num_classes: 3,
                                  depth: 2, width: 32, heads: 2, head_dim: 16}}
data: {train: shards/train, val: shards/train, batch_size: 6}
"""


def run_stages(root: Path, tokenizer_yaml: str, fit_yaml: str) -> Path:
    """Runs all stages in `root` and returns it."""
    write_images(root / "images")
    (root / "tokenizer.yaml").write_text(tokenizer_yaml)
    (root / "fit.yaml").write_text(fit_yaml)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(["train-tokenizer", "--config", "tokenizer.yaml"]) == 0
        tokenize = ["tokenize", "--images", "images", "--tokenizer", "tok", "--out", "shards/train"]
        assert run([*tokenize, "--shard_size", "7"]) == 0
        assert run(["fit", "--config", "fit.yaml"]) == 0
        assert run(["export", "--ckpt_path", "run/checkpoints/last.ckpt", "--out", "export"]) == 0
    return root


def tags(logs: Path) -> tuple[set[str], set[str]]:
    """Returns the scalar and image tags in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs))
    events.Reload()
    return set(events.Tags()["scalars"]), set(events.Tags()["images"])
