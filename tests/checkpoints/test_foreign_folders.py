"""Exported folders whose config.json comes from elsewhere: read, or refused in one line, within bounds."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_network

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import load_tokenizer, load_trained, save_folder
from lightning_mvar.errors import InputError

NAMES = list("abcdefghij")


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_folder(tmp_path / "export", tokenizer, tiny_network(), NAMES)
    return tmp_path / "export"


def refusal(folder: Path, config: Any) -> str:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(InputError) as raised:
        load_trained(folder)
    assert str(raised.value).isprintable()
    return str(raised.value)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every part of a JSON value, the whole included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [leaf for name, part in items for leaf in leaves(part, (*path, name))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    changed = {name: replaced(part, path[1:], new) if name == path[0] else part for name, part in parts}
    return changed if isinstance(value, dict) else [*changed.values()]


FOREIGN = [None, True, -1, 0, 2**62, 10**30, 1.5, 1e308, "", "x\0y", [], {}, [[[]]], [1e9, -1], {"a": {"b": None}}]


def test_every_replaced_part_of_a_config_is_read_or_refused_in_one_line(folder: Path) -> None:
    sound = json.loads((folder / "config.json").read_text())
    refused = 0
    paths = leaves(sound)
    for path in paths:
        for new in FOREIGN:
            (folder / "config.json").write_text(json.dumps(replaced(sound, path, new)))
            try:
                load_trained(folder)
            except InputError as error:
                refused += "\n" not in str(error)
    assert refused > 0.9 * len(paths) * len(FOREIGN)  # other values of drop_path and adaln_gate_init are sound


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("network", {"depth": 10**9}, r"network.depth must be in \[1, 1024\], got 1000000000"),
        ("network", {"depth": 1000}, "does not fit MVAR: its weights have 2 blocks, not 1000"),
        ("network", {"width": 0}, r"network.width must be in \[1, 65536\], got 0"),
        ("network", {"vocab_size": 2**40}, r"network.vocab_size must be in \[1, 1048576\]"),
        ("network", {"drop_path": -0.1}, r"network.drop_path must be in \[0, 1\), got -0.1"),
        ("network", {"num_classes": 11}, "class_names has 10 names for 11 classes"),
        ("network", {"mixers": [["mamba2"] * 1000]}, "network.mixers has 1000 mixers in a block; at most 16"),
        ("network", {"mixers": ["mamba2", ["mamba2"]]}, r"network.mixers is \['mamba2', \['mamba2'\]\]; it must be"),
        ("network", {"schedule": {"side_lengths": [1, 10**9]}}, "make more than 1048576 tokens"),
        ("network", {"schedule": {"side_lengths": [2, 1]}}, "positive and strictly increasing"),
        ("network", {"schedule": {"side_lengths": [*range(1, 10**5)]}}, "make more than 1048576 tokens"),
        ("network", {"schedule": None}, "network.schedule is None; it must be an object"),
        ("tokenizer", {"multipliers": [1] * 30}, "tokenizer.multipliers must be at most 12 numbers up to 256"),
        ("tokenizer", {"multipliers": [1] * 12, "schedule": {"side_lengths": [16]}}, "make images of 32768 x 32768"),
        ("tokenizer", {"blocks": 10**6}, r"tokenizer.blocks must be in \[1, 64\]"),
        ("tokenizer", {"vocab_size": True}, "tokenizer.vocab_size is True; it must be an integer"),
    ],
)
def test_sizes_are_bounded_before_anything_is_built(
    folder: Path, part: str, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part] |= change
    monkeypatch.setattr("torch.nn.Module.__init__", None)  # building a module is a TypeError
    assert re.search(message, refusal(folder, config))


def test_other_versions_and_kinds_of_config_are_told_with_the_remedy(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    remedy = "this release reads 1: install the release of lightning_mvar that wrote it"
    assert f"config.json has format_version 2; {remedy}" in refusal(folder, config | {"format_version": 2, "new": 1})
    assert f"has format_version '1'; {remedy}" in refusal(folder, config | {"format_version": "1"})
    assert f"has no format_version; {remedy}" in refusal(folder, [])
    assert "class_names has 1 names for 10 classes; give one name per class or none" in refusal(
        folder, config | {"class_names": ["a"]}
    )
    assert "not valid JSON" in refusal(folder, "[" * 10**6)
    assert "more than" in refusal(folder, " " * (2**24 + 1))
    assert "tokenizer is missing; it must be an object" in refusal(folder, {"format_version": 1})
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    for load in (load_trained, load_tokenizer):
        with pytest.raises(InputError, match=r"config\.json is not a regular file"):
            load(folder)
