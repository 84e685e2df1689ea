from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import SCHEDULE

from lightning_mvar import TokenizerConfig
from lightning_mvar.callbacks import Checkpoint
from lightning_mvar.data.datamodule import ImageDataModule
from lightning_mvar.optim import OptimizerConfig
from lightning_mvar.tokenizer_module import LitTokenizer


def make_module(**options: object) -> LitTokenizer:
    torch.manual_seed(0)
    config = TokenizerConfig(SCHEDULE, 64, 8, channels=8, multipliers=(1, 1, 2, 2), blocks=1, num_phi=2)
    return LitTokenizer(config, OptimizerConfig(base_lr=0.02, weight_decay=0.0), **options)


def fit(module: LitTokenizer, root: Path, steps: int) -> dict[str, float]:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(root),
    )
    trainer.fit(module, datamodule=ImageDataModule("digits:train", "digits:test", 32, batch_size=32))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_loss_is_what_the_docstring_says() -> None:
    module, images = make_module(), torch.rand(4, 3, 32, 32) * 2 - 1
    made = module.tokenizer(images)
    losses, _ = module.losses(images, made, made.decoded)
    features, steps = module.tokenizer.features(images), made.steps
    decoded = module.tokenizer.decode_features(steps[-1].f_hat)
    quantization = sum(F.mse_loss(step.f_hat, features) for step in steps) / len(steps)
    expected = F.mse_loss(decoded, images) + 0.5 * F.l1_loss(decoded, images) + 1.25 * quantization
    torch.testing.assert_close(losses["loss"], expected)


def test_gradients_pass_the_quantizer_straight_through() -> None:
    """The encoder is trained by the picture alone when nothing pulls it to the codes."""
    module = make_module(commitment=0.0)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    made = module.tokenizer(images)
    losses, _ = module.losses(images, made, made.decoded)
    (losses["l2"]).backward()
    gradient = module.tokenizer.encoder.conv_in.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert module.tokenizer.quantizer.codebook.weight.grad is None


def test_training_on_digits_lowers_the_error_and_uses_the_codebook(tmp_path: Path) -> None:
    module = make_module(revive_every=10)
    metrics = fit(module, tmp_path, 30)
    images = next(iter(ImageDataModule("digits:test", "digits:test", 32).val_dataloader())).images
    with torch.no_grad():
        before = float(F.mse_loss(make_module().tokenizer(images).decoded, images))
    assert metrics["val/l2"] < 0.5 * before
    assert metrics["val/codebook_usage"] > 0.3
    usage = [metrics[f"codebook_usage/{side}"] for side in SCHEDULE.side_lengths]
    assert all(0 < part <= metrics["val/codebook_usage"] + 1e-6 for part in usage)


def test_revival_moves_unused_codes_onto_residuals_and_spares_the_others(tmp_path: Path) -> None:
    module = make_module(revive_every=0)
    fit(module, tmp_path, 1)
    steps = module.tokenizer(torch.rand(2, 3, 32, 32) * 2 - 1).steps
    module.usage["train"].zero_()
    module.count_usage("train", steps)
    used = module.usage["train"].sum(dim=0) > 0
    assert int(module.usage["train"].sum()) == 2 * SCHEDULE.num_tokens
    module.revive_until = 1.0
    before = module.tokenizer.quantizer.codebook.weight.detach().clone()
    module.log = lambda *_: None  # type: ignore[assignment]
    module.revive(steps)
    after = module.tokenizer.quantizer.codebook.weight.detach()
    assert torch.equal(after[used], before[used])
    queries = torch.cat([step.queries.flatten(0, 1) for step in steps])
    assert torch.cdist(after[~used], queries).min(dim=1).values.max() == pytest.approx(0, abs=1e-3)
    assert not module.usage["train"].any()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Interrupted in the second epoch; order, random shifts of the digits and revived codes included."""

    def run(root: Path, stop: int | None, resume: str | None) -> dict[str, torch.Tensor]:
        module = make_module(revive_every=4)
        checkpoint = Checkpoint(str(root / "checkpoints"), every_n_train_steps=5)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=12,
            callbacks=[checkpoint, *([] if stop is None else [Stop(stop)])],
            logger=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(root),
        )
        data = ImageDataModule("digits:train", "digits:test", 32, batch_size=128, crop="random")
        with pytest.raises(RuntimeError, match="stop") if stop else nullcontext():
            trainer.fit(module, datamodule=data, ckpt_path=resume)
        return module.state_dict()

    expected = run(tmp_path / "whole", None, None)
    run(tmp_path / "run", 11, None)
    assert (tmp_path / "run/checkpoints/step=00000011.ckpt").is_file()
    resumed = run(tmp_path / "run", None, str(tmp_path / "run/checkpoints/step=00000011.ckpt"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


class Stop(L.Callback):
    """Raises in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stop")
