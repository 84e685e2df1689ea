import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_network
from hostile import Malicious
from published_states import FOLDER, official_weights
from safetensors.torch import save_file

from lightning_mvar import MVAR, ScaleSchedule, Tokenizer
from lightning_mvar.checkpoints import (
    load_official_mvar,
    load_official_tokenizer,
    load_tokenizer,
    load_trained,
    save_folder,
)
from lightning_mvar.errors import InputError

SCHEDULE = ScaleSchedule((1, 2, 3, 4))


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_holds_everything(network: MVAR, tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = list("abcdefghij")
    save_folder(tmp_path / "run", tokenizer, network, names)
    loaded = load_trained(tmp_path / "run")
    assert loaded.network.config == network.config
    assert loaded.tokenizer.config == tokenizer.config
    assert loaded.class_names == names
    assert not loaded.network.training
    assert_same_weights(loaded.network, network)
    assert_same_weights(loaded.tokenizer, tokenizer)
    assert load_tokenizer(tmp_path / "run").fingerprint() == tokenizer.fingerprint()


def test_a_tokenizer_folder_is_no_network(tokenizer_folder: Path) -> None:
    with pytest.raises(InputError, match="describes no network; write one with `lightning-mvar export`"):
        load_trained(tokenizer_folder)


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def delete_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncate_weights(folder: Path) -> None:
    path = folder / "network.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def delete_weights(folder: Path) -> None:
    (folder / "network.safetensors").unlink()


def change_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["network"]["width"] = 128
    (folder / "config.json").write_text(json.dumps(config))


def add_a_field(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["network"]["color"] = "red"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, r"config\.json is not valid JSON"),
        (delete_config, r"has no config\.json"),
        (truncate_weights, r"network\.safetensors is damaged"),
        (delete_weights, r"network\.safetensors does not exist"),
        (change_width, r"does not fit MVAR: start_embed is \(1, 1, 64\), not \(1, 1, 128\);.* and \d+ more"),
        (add_a_field, r"config\.json: network\.color is not a field of this version"),
    ],
)
def test_damaged_folders_are_named(tokenizer: Tokenizer, tmp_path: Path, damage, message: str) -> None:
    save_folder(tmp_path, tokenizer, tiny_network(), [])
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_trained(tmp_path)


def test_errors_name_files_that_are_not_checkpoints_and_their_code_never_runs(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with pytest.raises(InputError, match="does not exist"):
        load_trained(path)
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match="damaged or not a file of plain weights"):
        load_trained(path)
    torch.save({"weights": torch.zeros(10)}, path)
    with pytest.raises(InputError, match="not a checkpoint of `lightning-mvar fit`"):
        load_trained(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="damaged"):
        load_trained(path)
    torch.save({"code": Malicious(tmp_path / "owned")}, path)
    for load in (load_trained, load_official_mvar):
        with pytest.raises(InputError, match="not a file of plain weights"):
            load(path)
    assert not (tmp_path / "owned").exists()


@pytest.fixture(scope="module")
def official() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    case = json.loads((FOLDER / "mvar_small.json").read_text())
    return official_weights(case["official_keys"], SCHEDULE), official_weights(case["vqvae_keys"], SCHEDULE)


@pytest.mark.parametrize("wrapping", ["plain", "trainer", "prefixed"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_files_load_in_every_form(tmp_path: Path, official: tuple, wrapping: str, suffix: str) -> None:
    network, tokenizer = official
    path, tokenizer_path = tmp_path / f"network{suffix}", tmp_path / f"tokenizer{suffix}"
    if suffix == ".safetensors":
        if wrapping != "plain":
            pytest.skip("safetensors are flat")
        save_file(network, path)
        save_file(tokenizer, tokenizer_path)
    elif wrapping == "trainer":
        path = tokenizer_path = tmp_path / "trainer.pth"
        torch.save({"epoch": 3, "trainer": {"mvar_wo_ddp": network, "vae_local": tokenizer, "config": {"a": 1}}}, path)
    else:
        prefix = "" if wrapping == "plain" else "module._orig_mod."
        torch.save({prefix + key: value for key, value in network.items()}, path)
        torch.save({prefix + key: value for key, value in tokenizer.items()}, tokenizer_path)
    assert_same_weights(load_official_mvar(path), load_official_mvar(network))
    assert_same_weights(load_official_tokenizer(tokenizer_path, SCHEDULE), load_official_tokenizer(tokenizer, SCHEDULE))
