from pathlib import PurePosixPath

import pytest

from lightning_mvar.data.classes import Classes, imagenet_classes
from lightning_mvar.errors import InputError


def test_imagenet_has_a_thousand_classes_sorted_by_id() -> None:
    synsets = list(imagenet_classes())
    assert len(synsets) == 1000
    assert synsets == sorted(synsets)
    assert all(synset[0] == "n" and len(synset) == 9 and synset[1:].isdecimal() for synset in synsets)
    known = {0: "tench", 207: "golden retriever", 281: "tabby", 417: "balloon", 980: "volcano", 999: "toilet tissue"}
    assert {label: imagenet_classes()[synsets[label]][0] for label in known} == known


@pytest.mark.parametrize("names", [[], list(imagenet_classes())])
def test_imagenet_classes_are_found_by_number_id_and_name(names: list[str]) -> None:
    classes = Classes(names, 1000)
    for query in (207, "207", "golden retriever", "Golden_Retriever ", "n02099601"):
        assert classes.label(query) == 207
    assert classes.label("unconditional") == 1000
    assert classes.name(207) == "golden retriever"
    assert classes.name(1000) == "unconditional"


def test_an_ambiguous_name_lists_its_classes() -> None:
    with pytest.raises(InputError, match=r"2 classes are called 'crane': 134 \(crane, n02012849\); 517 \(crane, n031"):
        Classes([], 1000).label("crane")


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(InputError, match=r"no class 'retriever'; perhaps 205 \(flat-coated retriever, .*207 \(golden"):
        Classes([], 1000).label("retriever")
    with pytest.raises(
        InputError, match=r"no class 1000; use .* 0 to 999 or 'unconditional', or names \(tench, .*\.\.\.\)$"
    ):
        Classes([], 1000).label(1000)
    with pytest.raises(InputError, match=r"no class 'cat'; use numbers 0 to 9 or 'unconditional'$"):
        Classes([], 10).label("cat")
    with pytest.raises(InputError, match=r"no class -1; .* names \(dark, light\)$"):
        Classes(["dark", "light"], 2).label(-1)


def test_custom_classes_are_found_by_name_before_number() -> None:
    classes = Classes(["dark", "light", "0"], 3)
    assert [classes.label(query) for query in ("dark", "LIGHT", "0", "1")] == [0, 1, 2, 1]
    assert classes.name(1) == "light"
    folders = Classes(["1", "10", "2"], 3)
    assert [folders.label(query) for query in ("1", 1, "2", 2)] == [0, 1, 2, 2]
    thousand = Classes([str(i) for i in range(1000)], 1000)
    assert thousand.name(207) == "207"


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "..", ".", "", "~", "~root", "a/b", "a\\b", "x\0y", ".hidden", "-rf", "a\nb"]
)
def test_a_class_name_becomes_one_visible_path_component(name: str) -> None:
    folder = Classes([name, "other"], 2).folder(0)
    path = PurePosixPath(folder)
    assert path.parts == (folder,)
    assert folder not in ("", ".", "..", "other")
    assert folder[0] not in ".~-"
    assert folder.isprintable()


def test_classes_whose_names_collide_get_different_folders() -> None:
    names = ["a/b", "a_b", "A_B", "a_b_", "unconditional", "plain"]
    classes = Classes(names, len(names))
    folders = [classes.folder(label) for label in range(len(names) + 1)]
    assert max(len(folder.encode()) for folder in Classes(["界" * 300] * 30, 30).folders) < 255
    assert len({folder.casefold() for folder in folders}) == len(folders)
    assert folders[-2:] == ["plain", "unconditional"]
    assert Classes([], 1000).folder(207) == "n02099601"
