"""Tests of the served page over HTTP, and in a browser if one is installed."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import SCHEDULE, tiny_network
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import TrainedModel
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.web.backend import INSIDE, ScalePreview
from lightning_mvar.web.folder import PageFolder
from lightning_mvar.web.guard import RECEIVED, Audience

# The tests import `web.page` and `web.server` themselves: with gradio this takes seconds, and each process of xdist
# imports all test files.

FIELDS = ("3", 2, 1.5, 900, 0.96, 1.0, 0, False, False, *[0.0] * SCHEDULE.num_scales)
INITIAL = SamplingSettings(3.0, 40, 0.9, temperature=0.8)
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


class CountingPipeline(MVARPipeline):
    """Pipeline that counts concurrent jobs."""

    running = max_running = started = 0

    def stream_images(self, *arguments: Any, **settings: Any) -> Iterator[list[Image.Image]]:
        self.running += 1
        self.started += 1
        self.max_running = max(self.max_running, self.running)
        try:
            for images in super().stream_images(*arguments, **settings):
                threading.Event().wait(0.05)
                yield images
        finally:
            self.running -= 1


@pytest.fixture(scope="module")
def pipe(tokenizer: Tokenizer) -> CountingPipeline:
    return CountingPipeline(TrainedModel(tiny_network(), tokenizer, []), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PageFolder:
    return PageFolder(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def url(pipe: CountingPipeline, folder: PageFolder) -> Iterator[str]:
    from lightning_mvar.web.server import serving

    listener = socket.create_server(("127.0.0.1", 0))
    with serving(pipe, "tiny", INITIAL, listener, "127.0.0.1", ["page.example"], folder):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        # Gradio's client downloads each file to a new temporary folder and never removes it.
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("client")))
        yield Client(url, verbose=False)


def arrays(gallery: list[dict[str, Any]]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(item["image"])) for item in gallery])


def test_images_arrive_scale_by_scale(pipe: CountingPipeline, client: Client) -> None:
    job = client.submit(*FIELDS, api_name="/draw")
    images, scales = job.result(timeout=30)
    expected = [np.asarray(image) for image in pipe(["3", "3"])]
    assert (arrays(images) == np.stack(expected)).all()
    assert [scale["caption"] for scale in scales] == [f"{side} x {side}" for side in SCHEDULE.side_lengths]
    assert len(job.outputs()) == SCHEDULE.num_scales


def test_its_fields_start_with_the_given_settings(url: str) -> None:
    components = httpx.get(f"{url}/config").json()["components"]
    fields = {item["props"].get("label"): item["props"].get("value") for item in components}
    assert [fields[name] for name in ("Guidance", "Top-k", "Top-p", "Temperature")] == [3.0, 40, 0.9, 0.8]
    assert [fields[name] for name in SCHEDULE.names] == [0, 1, 2, 3]  # guidance by scale


def test_invalid_input_is_reported_without_traceback(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AppError, match="guidance must be a number from 0 to 1,000, got abc"):
        client.predict(*FIELDS[:2], "abc", *FIELDS[3:], api_name="/draw")
    with pytest.raises(
        AppError, match="there is no class '&lt;b&gt;'; use numbers"
    ):  # escaped, because the browser renders it as HTML
        client.predict("<b>", *FIELDS[1:], api_name="/draw")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_one_job_runs_at_a_time(pipe: CountingPipeline, client: Client, tmp_path: Path) -> None:
    """Checks that inpainting waits for drawing as well."""
    Image.new("RGBA", (8, 8), "red").save(tmp_path / "red.png")
    red = handle_file(tmp_path / "red.png")
    pipe.max_running = 0
    jobs = [client.submit(*FIELDS, api_name="/draw") for _ in range(2)]
    jobs.append(client.submit({"background": red, "layers": [red]}, INSIDE, *FIELDS, api_name="/paint"))
    assert all(job.result(timeout=30) for job in jobs)
    assert pipe.max_running == 1


def test_it_listens_on_its_address_only(url: str) -> None:
    assert httpx.get(url).status_code == 200
    with pytest.raises(ConnectionRefusedError), socket.socket() as other:
        other.connect(("127.0.0.2", httpx.URL(url).port))


def test_local_files_cannot_be_read(url: str, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), "red").save(tmp_path / "secret.png")
    for path in (__file__, "README.md", tmp_path / "secret.png", "/etc/passwd"):
        assert httpx.get(f"{url}/gradio_api/file={path}").status_code in (403, 404)
    secret = {"path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"}}
    fields = [{"background": secret, "layers": [secret], "composite": None}, INSIDE, *FIELDS]
    event = httpx.post(f"{url}/gradio_api/call/paint", json={"data": fields}).json()["event_id"]
    answer = httpx.get(f"{url}/gradio_api/call/paint/{event}", timeout=30).text
    assert "event: error" in answer
    assert "event: complete" not in answer


def test_foreign_pages_and_hosts_are_refused(url: str, folder: PageFolder) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        before = list(folder.path.rglob("*"))
        assert httpx.get(url, headers=headers).status_code == 403
        answer = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", b"x" * 10**6)}, headers=headers)
        assert answer.status_code == 403
        assert list(folder.path.rglob("*")) == before
    assert httpx.get(url, headers={"Host": "page.example"}).status_code == 200
    assert httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", b"x" * (21 << 20))}).status_code == 413


def size_of_files(folder: PageFolder) -> tuple[int, int]:
    sizes = [file.stat().st_size for file in folder.path.rglob("*") if file.is_file()]
    return len(sizes), sum(sizes)


def test_files_of_many_uploads_and_draws_are_bounded(
    url: str, client: Client, folder: PageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mvar.web.folder.MAX_FOLDER_BYTES", 3 * 2**20)
    for number in range(8):
        file = bytes([number]) * 2**20
        assert httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", file)}).status_code == 200
        assert size_of_files(folder)[1] <= 3 * 2**20
    monkeypatch.setattr("lightning_mvar.web.folder.MAX_FILES", 20)
    for seed in range(5):
        images, scales = client.predict(*FIELDS[:6], seed, *FIELDS[7:], api_name="/draw")
        assert size_of_files(folder)[0] <= 20
    assert all(Path(item["image"]).is_file() for item in [*images, *scales])  # downloaded


def test_a_job_keeps_what_it_shows_while_uploads_make_room(tmp_path: Path) -> None:
    from lightning_mvar.web.page import Jobs

    folder, image = PageFolder(tmp_path), Image.new("RGB", (8, 8))
    request: Any = SimpleNamespace(session_hash="a", request=SimpleNamespace(scope={RECEIVED: time.monotonic()}))
    previews = iter([ScalePreview([image, image], image, "1 x 1")] * 4)
    for images, scales in Jobs(folder, Audience()).run(previews, request):
        folder.make_room(2**30)
        assert all(path.is_file() for path in [*images, *(path for path, _ in scales)])
    assert size_of_files(folder)[0] == len(images) + len(scales)  # earlier images are removed


def test_jobs_that_nobody_waits_for_are_dropped(
    url: str, pipe: CountingPipeline, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_mvar.web.page import MAX_QUEUED_JOBS

    body = {"data": list(FIELDS)}
    for _ in range(10 * MAX_QUEUED_JOBS):  # some jobs end meanwhile
        if httpx.post(f"{url}/gradio_api/call/draw", json=body).status_code != 200:
            break
    else:
        pytest.fail("the queue never fills up")
    monkeypatch.setattr("lightning_mvar.web.guard.CLIENT_TIMEOUT_S", 0)
    started = pipe.started
    end = time.monotonic() + 30
    while httpx.get(f"{url}/gradio_api/queue/status").json()["queue_size"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    monkeypatch.undo()
    assert client.submit(*FIELDS, api_name="/draw").result(timeout=30)
    assert pipe.started - started <= 2  # the last, and perhaps one that was just beginning


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("queue/join", b"", 422),
        ("queue/join", b"[" * 10**5, 400),
        ("queue/join", b'{"data": 3}', 422),
        ("queue/join", b'{"data": []}', 400),
        ("queue/join", b'{"data": [], "fn_index": 999, "session_hash": "a"}', 400),
        ("queue/join", b'{"data": [], "fn_index": -1, "session_hash": "a"}', 400),
        ("call/nothing", b'{"data": []}', 400),
        ("component_server", b"{}", 400),
        ("component_server", b'{"data": 1, "component_id": 999, "session_hash": "a", "fn_name": "preprocess"}', 400),
    ],
)
def test_malformed_requests_are_refused_without_traceback(
    url: str, path: str, body: bytes, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = httpx.post(f"{url}/gradio_api/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert "Traceback" not in "".join(capfd.readouterr())


def call(url: str, name: str, data: list[Any]) -> str:
    """Calls an endpoint as curl would; returns the last event of its stream."""
    event = httpx.post(f"{url}/gradio_api/call/{name}", json={"data": data}).json()["event_id"]
    return httpx.get(f"{url}/gradio_api/call/{name}/{event}", timeout=60).text.strip().split("\n\n")[-1]


def file_data(path: object) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


NOT_KEPT, NO_FIT = "an image is no longer kept: draw or upload it again", "the values do not fit the fields of the page"


@pytest.mark.parametrize(
    ("editor", "message"),
    [
        (None, "there is no image to paint on"),
        ({}, "there is no image to paint on"),
        ({"id": "unknown"}, "there is no image to paint on"),
        (3, NO_FIT),
        ({"background": 3}, NO_FIT),
        ({"background": file_data("/etc/passwd")}, NOT_KEPT),
        ({"background": file_data("http://127.0.0.1:1/image.png")}, NOT_KEPT),
        ({"background": file_data("README.md")}, NOT_KEPT),
        ({"background": file_data("a\0b")}, NOT_KEPT),
        ({"background": {"path": "/etc/passwd"}}, NOT_KEPT),
    ],
)
def test_editors_hold_files_of_this_page_only(
    url: str, editor: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in call(url, "paint", [editor, INSIDE, *FIELDS])
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_file_of_this_page_hides_no_other(url: str, folder: PageFolder) -> None:
    own = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", b"x")}).json()[0]
    before = list(folder.path.rglob("*"))
    for path in ("/etc/passwd", "http://127.0.0.1:1/image.png"):
        editor = {"path": own, "background": file_data(path), "layers": [], "composite": None}
        assert NOT_KEPT in call(url, "paint", [editor, INSIDE, *FIELDS])
    assert list(folder.path.rglob("*")) == before


def test_other_fields_hold_no_files_at_all(url: str, folder: PageFolder) -> None:
    """Gradio copies or downloads files for any kind of field, before its function checks the value."""
    before = list(folder.path.rglob("*"))
    for path in ("/etc/passwd", "http://127.0.0.1:1/image.png"):
        assert NOT_KEPT in call(url, "draw", [file_data(path), *FIELDS[1:]])
    assert NO_FIT in call(url, "draw", list(FIELDS[:3]))
    assert list(folder.path.rglob("*")) == before


def send_part(url: str, editor: str, part: dict[str, str], data: bytes) -> int:
    """Sends a part of an edited image as a browser does; returns the status."""
    fields = {"component_id": editor, "session_hash": "a", "fn_name": "accept_blobs", **part}
    return httpx.post(f"{url}/gradio_api/component_server", data=fields, files={"file": data}).status_code


def test_a_browser_sends_edited_images_in_bounded_parts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    components = httpx.get(f"{url}/config").json()["components"]
    editor = str(next(item["id"] for item in components if item["type"] == "imageeditor"))
    image, paint = BytesIO(), BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    Image.new("RGBA", (8, 8), "red").save(paint, "PNG")
    background, layer = {"type": "background", "index": "null"}, {"type": "layer", "index": "0"}
    assert send_part(url, editor, {**background, "id": "a"}, image.getvalue()) == 200
    assert send_part(url, editor, {**layer, "id": "a"}, paint.getvalue()) == 200
    assert call(url, "paint", [{"id": "a"}, INSIDE, *FIELDS]).startswith("event: complete")
    for index in ("1000000000", "-1", "x"):
        assert send_part(url, editor, {**layer, "index": index, "id": "b"}, paint.getvalue()) == 400
    monkeypatch.setattr("lightning_mvar.web.inputs.MAX_EDIT_BYTES", 2 * len(image.getvalue()))
    for number in range(5):
        assert send_part(url, editor, {**background, "id": str(number)}, image.getvalue()) == 200
    assert "there is no image to paint on" in call(url, "paint", [{"id": "0"}, INSIDE, *FIELDS])
    assert "nothing is painted" in call(url, "paint", [{"id": "4"}, INSIDE, *FIELDS])


@pytest.fixture
def browser() -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,1100"):
        options.add_argument(f"--{option}")
    options.add_argument("--enable-unsafe-swiftshader")  # WebGL without a GPU, for the canvas
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_a_browser_draws_and_inpaints(
    browser: Any, url: str, pipe: CountingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def wait_for(selector: str, count: int = 1, seconds: float = 60) -> Any:
        elements = WebDriverWait(browser, seconds).until(
            lambda _: [*browser.find_elements("css selector", selector)][: count + 1][count - 1 :]
        )
        return elements[0]

    stream, drawn_with = pipe.stream_images, list[dict[str, Any]]()
    monkeypatch.setattr(pipe, "stream_images", lambda **settings: drawn_with.append(settings) or stream(**settings))
    browser.get(url)
    wait_for("#curve-panel button").click()
    wait_for("#by-scale input").click()
    wait_for("#draw").click()
    wait_for("#drawn-scales img", SCHEDULE.num_scales)
    assert len(browser.find_elements("css selector", "#drawn img")) == 4
    assert drawn_with[-1]["guidance"] == [0, 1, 2, 3]  # the line of the initial guidance, until a slider is moved
    for keys in (Keys.CONTROL + "a", "10"):  # the control key is released in between
        wait_for("#guidance input").send_keys(keys)
    sliders = browser.find_elements("css selector", ".curve input[type=number]")
    expected = ["0", "3.33", "6", "6"]  # 6 is the top of the curve
    WebDriverWait(browser, 60).until(lambda _: [slider.get_attribute("value") for slider in sliders] == expected)
    wait_for("button[role=tab]:nth-of-type(2)").click()
    wait_for("#take").click()
    canvas = wait_for("#canvas canvas")
    wait_for("#canvas button[aria-label='Brush']")
    for _ in range(6):  # strokes are lost until the canvas holds the image, which the DOM does not show
        stroke = ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(60, 20)
        stroke.release().perform()
        wait_for("#paint").click()
        with suppress(TimeoutException):
            wait_for("#painted-scales img", SCHEDULE.num_scales, seconds=10)
            break
    assert len(browser.find_elements("css selector", "#painted img")) == 4
    assert external_requests(browser, url) == []


def external_requests(browser: Any, url: str) -> list[str]:
    """Returns the URLs that a page has requested from other hosts."""
    import json

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    fetched = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert fetched
    return [address for address in fetched if not address.startswith((url, "data:", "blob:"))]
