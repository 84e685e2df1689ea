from argparse import ArgumentError

import pytest
from torch import nn

from lightning_mvar import cli
from lightning_mvar.cli import fail, run
from lightning_mvar.cli.arguments import call, check


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    def lightning_interrupt(_: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 (like Lightning)

    from lightning_mvar.commands import sample

    for stop in (interrupt, lightning_interrupt):
        monkeypatch.setattr(sample, "main", stop)
        assert run(["sample"]) == 130
        assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_during_the_imports_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupt)
    assert run(["sample"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mvar.commands import sample

    def fail(_: list[str]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sample, "main", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["sample"])


def test_every_command_has_a_module_with_main() -> None:
    import importlib

    for module, _ in cli.COMMANDS.values():
        assert callable(importlib.import_module(f"lightning_mvar.commands.{module}").main)


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
