"""Settings of the Checkpoint callback; tests/commands/test_resume.py covers crashes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import scalars
from processes import start

from lightning_mvar.callbacks import BestCheckpoint, Checkpoint
from lightning_mvar.errors import InputError


def test_the_newest_checkpoints_are_kept_and_the_last_is_linked(plain_run_folder: Path) -> None:
    ranks = start(["fit", "--config", "run.yaml", "--trainer.max_steps", "11"], plain_run_folder)
    assert ranks.wait() == [0], ranks.printed()
    folder = plain_run_folder / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=00000009.ckpt", "step=00000011.ckpt"]
    assert (folder / "last.ckpt").resolve() == folder / "step=00000011.ckpt"
    assert f"last checkpoint: {folder}/step=00000011.ckpt" in ranks.printed()


def print_object_broadcasts(rank: int) -> None:
    """Makes a rank print how many objects its ranks exchange before a step, while it decides whether to save."""

    def on_train_batch_start(self, *args):  # type: ignore[no-untyped-def]
        with mock.patch.object(dist, "broadcast_object_list", wraps=dist.broadcast_object_list) as broadcast:
            decide(self, *args)
        print(f"exchanged {broadcast.call_count} objects")

    decide, Checkpoint.on_train_batch_start = Checkpoint.on_train_batch_start, on_train_batch_start


@pytest.mark.parametrize(("interval", "saved"), [("0:00:00", range(1, 7)), ("1:00:00", [6])])
def test_ranks_agree_on_checkpoints_by_time(plain_run_folder: Path, interval: str, saved: Iterable[int]) -> None:
    text = (plain_run_folder / "run.yaml").read_text()
    timed = text.replace("every_n_train_steps: 3", f'train_time_interval: "{interval}", keep: 20')
    (plain_run_folder / "run.yaml").write_text(timed)
    command = ["fit", "--config", "run.yaml", "--trainer.max_steps", "6", "--trainer.strategy", "ddp"]
    ranks = start([*command, "--data.batch_size", "8"], plain_run_folder, 2, prepare=print_object_broadcasts)
    assert ranks.wait() == [0, 0], ranks.printed()
    names = {path.name for path in (plain_run_folder / "run/checkpoints").iterdir()}
    assert names == {"last.ckpt", *(f"step={step:08d}.ckpt" for step in saved)}
    counts = [line for line in ranks.printed().splitlines() if line.startswith("exchanged")]
    assert len(counts) == 12
    if interval != "0:00:00":
        assert set(counts) == {"exchanged 0 objects"}


def test_checkpoints_by_time(plain_run_folder: Path) -> None:
    """An interval of zero saves after each step."""
    text = (plain_run_folder / "run.yaml").read_text()
    every_step = text.replace("every_n_train_steps: 3", 'train_time_interval: "0:00:00", keep: 20')
    (plain_run_folder / "run.yaml").write_text(every_step)
    ranks = start(["fit", "--config", "run.yaml", "--trainer.max_steps", "6"], plain_run_folder)
    assert ranks.wait() == [0], ranks.printed()
    names = {path.name for path in (plain_run_folder / "run/checkpoints").iterdir()}
    assert names == {"last.ckpt", *(f"step={step:08d}.ckpt" for step in range(1, 7))}


def test_a_checkpoint_holds_what_belongs_to_its_step(plain_run_folder: Path) -> None:
    """A checkpoint of step 9 goes with the curves up to it, and its counters agree with each other."""
    ranks = start(["fit", "--config", "run.yaml", "--trainer.max_steps", "9"], plain_run_folder)
    assert ranks.wait() == [0], ranks.printed()
    content = torch.load(plain_run_folder / "run/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 9
    progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert set(progress.values()) == {9}
    steps = {int(state["step"]) for state in content["optimizer_states"][0]["state"].values()}
    assert steps == {9}
    assert [step for step, _ in scalars(plain_run_folder / "run/logs")["train/loss"]] == list(range(9))


def test_a_rank_whose_process_group_is_gone_publishes_nothing(tmp_path: Path) -> None:
    """The checksums of its own files alone would seal an incomplete checkpoint."""
    trainer = mock.Mock(world_size=2, is_global_zero=True)
    trainer.strategy.save_checkpoint = lambda content, path: torch.save(content, path)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        Checkpoint(str(tmp_path), 1).write_and_publish(trainer, tmp_path / "step=00000001.ckpt", {}, None)
    assert [path.name for path in tmp_path.iterdir()] == [".step=00000001.ckpt.unfinished"]


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(InputError, match="either every_n_train_steps or train_time_interval"):
        Checkpoint("folder")
    with pytest.raises(InputError, match="Checkpoint's keep must be at least 2, got 1"):
        Checkpoint("folder", every_n_train_steps=1, keep=1)
    with pytest.raises(InputError, match="Checkpoint's every_n_train_steps must be at least 1, got 0"):
        Checkpoint("folder", every_n_train_steps=0)


def test_a_metric_that_no_validation_logged_is_named(recwarn: pytest.WarningsRecorder) -> None:
    best = BestCheckpoint("best", monitor="val/fdi")
    best.on_train_end(mock.Mock(fast_dev_run=True), mock.Mock())
    assert not recwarn.list
    with pytest.warns(UserWarning, match="no validation logged val/fdi: BestCheckpoint kept no weights; set monitor"):
        best.on_train_end(mock.Mock(fast_dev_run=False), mock.Mock())
    best.best_k_models["a.ckpt"] = torch.tensor(1.0)
    best.on_train_end(mock.Mock(fast_dev_run=False), mock.Mock())
    assert not recwarn.list
