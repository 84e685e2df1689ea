"""Mistakes on the command line give one message with the file and the remedy, and exit code 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_network, write_images, write_token_shards
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.cli import COMMANDS, run
from lightning_mvar.errors import InputError
from lightning_mvar.training.strategies import FSDP2Strategy

FIT = """
trainer: {{accelerator: cpu, max_steps: 1, logger: false, enable_checkpointing: false, enable_progress_bar: false,
           enable_model_summary: false}}
model: {{tokenizer: {tokenizer}, network: {{schedule: {{side_lengths: [1, 2, 3, 4]}}, vocab_size: 48, code_dim: 8,
         num_classes: 10, depth: 1, width: 32, heads: 1, head_dim: 32}}}}
data: {{train: shards, val: shards, batch_size: 4}}
"""


@pytest.fixture
def here(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a fit.yaml, its shards and an exported network."""
    monkeypatch.chdir(tmp_path)
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [10, 6])
    (tmp_path / "fit.yaml").write_text(FIT.format(tokenizer=tokenizer_folder))
    save_folder(tmp_path / "export", tokenizer, tiny_network(), [str(i) for i in range(10)])
    return tmp_path


def make_images(root: Path) -> Path:
    write_images(root / "images")
    return root / "images"


def error_of(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must fail as a user's mistake, and returns its stderr."""
    capfd.readouterr()
    assert run(list(argv)) == 1
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def test_the_tiny_run_itself_works(here: Path) -> None:
    assert run(["fit", "--config", "fit.yaml"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.network.vocab_size", "64"], "vocab_size is 48"),
        (["--model.network.num_classes", "5"], "num_classes is 10 in the shards and 5 in the model"),
        (["--model.network.schedule.side_lengths", "[1,2,4]"], "schedule"),
        (["--model.network.schedule.side_lengths", "[2,1]"], "strictly increasing"),
        (["--model.network.width", "33"], "head_dim"),
        (["--model.network.heads", "5"], "not a multiple of network.heads"),
        (["--model.network.mixers", "[mamba3]"], "'mamba3'"),
        (["--model.tokenizer", "nowhere"], "nowhere does not exist"),
        (["--data.train", "nowhere"], "--data.train nowhere does not exist; it must be a folder that `tokenize` wrote"),
        (["--data.batch_size", "100"], "lower --data.batch_size"),
        (["--data.batch_size", "many"], "batch_size"),
        (["--model.network.widht", "32"], "widht"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (
            ["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"],
            "set --trainer.max_steps or",
        ),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_fit_refuses(here: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert message in error_of(capfd, "fit", "--config", "fit.yaml", *options)


def test_a_name_that_is_not_utf8_is_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = error_of(capfd, "fit", "--config", "fit.yaml", "--trainer.default_root_dir", "caf\udce9")
    assert "argument 'caf\\udce9' is not valid UTF-8: rename the file" in error


def test_folders_of_logs_and_checkpoints_that_cannot_be_created_are_named(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, not at the first checkpoint."""
    (here / "logs.yaml").write_text(
        "trainer: {logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger, "
        "init_args: {save_dir: taken, name: '', version: logs}}}"
    )
    (here / "taken").write_text("")
    assert "cannot write to taken/logs (Not a directory)" in error_of(
        capfd, "fit", "--config", "fit.yaml", "--config", "logs.yaml"
    )
    (here / "checkpoints.yaml").write_text(CHECKPOINTS.replace("dirpath: state", "dirpath: taken"))
    message = error_of(capfd, "fit", "--config", "fit.yaml", "--config", "checkpoints.yaml")
    assert "taken is a file; name a folder to write to" in message


@pytest.mark.parametrize("command", ["validate", "test"])
def test_scoring_an_untrained_network_is_refused(here: Path, capfd: pytest.CaptureFixture[str], command: str) -> None:
    assert f"{command} needs --ckpt_path" in error_of(capfd, command, "--config", "fit.yaml")


def test_a_mistake_found_by_a_data_worker_is_reported_without_traceback(
    here: Path, capfd: pytest.CaptureFixture[str], tokenizer_folder: Path
) -> None:
    """The damaged file keeps its size, so only reading detects it."""
    path = here / "shards/000000.tar"
    path.write_bytes(b"x" * path.stat().st_size)
    message = error_of(capfd, "fit", "--config", "fit.yaml", "--data.num_workers", "1")
    assert message.splitlines()[-1].startswith("lightning-mvar: error: shards/000000.tar is damaged")
    images = make_images(here)
    (images / "dark/0.png").write_bytes(b"x")
    options = ["--images", str(images), "--tokenizer", str(tokenizer_folder), "--out", "new", "--num_workers", "1"]
    message = error_of(capfd, "tokenize", *options)
    assert "dark/0.png cannot be decoded" in message.splitlines()[-1]
    assert message.splitlines()[-1].startswith("lightning-mvar: error: ")


CHECKPOINTS = """
trainer: {enable_checkpointing: true, val_check_interval: 1, callbacks: [
  {class_path: lightning_mvar.callbacks.Checkpoint, init_args: {dirpath: state, every_n_train_steps: 1}},
  {class_path: lightning_mvar.callbacks.BestCheckpoint, init_args: {dirpath: best, monitor: val/loss}}]}
"""


def test_fit_refuses_what_no_run_can_go_on_from(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "checkpoints.yaml").write_text(CHECKPOINTS)
    fit = ["fit", "--config", "fit.yaml", "--config", "checkpoints.yaml"]
    assert run(fit) == 0
    (best,) = (here / "best").iterdir()
    assert f"{best.relative_to(here)} holds weights only" in error_of(capfd, *fit, "--ckpt_path", "best/" + best.name)
    assert run(["validate", *fit[1:], "--ckpt_path", "best/" + best.name]) == 0
    (here / "same.yaml").write_text(
        CHECKPOINTS.replace("dirpath: best", "dirpath: fresh").replace("dirpath: state", "dirpath: fresh")
    )
    assert "give each its own folder" in error_of(capfd, "fit", "--config", "fit.yaml", "--config", "same.yaml")


def test_strategies_refuse_what_they_cannot_do(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fsdp2 = ["--trainer.strategy", "lightning_mvar.training.strategies.FSDP2Strategy"]
    for replicas, problem in ((2, "2 must divide the number of ranks, 1"), (0, "must be at least 1, got 0")):
        hybrid = [*fsdp2, "--trainer.strategy.data_parallel_replicate", str(replicas)]
        assert f"data_parallel_replicate {problem}" in error_of(capfd, "fit", "--config", "fit.yaml", *hybrid)
    half = [*fsdp2, "--trainer.strategy.param_dtype", "bfloat16"]
    assert "needs --trainer.precision bf16-mixed" in error_of(capfd, "fit", "--config", "fit.yaml", *half)
    double = ["--trainer.strategy", "fsdp2", "--trainer.precision", "64-true"]
    assert "64-true" in error_of(capfd, "fit", "--config", "fit.yaml", *double)
    strategy = FSDP2Strategy()  # on a CPU, Lightning turns the command line's 16-mixed into bf16-mixed
    strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(InputError, match="16-mixed"):
        strategy.setup_environment()


def test_train_tokenizer_reports_missing_files_and_bad_settings(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = str(make_images(here))
    command = ["train-tokenizer", "--model.tokenizer.schedule.side_lengths", "[1,2,4]", "--data.train", images]
    command += ["--data.val", images]
    vgg = ["--model.perceptual", "lightning_mvar.tokenizer.perceptual.LPIPS", "--model.perceptual.vgg", "none.pth"]
    assert "none.pth does not exist; download it" in error_of(capfd, *command, *vgg)
    scores = ["--trainer.callbacks+", "lightning_mvar.callbacks.ReconstructionScoresCallback"]
    scores += ["--trainer.callbacks.extractor", "lightning_mvar.metrics.InceptionV3"]
    scores += ["--trainer.callbacks.extractor.weights", "none.pth"]
    assert "none.pth does not exist; download it" in error_of(capfd, *command, *scores)
    assert "none does not exist" in error_of(capfd, *command, "--model.weights", "none")
    assert "adversary.weight must be at least 0" in error_of(capfd, *command, "--model.adversary.weight", "-1")


def test_fit_refuses_a_typo_in_yaml(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (here / "fit.yaml").read_text()
    (here / "typo.yaml").write_text(text.replace("batch_size", "batch_sise"))
    assert "batch_sise" in error_of(capfd, "fit", "--config", "typo.yaml")
    (here / "option.yaml").write_text(
        "trainer: {callbacks: [{class_path: lightning_mvar.callbacks.Checkpoint, init_args: {dirpth: x}}]}"
    )
    configs = "fit.yaml, option.yaml"
    message = error_of(capfd, "fit", "--config", "fit.yaml", "--config", "option.yaml")
    assert f"Checkpoint: Option 'dirpth' is not accepted (config: {configs}); did you mean dirpath?" in message
    (here / "broken.yaml").write_text("trainer: {max_steps: 1")
    assert "broken.yaml" in error_of(capfd, "fit", "--config", "broken.yaml")


def test_fit_refuses_a_truncated_shard_and_another_tokenizers_shards(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = here / "shards/000001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    message = error_of(capfd, "fit", "--config", "fit.yaml")
    assert "shards/000001.tar is truncated or altered: it has 2000 bytes" in message
    assert "run the same `lightning-mvar tokenize` again" in message
    write_token_shards(here / "shards", "0123456789abcdef", [10, 6])
    assert "tokenizer fingerprint is 0123456789abcdef" in error_of(capfd, "fit", "--config", "fit.yaml")


def test_fit_refuses_to_resume_another_configuration(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpointing = ["--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", "run"]
    assert run(["fit", "--config", "fit.yaml", *checkpointing]) == 0
    (checkpoint,) = (str(path) for path in Path("run").rglob("*.ckpt"))
    resume = ["fit", "--config", "fit.yaml", "--trainer.max_steps", "2", "--ckpt_path", checkpoint]
    assert "depth is 1 in the checkpoint and 2 in this run" in error_of(capfd, *resume, "--model.network.depth", "2")
    Path(checkpoint).write_bytes(Path(checkpoint).read_bytes()[:5000])
    assert checkpoint in error_of(capfd, *resume)
    torch.save({"state_dict": {}}, checkpoint)
    assert "is not a checkpoint of this command" in error_of(capfd, *resume)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt_path", "nowhere", "--out", "a.npz"], "nowhere does not exist"),
        (["--ckpt_path", "export", "--out", "a.jpg"], "a.jpg must be NAME.npz or a folder"),
        (["--ckpt_path", "export", "--out", "fit.yaml"], "fit.yaml is a file; name a folder, or NAME.npz"),
        (["--ckpt_path", "export", "--out", "a.npz", "--classes", "3,eleven"], "no class 'eleven'"),
        (["--ckpt_path", "export", "--out", "a.npz", "--classes", "10"], "no class '10'; use numbers 0 to 9"),
        (["--ckpt_path", "export", "--out", "a.npz", "--per_class", "0"], "--per_class"),
        (["--ckpt_path", "export", "--out", "a.npz", "--top_p", "2"], "top_p"),
        (["--ckpt_path", "export", "--out", "a.npz", "--device", "warp"], "--device warp is not available"),
        (["--ckpt_path", "export", "--out", "a.npz", "--gudance", "2"], "gudance"),
        (["--out", "a.npz"], "ckpt_path"),
        (["--ckpt_path", "fit.yaml", "--out", "a.npz"], "fit.yaml is damaged or not a file of plain weights"),
    ],
)
def test_sample_refuses(here: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert message in error_of(capfd, "sample", *options)
    assert not list(here.glob("*.npz"))


def test_tokenize_refuses_missing_and_empty_folders(
    here: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokenizer", str(tokenizer_folder), "--out", "new"]
    assert "nowhere does not exist" in error_of(capfd, "tokenize", "--images", "nowhere", *options)
    Path("empty").mkdir()
    assert "no images under empty" in error_of(capfd, "tokenize", "--images", "empty", *options)
    assert "nowhere does not exist" in error_of(
        capfd, "tokenize", "--images", "digits:test", "--tokenizer", "nowhere", "--out", "new"
    )
    assert not Path("new").exists()


def test_help_and_unknown_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    usage = capfd.readouterr().out
    assert all(command in usage for command in COMMANDS)
    assert "unknown command 'fti'" in error_of(capfd, "fti")
    for command in COMMANDS:
        assert run([command, "--help"]) == 0
        assert "usage" in capfd.readouterr().out.lower()


def test_the_module_is_the_console_script() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lightning_mvar", "sample", "--ckpt_path", "nowhere", "--out", "x.npz"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("lightning-mvar: error: --ckpt_path nowhere does")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["export", "--ckpt_path", "n" * 5000, "--out", "out"],
            f"the path {'n' * 40}... is too long for a file system",
        ),
        (["report", "n" * 300], f"the path {'n' * 40}... is too long for a file system"),
        (
            [
                "edit",
                "--ckpt_path",
                "export",
                "--image",
                "0.png",
                "--box",
                "0,0,4,4",
                "--classes",
                "3",
                "--out",
                "out",
                "--picture",
                "",
            ],
            "--picture is empty; give it a value",
        ),
    ],
)
def test_paths_that_cannot_exist_are_reported(
    here: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_images(here / "images")
    next((here / "images").rglob("*.png")).rename("0.png")
    assert run(arguments) == 1
    assert message in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [
        "export --ckpt_path export --out export",
        "export --tokenizer export --out ./export",
        "sample --ckpt_path export --out q.npz --grid q.npz",
        "likelihood --ckpt_path export --images images --json export/config.json",
        "reconstruct --tokenizer export --images images --json r.json --picture r.json",
        "tokenize --tokenizer export --images images --out export",
        "shards info shards --json shards/manifest.json",
        "shards decode shards --tokenizer export --out shards/000000.tar",
        "bench data --shards shards --json shards/manifest.json",
        "evaluate --samples x.npz --reference x.npz --statistics x.npz",
        "evaluate --samples x.npz --reference digits:test --statistics x.npz",
        "edit --ckpt_path export --image 000000.png --out . --classes 1 --box 0,0,2,2",
        "edit --ckpt_path export --image p.png --picture p.png --out edited --classes 1 --box 0,0,2,2",
    ],
)
def test_an_output_that_is_also_an_input_is_refused(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("000000.png", "p.png"):
        Image.new("RGB", (16, 16)).save(name)
    np.savez("x.npz", arr_0=np.zeros((2, 16, 16, 3), dtype=np.uint8))
    make_images(here)
    files = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert run(command.split()) == 1
    assert "choose another path" in (message := capsys.readouterr().err) or "choose two different paths" in message
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == files
