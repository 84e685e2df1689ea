"""A path that starts with ~ means the home folder in Python as on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_network, write_images, write_token_shards

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import load_official_mvar, load_tokenizer, load_trained, save_folder
from lightning_mvar.checkpoints.published import network_to_published
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.data.tokens.sources import open_shards
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import save_torch
from lightning_mvar.metrics.reference import open_reference
from lightning_mvar.models.config import NetworkOptions
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.sampling.readers import open_samples
from lightning_mvar.training.datamodules import ImageDataModule, TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.tokenizer import LitTokenizer

DOORS: dict[str, Callable[[], object]] = {
    "tokenizer": lambda: load_tokenizer("~/model"),
    "network": lambda: load_trained("~/model", tokenizer="~/tok"),
    "pipeline": lambda: MVARPipeline.from_pretrained("~/model", device="cpu"),
    "published file": lambda: load_official_mvar("~/network.pth"),
    "images": lambda: open_images("~/images", 8),
    "labels": lambda: open_images("~/flat", 8, labels="~/labels.txt"),
    "shards": lambda: open_shards("~/shards").manifest(),
    "samples": lambda: open_samples("~/samples.npz"),
    "reference": lambda: open_reference("~/samples.npz").images(8),
    "datamodule of tokens": lambda: TokenDataModule("~/shards", "~/shards").setup("fit"),
    "datamodule of images": lambda: ImageDataModule("~/images", "~/images", 8).images("train"),
}


@pytest.fixture
def home(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_folder("~/model", tokenizer, tiny_network())
    save_folder("~/tok", tokenizer)
    save_torch(network_to_published(tiny_network(head_dim=64)), tmp_path / "network.pth")
    write_images(tmp_path / "images", per_class=2)
    (tmp_path / "flat").mkdir()
    next((tmp_path / "images").rglob("*.png")).rename(tmp_path / "flat/0.png")
    (tmp_path / "labels.txt").write_text("0.png dark\n")
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [6])
    np.savez(tmp_path / "samples.npz", np.zeros((4, 8, 8, 3), np.uint8))
    return tmp_path


@pytest.mark.parametrize("module", [LitMVAR, LitTokenizer])
def test_modules_look_for_checkpoints_in_the_home_folder(home: Path, module: type[LitMVAR | LitTokenizer]) -> None:
    with pytest.raises(InputError, match=f"{home}/missing.ckpt"):
        module.load_from_checkpoint("~/missing.ckpt")


def test_checkpoints_record_the_path_of_a_tokenizer_in_the_home_folder(home: Path) -> None:
    options = NetworkOptions(**vars(tiny_network().config))
    assert LitMVAR(options, "~/tok").tokenizer_path == str(home / "tok")


@pytest.mark.parametrize("door", DOORS)
def test_every_reader_expands_the_home_folder(
    home: Path, door: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    DOORS[door]()
    assert not Path("~").exists()
