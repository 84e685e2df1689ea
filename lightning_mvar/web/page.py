"""The page of `serve`: one column of settings, and a tab each to draw and to in-paint.

One job runs at a time, the others wait. The page fetches nothing from elsewhere and reads no file of this machine.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image

from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.scales import in_words
from lightning_mvar.web.studio import INSIDE, MAX_PICTURES, OUTSIDE, Drawn, Studio, class_menu

MAX_WAITING = 16  # jobs
MAX_UPLOAD = "20mb"
KEEP = 3600  # seconds that pictures stay on disk for the browsers
SHARP = 128  # pictures up to this side are enlarged as squares instead of blurred
Shown = tuple[list[Path], list[tuple[Path, str]]]  # values of the galleries: pictures, and scales with their captions
JOB: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1}  # of drawing and in-painting together
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

CSS = """
.sharp img, .sharp canvas { image-rendering: pixelated; }
.grid-wrap { height: auto !important; min-height: 0 !important; max-height: none; overflow: hidden; }
.grid-wrap { padding-top: 2.5rem; }
.pictures .grid-container { grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); justify-items: center; }
.scales .grid-container { grid-template-columns: repeat(auto-fit, minmax(4rem, 1fr)); }
.pictures .thumbnail-item { max-width: 30rem; }
.scales .caption-label { font-size: x-small; padding: 0 0.4em; }
"""


def build_page(pipe: MVARPipeline, name: str) -> gr.Blocks:
    """The page of a pipeline; `name` says on it what draws."""
    studio, schedule = Studio(pipe), pipe.network.config.schedule
    about = f"{pipe.classes.count} classes, {in_words(pipe.shape)} pixels, {schedule.num_scales} scales"
    with gr.Blocks(title="lightning_mvar", analytics_enabled=False, delete_cache=(KEEP, KEEP), fill_width=True) as page:
        gr.Markdown(f"## Pictures, scale by scale\n`{name}`: {about}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                fields = settings_fields(pipe)
            with gr.Column(scale=3, min_width=600):
                with gr.Tab("Draw"):
                    drawn, chosen = draw_tab(studio, fields)
                with gr.Tab("In-paint"):
                    paint_tab(studio, fields, drawn, chosen)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def settings_fields(pipe: MVARPipeline) -> list[gr.components.Component]:
    """Fields in the order of `studio.settings`. None has bounds of its own: `settings` names the field it refuses."""
    menu = class_menu(pipe.classes)
    wanted = gr.Dropdown(menu, value=menu[1][1], label="Class", info="type to search", allow_custom_value=True)
    with gr.Group(), gr.Row():
        count = gr.Number(4, label="Pictures", info=f"1 to {MAX_PICTURES}", step=1, min_width=120)
        guidance = gr.Number(1.5, label="Guidance", info="0 for none", step=0.1, min_width=120)
    with gr.Group(), gr.Row():
        top_k = gr.Number(900, label="Top-k", info="0 for all", step=1, min_width=120)
        top_p = gr.Number(0.96, label="Top-p", info="1 for all", step=0.01, min_width=120)
    with gr.Group():
        seed = gr.Number(0, label="Seed", info="the same seed draws the same pictures", step=1)
        another = gr.Button("Another seed", size="sm")
    smooth = gr.Checkbox(False, label="Smooth", info="mixed codes, for looking at")
    another.click(None, None, seed, js="() => Math.floor(Math.random() * 1e6)", **HIDDEN)
    return [wanted, count, guidance, top_k, top_p, seed, smooth]


def draw_tab(studio: Studio, fields: list[gr.components.Component]) -> tuple[gr.Gallery, gr.State]:
    """Its gallery, and the number of the picture that is chosen there."""
    with gr.Row():
        start = gr.Button("Draw", variant="primary", elem_id="draw", scale=4)
        stop = gr.Button("Stop", scale=1)
    drawn = gallery(studio, "Pictures", "drawn", "pictures")
    scales = gallery(studio, "Scale by scale", "drawn-scales", "scales")
    chosen = gr.State(0)

    def draw(*inputs: Any) -> Iterator[Shown]:
        with told():
            yield from gallery_values(studio.draw(*inputs))

    def choose(event: gr.SelectData) -> int:
        return event.index

    job = start.click(draw, fields, [drawn, scales], show_progress_on=drawn, api_name="draw", **JOB)
    start.click(lambda: 0, None, chosen, **HIDDEN)
    drawn.select(choose, None, chosen, **HIDDEN)
    stop.click(None, cancels=job, **HIDDEN)
    return drawn, chosen


def paint_tab(studio: Studio, fields: list[gr.components.Component], drawn: gr.Gallery, chosen: gr.State) -> None:
    """To work on a picture of the other tab, or on a file."""
    with gr.Row():
        with gr.Column():
            with gr.Row():
                take = gr.Button("Take the drawn picture", size="sm", elem_id="take")
                upload = gr.UploadButton("Upload a picture", size="sm", file_types=["image"], elem_id="upload")
            canvas = painting_canvas(studio)
        with gr.Column():
            with gr.Row():
                start = gr.Button("In-paint", variant="primary", size="sm", elem_id="paint")
                stop = gr.Button("Stop", size="sm")
            painted = gallery(studio, "Drawn anew", "painted", "pictures")
    where = gr.Radio([INSIDE, OUTSIDE], value=INSIDE, label="Draw anew")
    scales = gallery(studio, "Scale by scale", "painted-scales", "scales")

    def paint(*inputs: Any) -> Iterator[Shown]:
        with told():
            yield from gallery_values(studio.paint(*inputs))

    def take_drawn(*inputs: Any) -> Image.Image:
        with told():
            return studio.take(*inputs)

    def take_file(path: str) -> Image.Image:
        with told():
            return studio.upload(path)

    inputs = [canvas, where, *fields]
    job = start.click(paint, inputs, [painted, scales], show_progress_on=painted, api_name="paint", **JOB)
    stop.click(None, cancels=job, **HIDDEN)
    take.click(take_drawn, [drawn, chosen], canvas, **HIDDEN)
    upload.upload(take_file, upload, canvas, **HIDDEN)


def painting_canvas(studio: Studio) -> gr.ImageEditor:
    """A picture with a brush that one can see through.

    A stroke is one and a half tokens of the finest scale wide: a token is drawn anew where half of it is covered.
    """
    token = studio.enlarged * studio.pipe.tokenizer.config.downsampling
    radius = round(0.75 * token)
    return gr.ImageEditor(
        label="Paint over a part",
        type="pil",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=radius, colors=[("#ff3030", 0.5)], color_mode="fixed"),
        eraser=gr.Eraser(default_size=radius),
        canvas_size=studio.canvas,
        height=480,
        placeholder="Take a drawn picture, or upload one",
        elem_id="canvas",
        elem_classes=looks(studio),
    )


def gallery(studio: Studio, label: str, name: str, kind: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        type="pil",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],  # by default also one that shares on a public site
        elem_id=name,
        elem_classes=[kind, *looks(studio)],
    )


def looks(studio: Studio) -> list[str]:
    return ["sharp"] if max(studio.pipe.shape) <= SHARP else []


def gallery_values(forming: Iterator[Drawn]) -> Iterator[Shown]:
    """What the galleries show, after each scale.

    Pictures in memory gradio would write again at every scale, also while a browser reads them; files it copies once.
    """
    with TemporaryDirectory() as folder:
        scales: list[tuple[Path, str]] = []
        for step, drawn in enumerate(forming):
            pictures = [save(image, folder, f"{step}_{i}") for i, image in enumerate(drawn.pictures)]
            scales.append((save(drawn.sheet, folder, f"{step}"), drawn.scale))
            yield pictures, scales


def save(image: Image.Image, folder: str, name: str) -> Path:
    path = Path(folder, f"{name}.png")
    image.save(path)
    return path


@contextmanager
def told() -> Iterator[None]:
    """Show a user's mistake on the page, which takes messages for HTML."""
    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error


@contextmanager
def serving(pipe: MVARPipeline, name: str, host: str, port: int) -> Iterator[None]:
    """Serve the page of a pipeline from a thread of its own, as long as the context lasts."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a job that is under way may write to it still
        os.environ["GRADIO_TEMP_DIR"] = folder  # pictures and uploads; its default is shared with all other users
        page = build_page(pipe, name)
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=MAX_UPLOAD,
            theme=gr.themes.Default(primary_hue="blue"),
            css=CSS,
        )
        try:
            yield
        finally:
            page.close(verbose=False)
