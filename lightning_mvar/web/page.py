"""Web page of `serve`: a column of sampling settings, a tab for drawing images and one for inpainting.

One job runs at a time; the others wait in a queue. The page loads nothing from other hosts and exposes no local files.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.sampling.guidance import Guidance
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.scales import format_shape
from lightning_mvar.web.backend import INSIDE, MAX_IMAGES, OUTSIDE, PageBackend, ScalePreview, class_menu
from lightning_mvar.web.folder import PageFolder
from lightning_mvar.web.guard import RECEIVED, Audience
from lightning_mvar.web.inputs import Page, bound_edits, edited_image

MAX_QUEUED_JOBS = 16
MAX_CURVE = 6  # guidance scale at the top of the curve
MAX_SESSIONS = 100  # whose state gradio keeps
MAX_PIXELATED_SIDE = 128  # larger images are interpolated when enlarged, smaller ones show square pixels
GalleryValues = tuple[list[Path], list[tuple[Path, str]]]  # images, and one captioned sheet per scale
# One queue for drawing and inpainting. The backend decodes the inputs: gradio would open any file, of any size.
JOB: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1, "preprocess": False}
HIDDEN_EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

CSS = """
.sharp img, .sharp canvas { image-rendering: pixelated; }
.grid-wrap { height: auto !important; min-height: 0 !important; max-height: none; overflow: hidden; }
.grid-wrap { padding-top: 2.5rem; }
.pictures .grid-container { grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); justify-items: center; }
.scales .grid-container { grid-template-columns: repeat(auto-fit, minmax(4rem, 1fr)); }
.pictures .thumbnail-item { max-width: 30rem; }
.scales .caption-label { font-size: x-small; padding: 0 0.4em; }
.curve { flex-wrap: nowrap; gap: 0; }
.curve .block { padding: 0; align-items: center; border: none; text-align: center; overflow: visible !important; }
.curve input[type="range"] { writing-mode: vertical-lr; direction: rtl; width: 1.2rem; min-width: 0; height: 8rem; }
.curve input[type="number"] { width: 2.6rem; padding: 0; text-align: center; font-size: x-small; }
.curve input[type="range"]::-webkit-slider-runnable-track {
  background: linear-gradient(to top, var(--slider-color) var(--range_progress), var(--neutral-200) 0) !important;
}
.curve .head { align-items: center; }
.curve .min_value, .curve .max_value, .curve .reset-button { display: none; }
.curve .head, .curve .slider_input_container, .curve .tab-like-container { flex-direction: column; display: flex; }
"""


class Jobs:
    """Runs the jobs of a page while a client is waiting for their images, which are written to files."""

    def __init__(self, folder: PageFolder, audience: Audience) -> None:
        self.folder, self.audience = folder, audience

    def run(self, previews: Iterator[ScalePreview], request: gr.Request) -> Iterator[GalleryValues]:
        """Yields the values of both galleries after each scale.

        Raises:
            InputError: if no client is waiting for the images any longer.
        """
        folder, scales = self.folder.new_folder(), list[tuple[Path, str]]()
        self.check_wanted(request)
        for step, preview in enumerate(previews):
            images = [save(image, folder, f"{step}_{i}") for i, image in enumerate(preview.images)]
            scales.append((save(preview.sheet, folder, f"{step}"), preview.caption))
            self.folder.shown = frozenset([*images, *(path for path, _ in scales)])
            self.folder.make_room()
            yield images, scales
            self.check_wanted(request)

    def check_wanted(self, request: gr.Request) -> None:
        session, http_request = request.session_hash, request.request
        assert session is not None
        assert http_request is not None
        if not self.audience.is_waiting(session, http_request.scope[RECEIVED]):
            raise InputError("no client is waiting for these images any longer")


def build_page(
    pipe: MVARPipeline, name: str, initial: SamplingSettings, folder: PageFolder, audience: Audience
) -> gr.Blocks:
    """Builds the page of a pipeline, with `name` in its heading and the settings `initial` in its fields."""
    backend, jobs, schedule = PageBackend(pipe), Jobs(folder, audience), pipe.network.config.schedule
    summary = f"{pipe.classes.count} classes, {format_shape(pipe.shape)} pixels, {schedule.num_scales} scales"
    with Page(title="lightning_mvar", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"## Images, scale by scale\n`{name}`: {summary}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                fields = settings_fields(pipe, initial)
            with gr.Column(scale=3, min_width=600):
                with gr.Tab("Draw"):
                    drawn, selected = draw_tab(backend, jobs, fields)
                with gr.Tab("Inpaint"):
                    inpaint_tab(backend, jobs, fields, drawn, selected)
    page.state_session_capacity = MAX_SESSIONS
    return page.queue(max_size=MAX_QUEUED_JOBS, default_concurrency_limit=1, api_open=False)


def settings_fields(pipe: MVARPipeline, initial: SamplingSettings) -> list[gr.components.Component]:
    """Builds the input fields in the order of `sampling_arguments`, which checks bounds and names the invalid field."""
    assert isinstance(initial.guidance, float)  # not one per scale, for which there is no field
    assert isinstance(initial.temperature, float)
    menu = class_menu(pipe.classes)
    class_name = gr.Dropdown(menu, value=menu[1][1], label="Class", info="type to search", allow_custom_value=True)
    with gr.Group(), gr.Row():
        count = gr.Number(4, label="Images", info=f"1 to {MAX_IMAGES}", step=1, min_width=120)
        guidance = gr.Number(
            initial.guidance, label="Guidance", info="0 for none", step=0.1, min_width=120, elem_id="guidance"
        )
    with gr.Group(), gr.Row():
        top_k = gr.Number(initial.top_k, label="Top-k", info="0 for all", step=1, min_width=80)
        top_p = gr.Number(initial.top_p, label="Top-p", info="1 or 0 for all", step=0.01, min_width=80)
        temperature = gr.Number(
            initial.temperature, label="Temperature", info="below 1: likelier", step=0.05, min_width=80
        )
    with gr.Group():
        seed = gr.Number(initial.seed, label="Seed", info="the same seed draws the same images", step=1)
        new_seed = gr.Button("New seed", size="sm")
    smooth = gr.Checkbox(initial.smooth, label="Smooth", info="mixes codes: smoother images, not for scores")
    new_seed.click(None, None, seed, js="() => Math.floor(Math.random() * 1e6)", **HIDDEN_EVENT)
    curve = guidance_curve(pipe, guidance, initial.guide)
    return [class_name, count, guidance, top_k, top_p, temperature, seed, smooth, *curve]


def guidance_curve(pipe: MVARPipeline, guidance: gr.Number, initial: Guidance) -> list[gr.components.Component]:
    """Builds one slider per scale, set to `initial`, and the checkbox that makes them replace the field `guidance`.

    A new number in that field sets the sliders to its linear ramp, clipped at `MAX_CURVE`, as a starting point.
    """
    config = pipe.network.config
    line = Guidance(1.0).strengths(config)
    with gr.Accordion("Guidance by scale", open=False, elem_id="curve-panel"):
        by_scale = gr.Checkbox(False, label="Use this curve", elem_id="by-scale")
        with gr.Row(elem_classes="curve"):
            sliders = [
                gr.Slider(
                    0,
                    MAX_CURVE,
                    min(MAX_CURVE, round(strength, 2)),
                    step=0.01,
                    label=name,
                    min_width=30,
                    elem_id=f"strength-{name}",
                )
                for name, strength in zip(config.schedule.names, initial.strengths(config), strict=True)
            ]
    if len(sliders) > 1:
        draw_line = f"(g) => {list(line)}.map(x => Math.min({MAX_CURVE}, +(g * x).toFixed(2)))"
        guidance.change(None, guidance, sliders, js=draw_line, **HIDDEN_EVENT)
    return [by_scale, *sliders]


def draw_tab(backend: PageBackend, jobs: Jobs, fields: list[gr.components.Component]) -> tuple[gr.Gallery, gr.State]:
    """Builds the tab; returns its gallery and the index of the image selected there."""
    with gr.Row():
        start = gr.Button("Draw", variant="primary", elem_id="draw", scale=4)
        stop = gr.Button("Stop", scale=1)
    drawn = gallery(backend, "Images", "drawn", "pictures")
    scales = gallery(backend, "Scale by scale", "drawn-scales", "scales")
    selected = gr.State(0)

    def draw(request: gr.Request, *inputs: Any) -> Iterator[GalleryValues]:
        with errors_on_page():
            yield from jobs.run(backend.draw(*inputs), request)

    def select(event: gr.SelectData) -> int:
        return event.index

    job = start.click(draw, fields, [drawn, scales], show_progress_on=drawn, api_name="draw", **JOB)
    start.click(lambda: 0, None, selected, **HIDDEN_EVENT)
    drawn.select(select, None, selected, **HIDDEN_EVENT)
    stop.click(None, cancels=job, **HIDDEN_EVENT)
    return drawn, selected


def inpaint_tab(
    backend: PageBackend, jobs: Jobs, fields: list[gr.components.Component], drawn: gr.Gallery, selected: gr.State
) -> None:
    """Builds the tab that inpaints an image of the other tab or an uploaded file."""
    with gr.Row():
        with gr.Column():
            with gr.Row():
                use_drawn = gr.Button("Use the drawn image", size="sm", elem_id="take")
                upload = gr.UploadButton("Upload an image", size="sm", file_types=["image"], elem_id="upload")
            canvas = painting_canvas(backend)
        with gr.Column():
            with gr.Row():
                start = gr.Button("Inpaint", variant="primary", size="sm", elem_id="paint")
                stop = gr.Button("Stop", size="sm")
            painted = gallery(backend, "Inpainted", "painted", "pictures")
    region = gr.Radio([INSIDE, OUTSIDE], value=INSIDE, label="Redraw")
    scales = gallery(backend, "Scale by scale", "painted-scales", "scales")

    def inpaint(request: gr.Request, editor: dict[str, Any] | None, *inputs: Any) -> Iterator[GalleryValues]:
        with errors_on_page():
            yield from jobs.run(backend.inpaint(*edited_image(canvas, editor), *inputs), request)

    def load_drawn(images: list[dict[str, Any]] | None, index: Any) -> Image.Image:
        with errors_on_page():
            return backend.load_drawn([Path(item["image"]["path"]) for item in images or [] if "image" in item], index)

    def load_upload(file: dict[str, Any]) -> Image.Image:
        with errors_on_page():
            return backend.load_upload(Path(file["path"]))

    inputs = [canvas, region, *fields]
    job = start.click(inpaint, inputs, [painted, scales], show_progress_on=painted, api_name="paint", **JOB)
    stop.click(None, cancels=job, **HIDDEN_EVENT)
    use_drawn.click(load_drawn, [drawn, selected], canvas, preprocess=False, **HIDDEN_EVENT)
    upload.upload(load_upload, upload, canvas, preprocess=False, **HIDDEN_EVENT)


def painting_canvas(backend: PageBackend) -> gr.ImageEditor:
    """Builds an image editor with a translucent brush.

    A stroke is 1.5 tokens of the finest scale wide, because a token is redrawn if half of its cell is covered.
    """
    token = backend.zoom * backend.pipe.tokenizer.config.downsampling
    radius = round(0.75 * token)
    canvas = gr.ImageEditor(
        label="Paint over a part",
        type="pil",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=radius, colors=[("#ff3030", 0.5)], color_mode="fixed"),
        eraser=gr.Eraser(default_size=radius),
        canvas_size=backend.canvas_size,
        height=480,
        placeholder="Use a drawn image, or upload one",
        elem_id="canvas",
        elem_classes=css_classes(backend),
    )
    bound_edits(canvas)
    return canvas


def gallery(backend: PageBackend, label: str, name: str, kind: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        type="pil",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],  # by default there is also one that shares on a public site
        elem_id=name,
        elem_classes=[kind, *css_classes(backend)],
    )


def css_classes(backend: PageBackend) -> list[str]:
    return ["sharp"] if max(backend.pipe.shape) <= MAX_PIXELATED_SIDE else []


def save(image: Image.Image, folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    image.save(path)
    return path


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Shows an InputError on the page, escaped because the page renders messages as HTML."""
    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
