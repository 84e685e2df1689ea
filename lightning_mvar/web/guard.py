"""ASGI middleware that checks hosts, origins and body sizes, and tracks clients that are waiting for results."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_mvar.web.folder import PageFolder

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
POSTS = re.compile(r"/gradio_api/(queue/join|call/\w+|cancel|reset|upload|component_server)/?")  # used by the page
FILE_POSTS = re.compile(r"/gradio_api/(upload|component_server)/?")
RESULTS = re.compile(r"/gradio_api/(queue/data|call/\w+/(?P<event>\w+))")
MAX_FILE_BODY, MAX_JSON_BODY = 20 * 2**20, 2**20
MAX_ARRIVING = 5 * MAX_FILE_BODY  # bytes of all uploads being received at the same time
BODY_TIMEOUT_S = 120.0  # for receiving the body of a request, at most 20 MB of files
CLIENT_TIMEOUT_S = 10.0  # how long a job waits for a client to ask for its images
RECEIVED = "lightning_mvar.received"  # key of the time of arrival in the scope of a request


class Audience:
    """Counts the clients that are waiting for the images of a job, by session."""

    def __init__(self) -> None:
        self.streams: Counter[str] = Counter()
        self.closed = False

    @contextmanager
    def count_stream(self, session: str | None) -> Iterator[None]:
        """Counts a stream of results of a session while it is open; does nothing for other requests."""
        if session is None:
            yield
            return
        self.streams[session] += 1
        try:
            yield
        finally:
            self.streams[session] -= 1
            if not self.streams[session]:
                del self.streams[session]

    def is_waiting(self, session: str, received: float) -> bool:
        """Returns whether a client is still waiting for a job whose request arrived at monotonic time `received`."""
        return not self.closed and (self.streams[session] > 0 or time.monotonic() - received < CLIENT_TIMEOUT_S)


class Body:
    """Body of a request with a time limit; a body that arrives too late looks like a disconnect to the application."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.receive_message, self.send_message = receive, send
        self.remaining_s = BODY_TIMEOUT_S  # counts only time spent waiting: the application may start receiving late
        self.complete = self.late = self.answered = False

    async def receive(self) -> Message:
        if self.complete:  # what follows is the end of the connection
            return await self.receive_message()
        begin = time.monotonic()
        try:
            message = await asyncio.wait_for(self.receive_message(), self.remaining_s)
        except asyncio.TimeoutError:
            self.late = True
            return {"type": "http.disconnect"}
        self.remaining_s -= time.monotonic() - begin
        self.complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if self.answered or not self.late:  # otherwise the guard answers
            self.answered = True
            await self.send_message(message)


class Guard:
    """ASGI middleware that rejects requests that the page itself would not send.

    A page of another site can make a user's browser send requests to this server and, with DNS rebinding, even read
    the answers. Therefore `Host` must name this server, and `Origin` must be the page itself.

    Args:
        app: application to protect.
        host: host that the server listens on. The loopback names, the name of this machine and the address that a
            connection has reached are also accepted.
        proxies: host names of proxies in front of this server, whose pages may call it.
        folder: folder for uploads.
        audience: where open streams of results are counted.
    """

    def __init__(
        self, app: ASGIApp, host: str, proxies: Collection[str], folder: PageFolder, audience: Audience
    ) -> None:
        self.app, self.folder, self.audience = app, folder, audience
        self.proxies = {name.lower() for name in proxies}
        self.hosts = {host.lower(), socket.gethostname().lower(), *LOOPBACK_HOSTS, *self.proxies}
        self.arriving = 0  # bytes of files in unfinished requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self.refuse_foreign(scope, headers) or self.refuse_body(scope, headers)
        if refusal is not None:
            status, message = refusal
            await PlainTextResponse(f"{message}\n", status)(scope, receive, send)
            return
        scope[RECEIVED] = time.monotonic()
        is_upload = scope["method"] == "POST" and FILE_POSTS.fullmatch(scope["path"])
        size = int(headers["content-length"]) if is_upload else 0
        self.arriving += size
        body = Body(receive, send)
        try:
            if size:
                self.folder.make_room(self.arriving)
            with self.audience.count_stream(result_session(scope)):
                await self.app(scope, body.receive, body.send)
        except ClientDisconnect:
            if not body.late:
                raise
        finally:
            self.arriving -= size
        if body.late and not body.answered:
            late = f"the request did not arrive within {BODY_TIMEOUT_S:g} s: try again\n"
            await PlainTextResponse(late, 408, {"Connection": "close"})(scope, receive, send)

    def refuse_foreign(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Returns HTTP status and message if a request does not come from a page of this server, otherwise None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if len(headers.getlist("host")) != 1 or hostname(f"//{host}") not in {*self.hosts, scope["server"][0]}:
            return 403, f"this page is not served as {host!r}: start it with --allowed_hosts NAME if it should be"
        if origin is not None and origin.partition("://")[2] != host and hostname(origin) not in self.proxies:
            return 403, f"pages of {origin!r} may not use this one"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            return 403, "pages of other sites may not use this one"
        return None

    def refuse_body(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Returns HTTP status and message if a request has a body that the page would not send, otherwise None."""
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST" or not POSTS.fullmatch(scope["path"]):
            return 404, "there is nothing here"
        length, files = headers.get("content-length"), FILE_POSTS.fullmatch(scope["path"])
        if length is None or "transfer-encoding" in headers:
            return 411, "send the length of the body"
        if int(length) > (MAX_FILE_BODY if files else MAX_JSON_BODY):
            return 413, f"at most {MAX_FILE_BODY >> 20} MB of files, or {MAX_JSON_BODY >> 20} MB of JSON"
        if files and self.arriving + int(length) > MAX_ARRIVING:
            return 503, "too many uploads at once: try again"
        return None


def hostname(url: str) -> str | None:
    """Returns the host of a URL in lower case, or None unless the URL consists of a host and perhaps a port."""
    try:
        parts = urlsplit(url)
        return parts.hostname if parts.port != 0 and "@" not in parts.netloc and not parts.path else None
    except ValueError:  # the port is not a number, for example
        return None


def result_session(scope: Scope) -> str | None:
    """Returns the session or event whose results a request streams, None for other requests."""
    match = RESULTS.fullmatch(scope["path"])
    if scope["method"] != "GET" or match is None:
        return None
    return match["event"] or QueryParams(scope["query_string"]).get("session_hash")
