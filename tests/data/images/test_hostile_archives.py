"""Archives and tables of unknown origin run no code, leave no folder and take no more memory than they can hold."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet
from storage_forms import structs, write_table, write_tar

from lightning_mvar.data.images import compressed
from lightning_mvar.data.images.decoding import UnusableFileError
from lightning_mvar.data.images.files import EncodedImages
from lightning_mvar.data.images.parquet_pages import COMPRESSED, DATA_PAGES, MAX_PAGES, decompressed_bytes, page_sizes
from lightning_mvar.data.images.sources import open_encoded
from lightning_mvar.errors import InputError

IMAGES = [("ant/0.png", b"ant 0"), ("ant/1.png", b"ant 1"), ("bee/0.png", b"bee 0")]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Returns the header of a member that claims a size of any sign."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, 0
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = size.to_bytes(12, "big", signed=True) if size < 0 else bytes([128]) + size.to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % sum(b"        ".join((block[:148], block[156:])))
    return bytes(block)


def plain(tmp_path: Path) -> bytes:
    return Path(write_tar(tmp_path / "plain.tar", IMAGES)).read_bytes()


def open_tar(path: Path, data: bytes) -> EncodedImages:
    path.write_bytes(data)
    return open_encoded(str(path), None, None)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [2**60, 2**40, -512, -(2**50)])
def test_a_claimed_size_is_not_allocated(kind: bytes, size: int, tmp_path: Path) -> None:
    tracemalloc.start()
    with pytest.raises(InputError, match="is not a tar archive, is compressed or is damaged"):
        open_tar(tmp_path / "a.tar", header("ant/9.png", size, kind) + plain(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_the_end_of_a_cut_archive_is_missed(tmp_path: Path) -> None:
    data = plain(tmp_path)
    for length in range(512, 3 * 1024 + 1, 512):  # before, between and within members, up to the end mark
        with pytest.raises(InputError, match=r"has no end|truncated|unexpected end"):
            open_tar(tmp_path / "a.tar", data[:length])
    assert len(open_tar(tmp_path / "a.tar", data[: 3 * 1024 + 512])) == 3


def test_joined_archives_are_read_to_the_end(tmp_path: Path) -> None:
    more = Path(write_tar(tmp_path / "more.tar", [("cat/5.png", b"cat")])).read_bytes()
    images = open_tar(tmp_path / "a.tar", plain(tmp_path) + more)
    assert [images.key(i) for i in range(4)] == ["ant/0.png", "ant/1.png", "bee/0.png", "cat/5.png"]
    assert images.read(3) == b"cat"


def test_links_in_an_archive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    links = [
        ("bee/hard.png", tarfile.LNKTYPE, "ant/0.png"),
        ("bee/soft.png", tarfile.SYMTYPE, "../ant/1.png"),
        ("bee/chain.png", tarfile.SYMTYPE, "soft.png"),
        ("bee/loop.png", tarfile.SYMTYPE, "loop.png"),
        ("bee/out.png", tarfile.SYMTYPE, "../../../etc/passwd"),
        ("bee/root.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("bee/folder", tarfile.SYMTYPE, "../ant"),
        ("bee/device.png", tarfile.CHRTYPE, ""),
        ("bee/pipe.png", tarfile.FIFOTYPE, ""),
    ]
    path = Path(write_tar(tmp_path / "a.tar", IMAGES))
    with tarfile.open(path, "a") as archive:
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    images = open_encoded(str(path), None, None)
    content = {images.key(i): images.read(i) for i in range(len(images))}
    assert content == dict(IMAGES) | {
        "bee/hard.png": b"ant 0",
        "bee/soft.png": b"ant 1",
        "bee/chain.png": b"ant 1",
    }
    assert "links to no file of the archive (6, such as" in caplog.text


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    block = header("ant/hole.png", 512, tarfile.GNUTYPE_SPARSE)
    with pytest.raises(InputError, match=r"ant/hole.png is stored as a sparse file: pack it without --sparse"):
        open_tar(tmp_path / "a.tar", block + b"x" * 512 + plain(tmp_path))


def test_names_that_climb_stay_keys(tmp_path: Path) -> None:
    members = [*IMAGES, ("../../x/0.png", b"climbs"), ("/abs/0.png", b"abs")]
    images = open_encoded(write_tar(tmp_path / "a.tar", members), None, None)
    assert images.class_names == ["abs", "ant", "bee"]


def test_a_shard_is_data(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    members = [("0.png", b"x"), ("0.cls", b"1"), ("0.pyd", pickle.dumps(Attack())), ("0.pth", pickle.dumps(Attack()))]
    images = open_encoded(write_tar(tmp_path / "a.tar", members), None, None)
    assert images.read(0) == b"x"
    with pytest.raises(InputError, match="is a number or a printable name"):
        open_encoded(write_tar(tmp_path / "b.tar", [("0.png", b"x"), ("0.cls", pickle.dumps(Attack()))]), None, None)
    assert not (tmp_path / "attacked").exists()


def test_a_large_member_is_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header("bee/large.png", 2**31))
        file.seek(2**31, os.SEEK_CUR)  # a hole
        file.write(plain(tmp_path))
    images = open_encoded(str(path), None, None)
    with pytest.raises(UnusableFileError, match="it has 2147483648 bytes, more than"):
        images.read([images.key(i) for i in range(4)].index("bee/large.png"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            b'{"label": 1, "class_name": "cat"}',
            r"several fields .*\(label, class_name\): choose one, such as",
        ),
        (b'{"label": [1]}', "no class in a .json"),
        (b'{"label": ' + b"[" * 100_000, "is not valid JSON"),
        (b'{"label": -1}', "has the class -1, but numbers count from 0"),
        (b'{"label": 99999999999}', "there is a class 99999999999"),
        (b'{"label": 1180591620717411303424}', "expected a number from 0 or a name"),
        (b'{"label": true}', "has the class True in label; expected"),
        (b"[1]", "it must be an object"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"x" * 2_000_000, "has 2000000 bytes, too many for a class"),
    ],
)
def test_labels_in_json_are_checked(label: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_encoded(write_tar(tmp_path / "a.tar", [("0.png", b"x"), ("0.json", label)]), None, None)
    assert "\n" not in str(error.value)


def test_other_fields_of_the_json_may_hold_anything(tmp_path: Path) -> None:
    """Shards of img2dataset hold scores, captions and hashes of any kind."""
    label = (
        rb'{"label": "cat", "similarity": NaN, "caption": "a\u0000b", "id": 1180591620717411303424, "exif": {"a": []}}'
    )
    images = open_encoded(write_tar(tmp_path / "a.tar", [("0.png", b"x"), ("0.json", label)]), None, None)
    assert images.class_names == ["cat"]


def test_the_choice_among_images_and_labels_of_a_sample(tmp_path: Path) -> None:
    label = json.dumps({"label": 1, "class_name": "cat"}).encode()
    path = write_tar(tmp_path / "a.tar", [("0.left.png", b"l"), ("0.right.png", b"r"), ("0.json", label)])
    with pytest.raises(InputError, match=r"several fields"):
        open_encoded(path, None, None)
    with pytest.raises(InputError, match=r"two images in one sample, 0.left.png and 0.right.png"):
        open_encoded(path, "label", None)
    images = open_encoded(path, "right.png,class_name", None)
    assert (images.class_names, images.read(0), len(images)) == (["cat"], b"r", 1)
    with pytest.raises(InputError, match="has no cls files next to its images: leave out --labels cls"):
        open_encoded(path, "left.png,cls", None)


def test_a_gzip_bomb_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "MAX_SMALL_BYTES", 2**22)
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(b"\0" * 2**24))
    with pytest.raises(InputError, match=r"bomb.tar.gz holds more than 5\d+ bytes, too many for images"):
        open_encoded(str(bomb), None, None, str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(gzip.compress(plain(tmp_path))[:100])
    with pytest.raises(InputError, match=r"cut.tar.gz is damaged"):
        open_encoded(str(cut), None, None, str(tmp_path / "cache"))


def test_a_changed_archive_is_decompressed_again(tmp_path: Path) -> None:
    for content in (b"one", b"another"):
        path = write_tar(tmp_path / "a.tar.gz", [*IMAGES, ("ant/7.png", content)], "w:gz")
        images = open_encoded(path, None, None, str(tmp_path / "cache"))
        assert images.read(2) == content


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.parquet", "a.arrow"])
def test_a_pipe_does_not_hang(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=r"does not exist .or is not a file"):
        open_encoded(str(tmp_path / name), None, None)
    os.mkfifo(tmp_path / "names.txt")
    flat = write_tar(tmp_path / "flat.tar", [("0.png", b"x")])
    with pytest.raises(InputError, match="does not exist"):
        open_encoded(flat, str(tmp_path / "names.txt"), None)


def test_many_headers_in_a_row_end(tmp_path: Path) -> None:
    names = header("x", 512, tarfile.GNUTYPE_LONGNAME) + b"y" * 512
    with pytest.raises(InputError, match="damaged"):
        open_tar(tmp_path / "a.tar", names * 3000 + plain(tmp_path))
    digits = header("x", 2**16, tarfile.XHDTYPE) + b"1" * 2**16
    with pytest.raises(InputError, match="damaged"):
        open_tar(tmp_path / "b.tar", digits + plain(tmp_path))


def write_parquet(path: Path, columns: dict[str, pa.Array], **options: object) -> str:
    parquet.write_table(pa.table(columns), path, **options)
    return str(path)


def test_paths_in_a_table_stay_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/0.png").write_bytes(b"0")
    os.symlink(tmp_path / "secret.png", tmp_path / "set/link.png")
    names = ["0.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "nowhere.png", "a\0b.png"]
    label = pa.array(["ant"] * len(names))
    as_paths = write_parquet(tmp_path / "set/paths.parquet", {"file_name": pa.array(names), "label": label})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": None, "path": name} for name in names], kind)
    as_structs = write_parquet(tmp_path / "set/structs.parquet", {"image": image, "label": label})
    for source in (as_paths, as_structs):
        images = open_encoded(source, None, None)
        results = []
        for i in range(len(images)):
            try:
                results.append(images.read(i).decode())
            except UnusableFileError as error:
                results.append("leaves" if "leaves the folder" in str(error) else "missing")
        assert sorted(results) == ["0", "leaves", "leaves", "leaves", "missing", "missing"], source


def test_a_repeated_value_takes_memory_once(tmp_path: Path) -> None:
    """10 MB in 2,000 rows: 20 GB if every row had its own."""
    rows = pa.array(np.zeros(2_000, np.int32))
    value = pa.DictionaryArray.from_arrays(rows, pa.array([b"x" * 10_000_000], pa.binary()))
    label = pa.DictionaryArray.from_arrays(rows, pa.array(["ant"]))
    options = {"compression": "zstd", "dictionary_pagesize_limit": 2**30}
    source = write_parquet(tmp_path / "a.parquet", {"image": value, "label": label}, **options)
    before = pa.total_allocated_bytes()
    images = open_encoded(source, None, None)
    assert len(images.read(1_999)) == 10_000_000
    assert pa.total_allocated_bytes() - before < 100_000_000


def test_long_names_and_many_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pa.array([b"x"] * 2, pa.binary())
    source = write_parquet(tmp_path / "a.parquet", {"image": image, "label": pa.array(["ant", "b" * 10_000])})
    with pytest.raises(InputError, match="a name or path has 10000 bytes, more than 4096"):
        open_encoded(source, None, None)
    constant = {"image": pa.array([b"x"] * 200_000, pa.binary()), "label": pa.array([0] * 200_000)}
    with pytest.raises(InputError, match="it claims 200000 rows in"):
        open_encoded(write_parquet(tmp_path / "b.parquet", constant), None, None)


def varint(value: int) -> bytes:
    """Returns a number as the footer of a Parquet file holds it: zigzag, 7 bits per byte, here always in 4 bytes."""
    groups = [2 * value >> shift & 127 for shift in range(0, 28, 7)]
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


def test_a_row_group_larger_than_its_index_claims_is_not_read_whole(tmp_path: Path) -> None:
    columns = {"image": pa.array([bytes(30_000)] * 1024, pa.binary()), "label": pa.array(["ant"] * 1024)}
    source = Path(write_parquet(tmp_path / "a.parquet", columns, compression="zstd", use_dictionary=False))
    data, size = source.read_bytes(), parquet.ParquetFile(source).metadata.row_group(0).total_byte_size
    claimed, false = varint(size), varint(8)
    assert data.count(claimed) == 1
    source.write_bytes(data.replace(claimed, false))
    images = open_encoded(str(source), None, None)
    with pytest.raises(InputError, match=r"damaged in row group 0 .*its rows have more than"):
        images.read(0)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_claim_what_pyarrow_finds_in_the_index(compression: str, version: str, tmp_path: Path) -> None:
    values = structs({f"ant/{i}.png": bytes([i % 256]) * 900 for i in range(2000)})
    label, path = pa.array(["ant", "bee"] * 1000), tmp_path / "a.parquet"
    options = {"compression": compression, "data_page_version": version, "data_page_size": 2**14}
    write_parquet(path, {"image": values, "label": label}, row_group_size=1500, **options)
    metadata = parquet.ParquetFile(path).metadata
    for group in range(2):
        chunks = [metadata.row_group(group).column(i) for i in range(3)]
        for columns, part in ((["image.bytes"], chunks[:1]), (["image"], chunks[:2]), (["label", "image"], chunks)):
            with_headers = sum(chunk.total_uncompressed_size for chunk in part)
            assert 0.9 * with_headers < decompressed_bytes(path, group, columns) < with_headers


@pytest.mark.parametrize("kind", [b"\x19", b"\x1c"])  # a list of one list, a struct that begins with a struct
def test_page_headers_that_are_nested_deeply_are_damaged(kind: bytes) -> None:
    data = b"\x19" + kind * 5000
    with pytest.raises(ValueError, match="nested too deeply"):
        list(page_sizes(io.BytesIO(data), {DATA_PAGES: 0, COMPRESSED: len(data)}))


def test_pages_are_not_counted_for_ever() -> None:
    data = bytes([0x25, 2, 0x15, 0, 0]) * (MAX_PAGES + 1)  # field 2 is 1 byte, field 3 is 0 bytes, end of the header
    sizes = page_sizes(io.BytesIO(data), {DATA_PAGES: 0, COMPRESSED: len(data)})
    with pytest.raises(ValueError, match=f"more than {MAX_PAGES} pages"):
        sum(sizes)


def test_a_page_that_grows_is_refused_before_it_is_decompressed(tmp_path: Path) -> None:
    columns = {"image": pa.array([bytes(10**8)], pa.binary()), "label": pa.array(["ant"])}
    images = open_encoded(write_parquet(tmp_path / "a.parquet", columns, compression="zstd"), None, None)
    del columns
    before = pa.total_allocated_bytes()
    with pytest.raises(InputError, match=r"damaged in row group 0 .*the limit given by index and file size"):
        images.read(0)
    assert pa.total_allocated_bytes() - before < 1_000_000


@pytest.mark.parametrize("new", [ipc.new_file, ipc.new_stream])
@pytest.mark.parametrize("dictionary", [False, True])
def test_an_arrow_file_that_grows_is_refused_before_it_is_decompressed(
    new: Callable[..., ipc.RecordBatchStreamWriter], dictionary: bool, tmp_path: Path
) -> None:
    for pixels, compression in ((bytes(20_000_000), "zstd"), (np.random.default_rng(0).bytes(2_000_000), "lz4")):
        image = pa.array([pixels, pixels], pa.binary())
        table = pa.table({"image": image.dictionary_encode() if dictionary else image, "label": ["ant", "bee"]})
        with new(tmp_path / "a.arrow", table.schema, options=ipc.IpcWriteOptions(compression=compression)) as file:
            file.write_table(table)
        before = pa.total_allocated_bytes()
        if compression == "lz4":
            assert open_encoded(str(tmp_path / "a.arrow"), None, None).read(1) == pixels
            continue
        with pytest.raises(InputError, match=r"it claims [24]000\d+ decompressed bytes"):
            open_encoded(str(tmp_path / "a.arrow"), None, None)
        assert pa.total_allocated_bytes() - before < 1_000_000


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_damaged_tables_are_told_in_one_line(suffix: str, tmp_path: Path) -> None:
    files = {f"ant/{i}.png": bytes([i]) * 100 for i in range(20)}
    path = Path(write_table(tmp_path / f"a.{suffix}", {"image": structs(files), "label": pa.array(["ant"] * 20)}))
    data, rng, messages = path.read_bytes(), np.random.default_rng(0), list[str]()
    for _ in range(150):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(0, len(data), 3)] = rng.choice([0, 1, 127, 255], 3)
        path.write_bytes(damaged.tobytes() if rng.random() < 0.8 else data[: rng.integers(len(data))])
        try:
            images = open_encoded(str(path), None, None)
            assert all(isinstance(images.read(i), bytes) for i in range(len(images)))
        except (InputError, UnusableFileError) as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def test_several_columns_are_a_choice(tmp_path: Path) -> None:
    image = pa.array([b"x", b"y"], pa.binary())
    columns = {"image": image, "mask": image, "label": pa.array([0, 1]), "class_name": pa.array(["ant", "bee"])}
    source = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError, match=r"columns of images \(image, mask\): choose one, such as"):
        open_encoded(source, None, None)
    with pytest.raises(InputError, match=r"columns of images"):
        open_encoded(source, "label", None)
    assert open_encoded(source, "image,class_name", None).class_names == ["ant", "bee"]
    features = {name: {"_type": "ClassLabel", "names": ["a", "b"]} for name in ("fine_label", "coarse_label")}
    two = {"image": image, "fine_label": pa.array([0, 1]), "coarse_label": pa.array([1, 0])}
    source = write_table(tmp_path / "b.parquet", two, features)
    with pytest.raises(InputError, match=r"columns of classes \(fine_label, coarse_label\): choose one"):
        open_encoded(source, None, None)
    assert open_encoded(source, "coarse_label", None).labels.tolist() == [0, 1]  # sorted by class


@pytest.mark.parametrize("metadata", ["[]", "{", '{"info": 1}', '{"info": {"features": [1]}}', '{"a": "\\ud800"}'])
def test_metadata_of_other_types_are_ignored_or_told(metadata: str, tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([b"x", b"y"], pa.binary()), "label": pa.array([0, 1])})
    parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "c.parquet")
    if metadata.startswith('{"info"'):
        assert len(open_encoded(str(tmp_path / "c.parquet"), None, None)) == 2
    else:
        with pytest.raises(InputError, match=r"the metadata of .*c.parquet"):
            open_encoded(str(tmp_path / "c.parquet"), None, None)


def test_images_of_one_name_in_a_table_stay_apart(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": bytes([i]), "path": "image.png"} for i in range(3)], kind)
    images = open_encoded(
        write_parquet(tmp_path / "a.parquet", {"image": image, "label": pa.array([0, 0, 0])}), None, None
    )
    assert [images.read(i) for i in range(3)] == [b"\0", b"\1", b"\2"]
    assert images.key(0) == "0/a-0-0-image.png"
