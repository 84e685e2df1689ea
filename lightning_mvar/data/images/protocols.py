"""Protocols by which published evaluations resize and crop real images; scores of different ones do not compare.

| protocol | resizing | origin |
|---|---|---|
| var | shorter side to 1.125 times the crop, Lanczos | VAR's training images |
| adm | halved by box averaging while both sides stay at least twice the crop, then bicubic | ADM's `center_crop_arr` |
| torchvision-bilinear, torchvision-bicubic | shorter side to the crop | `Resize` and `CenterCrop` on PIL images |

Each then crops the centre. Pillow's filters are antialiased. For an oblong crop, "shorter side" is the side that
limits the scale: the resized image just covers the crop.
"""

from __future__ import annotations

from typing import Literal, get_args

from PIL import Image
from PIL.Image import Resampling

CropProtocol = Literal["var", "adm", "torchvision-bilinear", "torchvision-bicubic"]
CROP_PROTOCOLS: tuple[str, ...] = get_args(CropProtocol)
NOT_CROPPED = "none"  # embedded images, which have one size
UNKNOWN_CROP = "unknown"  # images or statistics that another program wrote

RESIZE_MARGIN = 1.125  # of `var`: ratio of the resized shorter side to the crop

Size = tuple[int, int]  # (width, height), as in Pillow


def resize_to_cover(image: Image.Image, crop: Size, protocol: CropProtocol) -> Image.Image:
    """Resizes an image as a protocol prescribes; the result covers `crop` (width, height)."""
    if protocol == "var":
        scale = max(round(RESIZE_MARGIN * target) / side for target, side in zip(crop, image.size, strict=True))
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
    """Returns the rounded product of a size and a scale, at least `least` in both directions."""
    width, height = (max(round(side * scale), minimum) for side, minimum in zip(size, least, strict=True))
    return width, height


def centre_offset(slack: int, protocol: CropProtocol) -> int:
    """Returns the offset of a centred crop, given how many pixels the image is longer than the crop."""
    return round(slack / 2) if protocol.startswith("torchvision") else slack // 2
