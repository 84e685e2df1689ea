"""One tree of pictures gives the same manifest in every storage form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from storage_forms import CLASS_NAMES, make_files, write_forms

from lightning_mvar.cli import run
from lightning_mvar.data.images.sources import open_encoded


def test_manifests_of_all_forms_are_equal_up_to_the_source(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forms = write_forms(tmp_path, make_files())
    manifests = {}
    for number, (form, (source, *options)) in enumerate(forms.items()):
        argv = ["tokenize", "--images", source, "--tokenizer", str(tokenizer_folder), "--out", f"out/{number}"]
        assert run([*argv, "--shard_size", "4", *options]) == 0, form
        manifests[form] = json.loads(Path(f"out/{number}/manifest.json").read_text())
        assert manifests[form].pop("source") == source
    assert manifests["folder"]["class_names"] == CLASS_NAMES
    assert len(manifests["folder"]["shards"]) == 3
    for form, manifest in manifests.items():
        assert manifest == manifests["folder"], form


def test_all_forms_hold_the_same_files(tmp_path: Path) -> None:
    files = make_files(per_class=2)
    for form, (source, *options) in write_forms(tmp_path, files).items():
        given = dict(zip(options[::2], options[1::2], strict=True))
        names = Path(given["--class_names"]).read_text().splitlines() if "--class_names" in given else None
        images = open_encoded(source, given.get("--labels"), names, str(tmp_path / "cache"))
        assert {images.key(i): images.read(i) for i in range(len(images))} == files, form
