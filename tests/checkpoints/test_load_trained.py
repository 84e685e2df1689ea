"""`load_trained` of exported folders, training checkpoints and published files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_network
from published_states import published

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import load_trained, save_folder
from lightning_mvar.checkpoints.training import NetworkRecord, RunRecord, TokenizerRecord, load_recorded_tokenizer
from lightning_mvar.cli import run
from lightning_mvar.errors import InputError


@pytest.mark.parametrize("case", ["mvar_small", "var_small"])
def test_a_published_file_and_its_exported_folder_give_the_same_model(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network, tokenizer = published(case)
    torch.save(network, "network.pth")
    torch.save(tokenizer, "tokenizer.pth")
    assert run(["export", "--official", "network.pth", "--tokenizer", "tokenizer.pth", "--out", "folder"]) == 0
    direct, exported = load_trained("network.pth", "tokenizer.pth"), load_trained("folder")
    assert direct.network.config == exported.network.config
    for ours, theirs in zip(direct.network.state_dict().values(), exported.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert direct.tokenizer.fingerprint() == exported.tokenizer.fingerprint()
    command = ["sample", "--ckpt_path", "network.pth", "--tokenizer", "tokenizer.pth", "--classes", "1"]
    assert run([*command, "--out", "samples.npz", "--device", "cpu"]) == 0


def test_the_option_for_a_moved_tokenizer_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run_record = RunRecord(ema=False, skipped_steps=(0, 0), world_size=1, batch_of_all_ranks=None)
    place = TokenizerRecord(str(tmp_path / "old"), tokenizer.fingerprint())
    record = NetworkRecord(tiny_network().config, place, [], run_record)
    save_folder(tmp_path / "new", tokenizer)
    message = r"the tokenizer of a\.ckpt is no longer in .*old: pass its folder with --tokenizer"
    with pytest.raises(InputError, match=message):
        load_recorded_tokenizer(Path("a.ckpt"), None, record)
    assert load_recorded_tokenizer(Path("a.ckpt"), tmp_path / "new", record).fingerprint() == tokenizer.fingerprint()


def test_errors_name_files_without_a_network(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_folder(tmp_path / "tokenizer", tokenizer)
    save_folder(tmp_path / "both", tokenizer, tiny_network())
    torch.save({"state": torch.zeros(1)}, tmp_path / "other.ckpt")
    torch.save({"state": torch.zeros(1)}, tmp_path / "other.pth")
    for name, message in {
        "nowhere": "nowhere does not exist",
        "tokenizer": "describes no network",
        "other.ckpt": "other.ckpt is not a checkpoint of `lightning-mvar fit`",
        "other.pth": "other.pth does not have the keys of a published VAR or M-VAR network",
        "both/network.safetensors": "does not have the keys of a published VAR or M-VAR network",
    }.items():
        with pytest.raises(InputError, match=message):
            load_trained(tmp_path / name)
