"""Protocols of published evaluations for resizing and cropping real images; scores with different ones do not compare.

| protocol | resizing | origin |
|---|---|---|
| var | shorter side to 1.125 times the crop, or by another margin, Lanczos | VAR's training images |
| adm | halved by box averaging while both sides stay at least twice the crop, then bicubic | ADM's `center_crop_arr` |
| torchvision-bilinear, torchvision-bicubic | shorter side to the crop | `Resize` and `CenterCrop` on PIL images |

Each then crops the center. Pillow's filters are antialiased. For an oblong crop, "shorter side" is the side that
limits the scale: the resized image just covers the crop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from PIL import Image
from PIL.Image import Resampling

from lightning_mvar.errors import InputError

CropProtocol = Literal["var", "adm", "torchvision-bilinear", "torchvision-bicubic"]
CROP_PROTOCOLS: tuple[str, ...] = get_args(CropProtocol)
NOT_CROPPED = "none"  # for embedded images, which have one size
UNKNOWN_CROP = "unknown"  # for images or statistics written by another program

MARGIN = 1.125  # of `var`, in the papers
MAX_MARGIN = 4.0
OTHER_MARGIN = re.compile(r"var-(\d\.\d{1,16})")  # as `Resizing.__str__` writes it

Size = tuple[int, int]  # (width, height), as in Pillow


@dataclass(frozen=True)
class Resizing:
    """Resizing of images before they are cropped. `str` gives its name in results and statistics.

    Args:
        protocol: see the module docstring.
        margin: ratio of the resized shorter side to the crop, for `var` only; 1 cuts nothing off square images.

    Raises:
        InputError: if the margin is out of range or the protocol has none.
    """

    protocol: CropProtocol = "var"
    margin: float = MARGIN

    def __post_init__(self) -> None:
        if not 1 <= self.margin <= MAX_MARGIN:
            raise InputError(f"margin {self.margin} is out of range: use 1 (no margin) to {MAX_MARGIN:g}")
        if self.protocol != "var" and self.margin != MARGIN:
            raise InputError(f"crop {self.protocol} has no margin: leave out margin {self.margin}, or use crop var")

    def __str__(self) -> str:
        return self.protocol if self.margin == MARGIN else f"{self.protocol}-{float(self.margin)}"

    @property
    def settings(self) -> str:
        """The options that select it, for messages."""
        return f"crop {self.protocol}" + (f" and margin {self.margin}" if self.protocol == "var" else "")

    @classmethod
    def parse(cls, name: str) -> Resizing | None:
        """Parses a name in results or statistics; None if it is unknown."""
        if name in CROP_PROTOCOLS:
            return cls(cast(CropProtocol, name))
        match = OTHER_MARGIN.fullmatch(name)
        return None if match is None else cls("var", float(match[1]))


DEFAULT_RESIZING = Resizing()


def resize_to_cover(image: Image.Image, crop: Size, resizing: Resizing) -> Image.Image:
    """Resizes an image according to a protocol; the result covers `crop` (width, height)."""
    protocol = resizing.protocol
    if protocol == "var":
        scale = max(round(resizing.margin * target) / side for target, side in zip(crop, image.size, strict=True))
        return image.resize(scaled_size(image.size, scale, crop), Resampling.LANCZOS)
    if protocol == "adm":
        while all(side >= 2 * target for target, side in zip(crop, image.size, strict=True)):
            image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
        scale = max(target / side for target, side in zip(crop, image.size, strict=True))
        return image.resize(scaled_size(image.size, scale, crop), Resampling.BICUBIC)
    target, side = max(zip(crop, image.size, strict=True), key=lambda pair: pair[0] / pair[1])
    width, height = (max(target * length // side, least) for length, least in zip(image.size, crop, strict=True))
    return image.resize(
        (width, height), Resampling.BILINEAR if protocol == "torchvision-bilinear" else Resampling.BICUBIC
    )


def scaled_size(size: Size, scale: float, least: Size) -> Size:
    """Returns a size times a scale, rounded, and at least `least` in both directions."""
    width, height = (max(round(side * scale), minimum) for side, minimum in zip(size, least, strict=True))
    return width, height


def center_offset(slack: int, protocol: CropProtocol) -> int:
    """Returns the offset of a centered crop, given by how many pixels the image is longer than the crop."""
    return round(slack / 2) if protocol.startswith("torchvision") else slack // 2
