"""`serve`: web page that draws images with a checkpoint or an exported folder."""

from __future__ import annotations

import socket
import sys
from importlib.util import find_spec
from threading import Event

from lightning_mvar.checkpoints import WhichWeights, read_model
from lightning_mvar.cli.arguments import call
from lightning_mvar.devices import Precision
from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline

LOOPBACK_HOSTS = ("127.0.0.1", "localhost")


def serve(
    ckpt_path: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    device: str = "auto",
    precision: Precision = "float32",
) -> None:
    """Serve a web page that draws images scale by scale and inpaints, until Ctrl-C.

    Args:
        ckpt_path: checkpoint of `fit` (sharded or not), folder of `export`, or published file (.pth, .safetensors).
        host: address to listen on; the default is reachable from this machine only, 0.0.0.0 from any other.
        port: port to listen on, 1 to 65535.
        tokenizer: folder of the tokenizer, if it is no longer at the path that the checkpoint records.
        weights: of a checkpoint, `ema` for the averaged weights if it has them, `raw` for the last ones.
        device: auto, cpu, cuda or cuda:N.
        precision: precision of network and decoder.
    """
    if find_spec("gradio") is None:
        raise InputError("the page needs gradio: pip install 'lightning-mvar[serve]'")
    check_address(host, port)
    pipe = MVARPipeline(read_model(ckpt_path, tokenizer, weights), device, precision)
    from lightning_mvar.web.page import serving  # importing gradio takes seconds

    with serving(pipe, ckpt_path, host, port):
        if host not in LOOPBACK_HOSTS:
            print(f"warning: anyone who can reach {host} can use the page without a password", file=sys.stderr)
        print(f"serving at http://{host}:{port} (press Ctrl-C to stop)", flush=True)
        Event().wait()


def check_address(host: str, port: int) -> None:
    """Raises InputError if the address cannot be bound, before weights are read."""
    if not 0 < port < 2**16:
        raise InputError(f"--port {port} must be a number from 1 to {2**16 - 1}")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections of a page that just ended
            probe.bind((host, port))
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port or --host"
        ) from error


def main(argv: list[str]) -> None:
    call(serve, argv)
