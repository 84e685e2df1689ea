"""Mutations of manifest.json are one line of error, or harmless; a manifest never costs more than its file."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_token_shards

from lightning_mvar.data.tokens.manifest import PARTS, Manifest, save_record
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.stream import TokenStream
from lightning_mvar.data.tokens.verify import find_problems
from lightning_mvar.errors import InputError

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**30, 1e308, -1e308, 0.5, "", "x", "\0", "a\nb", "../x",
    "\ud800", [], [[]], [None], ["x"], [1, 1], [3, 2, 1], [0], [1, [2, 3], 4], [1, [2]], [2**40], {}, {"x": "y"},
    {"x": None}, {"x": {}}, [{}], [{"name": "x"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_token_shards(folder, "abc", [20, 20, 7])
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def use(folder: Path) -> list[int]:
    """Opens a folder as `fit` does and returns the ids of an ordered pass."""
    shards = LocalShards(folder)
    manifest = shards.manifest()
    manifest.check_model(folder, (1, 2, 3, 4), 48, 10, "abc")
    return [int(i) for rows in TokenStream(shards, manifest, 4, None, 30, 0, 1) for i in rows.ids]


def try_to_use(folder: Path) -> tuple[list[int], str]:
    """Returns what `use` does, or no ids and the message of its error."""
    try:
        return use(folder), ""
    except InputError as error:
        return [], str(error)


def mutations(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields manifests with one field missing, unknown or of each of the values, in itself or in a shard's entry."""
    for name in [*manifest, "unknown"]:
        for value in VALUES:
            yield f"{name} = {value!r}", manifest | {name: value}
        yield f"no {name}", {key: value for key, value in manifest.items() if key != name}
    for name in [*manifest["shards"][1], "unknown"]:
        for value in [*VALUES, "missing"]:
            changed = copy.deepcopy(manifest)
            changed["shards"][1][name] = value
            if value == "missing":
                del changed["shards"][1][name]
            yield f"shards[1].{name} = {value!r}", changed
    yield "repeated shard", manifest | {"shards": [*manifest["shards"], manifest["shards"][0]]}
    yield "no second shard", manifest | {"shards": [manifest["shards"][0], manifest["shards"][2]]}


HARMLESS = {
    *("source", "order", "listing", "seed", "flips", "margin", "precision", "skipped", "class_names", "shard_size"),
    "views",
}


def test_every_mutation_of_a_value_is_told_in_one_line_or_changes_no_batch(folder: Path) -> None:
    path = folder / "manifest.json"
    original, expected = json.loads(path.read_text()), use(folder)
    count = 0
    for name, changed in mutations(original):
        path.write_text(json.dumps(changed))
        ids, message = try_to_use(folder)
        assert "\n" not in message, name
        assert len(message) < 1000, name
        assert not message or str(folder) in message, name
        assert message or ids == expected, name
        assert message or changed == original or HARMLESS & set(name.split(" ")[0].split(".")) or "no " in name, name
        list(find_problems(folder))
        count += 1
    assert count > 600


TEXTS = [
    "", "{", "[]", "null", "1e308", '"x"', "[" * 100_000, '{"a":' * 100_000, "{}", '{"format_version": 3}', "\0",
    '{"format_version": NaN}', f'{{"format_version": 3, "seed": {"9" * 5000}}}', "\ufeff{}", "<!doctype html>",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=[text[:20] for text in TEXTS])
def test_a_text_that_is_no_manifest_is_an_error_in_one_line(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json (is damaged|has format version)") as error:
        use(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("version", [0, 4, "3", None, [], 1e308, 10**4000])
def test_an_unknown_format_version_is_refused(folder: Path, version: object) -> None:
    changed = json.loads((folder / "manifest.json").read_text()) | {"format_version": version, "new_field": 1}
    (folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"manifest\.json (has format version .*; this release reads 3|is damaged)"):
        use(folder)


@pytest.mark.parametrize(
    "replace", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)]
)
def test_only_a_regular_file_is_a_manifest(folder: Path, replace: Callable[[Path], None]) -> None:
    (folder / "manifest.json").unlink()
    replace(folder / "manifest.json")
    with pytest.raises(InputError, match=r"manifest\.json"):
        use(folder)


def test_a_manifest_without_end_costs_no_memory(folder: Path) -> None:
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"manifest\.json has more than 16777216 bytes"):
        use(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


def test_records_of_finished_shards_are_checked_like_the_manifest(folder: Path) -> None:
    manifest = Manifest.load(folder)
    shard = manifest.shards.pop()
    manifest.save(folder)
    save_record(folder, shard)
    assert Manifest.load(folder).shards[-1] == shard
    (path,) = (folder / PARTS).iterdir()
    record = json.loads(path.read_text())
    for text in (
        *(json.dumps(record | {name: value}) for name in record for value in VALUES),
        *TEXTS,
    ):
        path.write_text(text)
        assert "\n" not in try_to_use(folder)[1]
    path.write_text("{")
    with pytest.raises(InputError, match=r"parts/000002\.tar\.json is not valid JSON .*; remove that file and run the"):
        Manifest.load(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"parts/000002\.tar\.json is not a regular file"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    "replace", [lambda path: path.symlink_to(path.parent.parent), lambda path: path.write_text("")]
)
def test_records_are_neither_read_nor_written_through_a_link(folder: Path, replace: Callable[[Path], object]) -> None:
    manifest = Manifest.load(folder)
    replace(folder / PARTS)
    for act in (lambda: Manifest.load(folder), lambda: save_record(folder, manifest.shards[0])):
        with pytest.raises(InputError, match=r"shards/parts must be a folder: remove it"):
            act()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["shards"]


@pytest.mark.parametrize(
    ("source", "remedy"), [("photos", "tokenize images of"), ("samples of a network: seed=0", "sample tokens of")]
)
def test_shards_of_other_classes_are_refused_with_the_command_that_writes_such_shards(source: str, remedy: str) -> None:
    manifest = Manifest([1], 48, ["cat", "dog"], "abc", source, 0, 1)
    for names in (["dog", "cat"], ["cat"]):
        with pytest.raises(InputError, match=f"{remedy} the model's classes"):
            manifest.check_classes("shards", names)
