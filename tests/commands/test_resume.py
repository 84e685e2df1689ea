"""Runs that are killed, interrupted or out of disk space resume as if nothing had happened."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pictures, prepare_run, scalars
from processes import start
from torch.distributed.distributed_c10d import _abort_process_group
from training_runs import FIT, TWO_RANKS, act_in_step, largest_difference, train, weights

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints.training import newest_first, resolve_last
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.stream import TokenLoader, TokenStream


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, tokenizer_folder: Path
) -> Callable[..., Path]:
    """Returns a function that gives the folder of an uninterrupted run with the given options, trained only once.

    It corresponds to `run_folder` if it draws samples, and to `plain_run_folder` otherwise.
    """

    @cache
    def run(*options: str, devices: int = 1, draws: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted")
        prepare_run(folder, tokenizer, tokenizer_folder, draws)
        train(folder, "run", [*options], devices)
        return folder / "run"

    return run


DROP_PATH = ["--model.network.drop_path", "0.3"]
DDP, FSDP2 = [*TWO_RANKS, "ddp"], [*TWO_RANKS, "fsdp2", *DROP_PATH]


def kill_and_resume(folder: Path, root: str, options: list[str], devices: int, kills: int) -> None:
    """Kills all ranks at random moments after the first checkpoint of each start, then runs to the end."""
    rng, checkpoints = random.Random(0), folder / root / "checkpoints"
    for _ in range(kills):
        before = checkpoint_names(checkpoints)
        started = start([*FIT, *options, "--trainer.default_root_dir", root], folder, devices, name="killed")
        while checkpoint_names(checkpoints) <= before and any(rank.is_alive() for rank in started.ranks):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        assert all(rank.is_alive() for rank in started.ranks), started.printed()
        started.send(signal.SIGKILL)
    train(folder, root, options, devices)


def checkpoint_names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("step=*")}


@pytest.mark.parametrize(
    ("devices", "options", "kills"),
    [
        (1, [*DROP_PATH, "--trainer.max_steps", "16", "--trainer.val_check_interval", "8"], 2),
        (2, FSDP2, 1),
    ],
)
def test_a_run_killed_repeatedly_ends_as_an_uninterrupted_one(
    plain_run_folder: Path, uninterrupted: Callable[..., Path], devices: int, options: list[str], kills: int
) -> None:
    expected = uninterrupted(*options, devices=devices)
    kill_and_resume(plain_run_folder, "killed", options, devices, kills)
    difference = largest_difference(weights(expected), weights(plain_run_folder / "killed"))
    assert difference == 0 if devices == 1 else difference < 1e-6
    reference, killed = scalars(expected / "logs"), scalars(plain_run_folder / "killed/logs")
    if devices == 1:
        assert killed == reference  # every curve: the same steps, each once, the same values
    else:
        assert {tag: [step for step, _ in curve] for tag, curve in killed.items()} == {
            tag: [step for step, _ in curve] for tag, curve in reference.items()
        }
    assert len(newest_first(plain_run_folder / "killed/checkpoints")) == 2
    assert not list((plain_run_folder / "killed/checkpoints").glob(".*"))


SIX_STEPS = ["--trainer.max_steps", "6"]
EPOCHS = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2"]
VALIDATE_EACH_EPOCH = ["--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_steps", "8"], [3, 4, 5]),  # epochs end after steps 3 and 6; validations come after 4 and 8
        ([*EPOCHS, *VALIDATE_EACH_EPOCH], [2, 3]),
        ([*SIX_STEPS, "--data.batch_size", "40", "--trainer.val_check_interval", "2"], [1, 4]),  # one batch per epoch
        ([*SIX_STEPS, "--trainer.limit_train_batches", "2", "--trainer.accumulate_grad_batches", "2"], [3]),
        ([*SIX_STEPS, "--data.num_workers", "1", "--trainer.num_sanity_val_steps", "1"], [4]),
    ],
)
def test_a_checkpoint_of_any_step_resumes_exactly(run_folder: Path, options: list[str], steps: list[int]) -> None:
    """Steps before an epoch's last batch, after it, and after a validation."""
    text = (run_folder / "run.yaml").read_text()
    (run_folder / "run.yaml").write_text(text.replace("every_n_train_steps: 3", "every_n_train_steps: 1, keep: 99"))
    train(run_folder, "reference", options)
    expected, curves = weights(run_folder / "reference"), scalars(run_folder / "reference/logs")
    shown = pictures(run_folder / "reference/logs", "samples")
    for step in steps:
        part = run_folder / f"part{step}"
        (part / "checkpoints").mkdir(parents=True)
        shutil.copy(run_folder / f"reference/checkpoints/step={step:08d}.ckpt", part / "checkpoints")
        shutil.copytree(run_folder / "reference/logs", part / "logs")
        train(run_folder, part.name, options)
        assert largest_difference(expected, weights(part)) == 0, step
        assert scalars(part / "logs") == curves, step
        assert pictures(part / "logs", "samples") == shown, step


