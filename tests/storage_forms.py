"""Writes one tree of pictures, CLASS/NAME, in every storage form that `--images` takes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import ipc, parquet

Files = dict[str, bytes]  # content by CLASS/NAME
CLASS_NAMES = ["ant", "golden eagle", "golden retriever"]


def make_files(per_class: int = 3, side: int = 10) -> Files:
    rng = np.random.default_rng(0)
    files = {}
    for name in CLASS_NAMES:
        for i in range(per_class):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
            files[f"{name}/{name.replace(' ', '_')}_{i}.png"] = file.getvalue()
    return files


def label_of(key: str) -> int:
    return CLASS_NAMES.index(key.split("/")[0])


def stem_of(key: str) -> str:
    return key.split("/")[1].removesuffix(".png")


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def write_folder(root: Path, files: Files) -> str:
    for key, data in files.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    return str(root)


def write_zst(root: Path, files: Files) -> str:
    write_tar(root / "plain.tar", files.items())
    with pa.CompressedOutputStream(str(root / "a.tar.zst"), "zstd") as file:
        file.write((root / "plain.tar").read_bytes())
    return str(root / "a.tar.zst")


def write_samples(root: Path, files: Files, suffix: str, label: Callable[[str], bytes]) -> str:
    """Writes a WebDataset shard with a label file next to each image."""
    rows = [
        row for key, d in files.items() for row in ((f"{stem_of(key)}.png", d), (stem_of(key) + suffix, label(key)))
    ]
    return write_tar(root / "shard-0000.tar", rows)


def write_table(path: Path, columns: dict[str, pa.Array], features: dict[str, object] | None = None) -> str:
    metadata = {} if features is None else {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


def structs(files: Files, swapped: bool = False, large: bool = False) -> pa.Array:
    fields = [("bytes", pa.large_binary() if large else pa.binary()), ("path", pa.string())]
    rows = [{"bytes": data, "path": key.split("/")[1]} for key, data in files.items()]
    return pa.array(rows, pa.struct(fields[::-1] if swapped else fields))


def write_paths(root: Path, files: Files) -> str:
    write_folder(root / "pictures", files)
    names = [f"pictures/{key}" for key in files]
    return write_table(root / "a.parquet", {"file_name": pa.array(names), "label": pa.array(class_names_of(files))})


def class_names_of(files: Files) -> list[str]:
    return [key.split("/")[0] for key in files]


FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASS_NAMES}}


def write_forms(root: Path, files: Files) -> dict[str, list[str]]:
    """Returns the options of each form."""
    (root / "names.txt").write_text("\n".join(CLASS_NAMES))
    (root / "labels.txt").write_text("\n".join(f"{key.split('/')[1]} {key.split('/')[0]}" for key in files))
    by_name = {key.split("/")[1]: data for key, data in files.items()}
    numbers, words = [label_of(key) for key in files], class_names_of(files)
    names, labels = ["--class_names", str(root / "names.txt")], ["--labels", str(root / "labels.txt")]
    keys = pa.array([stem_of(key) for key in files])
    raw = pa.array(list(files.values()), pa.binary())

    def write_number(key: str) -> bytes:
        return str(label_of(key)).encode()

    def write_json(key: str) -> bytes:
        return json.dumps({"key": stem_of(key), "label": key.split("/")[0]}).encode()

    def table(name: str, columns: dict[str, pa.Array], with_features: bool = False) -> str:
        return write_table(root / name, columns, FEATURES if with_features else None)

    table("hub/data/train-00000-of-00001.parquet", {"image": structs(files), "label": pa.array(words)})
    table("disk/data-00000-of-00001.arrow", {"image": structs(files), "label": pa.array(numbers)}, True)
    return {
        "folder": [write_folder(root / "folder", files)],
        "tar": [write_tar(root / "a.tar", files.items())],
        "tar.gz": [write_tar(root / "gz/a.tar.gz", files.items(), "w:gz")],
        "WebDataset": [write_samples(root / "wds", files, ".cls", write_number), *names],
        "WebDataset json": [write_samples(root / "wds_json", files, ".json", write_json)],
        "Parquet struct": [table("struct.parquet", {"image": structs(files), "label": pa.array(numbers)}, True)],
        "Parquet jpg+cls": [table("columns.parquet", {"__key__": keys, "png": raw, "cls": pa.array(numbers)}), *names],
        "flat with labels": [write_folder(root / "flat", by_name), *labels],
        # further forms
        "tar.xz": [write_tar(root / "xz/a.tar.xz", files.items(), "w:xz")],
        "tar.zst": [write_zst(root / "zst", files)],
        "flat tar with labels": [write_tar(root / "flat.tar", by_name.items()), *labels],
        "WebDataset with words": [write_samples(root / "words", files, ".cls", lambda key: key.split("/")[0].encode())],
        "Parquet with names": [table("names.parquet", {"image": structs(files), "label": pa.array(words)})],
        "Parquet with categories": [
            table("categories.parquet", {"image": structs(files), "label": pa.array(words).dictionary_encode()})
        ],
        "Parquet large_binary": [table("l.parquet", {"image": structs(files, large=True), "label": pa.array(words)})],
        "Parquet swapped": [table("s.parquet", {"label": pa.array(words), "image": structs(files, swapped=True)})],
        "Parquet of paths": [write_paths(root / "paths", files)],
        "Hub repository": [str(root / "hub")],
        "save_to_disk": [str(root / "disk")],
    }
