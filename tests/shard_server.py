"""An HTTP server of a folder of shards that fails on demand."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Failure = Literal["404", "drop", "cut", "short", "wrong", "stall", "endless"]


class ShardServer:
    """Serves `folder`.

    `failures` lists how the next requests for a file fail: an error, a dropped connection, one that is cut in the
    middle, half of the file, wrong bytes, a stall, or bytes without end. While `dead`, every request is dropped.
    `requests` lists the requested names. Names in `.gz` are sent with `Content-Encoding: gzip`, as some servers do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.dead = folder, False
        self.failures: dict[str, list[Failure]] = defaultdict(list)
        self.requests: list[str] = []
        self.encodings: list[str | None] = []  # that the requests accept
        self.alive_for: int | None = None  # number of requests after which every request is dropped
        self.released = threading.Event()  # ends stalls
        self.delay_s = 0.0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.strip("/").partition("?")[0]
        self.requests.append(name)
        self.encodings.append(handler.headers["Accept-Encoding"])
        if self.dead or (self.alive_for is not None and len(self.requests) > self.alive_for):
            return
        failure = self.failures[name].pop(0) if self.failures[name] else None
        path = self.folder / name
        if failure == "404" or not path.is_file():
            handler.send_error(404)
            return
        content = path.read_bytes()
        half = content[: len(content) // 2]
        self.released.wait(self.delay_s)
        if failure == "drop":
            return
        handler.send_response(200)
        if failure not in ("short", "endless"):
            handler.send_header("Content-Length", str(len(content)))
        if name.endswith(".gz"):
            handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        if failure == "stall":
            handler.wfile.write(half)
            self.released.wait(60)
        elif failure == "endless":
            while not self.released.is_set():
                handler.wfile.write(content)
        elif failure in ("cut", "short"):
            handler.wfile.write(half)
        else:
            handler.wfile.write(bytes([content[0] ^ 1]) + content[1:] if failure == "wrong" else content)


@contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    """Runs a server in a separate thread while the context is open."""
    server = ShardServer(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the client may have given up
                server.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            http.shutdown()
            thread.join()
