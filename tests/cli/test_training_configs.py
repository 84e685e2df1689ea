"""Configurations of training: strict files, interpolations that saved files keep, and values that make no sense."""

from __future__ import annotations

import os
from argparse import ArgumentError
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities.rank_zero import WarningCache

from lightning_mvar.callbacks import StepProgressBar
from lightning_mvar.cli import configs, run
from lightning_mvar.cli.configs import find_configs, run_folder
from lightning_mvar.cli.training import TrainingCLI, parse_command, run_cli
from lightning_mvar.devices import exact_float32
from lightning_mvar.errors import InputError
from lightning_mvar.io.configs import PACKAGED


@pytest.fixture
def here(plain_run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run.yaml whose run takes two steps."""
    monkeypatch.chdir(plain_run_folder)
    text = Path("run.yaml").read_text().replace("max_steps: 12", "max_steps: 2").replace("interval: 4", "interval: 2")
    Path("run.yaml").write_text(text)
    return plain_run_folder


def fit(*options: str) -> int:
    return run(["fit", "--config", "run.yaml", *options])


def error_of(capfd: pytest.CaptureFixture[str], *options: str) -> str:
    """Runs `fit`, which must fail as a user's mistake, and returns the one line that says why."""
    capfd.readouterr()
    assert fit(*options) == 1
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out
    (line,) = [line for line in captured.err.splitlines() if "lightning-mvar: error: " in line]
    return line.split("lightning-mvar: error: ")[1]


def files(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["fit", "print_config"])
def test_a_saved_configuration_with_another_folder_is_another_run(
    here: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    assert fit("--trainer.logger+", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "logged") == 0
    saved = Path("run/logs/config.yaml")
    if command == "print_config":
        capfd.readouterr()
        assert fit("--print_config") == 0
        saved = here / "printed.yaml"
        saved.write_text(capfd.readouterr().out)
    before = files("run")
    assert run(["fit", "--config", str(saved), "--trainer.default_root_dir", "new"]) == 0
    assert files("run") == before
    assert Path("new/checkpoints/last.ckpt").exists()
    assert list(Path("new/logs").glob("events.out.tfevents.*"))


def test_a_saved_configuration_starts_a_new_run_and_scores_an_old_one(here: Path) -> None:
    assert fit() == 0
    assert fit("--resume", "--trainer.max_steps", "3") == 0
    saved = yaml.safe_load(Path("run/logs/config.yaml").read_text())
    assert not saved.keys() & {"resume", "overwrite", "verify", "ckpt_path"}
    assert saved["trainer"]["max_steps"] == 3
    assert saved["trainer"]["callbacks"][0]["init_args"]["dirpath"] == "${trainer.default_root_dir}/checkpoints"
    for command in ("validate", "test"):
        options = ["--config", "run/logs/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
        assert run([command, *options]) == 0


def test_tf32_is_an_option_of_training_that_is_off_by_default(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And set before anything is built."""
    seen: list[bool] = []

    def stop(self: TrainingCLI) -> None:
        seen.append(torch.backends.cudnn.allow_tf32)
        raise InputError("far enough")

    monkeypatch.setattr(TrainingCLI, "instantiate_classes", stop)
    with exact_float32():
        assert fit("--tf32", "true") == fit() == 1
    assert seen == [True, False]


def test_classes_whose_defaults_yaml_cannot_hold_are_saved_without_them(here: Path) -> None:
    averaging = ["--trainer.callbacks+", "StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.01"]
    averaging += ["--trainer.callbacks.swa_epoch_start", "1"]
    assert fit("--trainer.callbacks+", "Timer", *averaging) == 0
    saved = yaml.safe_load(Path("run/logs/config.yaml").read_text())
    _, timer, average = (callback["init_args"] for callback in saved["trainer"]["callbacks"])
    assert timer["interval"] == "step"
    assert "device" not in average
    again = parse_command(["fit", "--config", "run/logs/config.yaml", "--trainer.default_root_dir", "new"])
    assert [callback.class_path.split(".")[-1] for callback in again.trainer.callbacks] == [
        "Checkpoint",
        "Timer",
        "StochasticWeightAveraging",
    ]


def test_interpolations_name_options_from_the_root_also_in_included_files(here: Path) -> None:
    Path("part.yaml").write_text(
        "class_path: lightning.pytorch.loggers.CSVLogger\ninit_args: {save_dir: '${trainer.default_root_dir}/csv'}\n"
    )
    Path("overlay.yaml").write_text("trainer: {logger: part.yaml, val_check_interval: '${trainer.max_steps}'}\n")
    config = parse_command(["fit", "--config", "run.yaml", "--config", "overlay.yaml", "--trainer.max_steps", "7"])
    assert config.trainer.logger.init_args.save_dir == "run/csv"
    assert config.trainer.val_check_interval == 7
    added = ["--trainer.logger+", "CSVLogger", "--trainer.logger.save_dir", "${trainer.default_root_dir}"]
    loggers = parse_command(["fit", "--config", "run.yaml", *added]).trainer.logger
    assert [logger.init_args.save_dir for logger in loggers] == ["run", "run"]


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("data:\n  batch_size: 4\ntrainer:\n", "overlay.yaml, line 3: trainer has no value"),
        ("trainer:\n  # max_steps: 5\n", "overlay.yaml, line 1: trainer has no value"),
        ("model:\n  network:\n    # depth: 3\n", "line 2: network has no value"),
        ("model:\n  network:\n    depth:\n", "line 3: depth has no value"),
        ("model: {optimizer: {base_lr: }}", "base_lr has no value"),
        ("trainer:\n  callbacks:\n  -\n", "line 3: a list item is empty"),
        ("trainer: null", "trainer is null, not a mapping of options"),
        ("trainer: 3", "trainer is 3, not a mapping of options"),
        ("model: {network: ~}", "model.network is null"),
        ("model: {optimizer: []}", "model.optimizer is []"),
        ("model: {optimizer: {base_lr: null}}", "base_lr"),
        ("model: {label_drop: null}", "label_drop"),
        ("data: {batch_size: 4}\ndata: {num_workers: 0}", "line 2: data occurs twice"),
        ("trainer: {max_steps: 1", "overlay.yaml is not valid YAML"),
        ("trainer: &a [*a]", "nested too deeply"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("[1, 2]", "Unexpected config"),
        ("trainer: nowhere.yaml", "nowhere.yaml"),
        ("trainer: {default_root_dir: '${oc.env:NOT_SET_ANYWHERE}'}", "NOT_SET_ANYWHERE"),
        ("trainer: {default_root_dir: '${model.nothing}'}", "model.nothing"),
        ("trainer: {default_root_dir: '${trainer.default_root_dir}'}", "cannot be resolved"),
        ("trainer: {default_root_dir: '${unclosed'}", "cannot be resolved"),
    ],
)
def test_an_overlay_that_would_drop_options_is_refused(
    here: Path, capfd: pytest.CaptureFixture[str], overlay: str, message: str
) -> None:
    Path("overlay.yaml").write_text(overlay)
    assert message in error_of(capfd, "--config", "overlay.yaml")
    assert not Path("run").exists()


@pytest.mark.parametrize("overlay", ["", "# max_steps: 5\n", "---\n"])
def test_an_empty_overlay_changes_nothing(here: Path, overlay: str) -> None:
    Path("overlay.yaml").write_text(overlay)
    command = ["fit", "--config", "run.yaml"]
    with_overlay, without = parse_command([*command, "--config", "overlay.yaml"]), parse_command(command)
    assert with_overlay.trainer == without.trainer
    assert with_overlay.model == without.model


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_numbers_are_read_as_people_write_them(here: Path, number: str) -> None:
    Path("overlay.yaml").write_text(f"model: {{optimizer: {{base_lr: {number}}}}}")
    in_file = parse_command(["fit", "--config", "run.yaml", "--config", "overlay.yaml"])
    given = parse_command(["fit", "--config", "run.yaml", "--model.optimizer.base_lr", number])
    assert in_file.model.optimizer.base_lr == given.model.optimizer.base_lr == 1e-3


def test_config_files_that_are_no_text_are_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("binary.yaml").write_bytes(b"\x80\x81\xff")
    assert "not text" in error_of(capfd, "--config", "binary.yaml")
    assert "shards" in error_of(capfd, "--config", "shards")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed_everything", "-1"], "--seed_everything must be in [0, 4294967295], got -1"),
        (["--seed_everything", "4294967296"], "--seed_everything must be in"),
        (["--model.optimizer.base_lr", ".nan"], "--model.optimizer.base_lr is nan; use a finite number"),
        (["--model.optimizer.base_lr", ".inf"], "base_lr is inf"),
        (["--trainer.gradient_clip_val", ".nan"], "--trainer.gradient_clip_val is nan"),
        (["--model.network.drop_path=-.inf"], "drop_path is -inf"),
        (["--trainer.limit_val_batches", ".nan"], "limit_val_batches is nan"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval"),
        (["--trainer.val_check_interval", "-1"], "val_check_interval"),
        (["--trainer.val_check_interval", "4000", "--trainer.check_val_every_n_epoch", "1"], "val_check_interval"),
        (["--trainer.check_val_every_n_epoch", "0", "--trainer.val_check_interval", "1.0"], "check_val_every_n_epoch"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches"),
        (["--trainer.log_every_n_steps", "-1"], "trainer.log_every_n_steps"),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val"),
        (["--trainer.limit_train_batches", "-1"], "limit_train_batches"),
        (["--trainer.limit_val_batches", "-0.5"], "limit_val_batches"),
        (["--trainer.num_sanity_val_steps", "-2"], "num_sanity_val_steps"),
        (["--trainer.devices", "[0]"], "devices"),
        (["--trainer.devices", "0"], "devices"),
        (["--trainer.devices", "-1"], "devices"),
        (["--trainer.accelerator", "tpu"], "torch_xla"),
        (["--trainer.strategy", "fsdp"], "fsdp2"),
        (["--trainer.strategy", "fsdp", "--trainer.devices", "2"], "fsdp2"),
        (["--trainer.precision", "bf16-true"], "bf16-mixed"),
        (["--trainer.precision", "16-true"], "16-mixed"),
        (
            [
                "--trainer.callbacks+",
                "EarlyStopping",
                "--trainer.callbacks.monitor",
                "x",
                "--trainer.callbacks.mode",
                "up",
            ],
            "mode",
        ),
        (["--trainer.callbacks+", "nowhere.Callback"], "No module named 'nowhere'"),
        (["--trainer.logger", "lightning.pytorch.loggers.CometLogger"], "comet"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_in_one_line(
    here: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in error_of(capfd, *options)


def test_a_bug_in_training_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mvar.training.mvar import LitMVAR

    def training_step(self: LitMVAR, batch: object, batch_idx: int) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(LitMVAR, "training_step", training_step)
    with pytest.raises(ValueError, match="a bug") as raised:
        fit()
    assert not isinstance(raised.value, InputError)


def test_home_is_expanded_everywhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = here / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (here / "run.yaml").rename(home / "run.yaml")
    (home / "overlay.yaml").write_text("trainer: {default_root_dir: ~/run}\ndata: {train: ~/../shards}\n")
    assert run(["fit", "--config=~/run.yaml", "--config", "~/overlay.yaml"]) == 0
    assert (home / "run/checkpoints/last.ckpt").exists()
    checkpoint = "--ckpt_path=~/run/checkpoints/last.ckpt"
    assert run(["sample", checkpoint, "--out=~/samples.npz", "--per_class", "1", "--device", "cpu"]) == 0
    assert (home / "samples.npz").exists()
    assert run(["validate", "--config", "~/run/logs/config.yaml", checkpoint]) == 0
    assert not any(name.startswith("~") for _, folders, names in os.walk(here) for name in folders + names)


def test_a_config_that_is_not_here_comes_with_the_package(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(configs, "messages", WarningCache())
    names = ("configs/mixer/var.yaml", "optimizer/wsd.yaml")
    assert fit("--config", names[0], f"--config={names[1]}", "--config", names[0], "--print_config") == 0
    assert "block_causal_attention" in capfd.readouterr().out
    messages = [message for message in caplog.messages if "the packaged file" in message]
    assert len(messages) == 2
    for name, message in zip(names, messages, strict=True):
        assert message.startswith(f"{name} is not in this folder")
        assert message.endswith(str(PACKAGED / name.removeprefix("configs/")))
    Path("mixer").mkdir()
    Path("mixer/var.yaml").write_text("model: {network: {mixers: [markov_attention]}}")
    assert fit("--config", "mixer/var.yaml", "--print_config") == 0
    assert "markov_attention" in capfd.readouterr().out
    assert "configs/mixer/rav.yaml" in error_of(capfd, "--config", "configs/mixer/rav.yaml")


def test_a_runs_folder_is_named_after_its_configs(here: Path) -> None:
    names = ["configs/base/imagenet.yaml", "size/d20.yaml", "configs/strategy/fsdp2.yaml", "mixer/var.yaml"]
    assert run_folder("fit", [Path(name) for name in [*names, "callbacks/fid.yaml"]]) == "outputs/imagenet-d20-var"
    assert run_folder("fit", []) == "outputs/fit"
    argv = ["--config=a.yaml", "-c", "b.yaml", "--data.batch_size", "3", "--config", "~/c.yaml"]
    assert find_configs(argv) == (argv, [Path("a.yaml"), Path("b.yaml"), Path("~/c.yaml").expanduser()])
    text = Path("run.yaml").read_text().replace("default_root_dir: run, ", "")
    Path("run.yaml").write_text(text)
    Path("wide.yaml").write_text("model: {network: {width: 48}}")
    config = parse_command(["fit", "--config", "run.yaml", "--config=wide.yaml"])
    assert config.trainer.default_root_dir == "outputs/run-wide"
    assert config.trainer.callbacks[0].init_args.dirpath == "outputs/run-wide/checkpoints"


def test_options_of_a_wrong_type_are_refused_by_the_parser(here: Path) -> None:
    with pytest.raises(ArgumentError, match="batch_size"):
        parse_command(["fit", "--config", "run.yaml", "--data.batch_size", "many"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "\n".join(["a: &a0 x", *(f"a{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9))]),
            "aliases stand",
        ),
        ('seed_everything: !!int "abc"', "not valid YAML"),
        ("seed_everything: !!timestamp x", "not valid YAML"),
        ("seed_everything: 2023-02-30", "seed_everything|not valid YAML"),
        ("model: " + "[" * 2000, "nested too deeply"),
        ("model: [" + "x, " * 1000 + "]", "not a mapping of options"),
    ],
)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(content)
    with pytest.raises((ArgumentError, InputError), match=message) as error:
        parse_command(["fit", "--config", str(path)])
    assert len(str(error.value)) < 2000


def test_odd_values_in_a_checkpoint_are_told(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    newest = Path("run/checkpoints/last.ckpt").resolve()
    content = torch.load(newest, weights_only=True)  # not mapped: the file is written to
    weights = content["state_dict"] | {"network.head.weight": content["state_dict"]["network.head.weight"] * torch.nan}
    for command, change, message in (
        ("fit", {"loops": {"fit_loop": {"state_dict": 1}}}, "is damaged: loops.fit_loop."),
        ("fit", {"state_dict": weights}, "holds NaN or infinite values in network.head.weight"),
        ("validate", {"pytorch-lightning_version": None}, "pytorch-lightning_version is None, must be 2.6 or later"),
    ):
        torch.save(content | change, newest)
        capfd.readouterr()
        start = ["--resume"] if command == "fit" else ["--ckpt_path", str(newest)]
        assert run([command, "--config", "run.yaml", *start]) == 1
        captured = capfd.readouterr()
        assert "Traceback" not in captured.out + captured.err
        (line,) = [line for line in captured.err.splitlines() if "lightning-mvar: error: " in line]
        assert message in line


def test_the_default_progress_bar_counts_the_steps_of_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingCLI, "run_trainer", lambda self: None)
    built = run_cli(TrainingCLI, ["fit", "--config", "run.yaml", "--trainer.enable_progress_bar", "true"])
    assert isinstance(built.trainer.progress_bar_callback, StepProgressBar)
