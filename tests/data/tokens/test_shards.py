import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from conftest import write_token_shards

from lightning_mvar.data.tokens.manifest import Manifest, Shard
from lightning_mvar.data.tokens.packs import PACK_SIZE, Pack, TokenSpec
from lightning_mvar.data.tokens.shards import read_samples, read_shard, write_shard
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.errors import InputError


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray, list[str]]:
    count = PACK_SIZE + 5
    tokens = np.random.default_rng(0).integers(0, 4096, (count, 30)).astype(np.uint16)
    return tokens, np.arange(count) % 7, [f"image{i}" for i in range(count)]


def packs_of(path: Path, samples: int = PACK_SIZE + 5, spec: TokenSpec = TokenSpec()) -> Iterator[Pack]:
    """Reads a shard that no manifest lists."""
    return read_shard(path, Shard(path.name, samples, 0, ""), spec)


def test_plain_webdataset_reads_what_was_written(tmp_path: Path, arrays: tuple) -> None:
    tokens, labels, keys = arrays
    write_shard(tmp_path / "000000.tar", *arrays)
    samples = list(wds.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode())
    assert len(samples) == 2
    assert samples[0]["tokens.npy"].dtype == np.uint16
    np.testing.assert_array_equal(np.concatenate([s["tokens.npy"] for s in samples]), tokens)
    np.testing.assert_array_equal(np.concatenate([s["labels.npy"] for s in samples]), labels)
    assert [key for s in samples for key in s["keys.json"]] == keys


def test_read_shard_yields_the_packs(tmp_path: Path, arrays: tuple) -> None:
    write_shard(tmp_path / "0.tar", *arrays)
    packs = list(packs_of(tmp_path / "0.tar"))
    assert [len(pack.labels) for pack in packs] == [PACK_SIZE, 5]
    np.testing.assert_array_equal(np.concatenate([pack.tokens for pack in packs]), arrays[0])


def test_equal_content_gives_equal_bytes(tmp_path: Path, arrays: tuple) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shards = [write_shard(tmp_path / name / "0.tar", *arrays) for name in ("a", "b")]
    assert shards[0] == shards[1]


def test_a_failing_writer_leaves_nothing_behind(tmp_path: Path, arrays: tuple) -> None:
    class Unwritable:
        def __getitem__(self, _: slice) -> object:
            raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_shard(tmp_path / "0.tar", arrays[0], arrays[1], Unwritable())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 700, 0.5, 0.99])
def test_a_truncated_shard_raises_an_error_with_its_path(tmp_path: Path, arrays: tuple, keep: float) -> None:
    path = tmp_path / "0.tar"
    write_shard(path, *arrays)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    if keep == 0.99:  # truncated within tar's trailing padding, so nothing is lost
        assert sum(len(pack.labels) for pack in packs_of(path)) <= len(arrays[1])
        return
    with pytest.raises(InputError, match=r"0\.tar is damaged or not a token shard"):
        assert sum(len(pack.labels) for pack in packs_of(path)) == len(arrays[1])


def test_a_foreign_tar_raises_an_error_with_its_path(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("000.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(InputError, match=r"0\.tar is damaged or not a token shard"):
        list(packs_of(tmp_path / "0.tar"))


def test_a_shard_with_fewer_samples_than_listed_is_rejected(tmp_path: Path) -> None:
    manifest = write_token_shards(tmp_path, "abc", [5])
    manifest.shards[0].samples = 6
    with pytest.raises(InputError, match=r"000000\.tar is damaged .*it holds 5 samples, but the manifest says 6"):
        read_samples(manifest, LocalShards(tmp_path).fetch, [0, 4])


def test_the_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    manifest = write_token_shards(tmp_path, "abc", [5, 3])
    assert Manifest.load(tmp_path) == manifest
    assert manifest.num_samples == 8
    manifest.check_files(tmp_path)
    manifest.check_model(tmp_path, (1, 2, 3, 4), 48, 10, "abc")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (((1, 2, 4), 48, 10, "abc"), "side_lengths"),
        (((1, 2, 3, 4), 64, 10, "abc"), "vocab_size is 48 in the shards and 64 in the model"),
        (((1, 2, 3, 4), 48, 11, "abc"), "num_classes"),
        (((1, 2, 3, 4), 48, 10, "xyz"), "tokenizer fingerprint is abc"),
    ],
)
def test_a_mismatched_model_is_rejected(tmp_path: Path, model: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_token_shards(tmp_path, "abc", [5]).check_model(tmp_path, *model)


def test_missing_truncated_and_unfinished_shards_are_rejected(tmp_path: Path) -> None:
    manifest = write_token_shards(tmp_path, "abc", [5, 3])
    path = tmp_path / "000001.tar"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"000001\.tar is truncated or altered"):
        manifest.check_files(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"000001\.tar is missing"):
        manifest.check_files(tmp_path)
    manifest.shards.pop()
    with pytest.raises(InputError, match="1 of 2 shards; run the same `lightning-mvar tokenize` again"):
        manifest.check_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_a_damaged_manifest_raises_an_error_with_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_a_missing_manifest_raises_an_error_with_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="write them with `lightning-mvar tokenize`"):
        Manifest.load(tmp_path)


