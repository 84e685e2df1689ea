"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import os
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import write_token_shards
from lightning.pytorch.callbacks import Callback
from lit_modules import make_module, make_trainer
from processes import start
from training_runs import FIT, TWO_RANKS, largest_difference, train, weights

from lightning_mvar import Tokenizer
from lightning_mvar.callbacks import Checkpoint
from lightning_mvar.callbacks.checkpoint import DirectFileIO
from lightning_mvar.checkpoints.training import newest_intact, read_plain_part, read_tensors
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import tensors_in
from lightning_mvar.training.datamodules import TokenDataModule

UNINTERRUPTED = "uninterrupted.ckpt"


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> TokenDataModule:
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [20, 20, 12])
    return TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16)


def test_a_checkpoint_written_during_later_steps_holds_its_own_step(
    data: TokenDataModule, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint is written before the next step is done, except the last one."""
    save, written_after = DirectFileIO.save_checkpoint, {}

    def train_and_save(name: str) -> Path:
        checkpoints = Checkpoint(str(tmp_path / name), every_n_train_steps=2, keep=9, async_save=name == "async")
        trainer = make_trainer(tmp_path, 5, callbacks=[checkpoints], enable_checkpointing=True)

        def save_later(self: DirectFileIO, checkpoint: dict[str, Any], path: Path, **options: Any) -> None:
            step = checkpoint["global_step"]
            while name == "async" and trainer.global_step < min(step + 1, 5):
                time.sleep(0.001)
            written_after[name, step] = trainer.global_step
            save(self, checkpoint, path)

        monkeypatch.setattr(DirectFileIO, "save_checkpoint", save_later)
        trainer.fit(make_module(tokenizer_folder, {"ema_decay": 0.9}), data)
        assert checkpoints.writer is None
        return tmp_path / name

    expected, actual = train_and_save("sync"), train_and_save("async")
    assert written_after["sync", 2] == 2
    assert written_after["async", 2] > 2
    assert [path.name for path in sorted(expected.iterdir())] == [path.name for path in sorted(actual.iterdir())]
    assert os.readlink(actual / "last.ckpt") == "step=00000005.ckpt"
    for step in (2, 4, 5):
        a, b = (read_plain_part(folder / f"step={step:08d}.ckpt") for folder in (expected, actual))
        assert a["loops"] == b["loops"]
        for one, other in zip(tensors_in(a), tensors_in(b), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


class WaitForWriter(Callback):
    """Waits before each batch until nothing is being written."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        writer = trainer.checkpoint_callback.writer  # type: ignore[union-attr]
        futures.wait([] if writer.task is None else [writer.task])


@pytest.mark.parametrize(("failing", "raised_at"), [(3, 4), (5, 5)])
def test_a_checkpoint_that_cannot_be_written_ends_training_in_the_next_step(
    failing: int, raised_at: int, data: TokenDataModule, tokenizer_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The state of step 5 is saved at the end of training."""
    save = DirectFileIO.save_checkpoint

    def save_or_fail(self: DirectFileIO, checkpoint: dict[str, Any], path: Path, **options: Any) -> None:
        save(self, checkpoint, path)
        if checkpoint["global_step"] == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DirectFileIO, "save_checkpoint", save_or_fail)
    checkpoints = Checkpoint(str(tmp_path / "run"), every_n_train_steps=1, async_save=True)
    trainer = make_trainer(tmp_path, 5, callbacks=[WaitForWriter(), checkpoints], enable_checkpointing=True)
    with pytest.raises(InputError, match=f"cannot write .*step=0000000{failing}.ckpt .No space left on device"):
        trainer.fit(make_module(tokenizer_folder), data)
    assert trainer.global_step == raised_at
    newest = newest_intact(tmp_path / "run")
    assert newest is not None
    assert newest.name == f"step=0000000{failing - 1}.ckpt"
    assert (tmp_path / "run/last.ckpt").resolve() == newest
    assert not list((tmp_path / "run").glob(".*"))


def die_while_writing_step_6(rank: int) -> None:
    """Ends rank 0 when all shards of step 6 are written, and gives them another name.

    Those of step 3 are written after step 4 at the earliest.
    """
    import lightning_mvar.callbacks.checkpoint as module

    publish, write = module.publish, module.AtomicCheckpoint.write_and_publish

    def publish_or_die(temporary: Path, path: Path, *args: Any) -> None:
        last = path.name == "step=00000006.ckpt"
        publish(temporary, path.with_name(UNINTERRUPTED) if last else path, *args)
        if last:
            os._exit(9)

    def write_later(self: Any, trainer: L.Trainer, path: Path, *args: Any) -> Any:
        while trainer.global_step < 4:
            time.sleep(0.001)
        return write(self, trainer, path, *args)

    module.publish, module.AtomicCheckpoint.write_and_publish = publish_or_die, write_later  # type: ignore[assignment]


def test_two_ranks_of_fsdp2_resume_exactly_after_a_kill_during_the_write(plain_run_folder: Path) -> None:
    text = (plain_run_folder / "run.yaml").read_text()
    (plain_run_folder / "run.yaml").write_text(text.replace("steps: 3", "steps: 3, async_save: true"))
    options, checkpoints = [*TWO_RANKS, "fsdp2", "--trainer.max_steps", "6"], plain_run_folder / "run/checkpoints"
    command = [*FIT, *options, "--trainer.default_root_dir", "run"]
    killed = start(command, plain_run_folder, 2, prepare=die_while_writing_step_6)
    assert killed.wait()[0] == 9, killed.printed()
    newest = newest_intact(checkpoints, verify_checksums=True)
    assert newest is not None
    assert newest.name == "step=00000003.ckpt"
    train(plain_run_folder, "run", options, devices=2)
    assert newest_intact(checkpoints, verify_checksums=True) == checkpoints / "step=00000006.ckpt"
    assert largest_difference(read_tensors(checkpoints / UNINTERRUPTED, ""), weights(plain_run_folder / "run")) < 1e-6
