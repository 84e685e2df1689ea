"""Scores of a validation, compared with torchmetrics and a Frechet distance of the same images."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import SCHEDULE, Pixels, write_images
from lit_modules import make_trainer
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from lightning_mvar import TokenizerConfig
from lightning_mvar.callbacks import ReconstructionScoresCallback
from lightning_mvar.metrics.frechet import Statistics, frechet_distance
from lightning_mvar.training.datamodules import ImageDataModule
from lightning_mvar.training.tokenizer import LitTokenizer

CONFIG = TokenizerConfig(SCHEDULE, 24, 4, channels=8, multipliers=(1, 2, 2), blocks=1, num_phi=2)


def validate(folder: Path, on_corrupt: str = "raise") -> tuple[LitTokenizer, ImageDataModule, dict[str, float]]:
    torch.manual_seed(0)
    module = LitTokenizer(CONFIG, ema_decay=0.5)
    images = str(folder / "images")
    data = ImageDataModule(images, images, 16, batch_size=4, on_corrupt=on_corrupt)
    trainer = make_trainer(folder, 1, val_check_interval=1, callbacks=[ReconstructionScoresCallback(Pixels())])
    trainer.fit(module, data)
    return module, data, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_scores_are_those_of_the_averaged_weights_over_all_validation_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images")  # 18 of them, the last batch of two
    module, data, scores = validate(tmp_path)
    images = torch.cat([batch.images for batch in data.val_dataloader()])
    with torch.no_grad():
        decoded = module.averaged.decode(module.averaged.encode(images))
    a, b = images / 2 + 0.5, decoded / 2 + 0.5
    assert scores["val/psnr"] == pytest.approx(float(PeakSignalNoiseRatio(1.0, dim=(1, 2, 3))(b, a)), rel=1e-4)
    assert scores["val/ssim"] == pytest.approx(float(StructuralSimilarityIndexMeasure(data_range=1.0)(b, a)), abs=1e-4)
    features = [Pixels()(part).double() for part in (a, b)]
    expected = frechet_distance(*(Statistics(f.mean(0), f.T.cov()) for f in features))
    assert scores["val/rfid"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert scores["val/frechet_Pixels"] == scores["val/rfid"]


def test_a_batch_without_any_readable_image_is_left_out(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    for path in sorted((tmp_path / "images").rglob("*.png"))[:4]:
        path.write_bytes(b"")
    torch.manual_seed(0)
    module = LitTokenizer(CONFIG)
    images = str(tmp_path / "images")
    data = ImageDataModule(images, images, 16, batch_size=4, on_corrupt="skip")
    trainer = make_trainer(tmp_path, 1, callbacks=[ReconstructionScoresCallback()])
    (scores,) = trainer.validate(module, data, verbose=False)
    assert "val/psnr" in trainer.progress_bar_metrics
    readable = torch.cat([batch.images for batch in data.val_dataloader() if len(batch.images)])
    with torch.no_grad():
        decoded = module.tokenizer.decode(module.tokenizer.encode(readable))
    expected = PeakSignalNoiseRatio(1.0, dim=(1, 2, 3))(decoded / 2 + 0.5, readable / 2 + 0.5)
    assert len(readable) == 14
    assert scores["val/psnr"] == pytest.approx(float(expected), rel=1e-4)
    assert "val/rfid" not in scores


def test_the_sanity_check_is_not_scored() -> None:
    callback, trainer, module = ReconstructionScoresCallback(), mock.Mock(sanity_checking=True), mock.Mock()
    callback.on_validation_epoch_start(trainer, module)
    callback.on_validation_batch_end(trainer, module, torch.zeros(1, 3, 16, 16), mock.Mock(), 0)
    callback.on_validation_epoch_end(trainer, module)
    module.log_dict.assert_not_called()
