"""Writes a small ImageNet of 1,000 classes, including unusual and broken files, in each storage format."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_mvar.data.builtin.photos import PHOTO_FILES, read_photo
from lightning_mvar.data.classes import imagenet_classes

CLASSES = list(imagenet_classes())
SIDE = 24


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def rotated(image: Image.Image) -> bytes:
    """Stores an upright image as a camera does: rotated, with its orientation in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers rotate it by 90 degrees clockwise
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def sixteen_bit(image: Image.Image) -> bytes:
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


def half_transparent(image: Image.Image) -> bytes:
    alpha = Image.new("L", image.size)
    alpha.paste(255, (0, 0, image.width // 2, image.height))
    return encoded(Image.merge("RGBA", (*image.split(), alpha)), "PNG")


def decompression_bomb(image: Image.Image) -> bytes:
    """Encodes 400 million pixels in a small file."""
    return encoded(Image.new("1", (20_000, 20_000)), "PNG")


UNUSUAL: dict[str, Callable[[Image.Image], bytes]] = {  # decodable files by name
    "cmyk.jpg": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "gray.jpg": lambda image: encoded(image.convert("L"), "JPEG"),
    "palette.png": lambda image: encoded(image.convert("P"), "PNG"),
    "sixteen_bit.png": sixteen_bit,
    "half_transparent.png": half_transparent,
    "rotated.jpg": rotated,
    "tiny.png": lambda image: encoded(image.crop((0, 0, 1, 1)), "PNG"),
    "thin.png": lambda image: encoded(image.resize((1, 3000)), "PNG"),
    "modern.webp": lambda image: encoded(image, "WEBP"),
    "actually_png.jpg": lambda image: encoded(image, "PNG"),
}
BROKEN: dict[str, Callable[[Image.Image], bytes]] = {  # undecodable files by name
    "truncated.jpg": lambda image: encoded(image, "JPEG")[:-200],
    "empty.jpg": lambda image: b"",
    "text.jpg": lambda image: b"<html>not found</html>",
    "bomb.png": decompression_bomb,
}


def make_image_files(per_class: int, num_classes: int = len(CLASSES), seed: int = 0) -> dict[str, bytes]:
    """Returns file contents by CLASS/NAME: crops of the embedded photos; the first classes have unusual files too."""
    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(read_photo(file)) for file in PHOTO_FILES.values()]
    files = {}

    def crop(label: int) -> Image.Image:
        photo = photos[label % len(photos)]
        left, top = rng.integers(photo.width - SIDE - 8), rng.integers(photo.height - SIDE)
        return photo.crop((left, top, left + SIDE + 8, top + SIDE))

    for label, name in enumerate(CLASSES[:num_classes]):
        for i in range(per_class):
            files[f"{name}/{name}_{i}.jpg"] = encoded(crop(label), "JPEG")
    for label, (name, make) in enumerate((UNUSUAL | BROKEN).items()):
        files[f"{CLASSES[label]}/{CLASSES[label]}_{name}"] = make(crop(label))
    return files


def write_folder(files: dict[str, bytes], root: Path) -> Path:
    for key, data in files.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    return root


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_tar_of_tars(files: dict[str, bytes], path: Path) -> Path:
    """Writes one inner tar per class, as in ILSVRC2012_img_train.tar."""
    with tarfile.open(path, "w") as outer:
        for name in dict.fromkeys(key.split("/")[0] for key in files):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for key, data in files.items():
                    if key.startswith(f"{name}/"):
                        add_file(inner, key.split("/")[1], data)
            add_file(outer, f"{name}.tar", content.getvalue())
    return path


def write_tar_of_folders(files: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for key, data in files.items():
            add_file(archive, f"./imagenet/train/{key}", data)
    return path


def write_webdataset(files: dict[str, bytes], root: Path, shards: int = 4, seed: int = 1) -> Path:
    """Writes WebDataset shards in random order, with class numbers."""
    root.mkdir()
    order = np.random.default_rng(seed).permutation(len(files))
    keys = [list(files)[i] for i in order]
    for shard in range(shards):
        with tarfile.open(root / f"train-{shard:04d}.tar", "w") as archive:
            for key in keys[shard::shards]:
                add_file(archive, key.split("/")[1], files[key])
                number = CLASSES.index(key.split("/")[0])
                add_file(archive, key.split("/")[1].split(".")[0] + ".cls", str(number).encode())
    return root


def write_parquet(files: dict[str, bytes], root: Path, shards: int = 3, seed: int = 2) -> Path:
    """Writes Parquet files as Hugging Face's `datasets` does, in random order, with class names."""
    import json

    import pyarrow as pa
    from pyarrow import parquet

    root.mkdir()
    order = np.random.default_rng(seed).permutation(len(files))
    keys = [list(files)[i] for i in order]
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    names = list(dict.fromkeys(key.split("/")[0] for key in files))
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"image": image, "label": pa.int64()}, metadata=metadata)
    for shard in range(shards):
        shard_keys = keys[shard::shards]
        rows = {
            "image": [{"bytes": files[key], "path": key.split("/")[1]} for key in shard_keys],
            "label": [CLASSES.index(key.split("/")[0]) for key in shard_keys],
        }
        path = root / f"train-{shard:05d}-of-{shards:05d}.parquet"
        parquet.write_table(pa.table(rows, schema), path, row_group_size=100)
    return root
