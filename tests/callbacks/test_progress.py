"""The progress bar of a run, also of one that is resumed inside an epoch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from lit_modules import make_trainer

from lightning_mvar import Tokenizer
from lightning_mvar.callbacks import StepProgressBar
from lightning_mvar.cli.training import replace_default_progress_bar
from lightning_mvar.training.tokenizer import LitTokenizer


@pytest.mark.parametrize("resumed_at", [0, 6])
def test_the_bar_counts_the_steps_of_the_run(resumed_at: int, tokenizer: Tokenizer) -> None:
    bar = StepProgressBar(refresh_rate=2)
    trainer = SimpleNamespace(
        max_steps=10,
        max_epochs=-1,
        num_training_batches=20,
        global_step=resumed_at,
        current_epoch=0,
        progress_bar_metrics={},
        loggers=[],
    )
    module = LitTokenizer(tokenizer.config)
    module.trainer = trainer
    bar.on_train_start(trainer, module)
    for _ in range(resumed_at, 10):
        bar.on_train_batch_end(trainer, module, None, None, 0)  # of an accumulated batch, no step of its own
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, module, None, None, 0)
    shown = bar.train_progress_bar.format_dict
    assert (shown["initial"], shown["n"], shown["total"], shown["unit"]) == (resumed_at, 10, 10, "step")


def test_only_lightnings_default_bar_is_replaced(tmp_path: Path) -> None:
    default = make_trainer(tmp_path, 1, enable_progress_bar=True)
    replace_default_progress_bar(default, [])
    assert isinstance(default.progress_bar_callback, StepProgressBar)
    chosen = TQDMProgressBar()
    trainer = make_trainer(tmp_path, 1, enable_progress_bar=True, callbacks=[chosen])
    replace_default_progress_bar(trainer, [chosen])
    assert trainer.progress_bar_callback is chosen
