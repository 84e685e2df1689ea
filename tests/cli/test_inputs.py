"""Checks of what a command reads, before torch is imported: what is missing is named, the rest is left alone."""

import json
from pathlib import Path

import pytest

from lightning_mvar.cli.inputs import check_inputs
from lightning_mvar.errors import InputError

TRAIN = "--data.train export --data.val export --model.tokenizer"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with an export of two classes, configurations, a project and the link that a run may leave."""
    monkeypatch.chdir(tmp_path)
    Path("export").mkdir()
    Path("export/config.json").write_text(json.dumps({"class_names": ["cat", "dog"], "network": {"num_classes": 2}}))
    Path("last.ckpt").symlink_to("step=8.ckpt")
    Path("sample.yaml").write_text("ckpt_path: outputs/last.ckpt\nclasses: cat")
    Path("mine/outputs").mkdir(parents=True)
    Path("mine/outputs/last.ckpt").write_bytes(b"")
    Path("mine/sample.yaml").write_text("ckpt_path: outputs/last.ckpt")
    Path("train.yaml").write_text("data: {train: pictures, val: 'pictures:val'}")
    Path("tune.yaml").write_text("resume: false\nckpt_path: null\nclasses: null\nmodel:\n  weights: gone")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample --ckpt_path nowhere.ckpt", "--ckpt_path nowhere.ckpt does not exist; it must be a checkpoint file, "),
        ("sample --ckpt_path var-d17", "--ckpt_path var-d17 does not exist; .*, or one of var-d16, "),
        ("sample --ckpt_path export --tokenizer=export/t", "--tokenizer export/t does not exist; it must be a folder"),
        ("sample --config sample.yaml", "^sample.yaml, line 1: --ckpt_path outputs/last.ckpt does not exist"),
        ("sample --config sample.yaml --ckpt_path export --classes do", r"^--classes: .* 'do'; perhaps 1 \(dog\)\?"),
        ("sample --ckpt_path export --classes dgo", "--classes: there is no class 'dgo'; use numbers 0 to 1"),
        ("sample --ckpt_path var-d16 --classes goldn_retriever", r"--classes: .* perhaps 207 \(golden"),
        (
            "tokenize --images no/images --tokenizer export",
            "--images no/images does not exist; it must be a folder",
        ),
        ("sample --ckpt_path outputs/export", "--ckpt_path outputs/export does not exist; it must be a checkpoint"),
        ("fit --ckpt_path step=9.ckpt", "--ckpt_path step=9.ckpt does not exist; it must be a checkpoint of `fit`"),
        (f"fit {TRAIN} nowhere", "--model.tokenizer nowhere does not exist; it must be a folder"),
        (
            f"fit {TRAIN} export --data.train shards",
            "--data.train shards does not exist; it must be a folder that `t",
        ),
        ("evaluate --samples a.npz --reference digits:test", "--samples a.npz does not exist; it must be images that"),
        ("evaluate --samples export --reference photos", "--reference photos does not exist; .*, or imagenet256"),
        ("evaluate --samples a.npz --ckpt_path export --reference imagenet256 --floor b.npz", "--floor b.npz does not"),
        ("export --official var.pth --out out", "--official var.pth does not exist; it must be a checkpoint file, "),
        ("merge export last.ckpt other --out out", "^other does not exist; it must be a checkpoint file, "),
        ("merge export --base other --out out", "^--base other does not exist"),
        ("report sweeps/digits", "^sweeps/digits does not exist; it must be the folder of a sweep"),
        ("sweep digits.yml --jobs 2", "^digits.yml does not exist; it must be a sweep file"),
        ("shards verify --folder shards", "--folder shards does not exist; it must be a folder that `tokenize` or"),
        ("sample --ckpt_path export --draft_scorer s", "--draft_scorer s does not exist; it must be a folder that `t"),
        ("train-tokenizer --config train.yaml", "--data.train pictures does not exist"),
        ("sample --config mine/sample.yaml", "^mine/sample.yaml, line 1: .* does not exist; it exists in mine: run"),
        ("fit -c tune.yaml", "^tune.yaml, line 5: --model.weights gone does not exist"),
        ("fit -c tune.yaml --model {} --model.weights lost", "^--model.weights lost does not exist"),
    ],
)
def test_what_is_missing_is_named(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_inputs(*line.split())


@pytest.mark.parametrize(
    "line",
    [
        "sample --ckpt_path last.ckpt --classes anything",
        "sample --config sample.yaml --ckpt_path export --tokenizer vae-ch160v4096z32",
        "sample --config sample.yaml --print_config",
        "sample --ckpt_path owner/repository --tokenizer null",
        "sample --ckpt_path export --classes cat:0.5+dog:0.5",
        "evaluate --samples a.npz --ckpt_path last.ckpt --reference digits:test --classes anything",
        "evaluate --samples export --reference imagenet256",
        "merge export var-d16 owner/repository:file.pth --out out --coefficients 0.5 0.25 0.25",
        "sweep configs/sweep/digits.yaml",
        "tokenize --images https://host/{a,b}.tar --tokenizer owner/repository:file.pth",
        "tokenize --images digits:train --tokenizer --out",
        "train-tokenizer --config train.yaml --data.train digits:train --data.val photos-*.tar",
        "fit --model.tokenizer ${data.train}",
        "fit -c tune.yaml --resume",
        "validate -c tune.yaml --ckpt_path last.ckpt",
        "fit -c tune.yaml --model {weights:null}",
        "sample -c tune.yaml --ckpt_path export",
        "sample --ckpt_path export --classes null",
    ],
)
def test_what_may_exist_is_left_to_the_command(line: str) -> None:
    check_inputs(*line.split())


def test_ranks_are_left_to_report_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_inputs("sample", "--ckpt_path", "nowhere.ckpt")


def test_a_description_that_is_no_export_is_left_to_the_command() -> None:
    for text in ("{", "[]", '{"class_names": [1], "network": null}', '{"class_names": [], "network": {}}'):
        Path("export/config.json").write_text(text)
        check_inputs("sample", "--ckpt_path", "export", "--classes", "bird")
