"""Class names and labels: those of the training images, or ImageNet's 1,000."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, cached_property
from importlib.resources import files
from numbers import Integral

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import path_component

UNCONDITIONAL = "unconditional"
MAX_DIGITS = 18  # of a class number
WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)  # of a class in a mix
MAX_SUGGESTIONS = 8  # maximum number of names in a message


@cache
def imagenet_classes() -> dict[str, list[str]]:
    """Returns the names of each class by WordNet id, in label order, the usual name first (ILSVRC 2012)."""
    text = (files("lightning_mvar.data") / "imagenet_classes.tsv").read_text()
    rows = [line.split("\t") for line in text.splitlines()]
    return {synset: names.split(", ") for synset, names in rows}


class Classes:
    """Names and labels of a network's classes.

    A network of 1,000 classes gets ImageNet's names if its classes have no names (published checkpoints) or are WordNet
    ids (ImageNet's folders).

    Args:
        names: names of the classes, in label order; empty if unknown.
        count: number of classes.
    """

    def __init__(self, names: Sequence[str], count: int) -> None:
        self.count = count
        self.aliases = [[name] for name in names] or [[str(label)] for label in range(count)]
        imagenet = imagenet_classes()
        if count == len(imagenet) and list(names) in ([], list(imagenet)):
            self.aliases = [[*synonyms, synset] for synset, synonyms in imagenet.items()]
        self.labels: dict[str, list[int]] = defaultdict(list)  # by name; a few names belong to several classes
        for label, aliases in enumerate(self.aliases):
            for alias in aliases:
                self.labels[normalized(alias)].append(label)
            if len(aliases) > 2:  # all names of an ImageNet class together, as in lists of its labels
                self.labels[normalized(", ".join(aliases[:-1]))].append(label)

    def name(self, label: int) -> str:
        """Returns the usual name of a label in [0, count]; `count` is unconditional."""
        return UNCONDITIONAL if label == self.count else self.aliases[label][0]

    def folder(self, label: int) -> str:
        """Returns the folder name for images of a label in [0, count]: the class name, or the WordNet id for ImageNet.

        Names may come from untrusted files: each becomes one path component, and no two classes share a folder.
        """
        return self.folders[label]

    @cached_property
    def folders(self) -> list[str]:
        used = {UNCONDITIONAL: UNCONDITIONAL}  # folder by case-folded name, as some file systems ignore case
        for label, aliases in enumerate(self.aliases):
            folder = path_component(aliases[-1])
            while folder.casefold() in used:
                folder += f"_{label}"
            used[folder.casefold()] = folder
        return [*used.values()][1:] + [UNCONDITIONAL]

    def label(self, query: str | int) -> int:
        """Returns the label of a name, ignoring case, or of a number; `count` for "unconditional".

        A string is looked up as a name first: if classes are named 1 to 10, "1" is the class of that name, whereas the
        integer 1 is label 1. Integers may be numpy's.

        Raises:
            InputError: if no class matches, or several do; the message lists candidates.
        """
        if isinstance(query, bool) or not isinstance(query, str | Integral):
            raise InputError(f"a class is a name or a whole number, got {query!r}")
        labels = self.labels.get(normalized(query), []) if isinstance(query, str) else []
        if len(labels) == 1:
            return labels[0]
        if labels:
            raise InputError(f"{len(labels)} classes are called {query!r}: {self.describe(labels)}; use the number")
        if normalized(str(query)) == UNCONDITIONAL:
            return self.count
        is_number = isinstance(query, Integral) or (query.strip().isdecimal() and len(query) <= MAX_DIGITS)
        number = int(query) if is_number else -1
        if 0 <= number < self.count:
            return number
        shown = repr(query) if isinstance(query, str) else str(query)
        raise InputError(f"there is no class {shown:.100}; {self.suggest(str(query))}")

    def weights(self, query: str | int) -> dict[int, float]:
        """Returns the weight of each label in a mix of classes, NAME:WEIGHT+NAME:WEIGHT; of a single class, 1.

        Weights are divided by their sum.

        Raises:
            InputError: if no class matches, or a weight is not a positive number.
        """
        if not isinstance(query, str) or ":" not in query or normalized(query) in self.labels:
            return {self.label(query): 1.0}
        weights: dict[int, float] = defaultdict(float)
        for part in query.split("+"):
            name, _, number = part.rpartition(":")
            weight = float(number) if WEIGHT.fullmatch(number.strip()) else 0.0
            if not 0 < weight < math.inf:
                raise InputError(f"{query:.100} is not a mix of classes such as 3:0.5+8:0.5: {part:.100} has no weight")
            weights[self.label(name)] += weight
        total = sum(weights.values())
        return {label: weight / total for label, weight in weights.items()}

    def describe_weights(self, weights: Mapping[int, float]) -> str:
        """Returns the name of a class, or the mix as `weights` reads it."""
        if len(weights) == 1:
            return self.name(*weights)
        return "+".join(f"{self.name(label)}:{weight:g}" for label, weight in weights.items())

    def split(self, text: str) -> list[str]:
        """Splits comma-separated names or numbers; a name may contain commas: the longest reading counts."""
        parts, names, begin = text.split(","), list[str](), 0
        longest = 1 + max(name.count(",") for name in self.labels)
        while begin < len(parts):
            ends = range(min(begin + longest, len(parts)), begin + 1, -1)
            end = next((end for end in ends if normalized(",".join(parts[begin:end])) in self.labels), begin + 1)
            names.append(",".join(parts[begin:end]))
            begin = end
        return names

    def suggest(self, query: str) -> str:
        """Returns a hint for an unknown class: names that contain it or differ by a few letters, or the valid range."""
        part = normalized(query)
        similar = [i for i, names in enumerate(self.aliases) if any(part in normalized(name) for name in names)]
        if not similar:
            nearest = get_close_matches(part, self.labels, cutoff=0.75)
            similar = [*dict.fromkeys(label for name in nearest for label in self.labels[name])]
        numbers = f"use numbers 0 to {self.count - 1} or {UNCONDITIONAL!r}"
        if similar and part:
            return f"perhaps {self.describe(similar)}? Or {numbers}"
        names = [self.name(label) for label in range(min(self.count, MAX_SUGGESTIONS))]
        if names == [*map(str, range(len(names)))]:
            return numbers
        return f"{numbers}, or names ({', '.join(names)}{', ...' if len(names) < self.count else ''})"

    def describe(self, labels: Iterable[int]) -> str:
        """Formats labels with their names, at most `MAX_SUGGESTIONS` of them."""
        chosen = [*labels]
        shown = [f"{label} ({', '.join(self.aliases[label])})" for label in chosen[:MAX_SUGGESTIONS]]
        return "; ".join(shown) + ("; ..." if len(chosen) > MAX_SUGGESTIONS else "")


def select_classes(classes: str | None, names: Classes) -> list[dict[int, float]]:
    """Returns comma-separated classes and mixes of classes as weights by label; all classes if `classes` is None."""
    if classes is None:
        return [{label: 1.0} for label in range(names.count)]
    try:
        return [names.weights(name) for name in names.split(classes)]
    except InputError as error:
        raise InputError(f"--classes: {error}") from error


def normalized(name: str) -> str:
    """Returns a name as it is compared: without case, and with blanks only between words and after commas."""
    return ", ".join(part.strip() for part in name.lower().split(",")).replace("_", " ")
