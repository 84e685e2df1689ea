"""Published weights as people have them: wrapped, renamed, beside other objects, or no weights at all."""

from __future__ import annotations

import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import Malicious
from published_states import SCHEDULE, published
from safetensors.torch import save_file
from torch import Tensor

from lightning_mvar import ScaleSchedule
from lightning_mvar.checkpoints import load_official, load_official_mvar, load_trained
from lightning_mvar.cli import run
from lightning_mvar.errors import InputError

State = dict[str, Tensor]
NETWORK, TOKENIZER = published("var_small")
BESIDE = {
    "best": np.float64(1.5),
    "losses": [np.float32(1), np.int64(2), np.arange(3)],
    "args": Namespace(folder=Path("x"), device=torch.device("cpu"), lr=[np.bool_(True)]),
}
ZEROS = {key: torch.zeros_like(tensor) for key, tensor in NETWORK.items()}


def prefixed(prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in NETWORK.items()}


def compiled_blocks(state: State) -> State:
    return {key.replace("blocks.0.", "blocks.0._orig_mod."): tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"model": NETWORK},
        {"state_dict": NETWORK, "epoch": 3},
        {"model": ZEROS, "ema": NETWORK},
        {"ema": ZEROS, "var_wo_ddp": NETWORK},
        {"ema": {"module": NETWORK, "decay": 0.9}},
        {"trainer": {"var_wo_ddp": NETWORK, "vae_local": TOKENIZER, "config": None}, **BESIDE},
        NETWORK | BESIDE,
        compiled_blocks(NETWORK),
        prefixed("_orig_mod.module."),
        prefixed("_fsdp_wrapped_module."),
        {"state_dict": prefixed("model.") | {"vae." + key: tensor for key, tensor in TOKENIZER.items()}},
        OrderedDict(model=OrderedDict(NETWORK)),
    ],
    ids=lambda content: ",".join(list(content)[:2]),
)
def test_weights_are_found_wherever_a_trainer_puts_them(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "network.pth")
    loaded, expected = load_official_mvar(tmp_path / "network.pth"), load_official_mvar(NETWORK)
    assert loaded.config == expected.config
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["network.pt", "network.bin", "network.pth", "safetensors.pth"])
def test_the_content_of_a_file_says_its_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (save_file if name.startswith("safetensors") else torch.save)(NETWORK, tmp_path / name)
    torch.save(TOKENIZER, tmp_path / "vae.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_trained(f"~/{name}", "~/vae.pth").network.config.depth == 2


def test_a_torch_file_called_safetensors_is_told(tmp_path: Path) -> None:
    torch.save(NETWORK, tmp_path / "network.safetensors")
    with pytest.raises(
        InputError, match=r"not a safetensors file \(.*\): it was written by torch.save; rename it to .pth"
    ):
        load_official_mvar(tmp_path / "network.safetensors")


def without_schedule() -> State:
    return {key: tensor for key, tensor in NETWORK.items() if key not in ("lvl_1L", "attn_bias_for_masking")}


def test_weights_without_lvl_1l_take_the_schedule_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(without_schedule(), "network.pth")
    torch.save(TOKENIZER, "vae.pth")
    assert load_official_mvar("network.pth", SCHEDULE).config == load_official_mvar(NETWORK).config
    assert load_official("network.pth", "vae.pth", SCHEDULE).network.config.schedule == SCHEDULE
    export = ["export", "--official", "network.pth", "--tokenizer", "vae.pth", "--out", "folder"]
    assert run([*export, "--side_lengths", "[1,2,3,4]"]) == 0
    assert load_trained("folder").network.config.schedule == SCHEDULE
    for options, message in (
        ([], "it has no lvl_1L): give it with `lightning-mvar export --official FILE --resolution 256`"),
        (["--resolution", "256"], "is not a complete VAR or M-VAR network"),
        (["--side_lengths", "[1,2,3,5]"], "pos_1LC is (1, 30, 128), not (1, 39, 128)"),
        (["--side_lengths", "[3,2]"], "strictly increasing"),
        (["--side_lengths", "[1,2]", "--resolution", "256"], "give --resolution or --side_lengths, not both"),
    ):
        capfd.readouterr()
        assert run([*export, *options]) == 1
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(InputError, match=r"its side lengths are \(1, 2, 3, 4\), not \(1, 2, 3, 5\)"):
        load_official_mvar(NETWORK, ScaleSchedule((1, 2, 3, 5)))


def compress(path: Path) -> None:
    torch.save({"a": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as stored:
        records = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in records.items():
            packed.writestr(name, content)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*`git lfs pull`"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not weights: download the file itself"),
        (b"<html>", "is a web page"),
        (b"", "it is empty"),
        (b"\0" * 100, "is damaged or not"),
        (b"\xff" * 100, "is damaged or not"),
    ],
)
def test_files_that_are_no_weights_are_called_what_they_are(
    content: bytes, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"network{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        load_official_mvar(path)
    assert "\n" not in str(raised.value)


def expanded(state: State) -> State:
    """Claims a terabyte of class embeddings in one stored number."""
    return state | {"class_emb.weight": torch.zeros(1, 1).expand(2**31, 128)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (expanded(NETWORK), "its tensors claim 1099.* bytes, but it holds only"),
        (NETWORK | {"head.bias": torch.zeros(64, dtype=torch.int64)}, "head.bias as torch.int64"),
        (NETWORK | {"head.bias": torch.zeros(64, dtype=torch.complex64)}, "head.bias as torch.complex64"),
        (NETWORK | {"head.bias": torch.zeros(64).to_sparse()}, "tensors without data or with an unusual layout"),
        (NETWORK | {"head.bias": torch.zeros(64, device="meta")}, "tensors without data or with an unusual layout"),
        (NETWORK | {"lvl_1L": NETWORK["lvl_1L"].to(torch.complex64)}, "is not a complete VAR or M-VAR network"),
        ({"model": NETWORK | {"blocks.999999999.x": torch.zeros(1)}}, r"network.depth must be in \[1, 1024\]"),
    ],
)
def test_weights_are_plain_and_bounded(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "network.pth")
    with pytest.raises(InputError, match=message) as raised:
        load_official_mvar(tmp_path / "network.pth")
    assert "\n" not in str(raised.value)


def test_compressed_and_circular_files_are_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    compress(path)
    with pytest.raises(InputError, match="it is compressed"):
        load_official_mvar(path)
    nested: list[Any] = []
    for _ in range(40):
        nested = [nested, nested, nested]
    circular: dict[str, Any] = {"model": NETWORK, "nested": nested}
    circular["self"] = circular
    torch.save(circular, path)
    assert load_official_mvar(path).config.depth == 2


def test_other_objects_beside_the_weights_run_nothing(tmp_path: Path) -> None:
    torch.save({"model": NETWORK, "best": np.float64(1), "code": Malicious(tmp_path / "owned")}, tmp_path / "n.pth")
    with pytest.raises(InputError, match="holds other objects or code"):
        load_official_mvar(tmp_path / "n.pth")
    torch.save(np.array([Malicious(tmp_path / "owned")], dtype=object), tmp_path / "n.pth")
    with pytest.raises(InputError, match="holds other objects or code"):
        load_official_mvar(tmp_path / "n.pth")
    assert not (tmp_path / "owned").exists()
