"""`serve`: a web page that draws images with a checkpoint or an exported folder."""

from __future__ import annotations

import ipaddress
import signal
import socket
import sys
from threading import Event
from types import FrameType

from lightning_mvar.checkpoints import WhichWeights, load_trained
from lightning_mvar.devices import Precision
from lightning_mvar.errors import InputError, Interrupted, require_package
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.sampling.settings import SamplingSettings


def serve(
    ckpt_path: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    allowed_hosts: str = "",
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    device: str = "auto",
    precision: Precision = "float32",
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    temperature: float = 1.0,
) -> None:
    """Serves a web page that draws images scale by scale and inpaints, until Ctrl-C.

    Args:
        ckpt_path: checkpoint of `fit`, folder of `export`, published file, or a known name such as `var-d16`.
        host: address to listen on; the default is reachable only from this machine, 0.0.0.0 also from others.
        port: port to listen on, 1 to 65535.
        allowed_hosts: other host names under which browsers reach the page, such as that of a proxy, comma-separated.
        tokenizer: folder of the tokenizer, if it is no longer at the path recorded in the checkpoint.
        weights: for a checkpoint, `ema` for the averaged weights if it has them, `raw` for the last ones.
        device: auto, cpu, cuda or cuda:N.
        precision: precision of network and decoder.
        guidance: guidance scale in the page's field when it is opened, 0 for none.
        top_k: top-k in its field, 0 for all codes.
        top_p: top-p in its field, 0 or 1 for all codes.
        temperature: temperature in its field, below 1 for likelier tokens.
    """
    require_package("gradio", "serve", "the page")
    initial = SamplingSettings(guidance, top_k, top_p, temperature=temperature)
    listen(host, port).close()  # reports an unusable address before weights are read
    pipe = MVARPipeline(load_trained(ckpt_path, tokenizer, weights), device, precision)
    from lightning_mvar.web.folder import page_folder
    from lightning_mvar.web.server import serving  # importing gradio takes seconds

    for number in (signal.SIGINT, signal.SIGTERM):  # to remove temporary files before exiting
        signal.signal(number, interrupt)
    listener = listen(host, port)
    proxies = [name.strip() for name in allowed_hosts.split(",") if name.strip()]
    with page_folder() as folder, serving(pipe, ckpt_path, initial, listener, host, proxies, folder):
        if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print(f"warning: anyone who can reach {host} can use the page without a password", file=sys.stderr)
        print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port} (press Ctrl-C to stop)", flush=True)
        Event().wait()


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket; raises InputError if the address is invalid or in use."""
    if not 0 < port < 2**16:
        raise InputError(f"--port {port} must be a number from 1 to {2**16 - 1}")
    if not host:
        raise InputError("--host is empty: give an address of this machine, such as 127.0.0.1")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections of a page that just ended
        listener.bind(address)
        listener.listen()
        return listener
    except UnicodeError as error:  # the name is too long, or has empty parts
        raise InputError(f"--host {host!r} is not the name of a host") from error
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port or --host"
        ) from error


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number, "the page has ended", "start it again with the same command")
