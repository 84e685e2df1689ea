"""The `shards` command line: its output against independently computed values."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import write_images, write_token_shards
from PIL import Image

from lightning_mvar import Tokenizer
from lightning_mvar.cli import run
from lightning_mvar.data.images.examples import Views
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.sampling.grids import PADDING, SMALLEST_CAPTIONED


@pytest.fixture
def workdir(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 18 images of three classes in `images`, and their tokens in `tokens`."""
    write_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    tokenize("tokens", tokenizer_folder)
    return tmp_path


def tokenize(out: str, tokenizer_folder: Path, *options: str) -> None:
    command = ["tokenize", "--images", "images", "--tokenizer", str(tokenizer_folder), "--out", out]
    assert run([*command, "--shard_size", "7", *options]) == 0


def all_packs(folder: Path) -> list[dict]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(wds.WebDataset(urls, shardshuffle=False).decode())


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["shards", "--help"]) == 0
    text = capsys.readouterr().out
    assert "{verify,info,decode}" in text
    assert "shards verify DIR" in text
    for name, option in [("verify", "--tokenizer"), ("info", "--json"), ("decode", "--images")]:
        assert run(["shards", name, "--help"]) == 0
        assert option in capsys.readouterr().out


def test_an_intact_folder_passes_and_a_damaged_one_fails(
    workdir: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["shards", "verify", "tokens", "--tokenizer", str(tokenizer_folder)]) == 0
    assert "tokens is intact: 18 samples in 3 shards" in capfd.readouterr().out
    for name in ("000000.tar", "000002.tar"):
        path = workdir / "tokens" / name
        path.write_bytes(path.read_bytes()[:-600])
    (workdir / "tokens/000001.tar").unlink()
    assert run(["shards", "verify", "tokens"]) == 1
    out, error = capfd.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("tokens/")]
    assert {line.split(":")[0] for line in lines} == {f"tokens/00000{i}.tar" for i in range(3)}
    assert "tokens/000001.tar: is missing; run the same `lightning-mvar tokenize` again" in out
    assert f"error: tokens is damaged: {len(lines)} problems in 3 files, listed above" in error
    assert "Traceback" not in error


def test_statistics_equal_a_plain_count(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["shards", "info", "tokens", "--json", "info.json"]) == 0
    printed = capsys.readouterr().out
    (record,) = json.loads((workdir / "info.json").read_text())
    packs = all_packs(workdir / "tokens")
    tokens = np.concatenate([pack["tokens.npy"] for pack in packs])
    begin = 0
    for side, scale in zip((1, 2, 3, 4), record["scales"], strict=True):
        counts = Counter(tokens[:, begin : begin + side**2].ravel().tolist())
        shares = [count / counts.total() for count in counts.values()]
        assert scale["scale"] == str(side)
        assert scale["tokens"] == counts.total() == 18 * side**2
        assert scale["codebook_usage"] == pytest.approx(len(counts) / 48)
        assert scale["codebook_perplexity"] == pytest.approx(math.prod(p**-p for p in shares))
        begin += side**2
    assert record["classes"] == [
        {"label": i, "name": n, "samples": 6} for i, n in enumerate(["dark", "light", "mixed"])
    ]
    assert record["bytes_on_disk"] == sum(path.stat().st_size for path in (workdir / "tokens").glob("*.tar"))
    assert record["bytes_per_sample"] == pytest.approx(record["bytes_on_disk"] / 18)
    assert record["theoretical_bytes_per_sample"] == pytest.approx(30 * math.log2(48) / 8)
    assert record["source"] == "images"
    assert "min 6, median 6, max 6" in printed
    assert "codebook_perplexity" in printed


def test_skipped_images_and_rare_classes_are_listed(
    workdir: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "images/light/3.png").write_bytes(b"no image")
    tokenize("fewer", tokenizer_folder, "--max_failures", "1")
    capsys.readouterr()
    assert run(["shards", "verify", "fewer"]) == 0
    assert run(["shards", "info", "fewer"]) == 0
    printed = capsys.readouterr().out
    assert "rarest: light (5), dark (6), mixed (6)" in printed
    assert "skipped: images/light/3.png cannot be decoded" in printed


