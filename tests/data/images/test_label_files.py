"""Label files mean what they say; what could mean two things is an error that names both."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mvar.data.classes import imagenet_classes
from lightning_mvar.data.images.sources import open_encoded
from lightning_mvar.errors import InputError

WNIDS = list(imagenet_classes())
NAMES = ("1.png", "2.png", "3.png")


def labels_of(
    root: Path, text: str, class_names: list[str] | None = None, names: tuple[str, ...] = NAMES
) -> tuple[list[str], dict[str, int]]:
    """Returns the class names, and the label of each image, of a flat folder with this label file."""
    folder = root / "flat"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    (root / "labels.txt").write_text(text)
    images = open_encoded(str(folder), str(root / "labels.txt"), class_names)
    return images.class_names, {Path(images.display_path(i)).name: int(images.labels[i]) for i in range(len(images))}


BIRDS = ["golden eagle", "golden retriever"]


@pytest.mark.parametrize(
    "text",
    [
        "1.png golden eagle\n2.png golden retriever\n3.png golden eagle",
        "1 golden eagle\n2 golden retriever\n3 golden eagle",
        "1.png,golden eagle\n2.png,golden retriever\n3.png,golden eagle",
        '"1.png", "golden eagle"\n"2.png", "golden retriever"\n"3.png", "golden eagle"',
        "1.png\tgolden eagle\n2.png\tgolden retriever\n3.png\tgolden eagle",
        "3.png golden eagle\n\n  1.png   golden eagle  \n2.png golden retriever\n",
        "filename,label\n1.png,golden eagle\n2.png,golden retriever\n3.png,golden eagle",
        "file_name\tclass\n1.png\tgolden eagle\n2.png\tgolden retriever\n3.png\tgolden eagle",
        "image label\n1.png golden eagle\n2.png golden retriever\n3.png golden eagle",
        "id,width,label\n1,10,golden eagle\n2,20,golden retriever\n3,30,golden eagle",
        "val/1.png golden eagle\nval/2.png golden retriever\nval/3.png golden eagle",
        "\ufeff1.png,golden eagle\n2.png,golden retriever\n3.png,golden eagle",
        "1.png,golden eagle\n1.png,golden eagle\n2.png,golden retriever\n3.png,golden eagle",
        "1.jpg golden eagle\n2.jpg golden retriever\n3.jpg golden eagle",
        "1.png;golden eagle\n2.png;golden retriever\n3.png;golden eagle",
        "golden eagle\ngolden retriever\ngolden eagle",
    ],
)
def test_names_keep_their_blanks_in_every_layout(text: str, tmp_path: Path) -> None:
    assert labels_of(tmp_path, text) == (BIRDS, {"1.png": 0, "2.png": 1, "3.png": 0})


def test_names_with_commas_blanks_and_dots(tmp_path: Path) -> None:
    names = ("my cat 1.png", "v1.2.png", "x.png")
    text = "my cat 1.png crane, bird\nv1.2.png dog\nx.png crane, bird"
    expected = (["crane, bird", "dog"], {"my cat 1.png": 0, "v1.2.png": 1, "x.png": 0})
    assert labels_of(tmp_path, text, names=names) == expected
    quoted = 'file,class\nmy cat 1.png,"crane, bird"\nv1.2,dog\nx,"crane, bird"'
    assert labels_of(tmp_path, quoted, names=names) == expected


def test_a_word_is_a_name_first_and_a_number_only_otherwise(tmp_path: Path) -> None:
    text = "1.png 1\n2.png 2\n3.png 3"
    assert labels_of(tmp_path, text, ["1", "2", "3"])[1] == {"1.png": 0, "2.png": 1, "3.png": 2}
    assert labels_of(tmp_path, "1.png 0\n2.png 2\n3.png 1", ["a", "b", "c"])[1] == {"1.png": 0, "2.png": 2, "3.png": 1}
    with pytest.raises(InputError, match="use either names or numbers"):
        labels_of(tmp_path, "1.png 0\n2.png 2\n3.png 1", ["1", "2", "3"])
    assert labels_of(tmp_path, "1.png 0\n2.png 2\n3.png 2")[0] == ["0", "1", "2"]


def test_a_prefix_of_a_label_file_keeps_its_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "0.png,ant\n00.png,ant\n1.png,bee\n2.png,cat\n3.png,bee"
    assert labels_of(tmp_path, text) == (["ant", "bee", "cat"], {"1.png": 1, "2.png": 2, "3.png": 1})
    assert "lines of the label file that name no image (2, such as '0.png')" in caplog.text


def test_annotations_of_tiny_imagenet(tmp_path: Path) -> None:
    text = "\n".join(f"{name}\t{WNIDS[i]}\t0\t0\t60\t60" for i, name in enumerate(NAMES))
    assert labels_of(tmp_path, text) == (WNIDS, {"1.png": 0, "2.png": 1, "3.png": 2})


@pytest.mark.parametrize(
    ("text", "class_names", "message"),
    [
        ("1.png 0.0\n2.png 11.0\n3.png 2.0", None, "the class 0.0, but class numbers are integers"),
        ("1.png ant\n1.png bee\n2.png ant\n3.png ant", None, "gives 1.png two classes, 'ant' and 'bee': keep one"),
        ("1.png -1\n2.png 0\n3.png 1", None, "has the class -1, but numbers count from 0: remove images without"),
        ("1.png -1\n2.png 0\n3.png 1", ["a", "b"], "has the class '-1', which is not one of the 2 classes"),
        ("1.png 1\n2.png 2\n3.png 3", None, "classes count from 0.*if they are names, list them with --class_names"),
        (
            "1.png 01\n2.png 1\n3.png 0",
            None,
            "has the classes '01' and '1': list the names",
        ),
        ("foto,soort\n1.png,ant\n2.png,bee\n3.png,ant", None, r"the first line .*\(foto, soort\) names no image"),
        ("name,label,class\n1.png,0,ant\n2.png,1,bee\n3.png,0,ant", None, r"several columns .*\(label, class\): keep"),
        ("1.png,x,ant\n2.png,y,bee\n3.png,z,ant", None, "has 3 columns and no header: keep two"),
        ("1.png ant\n2.png bee", None, "has no label for 1 image.* such as 3.png"),
        ("a ant\nb bee\nc cat", None, "has no label for 3 image.* such as 1.png"),
        ("ant,1.png\nbee,2.png\nant,3.png", None, "has the line 'ant,1.png': put the name before the class"),
        ("ant\nbee", None, "has 2 labels for the 3 images"),
        ("1.png 1000000000\n2.png 0\n3.png 1", None, "there is a class 1000000000; numbers go up to"),
        ("1.png a\0b\n2.png c\n3.png c", None, "has the class 'a.x00b': a class is a number or a printable name"),
        ("\n \n", None, "is empty"),
    ],
)
def test_ambiguous_files_are_refused(text: str, class_names: list[str] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        labels_of(tmp_path, text, class_names)
    assert "\n" not in str(error.value)


def test_two_images_of_one_name_need_their_suffix(tmp_path: Path) -> None:
    names = ("1.jpg", "1.png")
    assert labels_of(tmp_path, "1.jpg ant\n1.png bee", names=names)[1] == {"1.jpg": 0, "1.png": 1}
    with pytest.raises(InputError, match=r"1 may be several images of .*: add the suffix"):
        labels_of(tmp_path, "1 ant\n1.png bee", names=names)


def test_a_class_that_climbs_does_not_move_the_image(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "secret.png").write_bytes(b"x")
    for word in ("../..", "..", "/etc", "a/../../b", "~"):
        (tmp_path / "labels.csv").write_text(f"secret.png,{word}")
        images = open_encoded(str(folder), str(tmp_path / "labels.csv"), None)
        assert images.display_path(0) == str(folder / "secret.png"), word
        assert images.read(0) == b"x"