def test_torn_checkpoints_are_reported_and_skipped(plain_run_folder: Path, uninterrupted: Callable[..., Path]) -> None:
    shutil.copytree(uninterrupted(), plain_run_folder / "run", symlinks=True)
    expected, folder = weights(uninterrupted()), plain_run_folder / "run/checkpoints"
    newest = newest_first(folder)[0]
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 3])
    again = train(plain_run_folder, "run", [])
    assert f"skipped: {newest} is missing or damaged" in again.printed()
    assert "resuming from" in again.printed()
    assert largest_difference(expected, weights(plain_run_folder / "run")) == 0
    newest, older = newest_first(folder)
    for path in (newest, older):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    restarted = train(plain_run_folder, "run", ["--verify"])
    assert f"{newest} is damaged (in " in restarted.printed()
    assert "no intact checkpoint" in restarted.printed()
    assert largest_difference(expected, weights(plain_run_folder / "run")) == 0


def test_torn_checkpoint_shards_are_reported_and_skipped(
    plain_run_folder: Path, uninterrupted: Callable[..., Path]
) -> None:
    shutil.copytree(uninterrupted(*FSDP2, devices=2), plain_run_folder / "run", symlinks=True)
    expected, folder = weights(plain_run_folder / "run"), plain_run_folder / "run/checkpoints"
    share = newest_first(folder)[0] / "__1_0.distcp"
    share.write_bytes(share.read_bytes()[:-1])
    again = train(plain_run_folder, "run", FSDP2, 2)
    assert f"skipped: {share} is damaged" in again.printed()
    assert largest_difference(expected, weights(plain_run_folder / "run")) < 1e-6


