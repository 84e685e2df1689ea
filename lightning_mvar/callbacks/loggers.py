"""Logs images, code counts and configuration to all loggers of a run, each through its own API.

|               | TensorBoard       | W&B                    | MLflow                  | CSVLogger                 |
|---------------|-------------------|------------------------|-------------------------|---------------------------|
| image         | image             | image                  | image                   | TAG/STEP.png              |
| code counts   | histograms        | histograms             | artifact TAG/STEP.csv   | TAG/STEP.csv              |
| configuration | text, table       | config, table `config` | parameters, config.yaml | hparams.yaml, config.yaml |

Other loggers get scores and hyperparameters. Only rank 0 logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import WarningCache
from PIL import Image
from torch import Tensor

from lightning_mvar.callbacks.tensorboard import add_counts, bucket_counts
from lightning_mvar.io.files import atomic_path
from lightning_mvar.sampling.grids import save_image, to_uint8
from lightning_mvar.training.lightning_internals import logged_step

messages = WarningCache()  # prints each message once


def log_image(trainer: L.Trainer, tag: str, image: Tensor) -> None:
    """Logs an image (3, H, W) in [0, 1] at the current step."""
    step = logged_step(trainer)
    for logger in loggers_of(trainer):
        match logger:
            case TensorBoardLogger():
                logger.experiment.add_image(tag, image.float().cpu(), step)
            case WandbLogger():
                logger.log_image(tag, [Image.fromarray(to_uint8(image))], step)
            case MLFlowLogger():
                logger.experiment.log_image(logger.run_id, Image.fromarray(to_uint8(image)), key=tag, step=step)
            case CSVLogger():
                save_image(image, Path(logger.log_dir) / tag / f"{step:08}.png")
            case _:
                report_scores_only(logger)


def log_codes(trainer: L.Trainer, tag: str, counts: Tensor, names: Sequence[str]) -> None:
    """Logs code counts (k, v) at the current step: `TAG/K` for the scale named K, `TAG/all` for all scales together."""
    step, by_name = logged_step(trainer), dict(zip(names, counts.cpu(), strict=True)) | {"all": counts.sum(dim=0).cpu()}
    occurring = {f"{tag}/{name}": scale for name, scale in by_name.items() if scale.any()}
    for logger in loggers_of(trainer):
        match logger:
            case TensorBoardLogger():
                for name, scale in occurring.items():
                    add_counts(logger.experiment, name, scale, step)
            case WandbLogger():
                from wandb import Histogram

                histograms: dict[str, Any] = {
                    name: Histogram(np_histogram=bucket_counts(scale)) for name, scale in occurring.items()
                }
                logger.log_metrics(histograms, step)
            case MLFlowLogger():
                logger.experiment.log_text(logger.run_id, counts_table(by_name), f"{tag}/{step:08}.csv")
            case CSVLogger():
                write_text(Path(logger.log_dir) / tag / f"{step:08}.csv", counts_table(by_name))
            case _:
                report_scores_only(logger)


def log_configuration(trainer: L.Trainer, yaml: str, values: Mapping[str, Any]) -> None:
    """Logs a run's configuration; `OverviewCallback` does so for TensorBoard, and writes config.yaml to log folders.

    Args:
        trainer: the trainer.
        yaml: content of config.yaml.
        values: hyperparameters by name: numbers, strings, booleans or None.
    """
    for logger in loggers_of(trainer):
        new = dict(values)
        match logger:
            case TensorBoardLogger():
                continue
            case WandbLogger():
                logger.log_text("config", ["config.yaml"], [[yaml]])
            case MLFlowLogger():
                logger.experiment.log_text(logger.run_id, yaml, "config.yaml")
                recorded = logger.experiment.get_run(logger.run_id).data.params  # MLflow refuses to change them
                new = {name: value for name, value in values.items() if name not in recorded}
        logger.log_hyperparams(new)


def loggers_of(trainer: L.Trainer) -> list[Logger]:
    """Returns the trainer's loggers on rank 0; empty on other ranks and in a `fast_dev_run`."""
    return [logger for logger in trainer.loggers if trainer.is_global_zero and not isinstance(logger, DummyLogger)]


def report_scores_only(logger: Logger) -> None:
    """Reports once that a logger gets no images and no code counts."""
    messages.info(
        f"{type(logger).__name__} gets scores and hyperparameters, but no images and no code counts: "
        f"add TensorBoardLogger, WandbLogger, MLFlowLogger or CSVLogger for those"
    )


def counts_table(counts: Mapping[str, Tensor]) -> str:
    """Returns counts (v,) by name as CSV: a row per code and a column per name."""
    rows = torch.stack([*counts.values()], dim=1).tolist()
    lines = [["code", *counts], *([code, *row] for code, row in enumerate(rows))]
    return "".join(",".join(map(str, line)) + "\n" for line in lines)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)
