"""`sample`: sets of samples drawn by one or two processes, interrupted, resumed, refused; rejection sampling."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Brightness, tiny_network
from PIL import Image
from processes import start

from lightning_mvar import Tokenizer, generate
from lightning_mvar.checkpoints import load_trained, save_folder
from lightning_mvar.cli import run
from lightning_mvar.data.images.names import visible
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.sampling.grids import to_uint8
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.readers import open_samples
from lightning_mvar.sampling.sampler import Drawing

SAMPLE = ["sample", "--ckpt_path", "model", "--per_class", "2", "--batch_size", "3", "--guidance", "0.5"]


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Path:
    """Working directory with a network of ten classes in `model`."""
    save_folder(tmp_path / "model", tokenizer, tiny_network())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(target: Path) -> dict[str, np.ndarray]:
    if target.suffix == ".npz":
        with np.load(target) as arrays:
            return {name: arrays[name] for name in arrays if name != "about"}
    return {str(path.relative_to(target)): np.asarray(Image.open(path)) for path in target.rglob("*.png")}


def assert_same(ours: Path, theirs: Path) -> None:
    """Asserts that pixels differ by 1 at most: rounding may depend on the batch size."""
    actual, expected = contents(ours), contents(theirs)
    assert actual.keys() == expected.keys()
    assert all(np.abs(actual[name].astype(int) - expected[name]).max() <= 1 for name in expected)


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_an_interrupted_set_is_completed_and_equals_an_uninterrupted_one(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    uninterrupted = ["--out", f"complete{Path(name).suffix}", "--grid", "complete.png"]
    assert run([*SAMPLE, *uninterrupted]) == 0
    drawn: list[int] = []

    draw = Drawing.draw

    def draw_until_interrupted(self: Drawing, labels: torch.Tensor, numbers: list[int]) -> np.ndarray:
        if interrupts and len(drawn) >= 6:
            raise KeyboardInterrupt
        drawn.extend(numbers)
        return draw(self, labels, numbers)

    monkeypatch.setattr(Drawing, "draw", draw_until_interrupted)
    options, interrupts = ["--out", name, "--grid", "grid.png"], True
    assert run([*SAMPLE, *options]) == 130
    assert not Path("set.npz").exists()
    interrupts = False
    assert run([*SAMPLE, *options]) == 0
    assert len(drawn) == 20
    assert run([*SAMPLE, *options]) == 0  # complete: nothing to draw
    assert len(drawn) == 20
    assert_same(Path(name), Path(uninterrupted[1]))
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in ("grid.png", "complete.png"))
    assert np.abs(ours - theirs).max() <= 1
    assert not Path("set.npz.partial").exists()


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_two_processes_share_the_work_and_resume_after_a_kill(workdir: Path, name: str) -> None:
    guided = {"set": ["--guidance_corrupt", "0.3", "--guidance_off_from", "3", "--temperature", "0.9"], "set.npz": []}
    command = [*SAMPLE, *guided[name], "--per_class", "20", "--device", "cpu", "--out"]
    assert run([*command, f"one{Path(name).suffix}"]) == 0
    both = start([*command, name], workdir, devices=2, option="--devices")
    unfinished = workdir / ("set.npz.partial" if name.endswith("npz") else name)
    for _ in range(600):
        if len([*unfinished.rglob("*.npz"), *unfinished.rglob("*.png")]) > 4:
            break
        time.sleep(0.05)
    both.send(signal.SIGKILL)
    assert not (workdir / "set.npz").exists()
    files = visible([*unfinished.rglob("*.npz"), *unfinished.rglob("*.png")])
    kept = {path: path.stat().st_mtime_ns for path in files}
    assert kept
    if name == "set":
        again = start([*command, name], workdir, devices=2, option="--devices")
        assert again.wait() == [0, 0], again.printed()
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    else:
        again = start([*command, name], workdir)  # on another number of devices
        assert again.wait() == [0], again.printed()
    assert_same(workdir / name, workdir / f"one{Path(name).suffix}")
    assert not [*workdir.rglob("*.tmp.*")]


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_files_that_a_killed_process_was_writing_are_ignored(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They are truncated or complete, and their names start with a dot."""
    command = [*SAMPLE, "--out", name, "--grid", "grid.png"]
    with monkeypatch.context() as patch:
        patch.setattr(Drawing, "draw", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(command) == 130
    folder, suffix = workdir / (f"{name}.partial" if name.endswith("npz") else name), "npz" if "npz" in name else "png"
    (folder / "0").mkdir(exist_ok=True)
    for parent in (folder, folder / "0"):
        (parent / f".000000.77.tmp.{suffix}").write_bytes(b"truncated")
        Image.new("RGB", (8, 8)).save(parent / ".000001.77.tmp.png")
    assert run(command) == 0
    assert len(open_samples(name)) == 20
    assert run(["sample", *SAMPLE[1:], "--out", f"complete{Path(name).suffix}", "--grid", "complete.png"]) == 0
    assert_same(Path(name), Path(f"complete{Path(name).suffix}"))
    assert Path("grid.png").read_bytes() == Path("complete.png").read_bytes()
    assert not [*workdir.rglob("*.tmp.*")]


def fail_on_rank_0(rank: int) -> None:
    from lightning_mvar.commands import sample

    if rank == 0:
        sample.load_trained = lambda *_: (_ for _ in ()).throw(InputError("rank 0 has no memory"))


def test_if_one_process_fails_the_other_ends_too(workdir: Path) -> None:
    both = start([*SAMPLE, "--out", "set", "--device", "cpu"], workdir, 2, fail_on_rank_0, option="--devices")
    assert both.wait(60) == [1, 1]
    assert "error: rank 0 has no memory" in both.printed()
    assert "error: rank 1 lost another rank" in both.printed()
    assert "run the same command again to continue" in both.printed()


def test_a_set_is_not_continued_with_other_settings(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("guidance1.5", "set.npz"):
        assert run([*SAMPLE, "--out", name]) == 0
        assert run([*SAMPLE, "--out", name]) == 0
        assert run([*SAMPLE, "--out", name, "--seed", "1"]) == 1
        message = capfd.readouterr().err
        assert (
            f"{name} holds images that were sampled with other settings (seed 0, not 1): choose another --out"
            in message
        )
    assert run([*SAMPLE, "--out", "other", "--top_p", "2"]) == 1
    assert not Path("other").exists()
    assert run([*SAMPLE, "--out", "model"]) == 1
    assert "model holds other files: choose another --out" in capfd.readouterr().err
    Path("folder.npz").mkdir()
    assert run([*SAMPLE, "--out", "folder.npz"]) == 1
    assert "--out folder.npz is a folder" in capfd.readouterr().err
    Path("guidance1.5/sampling.json").write_text("{")
    assert run([*SAMPLE, "--out", "guidance1.5"]) == 1
    assert "guidance1.5/sampling.json is damaged" in capfd.readouterr().err


@pytest.mark.parametrize("option", ["--grid", "--strip"])
@pytest.mark.parametrize("path", ["model", "model/network.safetensors", "./model/../model/config.json"])
def test_figures_do_not_replace_the_network(
    workdir: Path, option: str, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in Path("model").iterdir()}
    assert run(["sample", "--ckpt_path", "model", "--out", "a.npz", option, path]) == 1
    assert f"{option} {path} would overwrite the input --ckpt_path model" in capfd.readouterr().err
    assert {file: file.read_bytes() for file in Path("model").iterdir()} == before


def test_a_damaged_unfinished_set_is_reported(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "lightning_mvar.sampling.writers.NpzFile.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert run([*SAMPLE, "--out", "set.npz"]) == 130
    part = Path("set.npz.partial/00000003.npz")
    part.write_bytes(part.read_bytes()[:200])
    assert run([*SAMPLE, "--out", "set.npz"]) == 1
    assert "set.npz.partial/00000003.npz is damaged" in capfd.readouterr().err
    part.unlink()
    assert run([*SAMPLE, "--out", "set.npz"]) == 0


def test_classes_are_selected_by_name_number_or_unconditional(workdir: Path, tokenizer: Tokenizer) -> None:
    save_folder(workdir / "model", tokenizer, tiny_network(), ["zero", *map(str, range(1, 10))])
    assert run([*SAMPLE, "--out", "set.npz", "--classes", "zero, 3,unconditional"]) == 0
    assert contents(Path("set.npz"))["arr_1"].tolist() == [0, 0, 3, 3, 10, 10]
    assert run([*SAMPLE, "--out", "set", "--classes", "Zero,unconditional"]) == 0
    assert {path.parent.name for path in Path("set").rglob("*.png")} == {"zero", "unconditional"}
    unconditional = contents(Path("set.npz"))["arr_0"][4:]
    labels, generators = torch.tensor([10, 10]), image_keys(0, [4, 5])
    network, codes, _ = load_trained("model")
    expected = to_uint8(generate(network, codes, labels, guidance=0.0, generator=generators))
    assert np.abs(unconditional.astype(int) - expected).max() <= 1


def test_classes_are_mixed_guided_and_recorded(
    workdir: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    save_folder(workdir / "weaker", tokenizer, tiny_network(depth=1))
    guidance = ["--guidance", "[0,0.5,1,0]", "--guidance_network", "weaker", "--temperature", "0.9"]
    command = ["sample", "--ckpt_path", "model", "--classes", "3:0.7+8:0.3,5", *guidance]
    assert run([*command, "--out", "set.npz", "--grid", "grid.png"]) == 0
    weights = torch.zeros(2, 11)
    weights[0, 3], weights[0, 8], weights[1, 5] = 0.7, 0.3, 1
    settings = {"guidance": [0, 0.5, 1, 0], "guidance_network": "weaker", "temperature": 0.9}
    images = generate(tiny_network(), tokenizer, weights, generator=image_keys(0, range(2)), **settings)
    drawn = contents(Path("set.npz"))
    assert np.abs(drawn["arr_0"].astype(int) - to_uint8(images)).max() <= 1
    assert drawn["arr_1"].tolist() == [3, 5]
    metadata = open_samples("set.npz").metadata
    assert (metadata["classes"], metadata["guidance"]) == ("3:0.7+8:0.3,5", "0.0,0.5,1.0,0.0")
    assert (metadata["guidance_network"], metadata["temperature"]) == (fingerprint(tiny_network(depth=1)), 0.9)
    assert run([*command, "--out", "set.npz"]) == 0
    save_folder(workdir / "weaker", tokenizer, tiny_network(depth=1, qk_norm=False))
    assert run([*command, "--out", "set.npz"]) == 1
    assert "sampled with other settings (guidance_network" in capfd.readouterr().err
    assert run([*command, "--out", "set"]) == 0
    assert sorted(path.name for path in Path("set").iterdir() if path.is_dir()) == ["3:0.7+8:0.3", "5"]
    assert run([*command, "--tokens", "tokens"]) == 1
    assert "--tokens needs classes: remove mixes" in capfd.readouterr().err


def test_a_mix_does_not_rename_the_folders_of_classes(workdir: Path, tokenizer: Tokenizer) -> None:
    save_folder(workdir / "twins", tokenizer, tiny_network(), ["cat", "cat", *"cdefghij"])
    assert (
        run(["sample", "--ckpt_path", "twins", "--out", "set", "--classes", "0,1,c:0.5+d:0.5", "--per_class", "2"]) == 0
    )
    images = sorted(path.relative_to("set").as_posix() for path in Path("set").glob("*/*.png"))
    names = ["c:0.5+d:0.5/000004", "c:0.5+d:0.5/000005", "cat/000000", "cat/000001", "cat_1/000002", "cat_1/000003"]
    assert images == [f"{name}.png" for name in names]


def test_a_class_name_from_a_file_never_escapes_the_folder(workdir: Path, tokenizer: Tokenizer) -> None:
    names = ["../outside", str(workdir / "abs"), *map(str, range(8))]
    save_folder(workdir / "foreign", tokenizer, tiny_network(), names)
    before = {path.name for path in workdir.iterdir()}
    command = ["sample", "--ckpt_path", "foreign", "--out", "in/side", "--classes", "0,1,2"]
    assert run(command) == 0
    assert {path.name for path in workdir.iterdir()} - before == {"in"}
    assert len(list((workdir / "in/side").glob("*/*.png"))) == 3


def test_rejection_keeps_the_images_with_the_highest_confidence(workdir: Path) -> None:
    command = [*SAMPLE, "--out", "kept.npz", "--reject", "conftest.Brightness", "--keep", "0.4", "--classes", "9,4"]
    assert run(command) == 0
    network, codes, _ = load_trained("model")
    expected = []
    for group, label in enumerate((9, 4)):
        candidates = []
        for number in range(group * 5, group * 5 + 5):  # keep 0.4: two images of five
            labels = torch.tensor([label])
            image = to_uint8(generate(network, codes, labels, guidance=0.5, generator=image_keys(0, [number])))
            logits = Brightness()(torch.from_numpy(image).movedim(-1, 1) / 255)
            candidates.append((float(logits.softmax(dim=-1)[0, label]), number, image[0]))
        best = sorted(sorted(candidates, key=lambda c: -c[0])[:2], key=lambda c: c[1])
        expected += [image for _, _, image in best]
    kept = contents(Path("kept.npz"))
    assert kept["arr_1"].tolist() == [9, 9, 4, 4]
    assert np.abs(kept["arr_0"].astype(int) - np.stack(expected)).max() <= 1
    both = start([*command, "--out", "two", "--device", "cpu"], workdir, devices=2, option="--devices")
    assert both.wait() == [0, 0], both.printed()
    Path("two/4/000002.png").unlink()
    assert run([*command, "--out", "two"]) == 0  # one class is drawn again
    redrawn = np.stack([open_samples("two").pixels(number) for number in range(4)])
    assert np.abs(redrawn.astype(int) - np.stack(expected)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--reject", "conftest.Brightness", "--keep", "0"],
            "--keep must be in (0, 1], the share of the images that is kept, got 0",
        ),
        (
            ["--reject", "conftest.Brightness", "--classes", "unconditional"],
            "--reject needs classes: remove `unconditional` from --classes",
        ),
        (
            ["--reject", "conftest.Pixels"],
            "--reject Pixels returns (1, 4) for one image; a classifier of the net",
        ),
        (
            ["--reject", "torch.nn.Linear", "--reject.in_features", "2", "--reject.out_features", "10"],
            "--reject Linear does not classify images: it raises RuntimeError for one of 8 x 8",
        ),
        (["--reject", "conftest.Brightness", "--strip", "a.png"], "before --reject selects"),
        (["--keep", "0.3"], "--keep is the share of the images that --reject CLASSIFIER keeps: add --reject"),
        (["--per_class", "1000000000000"], "a set has at most 10,000,000 images"),
        (["--per_class", str(2**63), "--ckpt_path", "."], "a set has at most 10,000,000 images"),
        (["--grid", "a.jpg"], "--grid a.jpg must end in .png"),
        (["--animation", "a.mp4"], "--animation a.mp4 must end in .gif or .webp"),
        (["--classes", "3,3x"], "--classes: there is no class '3x'"),
        (["--devices", "0"], "--devices must be at least 1"),
        (["--devices", "2", "--device", "cuda:1"], "cuda:1"),
    ],
)
def test_invalid_options_are_refused(
    workdir: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run([*SAMPLE, "--out", "set", *options]) == 1
    assert message in capfd.readouterr().err
    assert not Path("set").exists()


def test_a_set_that_the_disk_cannot_hold_is_refused_before_drawing(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=7000))
    assert run([*SAMPLE, "--out", "a.npz"]) == 1  # 20 images of 192 bytes, twice, are 7,680 bytes
    assert (
        "drawing a.npz takes 0.0 GB, the batches and the file, but its disk has 0.0 GB free" in capfd.readouterr().err
    )
    assert not list(Path("a.npz.partial").glob("*.npz"))
    assert run([*SAMPLE, "--out", "a.npz", "--per_class", "1"]) == 1  # the folder belongs to the other set
    assert run([*SAMPLE, "--out", "b.npz", "--per_class", "1"]) == 0


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_the_last_frame_of_an_animation_is_the_grid(workdir: Path, suffix: str) -> None:
    options = ["--animation", f"scales{suffix}", "--grid", "grid.png", "--strip", "strip.png"]
    assert run([*SAMPLE, "--out", "set.npz", "--classes", "1,2,3", *options]) == 0
    with Image.open(f"scales{suffix}") as animation, Image.open("grid.png") as grid:
        assert animation.n_frames == 4  # one per scale
        assert animation.info["loop"] == 0
        animation.seek(3)
        last, expected = np.asarray(animation.convert("RGB")).astype(int), np.asarray(grid).astype(int)
    assert last.shape == expected.shape
    assert np.abs(last - expected).mean() < (8 if suffix == ".gif" else 1)  # GIF has 256 colors


def test_rows_of_the_grid_have_class_names(workdir: Path) -> None:
    assert run([*SAMPLE, "--out", "set.npz", "--classes", "1,2,3", "--grid", "grid.png"]) == 0
    grid = np.asarray(Image.open("grid.png"))
    names, images = grid[:, :-22], grid[:, -22:]  # two images of 8 and their padding
    assert names.shape[1] > 4
    for row in np.split(names[2:], 3):
        assert row.max() > 100
    with np.load("set.npz") as arrays:
        assert (images[2:10, 2:10] == arrays["arr_0"][0]).all()
