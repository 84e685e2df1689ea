"""`tokenize` on the first classes of a small ImageNet: every kind of source, several ranks, kills."""

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
    encoded,
    make_image_files,
    write_folder,
    write_parquet,
    write_tar_of_folders,
    write_tar_of_tars,
    write_webdataset,
)
from imagenet_folder import CLASSES as IMAGENET
from PIL import Image
from processes import Run, start

from lightning_mvar import Tokenizer
from lightning_mvar.cli import run
from lightning_mvar.data.images.decoding import TooManyPixelsError, decode_image, to_tensor
from lightning_mvar.data.tokens.manifest import PARTS, Manifest
from lightning_mvar.data.tokens.shards import read_shard
from lightning_mvar.io.locks import lock_folder

CLASSES = IMAGENET[:250]
Samples = dict[str, tuple[int, bytes]]  # label and tokens by key


def samples(folder: Path) -> Samples:
    """Reads all samples of a folder and checks that each occurs once."""
    manifest = Manifest.load(folder)
    assert not (folder / PARTS).exists()
    assert {path.name for path in folder.glob("*.tar")} == {shard.name for shard in manifest.shards}
    collected: Samples = {}
    for shard in manifest.shards:
        packs = list(read_shard(folder / shard.name, shard, manifest.spec))
        assert sum(len(pack.keys) for pack in packs) == shard.samples
        for pack in packs:
            rows = zip(pack.labels.tolist(), (tokens.tobytes() for tokens in pack.tokens), strict=True)
            own = dict(zip(pack.keys, rows, strict=True))
            assert len(own) == len(pack.keys)
            assert not own.keys() & collected.keys()
            collected |= own
    return collected


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return make_image_files(per_class=1, num_classes=len(CLASSES))