def add_member(path: Path, name: str, content: bytes) -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", ["pyd", "pkl", "pickle", "pth", "tokens.pyd", "cbor"])
def test_an_unknown_member_is_rejected_without_running_code(tmp_path: Path, arrays: tuple, suffix: str) -> None:
    path, ran = tmp_path / "0.tar", tmp_path / "ran"
    write_shard(path, *arrays)
    add_member(path, f"0-{PACK_SIZE:06d}.{suffix}", pickle.dumps(Touch(ran)))
    with pytest.raises(
        InputError, match=rf"0\.tar is damaged or not a token shard \(pack .* has {suffix}, which does not belong"
    ):
        list(packs_of(path))
    assert not ran.exists()


def test_arrays_are_read_without_pickle(tmp_path: Path) -> None:
    ran, file = tmp_path / "ran", io.BytesIO()
    np.save(file, np.array([Touch(ran)], dtype=object), allow_pickle=True)
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    add_member(tmp_path / "0.tar", "0.tokens.npy", file.getvalue())
    with pytest.raises(InputError, match=r"0\.tar is damaged or not a token shard"):
        list(packs_of(tmp_path / "0.tar"))
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["../000000.tar", "/000000.tar", "pipe:touch ran", "a/b.tar", "", ".hidden.tar", "0" * 300]
)
def test_shard_names_that_are_not_file_names_are_rejected(tmp_path: Path, name: str) -> None:
    manifest = write_token_shards(tmp_path, "abc", [5])
    manifest.shards[0].name = name
    with pytest.raises(InputError, match=r"manifest\.json is damaged: it lists a shard .*, which is not a file name"):
        LocalShards(tmp_path).fetch(manifest.shards[0])
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        manifest.check_files(tmp_path)


def test_a_shard_named_like_a_command_is_opened_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is damaged or not a token shard"):
        list(packs_of(Path("pipe:touch ran")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999, 999999)}",  # more memory than there is
        "{'descr': '<u2', 'fortran_order': False, 'shape': (1,",
        "{'descr': 7, 'fortran_order': False, 'shape': (1, 1)}",
        "[]",
    ],
)
def test_a_forged_array_header_is_an_error_of_the_shard(tmp_path: Path, header: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    text = header.encode() + b"\n"
    add_member(tmp_path / "0.tar", "0.tokens.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(InputError, match=r"0\.tar is damaged or not a token shard"):
        list(packs_of(tmp_path / "0.tar"))


def test_a_repacked_shard_is_read_and_a_member_twice_is_not(tmp_path: Path, arrays: tuple) -> None:
    write_shard(tmp_path / "0.tar", *arrays)
    with tarfile.open(tmp_path / "0.tar") as old, tarfile.open(tmp_path / "1.tar", "w") as new:
        for member in old:
            content = old.extractfile(member)
            assert content is not None
            member.name = f"./a.b/{member.name}"
            new.addfile(member, content)
    tokens = [pack.tokens for pack in packs_of(tmp_path / "1.tar")]
    np.testing.assert_array_equal(np.concatenate(tokens), arrays[0])
    add_member(tmp_path / "0.tar", f"0-{PACK_SIZE:06d}.keys.json", b"[]")
    with pytest.raises(InputError, match=r"keys\.json twice"):
        list(packs_of(tmp_path / "0.tar"))