def send(module: Any, batch: Any, number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def send_to_group(module: Any, batch: Any) -> None:
    os.killpg(os.getpgrp(), signal.SIGTERM)


def kill_with_logs_on_disk(module: Any, batch: Any) -> None:
    module.logger.save()
    os.kill(os.getpid(), signal.SIGKILL)


def fail(module: Any, batch: Any) -> None:
    raise RuntimeError("this rank breaks")


def fail_in_second_half(module: Any, batch: Any) -> None:
    if module.trainer.fit_loop.epoch_loop.batch_idx == 1:
        raise RuntimeError("failed")


def hide_shards(module: Any, batch: Any) -> None:
    for path in Path("shards").glob("*.tar"):
        path.rename(path.with_suffix(".gone"))


def record_ids(module: Any, batch: Any) -> None:
    with open("ids.txt", "a") as file:
        file.write("".join(f"{i} " for i in batch.ids.tolist()))


def signal_in_validation(rank: int, step: int) -> None:
    """Sends SIGTERM to rank 0 when the validation after `step` begins."""
    from lightning_mvar.training.mvar import LitMVAR

    def on_validation_epoch_start(self):  # type: ignore[no-untyped-def]
        if self.global_step == step and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    LitMVAR.on_validation_epoch_start = on_validation_epoch_start


@pytest.mark.parametrize(
    ("number", "devices", "options"), [(signal.SIGINT, 1, []), (signal.SIGUSR1, 2, DDP), (signal.SIGTERM, 2, FSDP2)]
)
def test_a_signal_to_one_rank_saves_and_ends_all(
    plain_run_folder: Path, uninterrupted: Callable[..., Path], number: signal.Signals, devices: int, options: list[str]
) -> None:
    """One rank ends after the current step; several take one more, because they do not wait for each other."""
    last = 6 if devices == 1 else 7
    reference = uninterrupted(*options, devices=devices)
    prepare = partial(act_in_step, step=5, act=partial(send, number=number))
    stopped = start([*FIT, *options, "--trainer.default_root_dir", "run"], plain_run_folder, devices, prepare)
    assert stopped.wait() == [128 + number] + [0] * (devices - 1), stopped.printed()
    assert f"interrupted by {number.name} after step {last}; --resume continues from the newest" in stopped.printed()
    assert newest_first(plain_run_folder / "run/checkpoints")[0].name == f"step={last:08d}.ckpt"
    train(plain_run_folder, "run", options, devices)
    assert largest_difference(weights(reference), weights(plain_run_folder / "run")) < 1e-6
    if devices == 1:
        assert scalars(plain_run_folder / "run/logs") == scalars(reference / "logs")


@pytest.mark.parametrize("step", [4, 8])
def test_a_validation_interrupted_by_a_signal_is_repeated(
    run_folder: Path, uninterrupted: Callable[..., Path], step: int
) -> None:
    """Covers a validation within the run and the last one."""
    prepare, steps = partial(signal_in_validation, step=step), ["--trainer.max_steps", "8"]
    stopped = start([*FIT, *steps, "--trainer.default_root_dir", "run"], run_folder, prepare=prepare)
    assert stopped.wait() == [143], stopped.printed()
    train(run_folder, "run", steps)
    reference = uninterrupted(*steps, draws=True)
    assert largest_difference(weights(reference), weights(run_folder / "run")) == 0
    assert scalars(run_folder / "run/logs") == scalars(reference / "logs")


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing(plain_run_folder: Path) -> None:
    prepare = partial(act_in_step, step=5, act=partial(send, number=signal.SIGINT, times=2))
    stopped = start([*FIT, "--trainer.default_root_dir", "run"], plain_run_folder, prepare=prepare)
    assert stopped.wait() == [130], stopped.printed()
    assert newest_first(plain_run_folder / "run/checkpoints")[0].name == "step=00000003.ckpt"


def signal_group_in_step_5(rank: int) -> None:
    """Its data workers belong to the group; the tests do not."""
    os.setpgrp()
    act_in_step(rank, 5, send_to_group)


def test_a_signal_to_the_data_workers_too_is_no_failure(plain_run_folder: Path) -> None:
    """Clusters send the signal to all processes of a job."""
    command = [*FIT, "--data.num_workers", "2", "--trainer.default_root_dir", "run"]
    stopped = start(command, plain_run_folder, prepare=signal_group_in_step_5)
    assert stopped.wait() == [143], stopped.printed()
    assert newest_first(plain_run_folder / "run/checkpoints")[0].name == "step=00000006.ckpt"


def test_a_run_killed_before_its_first_checkpoint_restarts_and_shows_each_step_once(
    plain_run_folder: Path, uninterrupted: Callable[..., Path]
) -> None:
    prepare = partial(act_in_step, step=2, act=kill_with_logs_on_disk)
    killed = start([*FIT, "--trainer.default_root_dir", "run"], plain_run_folder, prepare=prepare)
    assert killed.wait() == [-signal.SIGKILL], killed.printed()
    assert len(scalars(plain_run_folder / "run/logs")["train/loss"]) == 2
    train(plain_run_folder, "run", [])
    assert scalars(plain_run_folder / "run/logs") == scalars(uninterrupted() / "logs")


def fill_disk_after_step_3(rank: int) -> None:
    """Limits the file size after one checkpoint: writing fails as on a full disk, where no link can be made either."""
    import lightning_mvar.callbacks.checkpoint as module

    def fail_to_link(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_to_full_disk(self, trainer, *args):  # type: ignore[no-untyped-def]
        if trainer.global_step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            module.mend_last = fail_to_link
        return write(self, trainer, *args)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write, module.AtomicCheckpoint.write_and_publish = module.AtomicCheckpoint.write_and_publish, write_to_full_disk


@pytest.mark.parametrize(("devices", "strategy"), [(1, "auto"), (2, "ddp"), (2, "fsdp2")])
def test_a_full_disk_ends_all_ranks_and_keeps_earlier_checkpoints(
    plain_run_folder: Path, devices: int, strategy: str
) -> None:
    options = ["--data.batch_size", str(16 // devices), "--trainer.strategy", strategy]
    command = [*FIT, *options, "--trainer.default_root_dir", "run"]
    failed = start(command, plain_run_folder, devices, prepare=fill_disk_after_step_3)
    assert failed.wait() == [1] * devices, failed.printed()
    assert "cannot write the checkpoint" in failed.printed()
    if strategy != "fsdp2":  # whose writers drop the reason
        assert "File too large" in failed.printed()
    assert "Traceback" not in failed.printed()
    (kept,) = newest_first(plain_run_folder / "run/checkpoints")
    assert kept.name == "step=00000003.ckpt"
    assert not list((plain_run_folder / "run/checkpoints").glob(".*unfinished"))


@pytest.mark.parametrize(("devices", "strategy", "saved"), [(1, "auto", 5), (2, "ddp", 5), (2, "fsdp2", 3)])
def test_one_rank_that_raises_ends_all(plain_run_folder: Path, devices: int, strategy: str, saved: int) -> None:
    """Rank 0 of DDP saves the state after the last step; a shard of an FSDP2 network alone is useless."""
    options = [*SIX_STEPS, "--data.batch_size", str(16 // devices), "--trainer.strategy", strategy]
    command = [*FIT, *options, "--trainer.default_root_dir", "run"]
    failed = start(command, plain_run_folder, devices, prepare=partial(act_in_step, step=5, act=fail))
    assert failed.wait(60) == [1] * (devices - 1) + [70], failed.printed()
    assert "RuntimeError: this rank breaks" in failed.printed()
    if devices > 1:
        assert "rank 0 lost another rank after step 5" in failed.printed()
    newest = newest_first(plain_run_folder / "run/checkpoints")[0]
    assert newest.name == f"step={saved:08d}.ckpt"
    assert (plain_run_folder / "run/checkpoints/last.ckpt").resolve() == newest
    if strategy == "ddp":  # what rank 0 saved alone, in the middle of a step, is whole
        resumed = train(plain_run_folder, "run", options, devices)
        assert f"resuming from {newest}" in resumed.printed()


def fail_as_on_gpus(rank: int) -> None:
    """Makes the last rank fail in step 5, and rank 0 remove its process group, as it does with NCCL."""
    import lightning_mvar.callbacks.interruption as module

    act_in_step(rank, 5, fail)
    module.abort_collectives = _abort_process_group


def test_a_rank_that_has_lost_another_on_a_gpu_does_not_save(plain_run_folder: Path) -> None:
    command = [*FIT, *DDP, "--trainer.default_root_dir", "run"]
    lost = start(command, plain_run_folder, 2, prepare=fail_as_on_gpus)
    assert lost.wait(60) == [1, 70], lost.printed()
    assert "rank 0 lost another rank after step 5" in lost.printed()
    assert "steps since the last checkpoint are not saved: they may lack gradients of the lost rank" in lost.printed()
    assert newest_first(plain_run_folder / "run/checkpoints")[0].name == "step=00000003.ckpt"


def kill_in_validation(rank: int, step: int) -> None:
    """Kills the last rank when the validation after `step` begins."""
    from lightning_mvar.training.mvar import LitMVAR

    def on_validation_epoch_start(self):  # type: ignore[no-untyped-def]
        if self.global_step == step and rank > 0:
            os.kill(os.getpid(), signal.SIGKILL)

    LitMVAR.on_validation_epoch_start = on_validation_epoch_start


def test_rank_0_of_ddp_saves_if_another_dies_in_validation(
    plain_run_folder: Path, uninterrupted: Callable[..., Path]
) -> None:
    """The metrics of the validation, which it could only average with that rank, are not needed for that."""
    command = [*FIT, *DDP, "--trainer.default_root_dir", "run"]
    lost = start(command, plain_run_folder, 2, prepare=partial(kill_in_validation, step=8))
    assert lost.wait(60) == [1, -signal.SIGKILL], lost.printed()
    assert "step=00000008.ckpt; --resume continues from there" in lost.printed()
    assert "rank 0 lost another rank after step 8" in lost.printed()
    train(plain_run_folder, "run", DDP, 2)
    reference = uninterrupted(*DDP, devices=2)
    assert largest_difference(weights(reference), weights(plain_run_folder / "run")) < 1e-6


def test_an_interrupted_accumulation_is_repeated(plain_run_folder: Path) -> None:
    """Epochs have three batches, two per step and a last one alone; runs end by an exception or a signal mid-step."""
    accumulate = [*SIX_STEPS, "--trainer.accumulate_grad_batches", "2"]
    train(plain_run_folder, "reference", accumulate)
    interruptions = (("failed", fail_in_second_half, 70), ("stopped", partial(send, number=signal.SIGTERM), 143))
    for root, act, code in interruptions:
        command = [*FIT, *accumulate, "--trainer.default_root_dir", root]
        cut = start(command, plain_run_folder, prepare=partial(act_in_step, step=4, act=act))
        assert cut.wait() == [code], cut.printed()
        assert newest_first(plain_run_folder / root / "checkpoints")[0].name == "step=00000004.ckpt"
        train(plain_run_folder, root, accumulate)
        assert largest_difference(weights(plain_run_folder / "reference"), weights(plain_run_folder / root)) == 0


def test_a_missing_shard_ends_the_run_which_resumes_once_it_is_back(plain_run_folder: Path) -> None:
    options = [*SIX_STEPS, "--data.block_size", "1", "--trainer.default_root_dir", "run"]
    lost = start([*FIT, *options], plain_run_folder, prepare=partial(act_in_step, step=2, act=hide_shards))
    assert lost.wait(60) == [1], lost.printed()
    assert "is damaged or not a token shard" in lost.printed()
    assert ".tar does not exist" in lost.printed()
    for path in (plain_run_folder / "shards").glob("*.gone"):
        path.rename(path.with_suffix(".tar"))
    train(plain_run_folder, "run", options)


def die_before_publishing(rank: int, count: int) -> None:
    """Ends the process before the `count`-th time that it gives a link or a checkpoint its final name."""
    replace, replaced = os.replace, 0

    def replace_or_die(source: Path, target: Path) -> None:
        nonlocal replaced
        replaced += Path(target).suffix == ".ckpt"
        if replaced == count:
            os._exit(9)
        replace(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]


@pytest.mark.parametrize("count", [7, 8])
def test_a_run_killed_while_its_last_checkpoint_is_published_resumes_and_mends_the_link(
    plain_run_folder: Path, uninterrupted: Callable[..., Path], count: int
) -> None:
    """The fourth checkpoint, of step 12, is the last; the link is replaced first."""
    command, link = [*FIT, "--trainer.default_root_dir", "run"], plain_run_folder / "run/checkpoints/last.ckpt"
    killed = start(command, plain_run_folder, prepare=partial(die_before_publishing, count=count))
    assert killed.wait() == [9], killed.printed()
    assert os.readlink(link) == ("step=00000009.ckpt" if count == 7 else "step=00000012.ckpt")
    assert resolve_last(link).name == "step=00000009.ckpt"  # no weights of step 12 exist
    train(plain_run_folder, "run", [])
    assert os.readlink(link) == "step=00000012.ckpt"
    assert largest_difference(weights(uninterrupted()), weights(plain_run_folder / "run")) == 0


def test_a_finished_run_ends_at_once_and_resumes_if_extended(
    plain_run_folder: Path, uninterrupted: Callable[..., Path]
) -> None:
    shutil.copytree(uninterrupted(), plain_run_folder / "run", symlinks=True)
    before = weights(plain_run_folder / "run")
    train(plain_run_folder, "run", [])
    assert largest_difference(before, weights(plain_run_folder / "run")) == 0
    train(plain_run_folder, "run", ["--trainer.max_steps", "14"])
    assert newest_first(plain_run_folder / "run/checkpoints")[0].name == "step=00000014.ckpt"


def test_a_run_extended_by_epochs_continues_with_the_next_epochs_order(plain_run_folder: Path) -> None:
    epochs = ["--trainer.max_steps", "-1", "--trainer.max_epochs"]
    train(plain_run_folder, "run", [*epochs, "2"])
    prepare = partial(act_in_step, step=None, act=record_ids)
    extended = start([*FIT, *epochs, "3", "--trainer.default_root_dir", "run"], plain_run_folder, prepare=prepare)
    assert extended.wait() == [0], extended.printed()
    shards = LocalShards(plain_run_folder / "shards")
    third = TokenLoader(TokenStream(shards, shards.manifest(), 16, 0, 16_384, 0, 1), 0, pin_memory=False)
    third.load_state_dict({"epoch": 2, "samples": 0})
    assert (plain_run_folder / "ids.txt").read_text().split() == [str(i) for batch in third for i in batch.ids.tolist()]


def test_another_batch_size_keeps_the_place_in_the_data(plain_run_folder: Path) -> None:
    """Five batches of 16 are one epoch and two batches; with batches of 8 the next one is the epoch's fifth."""
    train(plain_run_folder, "run", ["--trainer.max_steps", "5"])
    resumed = train(plain_run_folder, "run", ["--data.batch_size", "8", "--trainer.max_steps", "8"])
    assert "resuming with batches of 8 images over all ranks instead of 16" in resumed.printed()
    content = torch.load(plain_run_folder / "run/checkpoints/step=00000008.ckpt", weights_only=True)
    (place,) = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert place == {"epoch": 2, "samples": 8}
