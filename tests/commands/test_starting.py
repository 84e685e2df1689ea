"""A run that starts in the folder of another: what is refused, what --resume and --overwrite do."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import scalars
from processes import start
from training_runs import FIT, act_in_step, train

from lightning_mvar.checkpoints.training import newest_first
from lightning_mvar.cli import run

Refusal = Callable[[list[str]], str]


@pytest.fixture
def refusal(plain_run_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Returns a function that runs a command, which must end as a user's mistake, and returns its stderr."""
    monkeypatch.chdir(plain_run_folder)

    def refuse(command: list[str]) -> str:
        capfd.readouterr()
        assert run(command) == 1
        error = capfd.readouterr().err
        assert "Traceback" not in error
        return error

    return refuse


def test_resume_needs_a_checkpoint_callback_and_excludes_ckpt_path(refusal: Refusal) -> None:
    assert "give --resume or --ckpt_path, not both" in refusal([*FIT, "--ckpt_path", "."])
    assert "--resume needs a lightning_mvar.callbacks.Checkpoint" in refusal([*FIT, "--trainer.callbacks", "null"])


def test_a_new_run_never_touches_the_checkpoints_of_an_earlier_one(plain_run_folder: Path, refusal: Refusal) -> None:
    for root in ("run", "other"):
        train(plain_run_folder, root, ["--trainer.max_steps", "4"])
    before = read_files(plain_run_folder / "run")
    for options in ([], ["--ckpt_path", "other/checkpoints/last.ckpt"]):
        error = refusal([*FIT[:-1], *options, "--trainer.default_root_dir", "run"])
        assert "run/checkpoints holds the checkpoints of an earlier run: continue it with --resume" in error
        assert read_files(plain_run_folder / "run") == before
    # It may resume from its own checkpoint.
    again = ["--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.default_root_dir", "run"]
    own = start([*FIT[:-1], *again, "--trainer.max_steps", "5"], plain_run_folder)
    assert own.wait() == [0], own.printed()


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_removes_that_run_alone_and_is_not_repeated_by_its_config(
    plain_run_folder: Path, refusal: Refusal
) -> None:
    train(plain_run_folder, "run", ["--trainer.max_steps", "6"])
    kept = [plain_run_folder / "run" / name for name in ("checkpoints/mine.ckpt", "logs/notes.txt", "samples.npz")]
    for path in kept:
        path.write_text("mine")
    new = [*FIT[:-1], "--overwrite", "--trainer.default_root_dir", "run", "--trainer.max_steps", "3"]
    started = start(new, plain_run_folder)
    assert started.wait() == [0], started.printed()
    checkpoints = newest_first(plain_run_folder / "run/checkpoints")
    assert [path.name for path in checkpoints] == ["step=00000003.ckpt"]
    assert [step for step, _ in scalars(plain_run_folder / "run/logs")["train/loss"]] == [0, 1, 2]
    assert all(path.read_text() == "mine" for path in kept)
    assert "overwrite" not in (plain_run_folder / "run/logs/config.yaml").read_text()
    for options, message in (
        (["--resume"], "give --resume or --overwrite, not both"),
        (["--ckpt_path", "run/checkpoints/last.ckpt"], "--overwrite would remove --ckpt_path run/checkpoints/step="),
    ):
        assert message in refusal([*new, *options])
    assert newest_first(plain_run_folder / "run/checkpoints") == checkpoints


def save_of_another_width(path: Path, other: Path) -> None:
    """Copies a checkpoint as one of a network with another width."""
    content = torch.load(path, weights_only=True)
    content["lightning_mvar"]["network"]["width"] *= 2
    torch.save(content, other)


def test_overwrite_keeps_the_earlier_run_until_the_new_one_starts(plain_run_folder: Path, refusal: Refusal) -> None:
    train(plain_run_folder, "run", ["--trainer.max_steps", "3"])
    before = read_files(plain_run_folder / "run/checkpoints")
    (plain_run_folder / "torn.ckpt").write_bytes(b"PK")
    save_of_another_width(plain_run_folder / "run/checkpoints/step=00000003.ckpt", plain_run_folder / "other.ckpt")
    command = [*FIT[:-1], "--overwrite", "--trainer.default_root_dir", "run"]
    for options, message in (
        (["--ckpt_path", "torn.ckpt"], "torn.ckpt"),
        (["--ckpt_path", "other.ckpt"], "has another configuration: width is"),
        (["--data.train", "shrads"], "shrads"),
        (["--model.tokenizer", "nowhere"], "nowhere"),
    ):
        assert message in refusal([*command, *options])
        assert read_files(plain_run_folder / "run/checkpoints") == before
        assert list((plain_run_folder / "run/logs").glob("events.*")), options


