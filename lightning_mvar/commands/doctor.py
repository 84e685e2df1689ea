"""`doctor`: explains why two scores differ."""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_mvar.analysis.doctor.differences import Difference, Result, compare
from lightning_mvar.analysis.doctor.estimates import MAX_SAMPLES, Estimate, ScoredSet, estimate_all
from lightning_mvar.analysis.doctor.published import published_result
from lightning_mvar.analysis.doctor.traces import add_traces
from lightning_mvar.cli.arguments import refuse_overwriting
from lightning_mvar.cli.tables import Record, format_value, print_rows
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.io.json_files import Mismatch, convert, read_json, write_json
from lightning_mvar.metrics.accuracy import classifier_for
from lightning_mvar.metrics.evaluator import FULL_NAMES
from lightning_mvar.metrics.reference import open_reference
from lightning_mvar.metrics.summary import prepare
from lightning_mvar.sampling.readers import open_samples

DISTANCE = "frechet_distance"
SAME_DISTANCE = 1e-3  # relative difference of a repeated measurement that rounding explains
MIN_HALVES = 20  # least number of samples for comparing two halves of them
REQUIRED = (DISTANCE, "num_samples", "samples", "reference")
TYPES: dict[str, Any] = {  # of the keys of a result that are more than compared
    **dict.fromkeys(("samples", "reference", "extractor", "extractor_class", "extractor_weights", "crop"), str),
    **dict.fromkeys(("file_format", "compression_traces"), str),
    **dict.fromkeys(("num_samples", "height", "width", "fewest_per_class", "most_per_class"), int),
    **dict.fromkeys(("reference_mean_norm", "reference_variance", "sharpness"), float),
    **dict.fromkeys((f"{name}{bound}" for name in FULL_NAMES.values() for bound in ("", "_low", "_high")), float),
}
PUBLISHED_NOTES = ("source", "evaluator", "sampling", "note")


def doctor(
    results: tuple[str, ...],
    *,
    published: str | None = None,
    extractor: nn.Module | None = None,
    cache: str = "outputs/statistics",
    max_images: int = 5000,
    json: str | None = None,
    device: str = "auto",
) -> None:
    """Explains why two results of `evaluate --json` differ: lists their differences, usually most important first, and
    estimates how much of the change in Frechet distance each explains.

    `doctor A.json B.json`, or `doctor A.json --published var-d16`. If samples and references are still where the
    results say, it also inspects their pixels and scores them again: with fewer samples, other class proportions,
    another crop or reference, or resized or JPEG-compressed samples. That extracts the features of up to 50,000 samples
    per set again. The estimates need not add up.

    Args:
        results: one or two files of `evaluate --json`. FILE#2 is the third result in a file that holds several.
        published: compare with a published score instead of a second result: var-d16, m-var-d24, dit-xl-2, ...; an
            unknown name lists all. Settings that a paper does not state are not compared.
        extractor: the extractor of the results, to score again; not needed for the classifiers of digits and photos.
        cache: folder that caches the statistics of real images and the classifiers of digits and photos.
        max_images: largest number of samples to resize or compress for an estimate.
        json: write the report to this JSON file, one record per score, difference and note.
        device: auto, cpu, cuda or cuda:N.
    """
    if len(results) != (2 if published is None else 1):
        raise InputError("name two results of `evaluate --json`, or one and --published NAME, such as var-d16")
    require_in("[2, inf)", "--", max_images=max_images)
    refuse_overwriting({"--json": json}, {f"result {i}": split_number(name)[0] for i, name in enumerate(results, 1)})
    pair = read_result(results[0]), read_result(results[1]) if published is None else published_result(published)
    target = choose_device(device)
    opened = [
        open_set(name, result, extractor, cache, max_images, target)
        for name, result in zip(("first", "second"), pair, strict=True)
    ]
    first, second = (found if isinstance(found, ScoredSet) else None for found in opened)
    add_traces(*pair, [None if scored is None else scored.samples for scored in (first, second)])
    differences, unknown = compare(*pair)
    found_estimates = [*estimate_all(differences, first, second, pair)]
    estimates = {found.factor: found for found in found_estimates if isinstance(found, Estimate)}
    notes = [found for found in found_estimates if isinstance(found, str)]
    notes += [note for found in opened for note in ([found] if isinstance(found, str) else check_set(found))]
    notes += overlapping_intervals(*pair)
    if published is not None:
        notes += [f"{key}: {pair[1][key]}" for key in PUBLISHED_NOTES if key in pair[1]]
        notes.append(f"not checked against the source: {', '.join(pair[1]['unverified'])}")
    report = make_report(*pair, differences, unknown, estimates, notes)
    print_report(report)
    if json is not None:
        write_json(json, report)


def read_result(name: str) -> Result:
    """Reads a result of `evaluate --json`; `FILE#2` is the third result of a file.

    Raises:
        InputError: if the file is missing, has no such result, or holds several and `name` has no number; or if a value
            has the wrong type.
    """
    path, number = split_number(name)
    records = read_json(Path(path), list[dict[str, Any]])
    if not records:
        raise InputError(f"{path} holds no results: write them with `evaluate --json {path}`")
    if number == "" and len(records) != 1:
        raise InputError(f"{path} holds {len(records)} results; name one of them, such as {path}#0")
    if int(number or 0) >= len(records):
        raise InputError(f"{path} holds {len(records)} results; the last is {path}#{len(records) - 1}")
    result = records[int(number or 0)]
    if missing := [key for key in REQUIRED if key not in result]:
        raise InputError(f"{name} is not a result of `evaluate --json`: it has no {missing[0]}")
    try:
        for key in filter(TYPES.get, result):
            convert(result[key], TYPES[key], key)
    except Mismatch as error:
        raise InputError(f"{name}: {error}; evaluate again with --json {path}") from error
    require_in("[1, inf)", f"{name}: ", **{key: result[key] for key in ("height", "width") if key in result})
    return result


