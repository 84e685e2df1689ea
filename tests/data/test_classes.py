from pathlib import PurePosixPath

import numpy as np
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
    with pytest.raises(InputError, match=r"no class 'goldn retriver'; perhaps 207 \(golden retriever"):
        Classes([], 1000).label("goldn retriver")
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


def test_a_name_with_commas_is_one_class_if_there_is_one() -> None:
    classes = Classes(["palace, castle", "palace", "dog", "a,b,c", "a", "b,c"], 6)
    expected = {
        "palace, castle": [0],
        "Palace,Castle,dog": [0, 2],
        "dog,palace,dog": [2, 1, 2],
        "a,b,c,a,3": [3, 4, 3],
        "a,dog,b , c": [4, 2, 5],
        "1,unconditional": [1, 6],
    }
    assert {text: [classes.label(name) for name in classes.split(text)] for text in expected} == expected
    imagenet = Classes([], 1000)
    names = imagenet.split("tench, Tinca tinca,maillot, tank suit,n02099601,tench")
    assert [imagenet.label(name) for name in names] == [0, 639, 207, 0]
    for text in ("dog,", "dog,,a", "", "castle"):
        with pytest.raises(InputError, match="there is no class"):
            [classes.label(name) for name in classes.split(text)]


def test_numbers_of_other_types_are_labels_and_anything_else_is_refused() -> None:
    classes = Classes(["3", "dog"], 2)
    assert [classes.label(query) for query in (np.int64(1), np.uint8(1), np.str_("dog"))] == [1, 1, 1]
    for query in (True, np.True_, 1.0, None, b"dog", np.float32(1)):
        with pytest.raises(InputError, match="a class is a name or a whole number, got"):
            classes.label(query)  # type: ignore[arg-type]
    for query in (np.int64(2), 10**30, "9" * 5000):
        with pytest.raises(InputError, match="there is no class"):
            classes.label(query)


def test_a_mix_of_classes_has_weights_that_sum_to_one() -> None:
    classes = Classes(["one", "two", "a:b", "c+d"], 4)
    assert classes.weights("two") == classes.weights(1) == {1: 1.0}
    assert classes.weights("a:b") == {2: 1.0}  # a name
    assert classes.weights("one:0.5+two:1.5") == {0: 0.25, 1: 0.75}
    assert classes.weights("one:1+two:2+one:1") == {0: 0.5, 1: 0.5}
    assert classes.weights("unconditional:1+3:1") == {4: 0.5, 3: 0.5}
    assert classes.weights(classes.describe_weights({0: 0.25, 1: 0.75})) == {0: 0.25, 1: 0.75}
    assert classes.describe_weights({1: 1.0}) == "two"


@pytest.mark.parametrize(
    "query", ["one:+two:1", "one:0+two:1", "one:-1+two:2", "one:x+two:1", "one+two:1", "one:1e999"]
)
def test_a_mix_without_positive_weights_is_refused(query: str) -> None:
    with pytest.raises(InputError, match="is not a mix of classes such as"):
        Classes(["one", "two"], 2).weights(query)
