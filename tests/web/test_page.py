"""Tests of the served page over HTTP, and in a browser if one is installed."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import SCHEDULE, tiny_network
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from processes import free_port

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import TrainedModel
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.web.backend import INSIDE
from lightning_mvar.web.page import serving

FIELDS = ("3", 2, 1.5, 900, 0.96, 0, False)
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


class CountingPipeline(MVARPipeline):
    """Pipeline that counts concurrent jobs."""

    running = max_running = 0

    def stream_images(self, *arguments: Any, **settings: Any) -> Iterator[list[Image.Image]]:
        self.running += 1
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
def url(pipe: CountingPipeline) -> Iterator[str]:
    port = free_port()
    with serving(pipe, "tiny", "127.0.0.1", port):
        yield f"http://127.0.0.1:{port}"


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


def test_invalid_input_is_reported_without_traceback(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AppError, match="guidance must be a number from 0 to 100, not abc"):
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


def test_a_browser_draws_and_inpaints(browser: Any, url: str) -> None:
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    def wait_for(selector: str, count: int = 1, seconds: float = 60) -> Any:
        elements = WebDriverWait(browser, seconds).until(
            lambda _: [*browser.find_elements("css selector", selector)][: count + 1][count - 1 :]
        )
        return elements[0]

    browser.get(url)
    wait_for("#draw").click()
    wait_for("#drawn-scales img", SCHEDULE.num_scales)
    assert len(browser.find_elements("css selector", "#drawn img")) == 4
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
