"""Pictures, code counts and configuration, read back from what each logger has stored."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import pictures
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lit_modules import make_trainer
from PIL import Image

from lightning_mvar.callbacks.loggers import log_codes, log_configuration, log_image, messages
from lightning_mvar.training.lightning_internals import correct_logged_step

IMAGE = torch.arange(3 * 4 * 5).view(3, 4, 5) / 60
PIXELS = (IMAGE * 255).round().byte().movedim(0, -1).numpy()
COUNTS = torch.tensor([[3, 0, 1, 0], [0, 0, 0, 0], [0, 2, 2, 0]])
TABLE = [
    ["code", "1", "2", "3", "all"],
    *([str(i), *map(str, row), str(sum(row))] for i, row in enumerate(COUNTS.T.tolist())),
]
VALUES = {"network.depth": 4, "optimizer.base_lr": 0.5, "precision": "32-true", "ema_decay": None}
YAML = "trainer:\n  max_steps: 8\n"
STEP = 7


class ScoreLogger(Logger):
    """A logger of none of the known kinds."""

    name, version = "scores", 0

    def __init__(self) -> None:
        self.hyperparameters: list[dict[str, Any]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise AssertionError("only Lightning logs scores")

    def log_hyperparams(self, params: Any) -> None:
        self.hyperparameters.append(params)


def log_everything(folder: Path, *loggers: Logger) -> None:
    """Logs one of each kind at step 7, as the callbacks of a training run do."""
    trainer = make_trainer(folder, 8, logger=[*loggers])
    correct_logged_step(trainer, STEP)
    log_configuration(trainer, YAML, VALUES)
    log_image(trainer, "samples", IMAGE)
    log_codes(trainer, "codes", COUNTS, ["1", "2", "3"])
    for logger in loggers:
        logger.save()
        logger.finalize("success")


def test_each_of_several_loggers_gets_everything(tmp_path: Path) -> None:
    log_everything(tmp_path, TensorBoardLogger(tmp_path, "tb", ""), CSVLogger(tmp_path, "csv", 0))
    assert len(pictures(tmp_path / "tb", "samples")) == 1
    folder = tmp_path / "csv/version_0"
    np.testing.assert_array_equal(np.array(Image.open(folder / "samples/00000007.png")), PIXELS)
    assert [*csv.reader((folder / "codes/00000007.csv").open())] == TABLE
    assert yaml.safe_load((folder / "hparams.yaml").read_text()) == VALUES


def test_wandb_stores_pictures_histograms_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, settings=wandb.Settings(console="off"))
    run = logger.experiment
    log_everything(tmp_path, logger)
    summary = dict(run.summary)
    assert {name: run.config[name] for name in VALUES} == VALUES
    wandb.finish()
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    (picture,) = media.glob("images/samples_*.png")
    np.testing.assert_array_equal(np.array(Image.open(picture)), PIXELS)
    (table,) = media.glob("table/config_*.json")
    assert json.loads(table.read_text())["data"] == [[YAML]]
    assert summary.keys() >= {"codes/1", "codes/3", "codes/all"}
    assert summary["codes/all"]["values"] == COUNTS.sum(dim=0).tolist()
    assert summary["codes/all"]["bins"] == [0, 1, 2, 3, 4]
    assert summary["trainer/global_step"] == STEP


def test_mlflow_stores_pictures_tables_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    log_everything(tmp_path, logger)
    log_configuration(make_trainer(tmp_path, 8, logger=logger), YAML, VALUES | {"precision": "bf16-mixed", "new": 1})
    params = logger.experiment.get_run(logger.run_id).data.params
    assert params == {name: str(value) for name, value in VALUES.items()} | {"new": "1"}
    artifacts = tmp_path / "mlruns" / str(logger.experiment_id) / str(logger.run_id) / "artifacts"
    assert (artifacts / "config.yaml").read_text() == YAML
    assert [*csv.reader((artifacts / "codes/00000007.csv").open())] == TABLE
    (picture,) = artifacts.glob("images/samples?step?7?*.png")
    np.testing.assert_array_equal(np.array(Image.open(picture)), PIXELS)


def test_an_unknown_logger_gets_hyperparameters_and_one_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    messages.clear()
    logger = ScoreLogger()
    with caplog.at_level(logging.INFO):
        log_everything(tmp_path, logger, DummyLogger())
    assert logger.hyperparameters == [VALUES]
    assert [r.getMessage()[:57] for r in caplog.records if "no images" in r.getMessage()] == [
        "ScoreLogger gets scores and hyperparameters, but no image"
    ]


def test_other_ranks_log_nothing() -> None:
    logger = ScoreLogger()
    log_configuration(SimpleNamespace(is_global_zero=False, loggers=[logger]), YAML, VALUES)
    assert logger.hyperparameters == []