def break_a_constructor(rank: int) -> None:
    import lightning_mvar.training.datamodules as module

    module.require_in = lambda: None


def test_a_bug_in_a_constructor_keeps_its_traceback(plain_run_folder: Path) -> None:
    broken = start(FIT, plain_run_folder, prepare=break_a_constructor)
    assert broken.wait() == [70], broken.printed()
    assert "TypeError: break_a_constructor" in broken.printed()


def test_verify_needs_a_checkpoint_which_rank_0_alone_reads(plain_run_folder: Path, refusal: Refusal) -> None:
    assert "`--verify` needs --resume or --ckpt_path" in refusal([*FIT[:-1], "--verify"])
    train(plain_run_folder, "run", ["--trainer.max_steps", "3"])
    options = ["--data.batch_size", "8", "--trainer.strategy", "ddp", "--trainer.max_steps", "4", "--verify"]
    command = [*FIT[:-1], *options, "--ckpt_path", "run/checkpoints/last.ckpt"]
    verified = start(command, plain_run_folder, 2, prepare=report_verification)
    assert verified.wait() == [0, 0], verified.printed()
    assert ["verified" in path.read_text() for path in verified.outputs] == [True, False]


def report_verification(rank: int) -> None:
    import lightning_mvar.cli.training as module

    module.check_intact = lambda *arguments, **options: print("verified")


def test_a_run_from_an_older_checkpoint_does_not_remove_the_later_ones(
    plain_run_folder: Path, refusal: Refusal
) -> None:
    train(plain_run_folder, "run", ["--trainer.max_steps", "6"])
    again = [*FIT[:-1], "--ckpt_path", "run/checkpoints/step=00000003.ckpt", "--trainer.default_root_dir"]
    assert "would remove later checkpoints, up to run/checkpoints/step=00000006.ckpt" in refusal([*again, "run"])
    elsewhere = start([*again, "other", "--trainer.max_steps", "4"], plain_run_folder)
    assert elsewhere.wait() == [0], elsewhere.printed()


def wait_for_go(module: Any, batch: Any) -> None:
    Path("ready").touch()
    while not Path("go").exists():
        time.sleep(0.01)


def test_a_second_start_in_one_folder_is_refused(plain_run_folder: Path) -> None:
    run = ["--trainer.default_root_dir", "run"]
    first = start([*FIT, *run], plain_run_folder, prepare=partial(act_in_step, step=2, act=wait_for_go), name="first")
    while not (plain_run_folder / "ready").exists():
        assert first.ranks[0].is_alive(), first.printed()
        time.sleep(0.01)
    second = start([*FIT, *run], plain_run_folder, name="second")
    assert second.wait() == [1]
    assert "another fit is running in run: wait for it, or choose another --trainer.default_root_dir" in (
        second.printed()
    )
    (plain_run_folder / "go").touch()
    assert first.wait() == [0], first.printed()
    assert not (plain_run_folder / "run/.lock").exists()


def see_no_checkpoint(rank: int) -> None:
    """Rank 1 sees an outdated listing of a network file system, in which the run has no checkpoint."""
    if rank == 1:
        import lightning_mvar.cli.starting as module

        module.newest_intact = lambda *arguments: None
        module.newest_first = lambda folder: []


def test_all_ranks_resume_from_what_rank_0_has_found(plain_run_folder: Path) -> None:
    options = ["--data.batch_size", "8", "--trainer.strategy", "ddp"]
    train(plain_run_folder, "run", [*options, "--trainer.max_steps", "3"], 2)
    command = [*FIT, *options, "--trainer.default_root_dir", "run", "--trainer.max_steps", "6"]
    resumed = start(command, plain_run_folder, 2, prepare=see_no_checkpoint)
    assert resumed.wait() == [0, 0], resumed.printed()
    assert "resuming from" in resumed.printed()
    content = torch.load(plain_run_folder / "run/checkpoints/step=00000006.ckpt", weights_only=True)
    assert {int(state["step"]) for state in content["optimizer_states"][0]["state"].values()} == {6}
