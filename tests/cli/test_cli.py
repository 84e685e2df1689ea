import errno
import logging
import os
import re
import subprocess
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path

import lightning as L
import pytest
from huggingface_hub.utils import http_backoff
from torch import nn

from lightning_mvar import cli
from lightning_mvar.cli import fail, run
from lightning_mvar.cli.arguments import call, check, refuse_overwriting
from lightning_mvar.cli.training import SILENCED
from lightning_mvar.errors import InputError


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(ckpt_path: str) -> None:
        raise KeyboardInterrupt

    def lightning_interrupt(ckpt_path: str) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 (like Lightning)

    from lightning_mvar.commands import sample

    for stop in (interrupt, lightning_interrupt):
        monkeypatch.setattr(sample, "sample", stop)
        assert run(["sample", "var-d16"]) == 130
        assert "interrupted: run the same command again; " in capsys.readouterr().err


def test_ctrl_c_during_the_imports_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupt)
    assert run(["sample", "var-d16"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mvar.commands import sample

    def fail(ckpt_path: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sample, "sample", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["sample", "var-d16"])


def count(flag: bool = False, number: int = 1, classifier: nn.Module | None = None) -> None:
    print(flag, number)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "False 1"),
        (["--flag"], "True 1"),
        (["--flag", "--number", "2"], "True 2"),
        (["--number", "2", "--flag"], "True 2"),
        (["--flag", "true"], "True 1"),
        (["--flag", "false"], "False 1"),
        (["--flag=false"], "False 1"),
    ],
)
@pytest.mark.parametrize("subcommand", [False, True])
def test_boolean_options_also_work_as_flags(
    options: list[str], expected: str, subcommand: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if subcommand:
        call({"count": count}, ["numbers", "count", *options])
    else:
        call(count, ["count", *options])
        check(count, ["count", *options])
    assert capsys.readouterr().out == f"{expected}\n"


def test_other_values_of_boolean_options_are_refused() -> None:
    for parse in (call, check):
        with pytest.raises(ArgumentError, match="flag"):
            parse(count, ["count", "--flag", "maybe"])


def test_help_lists_only_the_classes_of_this_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(count, ["count", "--help"])
    printed = capsys.readouterr().out
    assert "known subclasses: lightning_mvar." in " ".join(printed.split())
    assert "torch.nn" not in printed


def test_control_characters_of_a_message_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail("no class \x1b[31mred\nblue \ud800 ä") == 1
    assert capsys.readouterr().err == "lightning-mvar: error: no class \\x1b[31mred\\nblue \\ud800 ä\n"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ELOOP])
def test_a_path_that_cannot_be_accessed_is_reported(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_mvar.commands import sample

    def fail(ckpt_path: str) -> None:
        raise OSError(code, os.strerror(code), "/private/file")

    monkeypatch.setattr(sample, "sample", fail)
    assert run(["sample", "."]) == 1
    expected = f"lightning-mvar: error: cannot access /private/file ({os.strerror(code)})\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("{ sleep 0.2; CLI --help; } | true", 141, ""),
        ("CLI --help 2>&1 >/dev/full | grep -q 'error: cannot write'", 1, ""),
        ("CLI --help >&-", 0, ""),
        ("CLI nothing 2>&-", 1, ""),
        ("CLI nothing <&- >&- 2>&-", 1, ""),
        ("PYTHONIOENCODING=ascii CLI ä 2>&1 >/dev/null | grep -qF '\\xe4'", 1, ""),
    ],
)
def test_standard_streams_may_be_closed_full_or_ascii(command: str, code: int, message: str) -> None:
    script = "set -o pipefail; " + command.replace("CLI", f"{sys.executable} -m lightning_mvar")
    root = str(Path(cli.__file__).parents[2])
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}, timeout=60
    )
    assert (done.returncode, done.stderr) == (code, message)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, cli.SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
    ],
)
def test_openmp_threads_spin_for_a_short_time_unless_the_user_has_chosen(chosen: dict[str, str], expected: str) -> None:
    script = "from lightning_mvar.cli import limit_spinning; limit_spinning(); import torch"
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = kept | chosen | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


def write(out: str, data: str | None = None) -> None:
    raise AssertionError("called with an empty path")


@pytest.mark.parametrize("options", [["--out", ""], ["--out="], ["--out", "x", "--data", ""]])
def test_an_empty_option_is_refused(options: list[str]) -> None:
    for parse in (call, check):
        with pytest.raises(InputError, match=r"^--(out|data) is empty; give it a value$"):
            parse(write, ["write", *options])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"--out": "model"}, "--out model would overwrite the input --ckpt_path model"),
        ({"--out": "link"}, "--out link would overwrite the input --ckpt_path model"),
        ({"--json": "model/config.json"}, "--json model/config.json would overwrite the input --ckpt_path model"),
        ({"--json": "shards/000000.tar"}, "--json shards/000000.tar would overwrite the input --reference shards"),
        ({"--json": "shards/a.tar.gz"}, "--json shards/a.tar.gz would overwrite the input --reference shards"),
        ({"--picture": "images/a/1.png"}, "--picture images/a/1.png would overwrite the input --images images"),
        ({"--out": "q.npz", "--grid": "x/../q.npz"}, "--grid and --out are both x/../q.npz"),
    ],
)
def test_no_output_replaces_an_input_or_another_output(
    outputs: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    existing = ["model/config.json", "model/grid.png", "model/scores.json"]
    for name in (*existing, "images/a/1.png", "images/scores.json", "shards/000000.tar", "shards/a.tar.gz"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("link").symlink_to("model")
    inputs = {"--ckpt_path": "model", "--images": "images", "--reference": "shards", "--tokenizer": None}
    with pytest.raises(InputError, match=re.escape(message)):
        refuse_overwriting(outputs, inputs)
    again = {"--json": "model/scores.json", "--grid": "model/grid.png", "--each": "images/scores.json", "--out": None}
    refuse_overwriting(again, inputs)  # of an earlier run of the same command


def test_lightning_prints_no_tips_and_no_hint_to_use_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "srun").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    cli.enable_logging()
    with warnings.catch_warnings(record=True) as shown, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        for message in SILENCED:
            warnings.filterwarnings("ignore", message)
        L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    assert caplog.messages
    assert not [message for message in caplog.messages if "Tip" in message]
    assert not [warning for warning in shown if "srun" in str(warning.message)]


def test_retries_of_the_hub_are_hidden(caplog: pytest.LogCaptureFixture) -> None:
    cli.enable_logging()
    with pytest.raises(Exception, match="Connection refused"):
        http_backoff("GET", "http://127.0.0.1:1/", max_retries=1, base_wait_time=0)
    assert not [message for message in caplog.messages if "127.0.0.1" in message or "Retry" in message]