def image_box(column: int, row: int, height: int) -> tuple[int, int, int, int]:
    """Returns the box of an 8 x 8 image in the picture of `decode`: row 0 has originals, row 1 reconstructions."""
    zoom = SMALLEST_CAPTIONED // 8
    width = (8 + 2 * PADDING) * zoom
    left = PADDING + column * (width + PADDING) + PADDING * zoom
    top = height - PADDING - (2 - row) * (8 + PADDING) * zoom
    return left, top, left + 8 * zoom, top + 8 * zoom


@pytest.mark.parametrize(("views", "flips", "margin"), [(1, "false", 1.0), (3, "false", 1.125), (3, "true", 1.5)])
def test_the_picture_has_originals_above_their_reconstructions(
    workdir: Path,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    views: int,
    flips: str,
    margin: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--views", str(views), "--seed", "5", "--flips", flips, "--margin", str(margin)]
    tokenize("views", tokenizer_folder, *options)
    command = ["shards", "decode", "views", "--tokenizer", str(tokenizer_folder), "--out", "pairs.png", "--n", "6"]
    assert run(command) == 0
    assert "6 samples of views in pairs.png, 6 of them below their originals" in capsys.readouterr().out
    source = open_images("images", 8, margin=margin)
    examples = source if views == 1 else Views(source, views, 5, flips == "true")
    images = {examples[i].key: examples[i].image for i in range(18 * views)}
    packs = all_packs(workdir / "views")
    rows = {key: tokens for pack in packs for key, tokens in zip(pack["keys.json"], pack["tokens.npy"], strict=True)}
    expected = {}
    for key, image in images.items():
        with torch.no_grad():
            decoded = tokenizer.decode(torch.from_numpy(rows[key].astype(np.int64))[None])[0].clamp(-1, 1)
        expected[key] = [
            ((part + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).numpy() for part in (image, decoded)
        ]
    shown = set()
    with Image.open("pairs.png") as picture:
        for column in range(6):
            original, reconstruction = (
                np.asarray(picture.crop(image_box(column, row, picture.height)).resize((8, 8), 0)) for row in (0, 1)
            )
            (key,) = [k for k, (image, _) in expected.items() if np.array_equal(image, original)]
            assert np.abs(reconstruction.astype(int) - expected[key][1].astype(int)).max() <= 1
            shown.add(key)
    assert len(shown) == 6


def test_missing_originals_are_left_out_and_reported(
    workdir: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (workdir / "images").rename(workdir / "elsewhere")
    command = ["shards", "decode", "tokens", "--tokenizer", str(tokenizer_folder), "--out", "pairs.png", "--n", "40"]
    assert run(command) == 0
    out = capfd.readouterr().out
    assert "without originals: images does not exist" in out
    assert "18 samples of tokens in pairs.png, 0 of them" in out
    (workdir / "elsewhere/dark/0.png").unlink()
    assert run([*command, "--images", "elsewhere"]) == 0
    assert "18 samples of tokens in pairs.png, 17 of them" in capfd.readouterr().out
    assert run([*command, "--images", "nowhere"]) == 1
    assert "nowhere does not exist" in capfd.readouterr().err


@pytest.mark.parametrize(
    "source",
    ["pipe:touch ran; cat images/light/0.png", "https://127.0.0.1:1/images.tar", "a\nb", "\x1b[31m", "pipe:touch ran"],
)
def test_the_source_in_a_manifest_is_never_run_or_fetched(
    workdir: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str], source: str
) -> None:
    path = workdir / "tokens/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source}))
    assert run(["shards", "decode", "tokens", "--tokenizer", str(tokenizer_folder), "--out", "pairs.png"]) == 0
    assert f"without originals: the manifest names {source!r}, which is not a path" in capfd.readouterr().out
    assert not (workdir / "ran").exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{0..99999999999}.tar", "expands to more than 100000 names"),
        ("{a,b}" * 40, "expands to more than 100000 names"),
        ("{a..z}" * 20, "expands to more than 100000 names"),
        ("{{a,b},c}" * 40, "expands to more than 100000 names"),
        ("a{b", "is not a pattern of names"),
        (f"{{0..{'9' * 5000}}}", "is not a pattern of names"),
        ("/dev/zero", "does not exist (or is not a file)"),
    ],
)
def test_a_pattern_in_a_manifest_is_bounded(
    workdir: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str], source: str, reason: str
) -> None:
    path = workdir / "tokens/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source}))
    assert run(["shards", "decode", "tokens", "--tokenizer", str(tokenizer_folder), "--out", "pairs.png"]) == 0
    out = capfd.readouterr().out
    assert "without originals: " in out
    assert reason in out
    assert max(len(line) for line in out.splitlines()) < 1000


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("/*/*/*/*/*/*/*.tar", "which has wildcards"),
        ("/", "far more files than the shards have images"),
        ("/:train", "far more files than the shards have images"),
        ("many", "far more files than the shards have images"),
    ],
)
def test_the_source_in_a_manifest_is_not_searched_for_long(
    workdir: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    source: str,
    reason: str,
) -> None:
    monkeypatch.setattr("lightning_mvar.commands.shards.MAX_OTHER_FILES", 20)
    path = workdir / "tokens/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source}))
    for number in range(60):
        (workdir / "many" / str(number)).mkdir(parents=True)
    assert run(["shards", "decode", "tokens", "--tokenizer", str(tokenizer_folder), "--out", "pairs.png"]) == 0
    out = capfd.readouterr().out
    assert f"without originals: the manifest names {source!r}, which " in out
    assert f"{reason}; pass their location as --images" in out


