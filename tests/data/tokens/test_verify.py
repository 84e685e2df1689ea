"""`shards verify` reports every kind of damage, for the file that has it."""

import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_token_shards

from lightning_mvar.data.tokens import shards
from lightning_mvar.data.tokens.verify import Problem, find_problems
from lightning_mvar.errors import InputError

SIZES = [20, 20, 20, 7]  # samples; packs of 8
Members = dict[str, bytes]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "PACK_SIZE", 8)
    write_token_shards(tmp_path / "shards", "abc", SIZES)
    return tmp_path / "shards"


def problems_of(folder: Path, tokenizer: str | None = None) -> list[Problem]:
    return list(find_problems(folder, tokenizer))


def edit_bytes(change: Callable[[bytes], bytes], name: str = "000001.tar", forge: bool = False) -> Callable[..., None]:
    """Changes a file; with `forge`, the manifest gets its new size and checksum."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        if forge:
            update_manifest(folder, name)

    return damage


def update_manifest(folder: Path, name: str) -> None:
    """Writes the size and checksum of a changed file into the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(shard for shard in manifest["shards"] if shard["name"] == name)
    content = (folder / name).read_bytes()
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_members(change: Callable[[Members], Members | None]) -> Callable[[Path], None]:
    """Changes the members of shard 1; the manifest gets its new size and checksum."""

    def damage(folder: Path) -> None:
        path = folder / "000001.tar"
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        with tarfile.open(path, "w") as tar:
            for name, data in (change(members) or members).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        update_manifest(folder, "000001.tar")

    return damage


