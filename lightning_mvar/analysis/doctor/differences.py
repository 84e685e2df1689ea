"""Differences between two results of `evaluate` in what their scores depend on."""

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
IDENTITY_TOLERANCE = 1e-3  # relative; rounding on other machines is far below, another crop above
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
    """Something that scores depend on.

    Args:
        name: what reports call it.
        effect: what a difference does to scores.
        value: finds it in a result; None if the result does not say. By default the key `name`.
    """

    name: str
    effect: str
    value: Callable[[Result], Any] | None = None

    def value_in(self, result: Result) -> Any:
        return result.get(self.name) if self.value is None else self.value(result)


class Difference(NamedTuple):
    """A factor that differs, with its value in each result."""

    factor: str
    first: Any
    second: Any
    effect: str


def joined(*names: str) -> Callable[[Result], str | None]:
    """Returns a function that finds several keys of a result and joins their values."""
    return lambda result: " x ".join(str(result[name]) for name in names) if set(names) <= set(result) else None


def extractor_arguments(result: Result) -> str | None:
    """Returns the arguments in a description such as "package.Features(scale=2.0)"."""
    description = result.get("extractor_class")
    return None if description is None else description.partition("(")[2].removesuffix(")")


def file_name(reference: str) -> str:
    """Returns the file name of a reference, without its folder; also of one that `evaluate` downloads by name."""
    return PurePath(ADM_REFERENCES[reference].url if reference in ADM_REFERENCES else reference).name


def described_reference(result: Result) -> str | None:
    """Returns a reference's file name and variance: two of one name may hold other images."""
    if "reference" not in result:
        return None
    variance = f" (variance {result[IDENTITY[1]]:.4g})" if IDENTITY[1] in result else ""
    return file_name(result["reference"]) + variance


def known_crop(result: Result) -> str | None:
    crop = result.get("crop")
    return None if crop in ("none", "unknown") else crop


def balance(result: Result) -> str | None:
    """Returns whether all classes have equally many images, if not how many."""
    if "fewest_per_class" in result:
        fewest, most = result["fewest_per_class"], result["most_per_class"]
        return "balanced" if fewest == most else f"{fewest} to {most} images per class"
    return "balanced" if "per_class" in result else result.get("balance")


def compression(result: Result) -> str | None:
    """Returns the possibly lossy format of the pictures, if any: as their files say, or else their pixels."""
    if "file_format" not in result:
        return None
    lossy = [name for name in LOSSY if name in result["file_format"].split("+")]
    return "+".join(lossy) or result.get("compression_traces", "none")


def setting(name: str) -> Callable[[Result], Any]:
    """Returns a function that finds a sampling setting; results name those at their default only if published."""
    return lambda result: result.get(name, DEFAULTS[name] if "guidance" in result else None)


FEATURE_FACTORS = {"extractor", "extractor weights", "extractor arguments", "resize"}  # if they differ, so do units
INCOMPARABLE = "the features are others, so distances have other units and do not compare"
FACTORS = (  # those first that usually move scores most
    Factor("extractor", INCOMPARABLE),
    Factor("extractor weights", INCOMPARABLE, lambda result: result.get("extractor_weights")),
    Factor("extractor arguments", INCOMPARABLE, extractor_arguments),
    Factor("resize", "the extractor sees other pixels of samples and reference"),
    Factor("reference", "distances to other images", described_reference),
    Factor("crop", "the reference shows other parts of its images, at another sharpness", known_crop),
    Factor("image size", "the extractor sees other detail", joined("height", "width")),
    Factor("num_samples", "the fewer samples, the higher the distance; recall and precision change too"),
    Factor("sampled_classes", "a set without some classes is compared with a reference that has them"),
    Factor("balance of classes", "frequent classes count more than in the reference", balance),
    Factor("compression", "possibly lossy files: pixels may have changed, and the extractor notices", compression),
    Factor("sharpness", "blurred or resized samples are farther from sharp references"),
    Factor("rounding", "cutting off decimals darkens all images by half a level"),
    Factor("network_tokenizer", "other decoder: other images of the same tokens"),
    Factor("network", "other weights"),
    Factor("weights", "averaged (ema) weights usually score better than the last ones"),
    Factor("rejection", "keeping the surest images trades diversity for fidelity", setting("reject")),
    Factor("keep", "keeping fewer images trades diversity for fidelity"),
    *(
        Factor(name, SETTINGS.get(name, "other samples"), setting(name))
        for name in DEFAULTS
        if name not in ("seed", "reject")
    ),
    Factor("sampling", "other samples"),
    Factor("dtype", "a few tokens of nearly equal probability are chosen differently"),
    Factor("seed", "other samples of the same distribution: noise"),
)


def compare(first: Result, second: Result) -> tuple[list[Difference], list[str]]:
    """Returns what differs, in the order of `FACTORS`, and the factors that only one of the results states."""
    differences, unknown = [], []
    for factor in FACTORS:
        values = factor.value_in(first), factor.value_in(second)
        if (values[0] is None) != (values[1] is None):
            unknown.append(factor.name)
        elif differ(factor.name, first, second, *values):
            differences.append(Difference(factor.name, *values, factor.effect))
    return without_implied(differences, first, second), unknown


def differ(name: str, first: Result, second: Result, ours: Any, theirs: Any) -> bool:
    """Returns whether two values differ. References are compared by their statistics if their extractor is the same,
    otherwise by name."""
    if name != "reference" or None in (ours, theirs):
        return ours != theirs
    same_extractor = first.get("extractor_weights") == second.get("extractor_weights") is not None
    if same_extractor and set(IDENTITY) <= first.keys() & second.keys():
        return not all(isclose(first[key], second[key], rel_tol=IDENTITY_TOLERANCE) for key in IDENTITY)
    return file_name(first["reference"]) != file_name(second["reference"])


def without_implied(differences: list[Difference], first: Result, second: Result) -> list[Difference]:
    """Leaves out what another difference implies: another crop changes a reference's statistics, another extractor has
    other weights, JPEG changes the sharpness, and weights of the same network are the same under two names."""
    names = {difference.factor for difference in differences}
    implied = {"extractor weights", "extractor arguments"} if "extractor" in names else set[str]()
    if {"crop", "reference"} <= names and file_name(first["reference"]) == file_name(second["reference"]):
        implied.add("reference")
    if first.get("network") == second.get("network") is not None:
        implied.add("weights")
    implied |= {"sharpness"} if "compression" in names else set()
    return [difference for difference in differences if difference.factor not in implied]
