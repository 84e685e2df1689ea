"""A small ImageNet to tokens: from every kind of source, on several ranks, through kills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_folder import (
    BROKEN,
    CLASSES,
    encoded,
    pictures,
    write_folder,
    write_parquet,
    write_tar_of_folders,
    write_tar_of_tars,
    write_webdataset,
)
from PIL import Image
from processes import Run, start

from lightning_mvar import Tokenizer
from lightning_mvar.cli import run
from lightning_mvar.data.images.decoding import decode_image, to_tensor
from lightning_mvar.data.tokens.shards import PARTS, Manifest, read_shard
from lightning_mvar.io.locks import alone_in

Samples = dict[str, tuple[int, bytes]]  # label and tokens by key


def samples(folder: Path) -> Samples:
    """All samples of a folder, each of which must be there once."""
    manifest = Manifest.load(folder)
    assert not (folder / PARTS).exists()
    assert {path.name for path in folder.glob("*.tar")} == {shard.name for shard in manifest.shards}
    found: Samples = {}
    for shard in manifest.shards:
        packs = list(read_shard(folder / shard.name))
        assert sum(len(pack.keys) for pack in packs) == shard.samples
        for pack in packs:
            rows = zip(pack.labels.tolist(), (tokens.tobytes() for tokens in pack.tokens), strict=True)
            own = dict(zip(pack.keys, rows, strict=True))
            assert len(own) == len(pack.keys)
            assert not own.keys() & found.keys()
            found |= own
    return found


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return pictures(per_class=1)


@pytest.fixture(scope="module")
def workspace(files: dict[str, bytes], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, stored in every way, and shards of the folder."""
    root = tmp_path_factory.mktemp("tokenize")
    shutil.copytree(tokenizer_folder, root / "tok")
    write_folder(files, root / "folder")
    write_tar_of_tars(files, root / "train.tar")
    write_tar_of_folders(files, root / "folders.tar")
    write_webdataset(files, root / "webdataset")
    write_parquet(files, root / "parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(command("folder", "whole")) == 0
    return root


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


def command(source: str, out: str, *options: str) -> list[str]:
    words = ["tokenize", "--images", source, "--tokenizer", "tok", "--out", out, "--shard_size", "100"]
    return [*words, "--max_failures", str(len(BROKEN)), *options]


def test_tokens_are_those_of_the_pictures(here: Path, files: dict[str, bytes], tokenizer: Tokenizer) -> None:
    """A plain loop over the files: resize, crop the centre, encode."""
    found = samples(Path("whole"))
    readable = [key for key in files if not key.endswith(tuple(f"_{name}" for name in BROKEN))]
    assert found.keys() == set(readable)
    for key in random.Random(0).sample(readable, 50):
        picture = decode_image(files[key])
        if min(picture.size) * 16 < max(picture.size):
            continue
        scale = 9 / min(picture.size)
        size = [max(round(side * scale), 8) for side in picture.size]
        left, top = ((side - 8) // 2 for side in size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS).crop((left, top, left + 8, top + 8))
        label, tokens = found[key]
        assert label == CLASSES.index(key.split("/")[0])
        expected = tokenizer.encode(to_tensor(picture)[None])[0]
        assert np.frombuffer(tokens, np.uint16).tolist() == expected.tolist()


def test_failures_are_counted_and_named(here: Path) -> None:
    manifest = Manifest.load(Path("whole"))
    assert (manifest.num_images, manifest.num_samples) == (1014, 1010)
    assert len(manifest.skipped) == len(BROKEN)
    for name in BROKEN:
        assert sum(f"_{name} cannot be decoded" in message for message in manifest.skipped) == 1


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("train.tar", []),
        ("folders.tar", ["--num_workers", "2"]),
        ("webdataset", ["--class_names", "imagenet"]),
        ("webdataset/train-{0000..0003}.tar", ["--class_names", "imagenet", "--batch_size", "17"]),
        ("parquet", []),
        ("pipe:cat webdataset/train-{0000..0003}.tar", ["--class_names", "imagenet"]),
    ],
)
def test_tokens_are_equal_whatever_the_source(here: Path, source: str, options: list[str], tmp_path: Path) -> None:
    assert run(command(source, str(tmp_path), *options)) == 0
    assert samples(tmp_path) == samples(Path("whole"))
    manifest, expected = Manifest.load(tmp_path), Manifest.load(Path("whole"))
    assert manifest.class_names == CLASSES
    assert len(manifest.skipped) == len(expected.skipped)
    assert manifest.same_run(expected) == (source != "parquet")  # whose images are read group by group