def edit_array(name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    """Changes an array of the second pack of shard 1; see `edit_members`."""
    member = f"000001-000008.{name}.npy"

    def apply(members: Members) -> Members:
        values, file = np.load(io.BytesIO(members[member])), io.BytesIO()
        result = change(values)
        np.save(file, values if result is None else result)
        return members | {member: file.getvalue()}

    return edit_members(apply)


def edit_keys(change: Callable[[list[str]], None]) -> Callable[[Path], None]:
    member = "000001-000008.keys.json"

    def apply(members: Members) -> Members:
        keys = json.loads(members[member])
        change(keys)
        return members | {member: json.dumps(keys).encode()}

    return edit_members(apply)


def edit_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def assign(index: object, value: int) -> Callable[[np.ndarray], None]:
    return lambda values: values.__setitem__(index, value)


def swap_files(folder: Path) -> None:
    a, b = (folder / "000001.tar").read_bytes(), (folder / "000002.tar").read_bytes()
    (folder / "000001.tar").write_bytes(b)
    (folder / "000002.tar").write_bytes(a)


def flip_bit(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]


def zero_block(data: bytes) -> bytes:
    return data[:4096] + bytes(512) + data[4608:]


def without(*names: str) -> Callable[[Members], Members]:
    return lambda members: {name: data for name, data in members.items() if name not in names}


ONE, TWO, MANIFEST = "000001.tar", "000002.tar", "manifest.json"
SECOND_PACK = [f"000001-000008.{name}" for name in ("tokens.npy", "labels.npy", "keys.json")]
DAMAGES: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {  # damage; message pattern by file name
    "truncated to half": (edit_bytes(lambda data: data[: len(data) // 2]), {ONE: "bytes, but the manifest says"}),
    "last byte missing": (edit_bytes(lambda data: data[:-1]), {ONE: "bytes, but the manifest says"}),
    "extra byte": (edit_bytes(lambda data: data + b"\0"), {ONE: "bytes, but the manifest says"}),
    "flipped bit": (edit_bytes(flip_bit), {ONE: "not have the SHA-256"}),
    "zeroed block": (edit_bytes(zero_block), {ONE: "not have the SHA-256"}),
    "swapped files": (swap_files, {ONE: "not have the SHA-256", TWO: "not have the SHA-256"}),
    "empty file": (edit_bytes(lambda _: b""), {ONE: "has 0 bytes"}),
    "missing file": (lambda folder: (folder / ONE).unlink(), {ONE: "is missing"}),
    "extra file": (
        lambda folder: shutil.copy(folder / ONE, folder / "000009.tar"),
        {"000009.tar": "is not listed|20 keys that 000001.tar has too"},
    ),
    "truncated to half, forged": (
        edit_bytes(lambda data: data[: len(data) // 2], forge=True),
        {ONE: r"is not a complete tar|holds \d+ samples, but the manifest says 20"},
    ),
    "random bytes, forged": (
        edit_bytes(lambda data: random.Random(0).randbytes(9000), forge=True),
        {ONE: "not a complete tar"},
    ),
    "token out of range": (
        edit_array("tokens", assign((3, 7), 48)),
        {ONE: r"1 tokens outside \[0, 48\).* 48 in sample 3"},
    ),
    "label out of range": (
        edit_array("labels", assign(2, 10)),
        {ONE: r"1 labels outside \[0, 10\), the first is 10 in sample 2"},
    ),
    "negative label": (edit_array("labels", assign(2, -1)), {ONE: r"1 labels outside .* is -1 in"}),
    "duplicate key in a shard": (
        edit_keys(lambda keys: keys.__setitem__(0, keys[1])),
        {ONE: "has 1 key more than once, such as 'image29'"},
    ),
    "duplicate key of another shard": (
        edit_keys(lambda keys: keys.__setitem__(0, "image3")),
        {ONE: "has 1 key that 000000.tar has too, such as 'image3'"},
    ),
    "int32 tokens": (
        edit_array("tokens", lambda v: v.astype(np.int32)),
        {ONE: r"tokens.npy is int32 of shape \(8, 30\)"},
    ),
    "float labels": (edit_array("labels", lambda v: v.astype(float)), {ONE: "labels.npy is float64"}),
    "1-D tokens": (edit_array("tokens", lambda v: v[0]), {ONE: r"tokens.npy is uint16 of shape \(30,\)"}),
    "too few tokens per sample": (
        edit_array("tokens", lambda v: v[:, :29].copy()),
        {ONE: "29 tokens per sample, but the manifest's schedule has 30"},
    ),
    "too few labels": (
        edit_array("labels", lambda v: v[:7]),
        {ONE: r"8 in tokens.npy, 7 in labels.npy, 8 in keys.json"},
    ),
    "too many keys": (edit_keys(lambda keys: keys.append("another")), {ONE: "9 in keys.json"}),
    "missing labels": (edit_members(without(SECOND_PACK[1])), {ONE: "pack 000001-000008 has no labels.npy"}),
    "missing pack": (edit_members(without(*SECOND_PACK)), {ONE: "holds 12 samples, but the manifest says 20"}),
    "array of objects": (edit_array("labels", lambda v: v.astype(object)), {ONE: "labels.npy is not a numpy array"}),
    "truncated array": (
        edit_members(lambda members: members | {SECOND_PACK[0]: members[SECOND_PACK[0]][:-9]}),
        {ONE: "tokens.npy is not a numpy array"},
    ),
    "keys that are not JSON": (edit_members(lambda m: m | {SECOND_PACK[2]: b'["a'}), {ONE: "keys.json is not JSON"}),
    "keys that are numbers": (edit_members(lambda m: m | {SECOND_PACK[2]: b"[1]"}), {ONE: "not a list of strings"}),
    "unknown member": (
        edit_members(lambda m: m | {"000001-000016.jpg": b"x"}),
        {ONE: "has jpg, which does not belong in a"},
    ),
    "wrong number of samples": (
        edit_manifest(lambda m: m["shards"][1].update(samples=19)),
        {ONE: "holds 20 samples, but the manifest says 19", MANIFEST: "the listed shards have 66"},
    ),
    "wrong number of images": (
        edit_manifest(lambda m: m.update(num_images=68)),
        {MANIFEST: "are 68 samples, but the .* have 67"},
    ),
    "too few images": (
        edit_manifest(lambda m: m.update(num_images=60)),
        {MANIFEST: "lists 000003.tar, but 60 images make 3"},
    ),
    "unlisted shard": (
        edit_manifest(lambda m: m["shards"].pop(1)),
        {MANIFEST: "it is unfinished: 3 of 4 shards; 000001.tar is the first", ONE: "is not listed"},
    ),
    "shard listed twice": (
        edit_manifest(lambda m: m["shards"].append(m["shards"][1])),
        {MANIFEST: "lists 000001.tar 2 times"},
    ),
    "invalid vocabulary": (
        edit_manifest(lambda m: m.update(vocab_size="48")),
        {MANIFEST: "vocab_size is '48'; it must be an integer"},
    ),
    "invalid skipped images": (
        edit_manifest(lambda m: m["shards"][1].update(skipped=None)),
        {MANIFEST: r"shards\[1\]\.skipped is None; it must be an object"},
    ),
    "invalid schedule": (edit_manifest(lambda m: m.update(side_lengths=[1, 3, 2])), {MANIFEST: "side_lengths is"}),
    "truncated manifest": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20]),
        {MANIFEST: "is damaged"},
    ),
    "missing manifest": (lambda folder: (folder / MANIFEST).unlink(), {MANIFEST: "does not exist"}),
}


def test_an_intact_folder_has_no_problems(folder: Path) -> None:
    assert problems_of(folder) == problems_of(folder, "abc") == []
    (problem,) = problems_of(folder, "xyz")
    assert "manifest.json: the tokens were made by tokenizer abc, not by xyz; " in str(problem)
    assert "; pass the folder of their tokenizer as --tokenizer" in str(problem)


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_reported_for_its_file(folder: Path, name: str) -> None:
    damage, messages = DAMAGES[name]
    damage(folder)
    problems = problems_of(folder)
    assert {problem.file.name for problem in problems} == set(messages)
    for file, pattern in messages.items():
        texts = [str(problem) for problem in problems if problem.file.name == file]
        for part in pattern.split("|"):
            assert any(re.search(part, text) for text in texts), texts
    assert all("\n" not in str(problem) and problem.remedy for problem in problems)


def test_one_problem_does_not_hide_others(folder: Path) -> None:
    """Every file is damaged in a different way, one of them beyond reading."""
    edit_array("tokens", assign((3, 7), 60000))(folder)
    edit_bytes(lambda data: data[:3000], "000000.tar")(folder)
    edit_bytes(lambda _: b"", "000002.tar")(folder)
    (folder / "000003.tar").unlink()
    edit_manifest(lambda m: m.update(views=0))(folder)
    assert {problem.file.name for problem in problems_of(folder)} == {MANIFEST, *(f"00000{i}.tar" for i in range(4))}


def test_bits_flipped_anywhere_are_reported(folder: Path) -> None:
    """Arbitrary bytes never stop the reader: it reports the file and continues."""
    rng, content = random.Random(0), (folder / ONE).read_bytes()
    for _ in range(100):
        index = rng.randrange(len(content))
        (folder / ONE).write_bytes(
            content[:index] + bytes([content[index] ^ (1 << rng.randrange(8))]) + content[index + 1 :]
        )
        problems = problems_of(folder)
        assert {problem.file.name for problem in problems} == {ONE}
        assert "not have the SHA-256" in problems[0].message


def test_a_folder_without_shards_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no token shards in"):
        problems_of(tmp_path)


def test_progress_counts_every_byte(folder: Path) -> None:
    steps: list[int] = []
    list(find_problems(folder, advance=steps.append))
    assert sum(steps) == sum(path.stat().st_size for path in folder.glob("*.tar"))
