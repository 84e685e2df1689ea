"""`serve`: a small web page that draws with a checkpoint or an exported folder."""

from __future__ import annotations

import socket
import sys
from importlib.util import find_spec
from threading import Event

from lightning_mvar.checkpoints import WhichWeights, load_trained
from lightning_mvar.cli.arguments import call
from lightning_mvar.devices import Precision
from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline

LOCAL = ("127.0.0.1", "localhost")


def serve(
    folder: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    device: str = "auto",
    precision: Precision = "float32",
) -> None:
    """Open a web page on this machine that draws pictures scale by scale and in-paints, until Ctrl-C.

    Args:
        folder: a checkpoint of `fit`, sharded or not, or a folder of `export`.
        host: address to answer at; the default is seen from this machine alone, 0.0.0.0 from every other.
        port: of the address.
        tokenizer: folder of the tokenizer, if it is no longer where the checkpoint remembers.
        weights: of a checkpoint, `ema` for those averaged over training where it has them, `raw` for the last.
        device: auto, cpu, cuda or cuda:N.
        precision: of network and decoder.
    """
    if find_spec("gradio") is None:
        raise InputError("the page needs gradio: pip install 'lightning-mvar[serve]'")
    check_address(host, port)
    pipe = MVARPipeline(load_trained(folder, tokenizer, weights), device, precision)
    from lightning_mvar.web.page import serving  # gradio takes seconds

    with serving(pipe, folder, host, port):
        if host not in LOCAL:
            print(f"warning: everybody who can reach {host} can use the page, without a password", file=sys.stderr)
        print(f"the page is at http://{host}:{port} (Ctrl-C ends it)", flush=True)
        Event().wait()


def check_address(host: str, port: int) -> None:
    """Raise InputError for an address that cannot be listened at, before weights are read."""
    if not 0 < port < 2**16:
        raise InputError(f"--port {port} must be a number from 1 to {2**16 - 1}")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the connections of a page that has just ended
            probe.bind((host, port))
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}:{port} ({error.strerror}): choose another --port or --host"
        ) from error


def main(argv: list[str]) -> None:
    call(serve, argv, positional=True)