@pytest.fixture(scope="module")
def workspace(files: dict[str, bytes], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images in every format, and shards of the image folder in `complete`."""
    root = tmp_path_factory.mktemp("tokenize")
    shutil.copytree(tokenizer_folder, root / "tok")
    write_folder(files, root / "folder")
    write_tar_of_tars(files, root / "train.tar")
    write_tar_of_folders(files, root / "folders.tar")
    write_webdataset(files, root / "webdataset")
    write_parquet(files, root / "parquet")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(command("folder", "complete")) == 0
    return root


@pytest.fixture
def workdir(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


def command(source: str, out: str, *options: str) -> list[str]:
    argv = ["tokenize", "--images", source, "--tokenizer", "tok", "--out", out, "--shard_size", "25"]
    return [*argv, "--max_failures", str(len(BROKEN)), *options]


def test_tokens_equal_those_of_a_plain_loop(workdir: Path, files: dict[str, bytes], tokenizer: Tokenizer) -> None:
    """The loop resizes each file, crops the center and encodes it."""
    actual = samples(Path("complete"))
    readable = [key for key in files if not key.endswith(tuple(f"_{name}" for name in BROKEN))]
    assert actual.keys() == set(readable)
    for key in random.Random(0).sample(readable, 50):
        image = decode_image(files[key])
        if min(image.size) * 16 < max(image.size):
            continue
        scale = 9 / min(image.size)
        size = [max(round(side * scale), 8) for side in image.size]
        left, top = ((side - 8) // 2 for side in size)
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS).crop((left, top, left + 8, top + 8))
        label, tokens = actual[key]
        assert label == CLASSES.index(key.split("/")[0])
        expected = tokenizer.encode(to_tensor(image)[None])[0]
        assert np.frombuffer(tokens, np.uint16).tolist() == expected.tolist()


def test_failures_are_counted_and_listed(workdir: Path) -> None:
    manifest = Manifest.load(Path("complete"))
    assert (manifest.num_images, manifest.num_samples) == (264, 260)
    assert len(manifest.skipped) == len(BROKEN)
    for name in BROKEN:
        assert sum(f"_{name} cannot be decoded" in message for message in manifest.skipped) == 1


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("train.tar", []),
        ("folders.tar", ["--num_workers", "2"]),
        ("webdataset", ["--class_names", "classes.txt"]),
        ("webdataset/train-{0000..0003}.tar", ["--class_names", "classes.txt", "--batch_size", "17"]),
        ("parquet", []),
        ("pipe:cat webdataset/train-{0000..0003}.tar", ["--class_names", "classes.txt"]),
    ],
)
def test_tokens_are_independent_of_the_source(workdir: Path, source: str, options: list[str], tmp_path: Path) -> None:
    assert run(command(source, str(tmp_path), *options)) == 0
    assert samples(tmp_path) == samples(Path("complete"))
    manifest, expected = Manifest.load(tmp_path), Manifest.load(Path("complete"))
    assert manifest.class_names == CLASSES
    assert len(manifest.skipped) == len(expected.skipped)
    assert manifest.same_run(expected) == (source != "parquet")  # Parquet images are read group by group


def test_random_crops_and_flips_are_independent_of_the_source(workdir: Path, tmp_path: Path) -> None:
    options = ["--views", "2", "--flips", "true", "--seed", "3"]
    for source in ("folder", "parquet"):
        assert run(command(source, str(tmp_path / source), *options)) == 0
    crops = samples(tmp_path / "folder")
    assert crops == samples(tmp_path / "parquet")
    assert len(crops) == 2 * 260
    assert run(command("folder", str(tmp_path / "straight"), "--views", "2", "--seed", "3")) == 0
    straight = samples(tmp_path / "straight")
    mirrored = sum(crops[key] != straight[key] for key in crops) / len(crops)
    assert 0.4 < mirrored < 0.6


def test_failures_are_limited(workdir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(command("folder", str(tmp_path / "a"), "--max_failures", "0")) == 1
    assert "cannot be decoded" in (message := capfd.readouterr().err.splitlines()[-1])
    assert "repair it, or skip up to N such images with --max_failures N" in message
    assert run(command("folder", str(tmp_path / "b"), "--max_failures", "2")) == 1
    assert "3 images cannot be decoded, more than --max_failures 2; the last is" in capfd.readouterr().err
    # Failures of finished shards count, too.
    assert run(command("folder", str(tmp_path / "b"), "--max_failures", "3")) == 1
    assert run(command("folder", str(tmp_path / "b"))) == 0
    assert samples(tmp_path / "b") == samples(Path("complete"))


def wait_for_shards(folder: Path, count: int, commands: Run) -> None:
    while len(list(folder.glob("*.tar"))) < count and any(rank.is_alive() for rank in commands.ranks):
        time.sleep(0.005)


def test_repeatedly_killed_ranks_write_every_sample_exactly_once(workdir: Path, tmp_path: Path) -> None:
    """Ranks are killed at random moments; the samples equal those of an uninterrupted run."""
    rng, out, folder = random.Random(0), tmp_path / "out", make_run_folder(tmp_path, workdir)
    for attempt in range(3):
        argv = command("folder", str(out), "--shard_size", "3", "--num_workers", str(attempt % 2))
        commands = start(argv, folder, 2, option="--devices")
        wait_for_shards(out, len(list(out.glob("*.tar"))) + rng.randrange(1, 5), commands)
        assert all(rank.is_alive() for rank in commands.ranks)
        for victim in rng.sample([0, 1], 2):
            time.sleep(rng.random() * 0.05)
            os.kill(commands.ranks[victim].pid, signal.SIGKILL)
        assert commands.wait() == [-signal.SIGKILL] * 2
    num_finished = len(list(out.glob("*.tar")))
    assert 3 <= num_finished < 88
    (out / ".000003.another_host.0123abcd.tmp.tar").touch()
    commands = start(command("folder", str(out), "--shard_size", "3"), folder, 2, option="--devices")
    assert commands.wait() == [0, 0], commands.printed()
    assert samples(out) == samples(Path("complete"))
    assert not list(out.glob(".*.tmp*"))
    assert len(Manifest.load(out).shards) == 88


def make_run_folder(tmp_path: Path, workdir: Path) -> Path:
    """Creates a folder with links to the inputs, for the outputs of the ranks."""
    folder = tmp_path / "run"
    if not folder.exists():
        folder.mkdir()
        for name in ("tok", "folder"):
            (folder / name).symlink_to(workdir / name)
    return folder


def sleep_before_writing(rank: int) -> None:
    """Keeps rank 1 from writing any shard."""
    if rank == 1:
        import lightning_mvar.data.tokens.writing as module

        module.write_shard = lambda *_: time.sleep(600)


def test_a_finished_rank_waits_and_ends_at_once_if_another_dies(workdir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = make_run_folder(tmp_path, workdir)
    commands = start(command("folder", str(out)), folder, 2, sleep_before_writing, option="--devices")
    wait_for_shards(out, 6, commands)  # all shards of rank 0
    time.sleep(0.5)
    assert commands.ranks[0].is_alive()
    os.kill(commands.ranks[1].pid, signal.SIGKILL)
    assert commands.wait(20) == [1, -signal.SIGKILL]
    assert "rank 0 lost another rank" in commands.outputs[0].read_text()
    assert "run the same command again to continue" in commands.outputs[0].read_text()
    assert run(command("folder", str(out))) == 0
    assert samples(out) == samples(Path("complete"))


def use_fewer_images(rank: int) -> None:
    """Gives rank 1 a copy of the images with fewer classes."""
    if rank == 1:
        import lightning_mvar.commands.tokenize as module

        open_images = module.open_images
        module.open_images = lambda source, *rest, **options: open_images("fewer", *rest, **options)


def test_ranks_must_have_the_same_images(workdir: Path, tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path, workdir)
    (folder / "fewer").mkdir()
    for name in CLASSES[:200]:
        (folder / "fewer" / name).symlink_to(workdir / "folder" / name)
    commands = start(command("folder", str(tmp_path / "out")), folder, 2, use_fewer_images, option="--devices")
    assert commands.wait(60) == [1, 1]
    assert "rank 1 has different images, or a different tokenizer, than rank 0" in commands.printed()


def test_a_folder_keeps_its_order_of_images(workdir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Parquet files are read group by group: continuing from an image folder would repeat some images."""
    assert run(command("parquet", str(tmp_path / "out"))) == 0
    (tmp_path / "out/000003.tar").unlink()
    assert run(command("folder", str(tmp_path / "out"))) == 1
    assert "holds shards of other images" in capfd.readouterr().err
    assert run(command("parquet", str(tmp_path / "out"))) == 0
    assert samples(tmp_path / "out") == samples(Path("complete"))


def test_shards_and_images_are_kept_apart(workdir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("folder", tmp_path / "images/folder")
    for images, out in (("images", "images/_shards"), ("images", "images"), ("images/folder", "images")):
        assert run(command(str(tmp_path / images), str(tmp_path / out))) == 1
        assert "contains the other: choose an --out outside of the images" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["folder"]


def test_a_second_process_waits_for_the_lock_and_fails(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_mvar.io.locks.LOCK_TIMEOUT_S", 0.2)
    with lock_folder(tmp_path / "out", "tokenize"):
        assert run(command("folder", str(tmp_path / "out"))) == 1
    assert "another tokenize is running in" in capfd.readouterr().err
    assert run(command("train.tar", str(tmp_path / "out"))) == 0


def test_a_killed_decoding_process_is_reported_in_one_line(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "lightning_mvar.data.images.crops.decode_image", lambda data: os.kill(os.getpid(), signal.SIGKILL)
    )
    assert run(command("folder", str(tmp_path), "--num_workers", "1")) == 1
    assert "a process that decodes images was killed, perhaps for lack of memory" in capfd.readouterr().err


def test_bfloat16_gives_mostly_the_same_tokens(workdir: Path, tmp_path: Path) -> None:
    assert run(command("folder", str(tmp_path), "--precision", "bfloat16")) == 0
    exact, lower = samples(Path("complete")), samples(tmp_path)
    assert exact.keys() == lower.keys()
    pairs = [(np.frombuffer(exact[key][1], np.uint16), np.frombuffer(lower[key][1], np.uint16)) for key in exact]
    same = np.mean([np.mean(a[:1] == b[:1]) for a, b in pairs])  # only the coarsest scale: finer ones depend on it
    assert same > 0.9
    assert any((a != b).any() for a, b in pairs)
    assert run(command("folder", str(tmp_path))) == 1


def test_each_process_decodes_at_most_two_batches_ahead(workdir: Path) -> None:
    """Otherwise the memory would fill up if encoding is slow."""
    from lightning_mvar.data.images.examples import batch_loader, batched
    from lightning_mvar.data.images.sources import open_images

    images = open_images("folder", 8, "skip")
    requested: list[int] = []

    def batches():  # type: ignore[no-untyped-def]
        for batch in batched(range(len(images)), 10):
            requested.append(batch[0])
            yield batch

    loader = iter(batch_loader(images, batches(), num_workers=2))
    for _ in range(5):
        next(loader)
    time.sleep(1)
    assert len(requested) <= 5 + 2 * 2


def test_a_decompression_bomb_is_rejected_before_it_is_decoded(tmp_path: Path) -> None:
    image = Image.new("1", (20_000, 20_000))
    with pytest.raises(TooManyPixelsError):
        decode_image(encoded(image, "PNG"))
    assert torch.isfinite(to_tensor(decode_image(encoded(image.crop((0, 0, 3000, 2000)), "PNG")))).all()