def split_number(name: str) -> tuple[str, str]:
    """Splits `FILE#2` into file and number; the number is "" if there is none."""
    path, _, number = name.rpartition("#")
    return (path, number) if number.isdecimal() else (name, "")


def open_set(
    name: str, result: Result, extractor: nn.Module | None, cache: str, max_images: int, device: torch.device
) -> ScoredSet | str:
    """Opens the samples of a result and their extractor, or returns the reason why they cannot be scored again."""
    if "samples" not in result:
        return "the samples of the published score are not available"
    if not Path(result["samples"]).expanduser().exists():
        return f"the samples of {name} are not scored again: {result['samples']} does not exist"
    try:
        reference, samples = open_reference(result["reference"]), open_samples(result["samples"])
    except InputError as error:
        return f"the samples of {name} are not scored again: {error}"
    if reference.kind == "shards":
        return f"the samples of {name} are not scored again: {result['reference']} holds token shards"
    if len(samples) > MAX_SAMPLES:
        return f"the samples of {name} are not scored again: there are {len(samples)}, more than {MAX_SAMPLES}"
    extractor = classifier_for(reference, cache) if extractor is None else extractor
    if extractor is None or fingerprint(extractor) != result.get("extractor_weights"):
        expected = f"{result.get('extractor')} with weights {result.get('extractor_weights')}"
        return f"the samples of {name} are not scored again: that needs --extractor {expected}"
    prepare(extractor, device)
    return ScoredSet(name, result, samples, extractor, Path(cache), max_images)


def check_set(scored: ScoredSet) -> Iterator[str]:
    """Yields notes on a distance that differs from the recorded one, and on the noise between halves of the samples."""
    recorded = scored.result[DISTANCE]
    if not isclose(scored.distance, recorded, rel_tol=SAME_DISTANCE, abs_tol=1e-6):
        yield (
            f"the samples of {scored.name} are now at distance {scored.distance:.4g}, not {recorded:.4g}: the samples, "
            f"the reference or the crop have changed since"
        )
    if len(scored.samples) >= MIN_HALVES:
        halves = [scored.distance_of(scored.by_class[begin::2]) for begin in (0, 1)]
        yield f"noise: two halves of {scored.name} are at distances {halves[0]:.4g} and {halves[1]:.4g}"


def overlapping_intervals(first: Result, second: Result) -> list[str]:
    """Returns a note on the scores whose confidence intervals overlap, if `evaluate --interval` recorded them."""
    low, high = (
        {name: [r[f"{name}_{end}"] for r in (first, second) if f"{name}_{end}" in r] for name in FULL_NAMES.values()}
        for end in ("low", "high")
    )
    names = [name for name in low if len(low[name]) == 2 and max(low[name]) <= min(high[name])]
    return [f"the confidence intervals overlap for {', '.join(names)}"] if names else []


def make_report(
    first: Result,
    second: Result,
    differences: list[Difference],
    unknown: list[str],
    estimates: dict[str, Estimate],
    notes: list[str],
) -> list[Record]:
    """Returns one flat record per score, difference and note.

    `explains` is the estimated contribution to the second distance minus the first.
    """
    report: list[Record] = [
        {
            "kind": "score",
            "name": name,
            "first": first[name],
            "second": second[name],
            "change": second[name] - first[name],
        }
        for name in FULL_NAMES.values()
        if name in first and name in second
    ]
    for difference in differences:
        record = {"kind": "difference", **difference._asdict()}
        if difference.factor in estimates:
            record |= {"estimate": estimates[difference.factor].text, "explains": estimates[difference.factor].explains}
        report.append(record)
    if unknown:
        notes = [f"stated by only one of the results: {', '.join(unknown)}", *notes]
    return [*report, *({"kind": "note", "text": note} for note in notes)]


def print_report(report: list[Record]) -> None:
    """Prints the scores, the differences with their estimates, and the notes."""
    scores, differences, notes = (
        [record for record in report if record["kind"] == kind] for kind in ("score", "difference", "note")
    )
    rows = [[r["name"], *(format_value(r[key]) for key in ("first", "second", "change"))] for r in scores]
    print_rows([["score", "first", "second", "change"], *rows])
    print()
    if differences:
        rows = [[r["factor"], str(r["first"]), str(r["second"]), r["effect"]] for r in differences]
        print_rows([["what differs", "first", "second", "effect"], *rows])
    else:
        print("the results agree in everything that both state")
    estimated = sorted((r for r in differences if "explains" in r), key=lambda r: -abs(r["explains"]))
    if estimated:
        print()
        rows = [[r["factor"], f"{r['explains']:+.4g}", r["estimate"]] for r in estimated]
        print_rows([["what explains it", f"of {scores[0]['change']:+.4g}", "measured on"], *rows])
    for note in notes:
        print(f"- {note['text']}")
