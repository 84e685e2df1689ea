"""Differences between two results of `evaluate` in the settings that affect their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import isclose
from pathlib import PurePath
from typing import Any, NamedTuple

from lightning_mvar.io.known_files import ADM_REFERENCES
from lightning_mvar.sampling.settings import SamplingSettings

Result = dict[str, Any]  # record of `evaluate`, or row of published scores

IDENTITY = ("reference_mean_norm", "reference_variance")
IDENTITY_TOLERANCE = 1e-3  # relative; above the rounding differences of other machines, below those of another crop
LOSSY = ("JPEG", "WEBP", "AVIF")
DEFAULTS = {field.name: field.default for field in fields(SamplingSettings)} | {"reject": "none"}
SETTINGS = {
    "guidance": "more guidance trades diversity for fidelity",
    "top_k": "sampling from fewer tokens trades diversity for fidelity",
    "top_p": "sampling from fewer tokens trades diversity for fidelity",
    "temperature": "lower temperatures trade diversity for fidelity",
}


@dataclass(frozen=True)
class Factor:
    """A setting or property that affects scores.

    Args:
        name: its name in reports.
        effect: how a difference in it affects scores.
        value: extracts it from a result, or returns None if the result does not state it. Default: the key `name`.
    """

    name: str
    effect: str
    value: Callable[[Result], Any] | None = None

    def value_in(self, result: Result) -> Any:
        """Returns the factor's value in a result, None if the result does not state it."""
        return result.get(self.name) if self.value is None else self.value(result)


class Difference(NamedTuple):
    """A factor that differs, with its value in each result."""

    factor: str
    first: Any
    second: Any
    effect: str


def joined(*names: str) -> Callable[[Result], str | None]:
    """Returns a function that joins the values of several keys of a result, or returns None if one is missing."""
    return lambda result: " x ".join(str(result[name]) for name in names) if set(names) <= set(result) else None


def extractor_arguments(result: Result) -> str | None:
    """Returns the arguments in a description such as "package.Features(scale=2.0)"."""
    description = result.get("extractor_class")
    return None if description is None else description.partition("(")[2].removesuffix(")")


def file_name(reference: str) -> str:
    """Returns the file name of a reference without its folder, also for a known reference such as `imagenet256`."""
    return PurePath(ADM_REFERENCES[reference].url if reference in ADM_REFERENCES else reference).name


def described_reference(result: Result) -> str | None:
    """Returns a reference's file name and variance, because two files of the same name may hold different images."""
    if "reference" not in result:
        return None
    variance = f" (variance {result[IDENTITY[1]]:.4g})" if IDENTITY[1] in result else ""
    return file_name(result["reference"]) + variance


def known_crop(result: Result) -> str | None:
    crop = result.get("crop")
    return None if crop in ("none", "unknown") else crop


def balance(result: Result) -> str | None:
    """Returns "balanced" if all classes have the same number of images, otherwise the range of their numbers."""
    if "fewest_per_class" in result:
        fewest, most = result["fewest_per_class"], result["most_per_class"]
        return "balanced" if fewest == most else f"{fewest} to {most} images per class"
    return "balanced" if "per_class" in result else result.get("balance")


def compression(result: Result) -> str | None:
    """Returns the lossy format of the pictures by their files or, failing that, by traces in their pixels."""
    if "file_format" not in result:
        return None
    lossy = [name for name in LOSSY if name in result["file_format"].split("+")]
    return "+".join(lossy) or result.get("compression_traces", "none")


def setting(name: str) -> Callable[[Result], Any]:
    """Returns a function that finds a sampling setting; only published results state settings at their default."""
    return lambda result: result.get(name, DEFAULTS[name] if "guidance" in result else None)


FEATURE_FACTORS = {"extractor", "extractor weights", "extractor arguments", "resize"}  # if they differ, so do units
INCOMPARABLE = "different features: the distances have different units and cannot be compared"
FACTORS = (  # in decreasing order of their usual effect
    Factor("extractor", INCOMPARABLE),
    Factor("extractor weights", INCOMPARABLE, lambda result: result.get("extractor_weights")),
    Factor("extractor arguments", INCOMPARABLE, extractor_arguments),
    Factor("resize", "the extractor sees different pixels of samples and reference"),
    Factor("reference", "distances to different images", described_reference),
    Factor("crop", "the reference shows different parts of its images, at a different sharpness", known_crop),
    Factor("image size", "the extractor sees a different level of detail", joined("height", "width")),
    Factor("num_samples", "the fewer samples, the higher the distance; recall and precision change too"),
    Factor("sampled_classes", "samples of some classes are compared with a reference of all"),
    Factor("balance of classes", "frequent classes count more than in the reference", balance),
    Factor("compression", "possibly lossy files: pixels may have changed, and the extractor notices", compression),
    Factor("sharpness", "blurred or resized samples are farther from sharp references"),
    Factor("rounding", "rounding down darkens images by half a gray level on average"),
    Factor("network_tokenizer", "a different decoder draws different images from the same tokens"),
    Factor("network", "different weights"),
    Factor("weights", "averaged (ema) weights usually score better than the last ones"),
    Factor("rejection", "keeping only the highest-scoring images trades diversity for fidelity", setting("reject")),
    Factor("keep", "keeping fewer images trades diversity for fidelity"),
    *(
        Factor(name, SETTINGS.get(name, "different samples"), setting(name))
        for name in DEFAULTS
        if name not in ("seed", "reject")
    ),
    Factor("sampling", "different samples"),
    Factor("dtype", "rounding changes a few tokens of nearly equal probability"),
    Factor("seed", "different samples of the same distribution: noise"),
)


def compare(first: Result, second: Result) -> tuple[list[Difference], list[str]]:
    """Returns the differences, in the order of `FACTORS`, and the factors that only one of the results states."""
    differences, unknown = [], []
    for factor in FACTORS:
        values = factor.value_in(first), factor.value_in(second)
        if (values[0] is None) != (values[1] is None):
            unknown.append(factor.name)
        elif differ(factor.name, first, second, *values):
            differences.append(Difference(factor.name, *values, factor.effect))
    return without_implied(differences, first, second), unknown


def differ(name: str, first: Result, second: Result, ours: Any, theirs: Any) -> bool:
    """Returns whether two values differ.

    References are compared by their statistics if both were made with the same extractor, otherwise by file name.
    """
    if name != "reference" or None in (ours, theirs):
        return ours != theirs
    same_extractor = first.get("extractor_weights") == second.get("extractor_weights") is not None
    if same_extractor and set(IDENTITY) <= first.keys() & second.keys():
        return not all(isclose(first[key], second[key], rel_tol=IDENTITY_TOLERANCE) for key in IDENTITY)
    return file_name(first["reference"]) != file_name(second["reference"])


def without_implied(differences: list[Difference], first: Result, second: Result) -> list[Difference]:
    """Leaves out differences that follow from another one.

    A different crop changes a reference's statistics, a different extractor has different weights, JPEG changes the
    sharpness, and the weights of one network are the same under two names.
    """
    names = {difference.factor for difference in differences}
    implied = {"extractor weights", "extractor arguments"} if "extractor" in names else set[str]()
    if {"crop", "reference"} <= names and file_name(first["reference"]) == file_name(second["reference"]):
        implied.add("reference")
    if first.get("network") == second.get("network") is not None:
        implied.add("weights")
    implied |= {"sharpness"} if "compression" in names else set()
    return [difference for difference in differences if difference.factor not in implied]
