"""Sharded checkpoints from elsewhere: no reader runs code from them, or believes what they claim."""

from __future__ import annotations

import pickle
import random
import shutil
import warnings
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import random_image, tiny_network, write_images
from hostile import Malicious
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import load_trained, save_folder
from lightning_mvar.checkpoints.sharded import ShardReader
from lightning_mvar.checkpoints.training import (
    NETWORK_KEY,
    SEAL,
    NetworkRecord,
    RunRecord,
    TokenizerRecord,
    publish,
    read_plain_part,
    read_tensors,
    size_and_crc,
)
from lightning_mvar.cli import run
from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> Path:
    """A sharded checkpoint as `fit` writes it, of one rank."""
    network = tiny_network()
    record = NetworkRecord(
        network.config,
        TokenizerRecord(str(tokenizer_folder), tokenizer.fingerprint()),
        [],
        RunRecord(False, (0, 0), 1, 4),
    )
    weights = {f"network.{name}": tensor.detach() for name, tensor in network.state_dict().items()}
    save_shards(tmp_path / "unfinished", {"state_dict": weights})
    torch.save({NETWORK_KEY: asdict(record)}, tmp_path / "unfinished/meta.pt")
    seal(tmp_path / "unfinished", tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


def save_shards(folder: Path, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def seal(folder: Path, path: Path) -> None:
    publish(folder, path, {file.name: size_and_crc(file) for file in folder.iterdir() if file.name != SEAL})


def change(checkpoint: Path, name: str, content: bytes) -> None:
    """Replaces a file of a checkpoint and seals it again, as whoever forges one would."""
    (checkpoint / name).write_bytes(content)
    seal(checkpoint, checkpoint.with_name("forged.ckpt"))
    checkpoint.with_name("forged.ckpt").rename(checkpoint)


def metadata_of(checkpoint: Path) -> Metadata:
    return ShardReader(checkpoint).metadata


def test_a_sharded_checkpoint_reads_back_exactly_and_all_at_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, load = [], ShardReader.load
    monkeypatch.setattr(ShardReader, "load", lambda *args, **options: (reads.append(args), load(*args, **options)))
    loaded, network = load_trained(checkpoint).network, tiny_network()
    ((_, read),) = reads
    assert all(
        tensor.data_ptr() == read[f"state_dict.network.{name}"].data_ptr()
        for name, tensor in loaded.state_dict().items()
    )
    assert loaded.config == network.config
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("where", [".metadata", "meta.pt", "__0_0.distcp"])
def test_no_reader_runs_code_of_a_sharded_checkpoint(
    checkpoint: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = Malicious(tmp_path / "owned")
    if where == ".metadata":
        metadata = metadata_of(checkpoint)
        change(checkpoint, where, pickle.dumps(replace(metadata, planner_data=code)))
    elif where == "meta.pt":
        torch.save(read_plain_part(checkpoint) | {"code": code}, "meta.pt")
        change(checkpoint, where, Path("meta.pt").read_bytes())
    else:
        save_shards(Path("hostile"), {"state_dict": {"network.head.bias": code}})
        (entry,) = metadata_of(Path("hostile")).storage_data.values()
        (checkpoint / where).write_bytes(Path("hostile", where).read_bytes())
        save_shards(Path("sound"), {"state_dict": {"network.head.bias": torch.zeros(48)}})
        metadata = metadata_of(Path("sound"))
        metadata.storage_data = dict.fromkeys(metadata.storage_data, entry)
        change(checkpoint, ".metadata", pickle.dumps(metadata))
    random_image().save("photo.png")
    write_images(Path("images"), per_class=1)
    for command in (
        ["sample", "--out", "samples.npz"],
        ["export", "--out", "folder"],
        ["export", "--out", "folder", "--to", "official"],
        ["likelihood", "--images", "images"],
        ["edit", "--image", "photo.png", "--box", "0,0,4,4", "--classes", "1", "--out", "edited"],
    ):
        assert run([*command, "--ckpt_path", "run.ckpt"]) == 1, command
        assert "run.ckpt" in capfd.readouterr().err
    for read in (load_trained, MVARPipeline.from_pretrained):
        with pytest.raises(InputError, match=r"run\.ckpt"):
            read("run.ckpt")
    assert not Path("owned").exists()


def test_entries_that_are_no_tensors_are_plain_data(tmp_path: Path) -> None:
    """A resumed run reads the optimizer's settings from such entries."""
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "names": ["a", "b"]}
    save_shards(tmp_path / "sound", {"optimizer_0": settings})
    state: dict[str, Any] = {"optimizer_0": {"lr": 0, "betas": None, "names": []}}
    ShardReader(tmp_path / "sound").load(state, no_dist=True)
    assert state["optimizer_0"] == settings
    save_shards(tmp_path / "hostile", {"optimizer_0": {"lr": Malicious(tmp_path / "owned")}})
    with pytest.raises(InputError, match=r"optimizer_0\.lr is damaged or not a file of plain weights"):
        ShardReader(tmp_path / "hostile").load({"optimizer_0": {"lr": 0}}, no_dist=True)
    assert not (tmp_path / "owned").exists()


def test_metadata_written_by_python_3_13_reads_on_any_python(checkpoint: Path) -> None:
    metadata = metadata_of(checkpoint)
    data = pickle.dumps(metadata, protocol=2).replace(b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath")
    assert b"pathlib._local" in data
    change(checkpoint, ".metadata", data)
    assert metadata_of(checkpoint) == metadata


def test_the_metadata_cannot_change_a_class(checkpoint: Path) -> None:
    forged = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x07\x00\x00\x00versionX\x01\x00\x00\x00xs\x86b."
    )
    change(checkpoint, ".metadata", forged)
    with pytest.raises(InputError, match=r"\.metadata is damaged .*\(it changes a class\)"):
        load_trained(checkpoint)
    assert Metadata.version is None


def first_tensor(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["state_dict.network.head.weight"]


def claim_a_terabyte(metadata: Metadata) -> None:
    first_tensor(metadata).size = torch.Size([2**20, 2**20])


def claim_a_negative_size(metadata: Metadata) -> None:
    first_tensor(metadata).size = torch.Size([-1])


def drop_the_dtype(metadata: Metadata) -> None:
    first_tensor(metadata).properties = TensorProperties(dtype="float32")  # type: ignore[arg-type]


def read_another_file(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../other"


def read_beyond_the_end(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.length = 2**40


def forget_the_data(metadata: Metadata) -> None:
    metadata.storage_data = {}


def hold_text(metadata: Metadata) -> None:
    metadata.state_dict_metadata["state_dict.network.head.weight"] = "text"  # type: ignore[assignment]


def drop_the_properties(metadata: Metadata) -> None:
    del first_tensor(metadata).properties


def place_data_by_text(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.offset = "0"


def list_the_data(metadata: Metadata) -> None:
    metadata.storage_data = list(metadata.storage_data)


def claim_a_bytearray(metadata: Metadata) -> None:
    metadata.planner_data = bytearray(1)  # protocol 5 stores its size before its content


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (claim_a_terabyte, "it claims 43.* bytes of tensors, more than the files hold"),
        (claim_a_negative_size, "negative size or no dtype for state_dict.network.head.weight"),
        (drop_the_dtype, "negative size or no dtype"),
        (read_another_file, "outside the files of the folder"),
        (read_beyond_the_end, "outside the files of the folder"),
        (forget_the_data, r"run\.ckpt does not fit, or is damaged \("),
        (hold_text, "it describes state_dict.network.head.weight by a str"),
        (drop_the_properties, "it describes state_dict.network.head.weight by a TensorStorageMetadata, not by a"),
        (place_data_by_text, "it describes data of an unknown form"),
        (list_the_data, "it is not metadata"),
        (claim_a_bytearray, "it holds a bytearray, which would be allocated before it is read"),
    ],
)
def test_metadata_that_the_files_do_not_bear_out_is_refused(checkpoint: Path, forge: Any, message: str) -> None:
    (checkpoint.parent / "other").write_bytes(bytes(10**6))
    metadata = metadata_of(checkpoint)
    forge(metadata)
    change(checkpoint, ".metadata", pickle.dumps(metadata, protocol=5))
    with pytest.raises(InputError, match=message) as raised:
        load_trained(checkpoint)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("check", ["checkpoints.sharded.find_problem", "io.tensors.check_layout"])
def test_a_bug_of_a_check_is_not_reported_as_a_damaged_file(
    checkpoint: Path, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(f"lightning_mvar.{check}", fail)
    with pytest.raises(AttributeError, match="a bug"):
        load_trained(checkpoint)


def test_a_compressed_shard_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    save_shards(tmp_path / "c", {"a": torch.zeros(100)})
    metadata = metadata_of(tmp_path / "c")
    (info,) = metadata.storage_data.values()
    shard = tmp_path / "c/__0_0.distcp"
    with zipfile.ZipFile(shard) as stored, zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    shutil.move(tmp_path / "x", shard)
    info.length = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + bytes(1000))
    (tmp_path / "c/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"\(it is compressed\)"):
        ShardReader(tmp_path / "c").load({"a": torch.ones(100)}, no_dist=True)


def test_flipped_bits_of_the_metadata_are_refused_or_harmless(checkpoint: Path) -> None:
    sound = (checkpoint / ".metadata").read_bytes()
    expected = read_tensors(checkpoint, "network.")
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        forged = bytearray(sound)
        forged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        (checkpoint / ".metadata").write_bytes(forged)
        try:
            tensors = read_tensors(checkpoint, "network.")
        except InputError as error:
            refused += "\n" not in str(error)
        else:
            assert all(tensors[name].dtype.itemsize > 0 for name in tensors.keys() & expected.keys())
    assert refused > 20


def test_a_folder_with_a_config_is_an_exported_one_whatever_else_lies_in_it(
    checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_folder(tmp_path / "export", tokenizer, tiny_network(num_classes=7))
    change(checkpoint, ".metadata", pickle.dumps(Malicious(tmp_path / "owned")))
    for file in checkpoint.iterdir():
        shutil.copy(file, tmp_path / "export")
    assert load_trained(tmp_path / "export").network.config.num_classes == 7
    assert MVARPipeline.from_pretrained(str(tmp_path / "export")).network.config.num_classes == 7
    assert not (tmp_path / "owned").exists()
