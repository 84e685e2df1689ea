"""The classes of a network by name: those of its training images, and ImageNet's 1,000 in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from importlib.resources import files

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import path_component

UNCONDITIONAL = "unconditional"
SUGGESTIONS = 8  # names that a message lists


@cache
def imagenet_classes() -> dict[str, list[str]]:
    """WordNet's id of each class, in label order, and its names, the usual one first (ILSVRC 2012)."""
    text = (files("lightning_mvar.data") / "imagenet_classes.tsv").read_text()
    rows = [line.split("\t") for line in text.splitlines()]
    return {synset: names.split(", ") for synset, names in rows}


class Classes:
    """What the classes of a network may be called.

    A network of 1,000 classes that have no names, as a published one, or have WordNet's ids as ImageNet's folders, has
    ImageNet's.

    Args:
        names: of the classes, in label order; empty where they are unknown.
        count: of classes.
    """

    def __init__(self, names: Sequence[str], count: int) -> None:
        self.count = count
        self.aliases = [[name] for name in names] or [[str(label)] for label in range(count)]
        imagenet = imagenet_classes()
        if count == len(imagenet) and list(names) in ([], list(imagenet)):
            self.aliases = [[*words, synset] for synset, words in imagenet.items()]
        self.labels: dict[str, list[int]] = defaultdict(list)  # of each name; a few words name several classes
        for label, aliases in enumerate(self.aliases):
            for alias in aliases:
                self.labels[plain(alias)].append(label)

    def name(self, label: int) -> str:
        """The usual name of a label in [0, count]; `count` is unconditional."""
        return UNCONDITIONAL if label == self.count else self.aliases[label][0]

    def folder(self, label: int) -> str:
        """Name of the folder for images of a label in [0, count]: the class's own, or its WordNet id for ImageNet.

        Names come from files of others: each becomes one path component, and no two classes share one.
        """
        return self.folders[label]

    @cached_property
    def folders(self) -> list[str]:
        taken = {UNCONDITIONAL: UNCONDITIONAL}  # name, ignoring case as some file systems do: folder
        for aliases in self.aliases:
            folder = path_component(aliases[-1])
            while folder.casefold() in taken:
                folder += "_"
            taken[folder.casefold()] = folder
        return [*taken.values()][1:] + [UNCONDITIONAL]

    def label(self, wanted: str | int) -> int:
        """The label of a name, in any case, or of a number; `count` for "unconditional".

        A word is a name first: of folders called 1 ... 10, "1" is the one called so, whereas the number 1 is label 1.

        Raises:
            InputError: if there is no such class, or several go by the name; with the candidates.
        """
        if isinstance(wanted, int) and 0 <= wanted < self.count:
            return wanted
        found = [] if isinstance(wanted, int) else self.labels.get(plain(wanted), [])
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{len(found)} classes are called {wanted!r}: {self.list(found)}; use the number")
        if not isinstance(wanted, int) and wanted.strip().isdecimal() and int(wanted) < self.count:
            return int(wanted)
        if plain(str(wanted)) == UNCONDITIONAL:
            return self.count
        raise InputError(f"there is no class {wanted!r}; {self.suggest(str(wanted))}")

    def suggest(self, wanted: str) -> str:
        """What to use instead of a name that is none."""
        near = [i for i, names in enumerate(self.aliases) if any(plain(wanted) in plain(name) for name in names)]
        numbers = f"use numbers 0 to {self.count - 1} or {UNCONDITIONAL!r}"
        if near and plain(wanted):
            return f"perhaps {self.list(near)}? Or {numbers}"
        names = [self.name(label) for label in range(min(self.count, SUGGESTIONS))]
        if names == [*map(str, range(len(names)))]:
            return numbers
        return f"{numbers}, or names ({', '.join(names)}{', ...' if len(names) < self.count else ''})"

    def list(self, labels: Iterable[int]) -> str:
        """Some labels with their names."""
        chosen = [*labels]
        named = [f"{label} ({', '.join(self.aliases[label])})" for label in chosen[:SUGGESTIONS]]
        return "; ".join(named) + ("; ..." if len(chosen) > SUGGESTIONS else "")


def plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")
