"""Tests of networks and tokenizers by name, against a server that answers as the Hub does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import tiny_network
from published_states import published

from lightning_mvar import ScaleSchedule, Tokenizer
from lightning_mvar.checkpoints import load_official_tokenizer, load_tokenizer, load_trained, open_trained, save_folder
from lightning_mvar.checkpoints.folders import read_config
from lightning_mvar.checkpoints.training import NetworkRecord, RunRecord, TokenizerRecord, load_recorded_tokenizer
from lightning_mvar.cli import run
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint, sha256_of
from lightning_mvar.io.hub import NETWORKS, SHA256, locate
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.training.network import absolute

COMMIT = NETWORKS["var-d16"].partition("@")[2]


class Hub:
    """Serves the files of folders OWNER/REPOSITORY below `root`, and records the paths requested with GET."""

    def __init__(self, root: Path) -> None:
        self.root, self.requests = root, list[str]()

    def reply(self, path: str) -> tuple[int, bytes]:
        parts = path.partition("?")[0].strip("/").removeprefix("api/models/").split("/")
        folder, kind, name = self.root.joinpath(*parts[:2]), "".join(parts[2:3]), "/".join(parts[4:])
        if not folder.is_dir():
            return 401, b"{}"
        files = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
            for file in folder.iterdir()
        ]
        if kind in ("", "revision"):
            siblings = [{"rfilename": file["path"]} for file in files]
            return 200, json.dumps({"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": siblings}).encode()
        if kind == "tree":
            return 200, json.dumps(files).encode()
        file = folder / name
        return (200, file.read_bytes()) if file.is_file() else (404, b"{}")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(tmp_path / "hub")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self, with_body: bool = False) -> None:
            status, body = hub.reply(self.path)
            self.send_response(status)
            for name, value in {"ETag": f'"{len(body)}"', "X-Repo-Commit": COMMIT, "Content-Length": len(body)}.items():
                self.send_header(name, str(value))
            if status == 401:
                self.send_header("X-Error-Code", "RepoNotFound")
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if with_body:
                hub.requests.append(self.path)
                self.wfile.write(body)

        def do_GET(self) -> None:
            self.do_HEAD(with_body=True)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{http.server_address[1]}"
        settings = {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache")}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = address + "/{repo_id}/resolve/{revision}/{filename}"
        for constant, value in settings.items():  # read from the environment when the library is imported
            monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
        yield hub
        http.shutdown()


@pytest.fixture(scope="module")
def published_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small network and a small tokenizer under the names of the published ones."""
    folder = tmp_path_factory.mktemp("published")
    for name, state in zip(("var_d16.pth", "vae_ch160v4096z32.pth"), published("var_small"), strict=True):
        torch.save(state, folder / name)
    return folder


@pytest.fixture
def var(server: Hub, published_files: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub that serves the published files, small ones with their own hashes."""
    for place in SHA256:
        file = published_files / place.partition(":")[2].partition("@")[0]
        monkeypatch.setitem(SHA256, place, sha256_of(file) if file.exists() else "")
    (server.root / "FoundationVision").mkdir(parents=True)
    (server.root / "FoundationVision/var").symlink_to(published_files)
    return server


def test_a_published_network_loads_by_its_name_with_the_published_tokenizer(var: Hub) -> None:
    pipe = MVARPipeline.from_pretrained("var-d16", device="cpu")
    network, tokenizer = (var.root / "FoundationVision/var" / name for name in ("var_d16.pth", "vae_ch160v4096z32.pth"))
    expected = load_trained(network, tokenizer)
    assert fingerprint(pipe.network) == fingerprint(expected.network)
    assert pipe.tokenizer.fingerprint() == expected.tokenizer.fingerprint()
    alone = load_official_tokenizer("vae-ch160v4096z32", pipe.network.config.schedule)
    assert alone.fingerprint() == expected.tokenizer.fingerprint()


def test_files_are_downloaded_once_and_then_need_no_network(var: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    load_trained("FoundationVision/var:var_d16.pth", "vae-ch160v4096z32")
    fetched = len(var.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_trained("var-d16")
    assert load_tokenizer("vae-ch160v4096z32").config.schedule == ScaleSchedule.for_resolution(256)
    network, tokenizer, _ = load_trained("var-d16")
    run = RunRecord(ema=False, skipped_steps=(0, 0), world_size=1, batch_of_all_ranks=None)
    place = TokenizerRecord(absolute("vae-ch160v4096z32"), tokenizer.fingerprint())
    recorded = load_recorded_tokenizer(Path("a.ckpt"), None, NetworkRecord(network.config, place, [], run))
    assert recorded.config.schedule == network.config.schedule
    assert len(var.requests) == fetched
    with pytest.raises(InputError, match=r"in the cache, and the Hub .*: download .*/resolve/v2/a\.pth on"):
        load_trained("FoundationVision/var:a.pth@v2")


def test_a_file_of_another_content_is_removed(var: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as change:
        change.setitem(SHA256, NETWORKS["var-d16"], "0" * 64)
        with pytest.raises(InputError, match=r"var_d16\.pth has the SHA-256 \w+ instead of 0+, and was removed"):
            locate("var-d16")
    assert not list((var.root.parent / "cache").glob("models--*/blobs/*"))
    assert locate("var-d16").path.is_file()
    assert len(var.requests) == 2


def test_a_pushed_pipeline_is_loaded_from_its_repository(server: Hub, tokenizer: Tokenizer) -> None:
    save_folder(server.root / "somebody/digits", tokenizer, tiny_network())
    assert load_trained("somebody/digits@v1").network.config == tiny_network().config


def test_published_weights_are_exported_by_name(var: Hub, tmp_path: Path) -> None:
    for options in (["--official", "var-d16"], ["--tokenizer", "vae-ch160v4096z32", "--resolution", "512"]):
        assert run(["export", *options, "--out", str(tmp_path / options[0])]) == 0
    assert read_config(tmp_path / "--official", "network", "").network == open_trained("var-d16").config
    assert read_config(tmp_path / "--tokenizer", "tokenizer", "").tokenizer.shape == (512, 512)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nobody/nothing", "nobody/nothing does not exist as a local path or as a repository that you may read"),
        ("FoundationVision/var:var_d99.pth", r"FoundationVision/var has no var_d99\.pth; it has .*:var_d16\.pth"),
        ("FoundationVision/var", r"var has no config\.json, which `export` .*it has .*var:vae_ch160v4096z32\.pth"),
        ("FoundationVision/var:var_d16.pth", "add --tokenizer vae-ch160v4096z32, or its file"),
        ("var-d17", "var-d17 does not exist; it must be .*var-d16, var-d20"),
    ],
)
def test_names_of_nothing_are_refused_in_one_line(var: Hub, place: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_trained(place)
    assert "\n" not in str(caught.value)


def test_local_paths_are_never_looked_up(var: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for place in (
        "outputs/missing",
        "runs/missing",
        str(tmp_path / "a/b"),
        "../x",
        "./missing/x",
        "nodir/model.pth",
        "nodir/last.ckpt",
    ):
        assert locate(place).path == Path(place)
    (tmp_path / "var-d16").mkdir()
    assert locate("var-d16").path == Path("var-d16")
    assert not var.requests
