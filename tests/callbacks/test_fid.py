"""FIDCallback: when it scores and which weights; BestCheckpoint: which model it keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import Pixels, scalars, tiny_network, write_token_shards
from processes import start

from lightning_mvar import Tokenizer
from lightning_mvar.callbacks import BestCheckpoint, FIDCallback
from lightning_mvar.checkpoints import load_trained
from lightning_mvar.checkpoints.training import read_plain_part
from lightning_mvar.cli import run
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_mvar.metrics.reference import measure, open_reference
from lightning_mvar.sampling.generate import generate
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.training.datamodules import TokenDataModule


def steps_scored(
    every_n_steps: int | None, every_n_epochs: int | None, validations: list[tuple[int, int]]
) -> list[int]:
    """Returns the steps at which a run of 20 steps and 9 epochs scores; validations are (step, finished epochs)."""
    callback = FIDCallback(Pixels(), "images", every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
    scored = []
    for step, epochs in validations:
        trainer = SimpleNamespace(
            state=SimpleNamespace(fn="fit"),
            global_step=step,
            max_steps=20,
            current_epoch=epochs,
            max_epochs=9,
            is_last_batch=False,
        )
        if callback.is_due(trainer):
            callback.scored = {"step": step, "epoch": epochs}
            scored.append(step)
    return scored


def test_validations_are_skipped_until_enough_steps_or_epochs_have_passed() -> None:
    validations = [(4, 1), (8, 2), (12, 4), (16, 5), (20, 7)]
    assert steps_scored(None, None, validations) == [4, 8, 12, 16, 20]
    assert steps_scored(5, None, validations) == [8, 16, 20]
    assert steps_scored(None, 3, validations) == [12, 20]
    assert steps_scored(100, None, validations) == [20]
    assert steps_scored(100, 100, [(8, 5), (16, 9)]) == [16]


def test_the_chosen_weights_are_scored_and_the_end_is_scored_without_a_validation(run_folder: Path) -> None:
    """With five steps and a validation after the fourth, the last point of the curve is from the end of training."""
    values = {}
    for name in ("ema", "raw"):
        text = (run_folder / "run.yaml").read_text().replace("batch_size: 3", f"batch_size: 3, weights: {name}")
        (run_folder / "run.yaml").write_text(text)
        fit = ["fit", "--config", "run.yaml", "--trainer.max_steps", "5", "--trainer.default_root_dir", name]
        ranks = start(fit, run_folder)
        assert ranks.wait() == [0], ranks.printed()
        curve = scalars(run_folder / name / "logs")["val/fid"]
        assert [step for step, _ in curve] == [3, 5]
        values[name] = curve[-1][1]
        (run_folder / "run.yaml").write_text(text.replace(f", weights: {name}", ""))
    assert values["ema"] != values["raw"]
    reference = measure(Pixels(), open_reference(str(run_folder / "images")).images(8), "").statistics
    for name, value in values.items():
        model = load_trained(run_folder / name / "checkpoints/last.ckpt", weights=name)  # type: ignore[arg-type]
        metric = FeatureStatistics(4)
        generators = image_keys(0, range(7))
        metric.update(Pixels()(generate(model.network, model.tokenizer, torch.arange(7), generator=generators)))
        assert value == pytest.approx(frechet_distance(reference, metric.compute()), rel=1e-4)


def test_samples_of_an_overflowing_network_are_named(tokenizer: Tokenizer) -> None:
    network = tiny_network()
    network.head.weight.data.fill_(torch.nan)
    module: Any = SimpleNamespace(network=network, network_config=network.config, tokenizer=tokenizer)
    callback = FIDCallback(Pixels(), "images", num_samples=6, batch_size=3, weights="raw")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    scores: Any = None  # not reached
    with pytest.raises(InputError, match="3 of 3 images are not finite: the network"):
        callback.sample_into(scores, trainer, module)


def test_samples_are_scored_against_decoded_shards(run_folder: Path, tokenizer: Tokenizer) -> None:
    sampling = {"guidance": [0.0, 0.5, 1.0, 1.0], "guidance_off_from": 3, "temperature": 0.9}
    text = (run_folder / "run.yaml").read_text().replace("reference: images", "reference: shards")
    text = text.replace("batch_size: 3", f"batch_size: 3, sampling: {json.dumps(sampling)}")
    (run_folder / "run.yaml").write_text(text)
    ranks = start(["fit", "--config", "run.yaml", "--trainer.max_steps", "4"], run_folder)
    assert ranks.wait() == [0], ranks.printed()
    ((_, value),) = scalars(run_folder / "run/logs")["val/fid"]
    reference = measure(Pixels(), open_reference(str(run_folder / "shards")).images(8, tokenizer), "").statistics
    model = load_trained(run_folder / "run/checkpoints/last.ckpt")
    metric = FeatureStatistics(4)
    labels, keys = torch.arange(7), image_keys(0, range(7))
    metric.update(Pixels()(generate(model.network, model.tokenizer, labels, generator=keys, **sampling)))
    assert value == pytest.approx(frechet_distance(reference, metric.compute()), rel=1e-4)


def test_validate_scores_a_checkpoint(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = start(["fit", "--config", "run.yaml", "--trainer.max_steps", "4"], run_folder)
    assert ranks.wait() == [0], ranks.printed()
    monkeypatch.chdir(run_folder)
    command = ["validate", "--config", "run.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
    assert run([*command, "--trainer.default_root_dir", "again"]) == 0
    ((_, expected),) = scalars(Path("run/logs"))["val/fid"]
    ((_, value),) = scalars(Path("again/logs"))["val/fid"]
    assert value == pytest.approx(expected, rel=1e-5)
    assert "val/precision" in capfd.readouterr().out


class LogsGivenScores(L.LightningModule):
    """Logs a given `val/fid` after each validation, or none."""

    def __init__(self, values: list[float | None]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.values = iter(values)

    def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
        return self.weight * 1.0

    def validation_step(self, batch: object, batch_idx: int) -> None: ...

    def on_validation_epoch_end(self) -> None:
        if (value := next(self.values)) is not None:
            self.log("val/fid", value)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1.0)


def test_the_best_checkpoint_follows_the_lowest_score_and_never_an_old_one(tmp_path: Path) -> None:
    data = torch.utils.data.DataLoader(torch.zeros(1, 1))
    best = BestCheckpoint(str(tmp_path / "best"))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=6,
        callbacks=[best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(LogsGivenScores([5.0, None, 3.0, 4.0, None, None]), data, data)
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step=00000003.ckpt"]
    content = read_plain_part(tmp_path / "best/step=00000003.ckpt")
    assert content["state_dict"]["weight"] == -3
    assert "optimizer_states" not in content


@pytest.mark.parametrize(
    ("options", "margin"), [({}, 1.0), ({"margin": 1.25}, 1.25), ({"crop": "adm"}, 1.125), (None, 1.125)]
)
def test_the_reference_has_the_margin_of_the_shards(
    options: dict[str, Any] | None, margin: float, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    manifest = write_token_shards(tmp_path, tokenizer.fingerprint(), [4])
    replace(manifest, margin=1.0).save(tmp_path)
    data = TokenDataModule(str(tmp_path), str(tmp_path))
    data.setup("fit")
    callback = FIDCallback(Pixels(), str(tmp_path), **(options or {}))
    callback.setup(SimpleNamespace(datamodule=None if options is None else data), None, "fit")  # type: ignore[arg-type]
    assert callback.real.resizing.margin == margin


def test_invalid_settings_are_refused() -> None:
    for settings in ({"num_samples": 5}, {"batch_size": 0}, {"every_n_steps": 0}, {"every_n_epochs": -1}):
        with pytest.raises(InputError):
            FIDCallback(Pixels(), "images", **settings)
    with pytest.raises(InputError, match="mode min or max"):
        BestCheckpoint("best", mode="lowest")