def test_mistakes_are_reported_in_one_line(
    workdir: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_token_shards(workdir / "foreign", "abc", [5])
    decode = ["--tokenizer", str(tokenizer_folder), "--out", "a.png"]
    (workdir / "cut").mkdir()
    for path in (workdir / "tokens").iterdir():
        (workdir / "cut" / path.name).write_bytes(path.read_bytes()[: 3000 if path.suffix == ".tar" else None])
    for name, values in (("odd", {"vocab_size": "48"}), ("empty", {"shards": []})):
        (workdir / name).mkdir()
        manifest = json.loads((workdir / "tokens/manifest.json").read_text()) | values
        (workdir / name / "manifest.json").write_text(json.dumps(manifest))
    for options, message in [
        ([], "shards needs a subcommand; it has verify, info, decode"),
        (["info", "x" * 5000], "xxx... is too long for a file system"),
        (["look", "tokens"], "look"),
        (["verify"], "shards verify needs FOLDER as its first argument (or --folder)"),
        (["verify", "nowhere"], "--folder nowhere does not exist; it must be a folder that `tokenize`"),
        (["verify", "images"], "no token shards in images"),
        (["info", "images"], "no token shards in images"),
        (["info", "cut"], "000000.tar is damaged"),
        (["verify", "foreign", "--tokenizer", str(tokenizer_folder)], "foreign is damaged: 1 problem in 1 file"),
        (["decode", "tokens", *decode[:-1], "a.jpg"], "--out a.jpg must end in .png"),
        (["decode", "foreign", *decode], "the tokens in foreign were made by tokenizer abc, not by"),
        (["info", "odd"], "odd/manifest.json is damaged (manifest.json: vocab_size is '48'; it must be an integer"),
        (["decode", "odd", *decode], "odd/manifest.json is damaged"),
        (["decode", "empty", *decode], "there are no samples in empty yet"),
        (["decode", "tokens", *decode, "--n", "0"], "--n must be at least 1, got 0"),
        (["decode", "tokens", *decode, "--seed", "-1"], "--seed must be at least 0, got -1"),
    ]:
        assert run(["shards", *options]) == 1, options
        error = capfd.readouterr().err
        assert message in error, options
        assert "Traceback" not in error
