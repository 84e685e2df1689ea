"""`export` of published files to our folder, which `sample` reads, and back."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from published_states import published
from safetensors.torch import save_file

from lightning_mvar.checkpoints import load_tokenizer, load_trained
from lightning_mvar.cli import run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published files of VAR, M-VAR and the tokenizer, separate and in one checkpoint of the published trainer."""
    folder = tmp_path_factory.mktemp("published")
    for kind in ("mvar", "var"):
        network, tokenizer = published(f"{kind}_small")
        torch.save(network, folder / f"{kind}_d2.pth")
        trainer = {f"{kind}_wo_ddp": network, "vae_local": tokenizer}
        torch.save({"epoch": 3, "iter": 0, "trainer": trainer}, folder / f"{kind}_trainer.pth")
    torch.save(tokenizer, folder / "vae.pth")
    save_file(tokenizer, folder / "vae.safetensors")
    return folder


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["mvar", "var"])
def test_published_files_become_a_folder_that_samples(
    workdir: Path, files: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    network = ["--official", str(files / f"{kind}_d2.pth"), "--tokenizer", str(files / "vae.safetensors")]
    assert run(["export", *network, "--out", "apart"]) == 0
    assert "depth 2" in capfd.readouterr().out
    card = ["--license", "mit", "--datasets", "imagenet-1k", "OWNER/FACES"]
    assert run(["export", "--official", str(files / f"{kind}_trainer.pth"), "--out", "together", *card]) == 0
    assert ModelCard.load("together/README.md").data.datasets == ["imagenet-1k", "OWNER/FACES"]
    one, other = load_trained("apart"), load_trained("together")
    assert one.tokenizer.fingerprint() == other.tokenizer.fingerprint()
    assert one.network.config == other.network.config
    sample = ["sample", "--ckpt_path", "apart", "--classes", "3,9", "--per_class", "2", "--out", "samples.npz"]
    assert run([*sample, "--top_k", "1"]) == 0
    with np.load("samples.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 64, 64, 3)
        assert arrays["arr_1"].tolist() == [3, 3, 9, 9]
    assert run(["sample", "apart", "--classes", "3", "--out", "one", "--grid", "one.png", "--strip", "strip.png"]) == 0
    with Image.open("one.png") as grid, Image.open("strip.png") as strip:
        assert grid.width > grid.height  # one image and its class name
        assert strip.width > 3 * strip.height  # four scales
    assert run(["export", "--ckpt_path", "apart", "--to", "official", "--out", "back"]) == 0
    for ours, theirs in ((f"{kind}_d2.pth", f"{kind}_d2.pth"), ("vae_ch32v64z32.pth", "vae.pth")):
        back, original = (torch.load(path, weights_only=True) for path in (workdir / "back" / ours, files / theirs))
        assert back.keys() == original.keys()
        assert torch.equal(*(state[next(iter(original))] for state in (back, original)))


def test_a_published_tokenizer_is_converted_alone(workdir: Path, files: Path) -> None:
    assert run(["export", "--tokenizer", str(files / "vae.pth"), "--resolution", "512", "--out", "tok"]) == 0
    config = load_tokenizer("tok").config
    assert (config.shape, config.vocab_size, config.schedule.num_tokens) == ((512, 512), 64, 2240)


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("owned",)


def test_files_that_are_not_what_they_claim(workdir: Path, files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is reported in one message with exit code 1; nothing is written and no code is executed."""
    network, vae = str(files / "mvar_d2.pth"), str(files / "vae.pth")
    Path("cut.pth").write_bytes(Path(network).read_bytes()[:-5000])
    Path("cut.safetensors").write_bytes((files / "vae.safetensors").read_bytes()[:-5000])
    Path("text.pth").write_text("hello")
    torch.save({"trainer": {"mvar_wo_ddp": Malicious()}}, "code.pth")
    torch.save([torch.zeros(1)], "list.pth")
    torch.save({0: torch.zeros(1)}, "keys.pth")
    torch.save({"trainer": None, "epoch": 3}, "trainer.pth")
    other = published("mvar_small")[0] | {"head.weight": torch.zeros(65, 128), "head.bias": torch.zeros(65)}
    torch.save(other, "other.pth")
    cases = {
        (
            "--official",
            vae,
            "--tokenizer",
            vae,
        ): "vae.pth does not have the keys of a published VAR or M-VAR network; it looks like a tokenizer",
        (
            "--official",
            network,
        ): "not have the keys of a published tokenizer; it looks like a network; add --tokenizer vae-ch160v4096z32",
        ("--official", network, "--tokenizer", network): "mvar_d2.pth does not have the keys of a published tokenizer",
        ("--official", "cut.pth", "--tokenizer", vae): "cut.pth is damaged or not a file of plain weights",
        ("--official", network, "--tokenizer", "cut.safetensors"): "cut.safetensors is damaged",
        ("--official", "text.pth"): "text.pth is damaged or not a file of plain weights",
        ("--official", "code.pth"): "code.pth is damaged or not a file of plain weights",
        ("--official", "list.pth"): "list.pth holds a list",
        ("--official", "nowhere.pth"): "nowhere.pth does not exist",
        ("--official", "other.pth", "--tokenizer", vae): "vocab_size is 64 there, 65 in the network",
        ("--official", network, "--tokenizer", "nowhere"): "nowhere does not exist",
        ("--official", network, "--ckpt_path", "."): "give --ckpt_path or --official, not both",
        (): "give --ckpt_path CKPT, --official FILE, or",
        (
            "--official",
            network,
            "--tokenizer",
            vae,
            "--resolution",
            "512",
        ): "its side lengths are (1, 2, 3, 4), not (1, 2,",
        ("--ckpt_path", ".", "--resolution", "512"): "--side_lengths are for published weights",
        ("--official", "."): ". is a folder, not a weights file",
        ("--tokenizer", "nowhere.pth"): "nowhere.pth does not exist",
        ("--official", "keys.pth"): "keys.pth is not a state dict of a published network",
        ("--official", "trainer.pth"): "trainer.pth is not a state dict of a published network",
        ("--tokenizer", vae, "--resolution", "300"): "no published schedule for 300 px",
        ("--tokenizer", vae, "--to", "official"): "is a published file already",
        ("--tokenizer", vae, "--license", "mit"): "--license is for the model card",
        ("--official", network, "--tokenizer", vae, "--to", "elsewhere"): "elsewhere",
    }
    for options, message in cases.items():
        capfd.readouterr()
        assert run(["export", *options, "--out", "out"]) == 1, options
        error = capfd.readouterr().err
        assert message in error, options
        assert error.count("\n") == 1
    assert not Path("out").exists()
    assert not Path("owned").exists()
    for target in ("folder", "official"):
        assert run(["export", "--official", network, "--tokenizer", vae, "--to", target, "--out", "text.pth"]) == 1
        assert "text.pth is a file; name a folder to write to" in capfd.readouterr().err


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Makes writing more than a megabyte fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("target", ["folder", "official"])
def test_a_full_disk_is_reported_in_one_message(
    files: Path, workdir: Path, full_disk: None, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "--official", str(files / "var_trainer.pth"), "--out", "full", "--to", target]) == 1
    error = capfd.readouterr().err
    assert error.splitlines()[-1].startswith("lightning-mvar: error: cannot write full/")
    assert "Traceback" not in error
    assert not list(workdir.glob("full/*"))


def test_a_network_does_not_replace_a_tokenizer(workdir: Path, files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Shards and checkpoints may refer to it."""
    assert run(["export", "--tokenizer", str(files / "vae.pth"), "--side_lengths", "[1,2,3,4]", "--out", "tok"]) == 0
    before = {path: path.read_bytes() for path in Path("tok").iterdir()}
    assert run(["export", "--official", str(files / "var_trainer.pth"), "--out", "tok"]) == 1
    assert "tok holds a tokenizer, which shards and checkpoints may refer to" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in Path("tok").iterdir()} == before
