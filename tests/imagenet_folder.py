"""A small ImageNet: its 1,000 classes, a few pictures of each, odd kinds of file among them, stored in every way."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_mvar.data.builtin.photos import FILES, read_photo
from lightning_mvar.data.classes import imagenet_classes

CLASSES = list(imagenet_classes())
SIDE = 24


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rotated(image: Image.Image) -> bytes:
    """As a camera stores a picture taken upright: turned, and a note that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def sixteen_bit(image: Image.Image) -> bytes:
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


def half_clear(image: Image.Image) -> bytes:
    alpha = Image.new("L", image.size)
    alpha.paste(255, (0, 0, image.width // 2, image.height))
    return encoded(Image.merge("RGBA", (*image.split(), alpha)), "PNG")


def bomb(image: Image.Image) -> bytes:
    """A small file of 400 million pixels."""
    return encoded(Image.new("1", (20_000, 20_000)), "PNG")


ODD: dict[str, Callable[[Image.Image], bytes]] = {  # what can be decoded, by file name
    "cmyk.jpg": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "grey.jpg": lambda image: encoded(image.convert("L"), "JPEG"),
    "palette.png": lambda image: encoded(image.convert("P"), "PNG"),
    "sixteen_bit.png": sixteen_bit,
    "half_clear.png": half_clear,
    "rotated.jpg": rotated,
    "tiny.png": lambda image: encoded(image.crop((0, 0, 1, 1)), "PNG"),
    "thin.png": lambda image: encoded(image.resize((1, 3000)), "PNG"),
    "modern.webp": lambda image: encoded(image, "WEBP"),
    "png_in_truth.jpg": lambda image: encoded(image, "PNG"),
}
BROKEN: dict[str, Callable[[Image.Image], bytes]] = {
    "truncated.jpg": lambda image: encoded(image, "JPEG")[:-200],
    "empty.jpg": lambda image: b"",
    "text.jpg": lambda image: b"<html>not found</html>",
    "bomb.png": bomb,
}


def pictures(per_class: int, seed: int = 0) -> dict[str, bytes]:
    """CLASS/NAME and content of every file: crops of the embedded photos; odd ones in the first classes."""
    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(read_photo(file)) for file in FILES.values()]
    files = {}

    def crop(label: int) -> Image.Image:
        photo = photos[label % len(photos)]
        left, top = rng.integers(photo.width - SIDE - 8), rng.integers(photo.height - SIDE)
        return photo.crop((left, top, left + SIDE + 8, top + SIDE))

    for label, name in enumerate(CLASSES):
        for i in range(per_class):
            files[f"{name}/{name}_{i}.jpg"] = encoded(crop(label), "JPEG")
    for label, (name, make) in enumerate((ODD | BROKEN).items()):
        files[f"{CLASSES[label]}/{CLASSES[label]}_{name}"] = make(crop(label))
    return files


def write_folder(files: dict[str, bytes], root: Path) -> Path:
    for key, data in files.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    return root


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_tar_of_tars(files: dict[str, bytes], path: Path) -> Path:
    """As ILSVRC2012_img_train.tar."""
    with tarfile.open(path, "w") as outer:
        for name in dict.fromkeys(key.split("/")[0] for key in files):
            inside = io.BytesIO()
            with tarfile.open(fileobj=inside, mode="w") as inner:
                for key, data in files.items():
                    if key.startswith(f"{name}/"):
                        add(inner, key.split("/")[1], data)
            add(outer, f"{name}.tar", inside.getvalue())
    return path


def write_tar_of_folders(files: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for key, data in files.items():
            add(archive, f"./imagenet/train/{key}", data)
    return path


def write_webdataset(files: dict[str, bytes], root: Path, shards: int = 4, seed: int = 1) -> Path:
    """In random order; classes as numbers."""
    root.mkdir()
    order = np.random.default_rng(seed).permutation(len(files))
    keys = [list(files)[i] for i in order]
    for shard in range(shards):
        with tarfile.open(root / f"train-{shard:04d}.tar", "w") as archive:
            for key in keys[shard::shards]:
                add(archive, key.split("/")[1], files[key])
                number = CLASSES.index(key.split("/")[0])
                add(archive, key.split("/")[1].split(".")[0] + ".cls", str(number).encode())
    return root


def write_parquet(files: dict[str, bytes], root: Path, shards: int = 3, seed: int = 2) -> Path:
    """As `datasets` writes it, in random order, with the names of the classes."""
    import json

    import pyarrow as pa
    from pyarrow import parquet

    root.mkdir()
    order = np.random.default_rng(seed).permutation(len(files))
    keys = [list(files)[i] for i in order]
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"image": image, "label": pa.int64()}, metadata=about)
    for shard in range(shards):
        mine = keys[shard::shards]
        rows = {
            "image": [{"bytes": files[key], "path": key.split("/")[1]} for key in mine],
            "label": [CLASSES.index(key.split("/")[0]) for key in mine],
        }
        path = root / f"train-{shard:05d}-of-{shards:05d}.parquet"
        parquet.write_table(pa.table(rows, schema), path, row_group_size=100)
    return root
