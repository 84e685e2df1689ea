"""Serves the page of a pipeline from a background thread."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import Thread

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from gradio.route_utils import FnIndexInferError

from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.web.folder import PageFolder
from lightning_mvar.web.guard import MAX_FILE_BODY, Audience, Guard
from lightning_mvar.web.page import CSS, build_page

REQUEST_ERRORS = (LookupError, ValueError, FnIndexInferError)  # from gradio, which trusts its page
END_TIMEOUT_S = 1.5  # for finishing the scale that is being drawn when the page ends


def refuse(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "this is not a request that the page would send"}, 400)


@contextmanager
def serving(
    pipe: MVARPipeline,
    name: str,
    initial: SamplingSettings,
    listener: socket.socket,
    host: str,
    proxies: Collection[str],
    folder: PageFolder,
) -> Iterator[None]:
    """Serves the page while the context is open.

    Args:
        pipe: pipeline that draws.
        name: name of the network in the heading of the page.
        initial: settings in the fields of the page when it is opened.
        listener: listening socket.
        host: host that it listens on.
        proxies: host names of proxies in front of the page.
        folder: folder for the files of the page.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder.served)
    audience = Audience()
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        build_page(pipe, name, initial, folder, audience),
        path="",
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        footer_links=[],
        max_file_size=MAX_FILE_BODY,
        app_kwargs={"exception_handlers": dict.fromkeys(REQUEST_ERRORS, refuse)},
        theme=gr.themes.Default(primary_hue="blue"),
        css=CSS,
    )
    guard = Guard(app, host, proxies, folder, audience)
    server = uvicorn.Server(uvicorn.Config(guard, log_level="warning", ws="none", timeout_graceful_shutdown=1))
    # A daemon thread, like those that it starts for jobs, does not keep the process alive.
    thread = Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield
    finally:
        audience.closed = True
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the next line cancels open streams
        server.should_exit = server.force_exit = True
        thread.join(END_TIMEOUT_S)
