"""Validates page requests: allows only files in the page's own folder and bounds the number of pending edits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs

from lightning_mvar.errors import InputError

MAX_LAYERS, MAX_EDITS, MAX_EDIT_BYTES = 8, 32, 64 * 2**20  # for edited images that wait for their job


class Page(gr.Blocks):
    """Page whose functions receive only files in its own folder, never other paths or URLs that a request names."""

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        try:
            check_files(inputs)
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except gr.Error:
            raise
        except (ValueError, TypeError, AttributeError) as error:  # from gradio, which trusts its page
            raise gr.Error("the values do not fit the fields of the page", print_exception=False) from error


def check_files(value: Any) -> None:
    """Raises gr.Error unless each file in a JSON value was uploaded or drawn here, and is still there.

    Objects within files are checked too: gradio downloads each `path` that is a URL, however deep it lies.
    """
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            check_file(Path(value["path"]))
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            check_files(item)


def check_file(path: Path) -> None:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    if not (path.is_absolute() and path.resolve().is_relative_to(folder.resolve()) and path.is_file()):
        raise gr.Error("an image is no longer kept: draw or upload it again", print_exception=False)


def bound_edits(canvas: gr.ImageEditor) -> None:
    """Bounds the edited images that an editor keeps in memory until their job begins."""
    accept, stored = canvas.accept_blobs, canvas.blob_storage

    def num_bytes() -> int:
        return sum(
            len(part or b"") for edit in stored.values() for part in (edit.background, edit.composite, *edit.layers)
        )

    @server
    def accept_blobs(data: AcceptBlobs) -> None:
        if data.data["index"] not in (None, "null", *map(str, range(MAX_LAYERS))):  # a browser sends text
            raise gr.Error(f"an image has at most {MAX_LAYERS} layers", print_exception=False)
        accept(data)
        while len(stored) > MAX_EDITS or num_bytes() > MAX_EDIT_BYTES:
            del stored[next(iter(stored))]

    canvas.accept_blobs = accept_blobs  # a subclass would make gradio write a stub file beside this one


def edited_image(canvas: gr.ImageEditor, value: dict[str, Any] | None) -> tuple[bytes | None, list[bytes]]:
    """Returns the files of an editor's background and layers; `value` is what a request sent for the editor."""
    if value is not None and value["id"] is not None:
        edit = canvas.blob_storage.pop(value["id"], None)
        return (None, []) if edit is None else (edit.background, [layer for layer in edit.layers if layer is not None])
    background, layers = (None, []) if value is None else (value["background"], value["layers"])
    if len(layers) > MAX_LAYERS:
        raise InputError(f"an image has at most {MAX_LAYERS} layers")
    return background and Path(background["path"]).read_bytes(), [Path(layer["path"]).read_bytes() for layer in layers]
