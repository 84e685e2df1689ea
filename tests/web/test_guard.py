"""Tests of the guard: it lets the page through and refuses foreign hosts, foreign pages and large bodies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from lightning_mvar.web import guard as module
from lightning_mvar.web.folder import PageFolder
from lightning_mvar.web.guard import MAX_FILE_BODY, MAX_JSON_BODY, Audience, Guard

URL = "http://127.0.0.1:7860"


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("answered")(scope, receive, send)

    return Guard(app, "page.lan", ["Proxy.example"], PageFolder(tmp_path), Audience())


def ask(guard: Guard, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> Any:
    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url=URL) as client:
            return await client.request(method, path, headers=headers, content=body)

    return asyncio.run(request())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[
            (host, 200)
            for host in ("127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860", "page.lan", "proxy.example")
        ],
        *[
            (host, 403)
            for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "10.0.0.1", "0.0.0.0")
        ],
        *[(host, 403) for host in ("", "[", "a@localhost", "localhost:7860.evil.example", "localhost/", "[::2]")],
    ],
)
def test_only_known_hosts_are_answered(guard: Guard, host: str, status: int) -> None:
    answer = ask(guard, "GET", "/", {"Host": host})
    assert answer.status_code == status
    assert (answer.text == "answered") == (status == 200)
    if status == 403:
        assert f"this page is not served as {host!r}: start it with --allowed_hosts NAME" in answer.text


def test_a_request_without_a_host_is_refused(guard: Guard) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    for hosts in ([], [b"localhost", b"localhost"]):
        headers = [(b"host", host) for host in hosts]
        scope = {"type": "http", "method": "GET", "path": "/", "server": ("127.0.0.1", 7860), "headers": headers}
        asyncio.run(guard(scope, lambda: None, send))  # type: ignore[arg-type]
    assert [message["status"] for message in sent if "status" in message] == [403, 403]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        *[(origin, 200) for origin in (URL, "https://127.0.0.1:7860", "https://proxy.example")],
        *[
            (origin, 403)
            for origin in ("http://evil.example", "null", "", "http://127.0.0.1:8888", "http://localhost:7860")
        ],
        *[(origin, 403) for origin in ("http://[", "http://a@proxy.example", "http://proxy.example:1.evil.example")],
    ],
)
def test_only_pages_of_this_server_may_call_it(guard: Guard, origin: str, status: int) -> None:
    for method in ("GET", "POST"):
        answer = ask(guard, method, "/gradio_api/queue/join", {"Origin": origin}, b"{}" if method == "POST" else b"")
        assert answer.status_code == status
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_other_sites_may_link_to_the_page_but_not_load_from_it(guard: Guard) -> None:
    site = {"Sec-Fetch-Site": "cross-site"}
    assert ask(guard, "GET", "/", {**site, "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert ask(guard, "GET", "/config", {**site, "Sec-Fetch-Mode": "no-cors"}).status_code == 403
    assert ask(guard, "GET", "/config", {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "length", "status"),
    [
        ("POST", "/gradio_api/upload", MAX_FILE_BODY, 200),
        ("POST", "/gradio_api/upload", MAX_FILE_BODY + 1, 413),
        ("POST", "/gradio_api/component_server", MAX_FILE_BODY + 1, 413),
        ("POST", "/gradio_api/queue/join", MAX_JSON_BODY, 200),
        ("POST", "/gradio_api/queue/join", MAX_JSON_BODY + 1, 413),
        ("POST", "/gradio_api/call/draw", 2, 200),
        ("POST", "/gradio_api/upload", None, 411),
        ("POST", "/gradio_api/process_recording", 2, 404),
        ("POST", "/gradio_api/run/draw", 2, 404),
        ("POST", "/login", 2, 404),
        ("PUT", "/gradio_api/upload", 2, 404),
        ("OPTIONS", "/gradio_api/upload", 0, 404),
    ],
)
def test_bodies_are_bounded(guard: Guard, method: str, path: str, length: int | None, status: int) -> None:
    headers = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
    assert ask(guard, method, path, headers).status_code == status


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_only_posts_make_room(guard: Guard, method: str) -> None:
    drawn = guard.folder.new_folder() / "0.png"
    drawn.write_bytes(b"x")
    assert ask(guard, method, "/gradio_api/upload", {"Content-Length": "999999999999"}).status_code == 200
    assert drawn.exists()


def test_unfinished_uploads_are_bounded_together(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ARRIVING", 100)
    ended = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await ended.wait()
        await PlainTextResponse("answered")(scope, receive, send)

    async def upload_three() -> list[int]:
        guard.app = slow
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url=URL) as client:
            uploads = [asyncio.create_task(client.post("/gradio_api/upload", content=b"x" * 40)) for _ in range(3)]
            await asyncio.wait(uploads, return_when=asyncio.FIRST_COMPLETED)
            ended.set()
            return [(await upload).status_code for upload in uploads]

    assert asyncio.run(upload_three()) == [200, 200, 503]
    assert guard.arriving == 0


def test_a_job_is_wanted_while_its_client_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    audience = Audience()
    now = module.time.monotonic()
    assert audience.is_waiting("a", now)
    assert not audience.is_waiting("a", now - 60)
    with audience.count_stream("a"), audience.count_stream("a"):
        assert audience.is_waiting("a", now - 60)
        assert not audience.is_waiting("b", now - 60)
    assert not audience.is_waiting("a", now - 60)
    assert not audience.streams
    audience.closed = True
    assert not audience.is_waiting("a", now)


@pytest.mark.parametrize(
    ("path", "session"),
    [
        ("/gradio_api/queue/data?session_hash=abc", "abc"),
        ("/gradio_api/call/draw/abc", "abc"),
        ("/gradio_api/queue/data", None),
        ("/config", None),
    ],
)
def test_streams_of_results_are_counted(guard: Guard, path: str, session: str | None) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(guard.audience.streams))
        await PlainTextResponse("answered")(scope, receive, send)

    guard.app = app
    ask(guard, "GET", path)
    assert seen == [{session: 1} if session else {}]


def test_a_body_that_arrives_too_slowly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Request(scope, receive).body()
        await PlainTextResponse("answered")(scope, receive, send)

    async def drip() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x"
            await asyncio.sleep(0.1)

    async def upload() -> int:
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
            headers = {"Content-Length": "10"}
            return (await client.post("/gradio_api/upload", content=drip(), headers=headers)).status_code

    guard = Guard(app, "page.lan", [], PageFolder(tmp_path), Audience())
    assert asyncio.run(upload()) == 200
    monkeypatch.setattr(module, "BODY_TIMEOUT_S", 0.3)
    assert asyncio.run(upload()) == 408
    assert guard.arriving == 0


def test_the_time_for_a_body_begins_when_it_is_received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.3)
        body = await Request(scope, receive).body()
        await PlainTextResponse(body)(scope, receive, send)

    monkeypatch.setattr(module, "BODY_TIMEOUT_S", 0.1)
    guard = Guard(app, "page.lan", [], PageFolder(tmp_path), Audience())
    answer = ask(guard, "POST", "/gradio_api/queue/join", body=b"body")
    assert (answer.status_code, answer.text) == (200, "body")


def test_an_answer_that_has_begun_is_not_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    monkeypatch.setattr(module, "BODY_TIMEOUT_S", 0.1)
    guard = Guard(app, "page.lan", [], PageFolder(tmp_path), Audience())
    headers = [(b"host", b"localhost"), (b"content-length", b"1")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": headers}
    asyncio.run(guard(scope | {"server": ("localhost", 80), "query_string": b""}, receive, send))
    assert sent == ["http.response.start", "http.response.body"]
