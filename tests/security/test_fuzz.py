"""Seeded random damage to each kind of foreign file: a command ends with 0 or 1, within bounds, and runs no code.

`FUZZ_CASES=200 pytest tests/security/test_fuzz.py -rP` tries more and prints the largest memory and time.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from bounded import run_bounded, tree
from conftest import tiny_network, write_images, write_token_shards
from mutations import damaged_bytes, damaged_json, damaged_lines, damaged_npz, damaged_safetensors, damaged_tar

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.io.fingerprint import sha256_of

CASES = int(os.environ.get("FUZZ_CASES", "8"))
PEAK_BYTES = 2**28  # resident memory of a command; a read without bounds takes more before it meets those of `bounded`
OUTPUTS = {"out", "out.png", "outputs", "out.rank0.txt", "peak_bytes"}  # `outputs` holds the statistics of references
SAMPLE = ["sample", "--ckpt_path", "model", "--out", "out", "--classes", "1", "--device", "cpu"]
SHARDS = [["shards", action, "shards"] for action in ("info", "verify")]
DECODE = ["shards", "decode", "shards", "--tokenizer", "tok", "--out", "out.png"]
TOKENIZE = ["tokenize", "--tokenizer", "tok", "--out", "out", "--device", "cpu"]
EVALUATE = ["evaluate", "--reference", "real.npz", "--extractor", "conftest.Pixels", "--device", "cpu"]


class Target(NamedTuple):
    """A file to damage, and the commands that read it."""

    file: str
    damage: Callable[[bytes, random.Random], bytes]
    commands: list[list[str]]


def text(damage: Callable[[str, random.Random], str]) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, rng: damage(data.decode(), rng).encode()


TARGETS = {
    "config": Target("model/config.json", text(damaged_json), [SAMPLE]),
    "weights": Target("model/network.safetensors", damaged_safetensors, [SAMPLE]),
    "manifest": Target("shards/manifest.json", text(damaged_json), [*SHARDS, DECODE]),
    "shard": Target("shards/000000.tar", damaged_tar, [*SHARDS, DECODE]),
    "npz": Target("samples.npz", damaged_npz, [[*EVALUATE, "--samples", "samples.npz"]]),
    "png": Target("images/dark/0.png", damaged_bytes, [[*TOKENIZE, "--images", "images"]]),
    "tar": Target("images.tar", damaged_tar, [[*TOKENIZE, "--images", "images.tar"]]),
    "labels": Target("labels.txt", text(damaged_lines), [[*TOKENIZE, "--images", "flat", "--labels", "labels.txt"]]),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with an intact file of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    save_folder(folder / "model", tokenizer, tiny_network(), [f"class {i}" for i in range(10)])
    save_folder(folder / "tok", tokenizer)
    write_token_shards(folder / "shards", tokenizer.fingerprint(), [6])
    write_images(folder / "images", per_class=2)
    shutil.make_archive(str(folder / "images"), "tar", folder / "images")
    (folder / "flat").mkdir()
    for i, path in enumerate(sorted((folder / "images").rglob("*.png"))):
        shutil.copy(path, folder / "flat" / f"{i}.png")
    (folder / "labels.txt").write_text("".join(f"{i}.png class{i // 2}\n" for i in range(6)))
    rng = np.random.default_rng(0)
    for name in ("samples", "real"):
        np.savez(folder / f"{name}.npz", rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), np.arange(6))
    return folder


@pytest.mark.parametrize("kind", TARGETS)
def test_the_sound_file_is_read(sound: Path, kind: str, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "work")
    for command in TARGETS[kind].commands:
        outcome = run_bounded(command, tmp_path / "work")
        assert outcome.code == 0, outcome.output


@pytest.mark.parametrize("kind", TARGETS)
def test_damaged_files_end_in_one_message_at_most(sound: Path, kind: str, tmp_path: Path) -> None:
    target = TARGETS[kind]
    outcomes, problems = [], []
    for seed in range(CASES):
        work = tmp_path / str(seed) / "work"  # the parent folder is where a climbing name would arrive
        shutil.copytree(sound, work)
        content = target.damage((sound / target.file).read_bytes(), random.Random(seed))
        (work / target.file).write_bytes(content)
        if kind == "shard":
            seal_shard(work / "shards")
        before = tree(work.parent)
        for command in target.commands:
            outcome = run_bounded(command, work)
            outcomes.append(outcome)
            if outcome.code not in (0, 1) or "Traceback" in outcome.output:
                problems.append(f"seed {seed}: {' '.join(command)}\n{outcome.output}")
        new = {path.removeprefix("work/").split("/")[0] for path in tree(work.parent) - before}
        if new - OUTPUTS:
            problems.append(f"seed {seed} wrote {new - OUTPUTS}")
    assert not problems, "\n".join(problems)
    peak, seconds = max(outcome.peak_bytes for outcome in outcomes), max(outcome.seconds for outcome in outcomes)
    assert 0 < peak < PEAK_BYTES
    refused = sum(outcome.code == 1 for outcome in outcomes)
    print(f"{kind}: {refused} of {len(outcomes)} commands refused, at most {peak / 2**20:.0f} MiB and {seconds:.1f} s")


def seal_shard(folder: Path) -> None:
    """Writes the checksum and size of the damaged shard into the manifest, as its author would."""
    manifest = Manifest.load(folder)
    path = folder / manifest.shards[0].name
    manifest.shards[0].sha256, manifest.shards[0].bytes = sha256_of(path), path.stat().st_size
    manifest.save(folder)