def test_random_crops_and_mirrors_are_equal_whatever_the_source(here: Path, tmp_path: Path) -> None:
    options = ["--views", "2", "--flips", "true", "--seed", "3"]
    for source in ("folder", "parquet"):
        assert run(command(source, str(tmp_path / source), *options)) == 0
    crops = samples(tmp_path / "folder")
    assert crops == samples(tmp_path / "parquet")
    assert len(crops) == 2 * 1010
    assert run(command("folder", str(tmp_path / "straight"), "--views", "2", "--seed", "3")) == 0
    straight = samples(tmp_path / "straight")
    mirrored = sum(crops[key] != straight[key] for key in crops) / len(crops)
    assert 0.4 < mirrored < 0.6


def test_failures_are_limited(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(command("folder", str(tmp_path / "a"), "--max_failures", "0")) == 1
    assert "cannot be decoded" in (message := capfd.readouterr().err.splitlines()[-1])
    assert "repair it, or leave out up to N such images with --max_failures N" in message
    assert run(command("folder", str(tmp_path / "b"), "--max_failures", "2")) == 1
    assert "3 images cannot be decoded, more than --max_failures 2; the last is" in capfd.readouterr().err
    # Those of shards that are finished count, too.
    assert run(command("folder", str(tmp_path / "b"), "--max_failures", "3")) == 1
    assert run(command("folder", str(tmp_path / "b"))) == 0
    assert samples(tmp_path / "b") == samples(Path("whole"))


def wait_for_shards(folder: Path, count: int, commands: Run) -> None:
    while len(list(folder.glob("*.tar"))) < count and any(rank.is_alive() for rank in commands.ranks):
        time.sleep(0.005)


def test_two_ranks_that_are_killed_again_and_again_leave_nothing_out_and_nothing_twice(
    here: Path, tmp_path: Path
) -> None:
    """Each at a random moment; in the end the same samples as without."""
    rng, out, folder = random.Random(0), tmp_path / "out", tmp_path_run(tmp_path, here)
    for attempt in range(4):
        words = command("folder", str(out), "--shard_size", "10", "--num_workers", str(attempt % 2))
        commands = start(words, folder, 2, option="--devices")
        wait_for_shards(out, len(list(out.glob("*.tar"))) + rng.randrange(1, 5), commands)
        assert all(rank.is_alive() for rank in commands.ranks)
        for victim in rng.sample([0, 1], 2):
            time.sleep(rng.random() * 0.05)
            os.kill(commands.ranks[victim].pid, signal.SIGKILL)
        assert commands.wait() == [-signal.SIGKILL] * 2
    there = len(list(out.glob("*.tar")))
    assert 4 <= there < 102
    commands = start(command("folder", str(out), "--shard_size", "10"), folder, 2, option="--devices")
    assert commands.wait() == [0, 0], commands.printed()
    assert samples(out) == samples(Path("whole"))
    assert not list(out.glob(".*.tmp*"))
    assert len(Manifest.load(out).shards) == 102


def tmp_path_run(tmp_path: Path, here: Path) -> Path:
    """A folder for the commands' output in which the sources are."""
    folder = tmp_path / "run"
    if not folder.exists():
        folder.mkdir()
        for name in ("tok", "folder"):
            (folder / name).symlink_to(here / name)
    return folder


def sleep_before_writing(rank: int) -> None:
    """Rank 1 never writes a shard."""
    if rank == 1:
        import lightning_mvar.commands.tokenize as module

        module.write_shard = lambda *_: time.sleep(600)


def test_a_rank_that_is_done_waits_and_hears_at_once_when_another_has_died(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = tmp_path_run(tmp_path, here)
    commands = start(command("folder", str(out)), folder, 2, sleep_before_writing, option="--devices")
    wait_for_shards(out, 6, commands)  # all of rank 0
    time.sleep(0.5)
    assert commands.ranks[0].is_alive()
    os.kill(commands.ranks[1].pid, signal.SIGKILL)
    assert commands.wait(20) == [1, -signal.SIGKILL]
    assert "rank 0 lost another rank" in commands.outputs[0].read_text()
    assert "the same command goes on with what is missing" in commands.outputs[0].read_text()
    assert run(command("folder", str(out))) == 0
    assert samples(out) == samples(Path("whole"))


def leave_out_a_class(rank: int) -> None:
    """Rank 1 has another copy of the images."""
    if rank == 1:
        import lightning_mvar.commands.tokenize as module

        whole = module.open_images
        module.open_images = lambda source, *rest: whole("fewer", *rest)


def test_ranks_must_have_the_same_images(here: Path, tmp_path: Path) -> None:
    folder = tmp_path_run(tmp_path, here)
    (folder / "fewer").mkdir()
    for name in CLASSES[:900]:
        (folder / "fewer" / name).symlink_to(here / "folder" / name)
    commands = start(command("folder", str(tmp_path / "out")), folder, 2, leave_out_a_class, option="--devices")
    assert commands.wait(60) == [1, 1]
    assert "rank 1 has other images, or another tokenizer, than rank 0" in commands.printed()


def test_an_order_is_kept_to(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Parquet files are read group by group: to go on from a folder would take some images twice."""
    assert run(command("parquet", str(tmp_path / "out"))) == 0
    (tmp_path / "out/000003.tar").unlink()
    assert run(command("folder", str(tmp_path / "out"))) == 1
    assert "holds shards of other images" in capfd.readouterr().err
    assert run(command("parquet", str(tmp_path / "out"))) == 0
    assert samples(tmp_path / "out") == samples(Path("whole"))


def test_a_second_start_waits_and_is_refused(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_mvar.io.locks.PATIENCE_S", 0.2)
    with alone_in(tmp_path / "out", "tokenize"):
        assert run(command("folder", str(tmp_path / "out"))) == 1
    assert "another tokenize is at work in" in capfd.readouterr().err
    assert run(command("train.tar", str(tmp_path / "out"))) == 0


def test_a_decoding_process_that_is_killed_ends_the_command_in_a_line(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "lightning_mvar.data.images.crops.decode_image", lambda data: os.kill(os.getpid(), signal.SIGKILL)
    )
    assert run(command("folder", str(tmp_path), "--num_workers", "1")) == 1
    assert "a process that decodes images was killed, perhaps for memory" in capfd.readouterr().err


def test_half_precision_finds_mostly_the_same_tokens(here: Path, tmp_path: Path) -> None:
    assert run(command("folder", str(tmp_path), "--precision", "bfloat16")) == 0
    exact, lower = samples(Path("whole")), samples(tmp_path)
    assert exact.keys() == lower.keys()
    pairs = [(np.frombuffer(exact[key][1], np.uint16), np.frombuffer(lower[key][1], np.uint16)) for key in exact]
    same = np.mean([np.mean(a[:1] == b[:1]) for a, b in pairs])  # of the coarsest scale: later ones follow from it
    assert same > 0.9
    assert any((a != b).any() for a, b in pairs)
    assert run(command("folder", str(tmp_path))) == 1


def test_decoding_is_at_most_two_batches_of_each_process_ahead(here: Path) -> None:
    """Or a slow encoder would fill the memory."""
    from lightning_mvar.data.images.examples import batch_loader, batched
    from lightning_mvar.data.images.sources import open_images

    images = open_images("folder", 8, "skip")
    asked: list[int] = []

    def batches():  # type: ignore[no-untyped-def]
        for batch in batched(range(len(images)), 10):
            asked.append(batch[0])
            yield batch

    reading = iter(batch_loader(images, batches(), num_workers=2))
    for _ in range(5):
        next(reading)
    time.sleep(1)
    assert len(asked) <= 5 + 2 * 2


def test_an_image_that_is_larger_than_memory_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    image = Image.new("1", (20_000, 20_000))
    with pytest.raises(Image.DecompressionBombError):
        decode_image(encoded(image, "PNG"))
    assert torch.isfinite(to_tensor(decode_image(encoded(image.crop((0, 0, 3000, 2000)), "PNG")))).all()
