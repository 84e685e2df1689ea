"""Tests of `serve`, from start-up to Ctrl-C."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import httpx
import processes
import pytest
from conftest import tiny_network

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.cli import run
from lightning_mvar.commands import serve as command
from lightning_mvar.sampling.settings import SamplingSettings


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Path:
    save_folder(tmp_path / "export", tokenizer, tiny_network())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wait_for_page(url: str, seconds: float = 60) -> str:
    """Polls a URL until it answers; returns the page."""
    end = time.monotonic() + seconds
    while True:
        try:
            return httpx.get(url).text
        except httpx.ConnectError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def use_own_temporary_folder(rank: int) -> None:
    """Makes the server write its temporary files below its working folder."""
    os.mkdir("tmp")
    tempfile.tempdir = os.environ["TMPDIR"] = str(Path("tmp").resolve())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_page_that_draws_and_removes_its_files(workdir: Path, number: int, code: int) -> None:
    port = processes.free_port()
    arguments = ["serve", "--port", str(port), "--ckpt_path", "export", "--device", "cpu"]
    server = processes.start(arguments, workdir, prepare=use_own_temporary_folder)
    url = f"http://127.0.0.1:{port}/gradio_api"
    try:
        assert "10 classes, 8 x 8 pixels, 4 scales" in wait_for_page(f"http://127.0.0.1:{port}")
        while "press Ctrl-C to stop" not in server.printed() and server.ranks[0].is_alive():
            time.sleep(0.05)
        assert httpx.post(f"{url}/upload", files={"files": ("a.png", b"x" * 1000)}).status_code == 200
        assert list((workdir / "tmp").rglob("a.png"))
        body = {"data": ["3", 8, 1.5, 0, 1, 1, 0, False, False, *[1] * 4]}
        events = [httpx.post(f"{url}/call/draw", json=body).json()["event_id"] for _ in range(10)]
        with (
            httpx.stream("GET", f"{url}/heartbeat/a") as beat,
            httpx.stream("GET", f"{url}/call/draw/{events[0]}", timeout=60) as drawing,
            httpx.stream("GET", f"{url}/call/draw/{events[-1]}"),
        ):
            next(beat.iter_text())
            assert "event: generating" in drawing.iter_lines()
            server.send(number)
            assert server.wait(15) == [code], server.printed()
    finally:
        server.send(signal.SIGKILL)
    assert not list((workdir / "tmp").glob("lightning_mvar_serve_*"))
    assert "warning" not in server.printed()
    assert "the page has ended" in server.printed()
    assert "Traceback" not in server.printed()


def test_errors_are_reported_before_the_page_opens(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        cases = {
            ("nowhere",): "nowhere does not exist; it must be a checkpoint file, a folder",
            (): "ckpt_path",
            ("export", "--port", port): f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another",
            ("export", "--port", "80000"): "--port 80000 must be a number from 1 to 65535",
            ("export", "--port", "0"): "--port 0 must be a number from 1 to 65535",
            ("export", "--port", "-1"): "--port -1 must be a number from 1 to 65535",
            ("export", "--host", "nowhere.invalid"): "cannot listen on nowhere.invalid",
            ("export", "--host", ""): "--host is empty: give an address of this machine",
            ("export", "--host", "a..b"): "--host 'a..b' is not the name of a host",
            ("export", "--device", "warp"): "--device warp is not available",
            ("export", "--top_p", "2"): "top_p must be a number from 0 to 1, got 2.0",
        }
        for arguments, message in cases.items():
            port_option = [] if "--port" in arguments else ["--port", str(processes.free_port())]
            checkpoint = ["--ckpt_path", *arguments] if arguments else []
            assert run(["serve", *checkpoint, *port_option]) == 1
            error = capfd.readouterr().err
            assert message in error
            assert error.count("\n") == 1


def test_a_page_starts_with_the_settings_of_the_papers_unless_others_are_given() -> None:
    parameters = inspect.signature(command.serve).parameters
    for name in ("guidance", "top_k", "top_p", "temperature"):
        assert parameters[name].default == getattr(SamplingSettings(), name)


def test_missing_gradio_is_reported_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(["serve", "--ckpt_path", "."]) == 1
    assert "the page needs gradio: pip install 'gradio" in capfd.readouterr().err


def test_a_public_host_prints_a_warning(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from contextlib import nullcontext

    from lightning_mvar.web import server

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "serving", lambda *_: nullcontext())
    monkeypatch.setattr(command.Event, "wait", interrupt)
    assert run(["serve", "--ckpt_path", "export", "--host", "0.0.0.0", "--port", str(processes.free_port())]) == 130
    assert "warning: anyone who can reach 0.0.0.0 can use the page" in capfd.readouterr().err
