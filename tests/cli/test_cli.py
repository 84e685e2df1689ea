import pytest

from lightning_mvar import cli
from lightning_mvar.cli import run


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    def lightning_interrupt(_: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 (Lightning ends so)

    from lightning_mvar.commands import sample

    for stop in (interrupt, lightning_interrupt):
        monkeypatch.setattr(sample, "main", stop)
        assert run(["sample"]) == 130
        assert "interrupted" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mvar.commands import sample

    def fail(_: list[str]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sample, "main", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["sample"])


def test_every_command_has_its_module() -> None:
    import importlib

    for module, _ in cli.COMMANDS.values():
        assert callable(importlib.import_module(f"lightning_mvar.commands.{module}").main)
