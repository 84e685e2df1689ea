"""Results read from a sweep's folder, and statistics over seeds compared with numpy and scipy on known numbers."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweep_folder
from scipy import stats
from sweep_folder import (
    BATCH,
    DEPTHS,
    MIXERS,
    SEEDS,
    SIDES,
    STEPS,
    cell_folder,
    recall,
    write_attempts,
    write_json,
    write_run_sweep,
    write_sweep,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from lightning_mvar.errors import InputError
from lightning_mvar.io.hparams import row_summary
from lightning_mvar.io.locks import FileLock
from lightning_mvar.sampling.costs import SamplingCosts
from lightning_mvar.sweeps.results import read_results
from lightning_mvar.sweeps.tables import scale_tags
from lightning_mvar.sweeps.variants import (
    Variant,
    choose_baseline,
    compare,
    holm_correction,
    smallest_significant_difference,
    variants_of,
)

ORDER = [(mixer, depth) for mixer in MIXERS for depth in DEPTHS]  # as in the file, not sorted by name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a finished sweep; tests must not change it."""
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "tiny")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Returns a copy of the sweep's folder that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "tiny"))


def variant(folder: Path, mixer: str, depth: str) -> Variant:
    (match,) = [v for v in variants_of(read_results(folder)) if v.axes == {"mixer": mixer, "depth": depth}]
    return match


def test_cells_come_in_the_order_of_the_file(written: Path) -> None:
    sweep = read_results(written)
    assert [(c.axes["mixer"], c.axes["depth"], c.seed) for c in sweep.cells] == [
        (mixer, depth, seed) for mixer, depth in ORDER for seed in SEEDS
    ]
    assert sweep.axes == {"mixer": ["mvar", "var", "markov"], "depth": ["2", "10"]}
    assert all(cell.finished and cell.tries == 1 and cell.seconds == 60 for cell in sweep.cells)


def test_a_cell_has_last_values_rates_costs_and_scores(written: Path) -> None:
    cell = read_results(written).cells[7]  # of a variant that is not the first
    mixer, depth, seed = "var", "2", 1
    assert cell.measures == pytest.approx(
        {
            "val/loss": sweep_folder.loss(mixer, depth, seed),
            "val/loss_last_scale": 1.1 * sweep_folder.loss(mixer, depth, seed),
            **{f"val_scale_loss/{side}": sweep_folder.scale_loss(mixer, depth, seed, side) for side in SIDES},
            "perf/images_per_s": 100 + STEPS[1],  # the middle one
            "parameters": sweep_folder.parameters(mixer, depth),
            "flops_per_training_image": 3000 * sweep_folder.parameters(mixer, depth),
            "flops_per_sampled_image": 2000 * sweep_folder.parameters(mixer, depth),
            "state_bytes_per_image": 8192,
            "frechet_distance": sweep_folder.distance(mixer, depth, seed),
            "inception_score": 9.0,
            "precision": 0.8 + sweep_folder.NOISE[mixer][seed],
            "recall": 0.7,
            "classifier_accuracy_on_samples": 0.9,
        },
        rel=1e-6,
    )
    assert [images for images, _ in cell.curves["val/loss"]] == [(step + 1) * BATCH for step in STEPS]
    losses = [sweep_folder.loss(mixer, depth, seed, step) for step in STEPS]
    assert [value for _, value in cell.curves["val/loss"]] == pytest.approx(losses, rel=1e-6)


def test_costs_that_evaluate_counts_are_those_of_sampling(folder: Path) -> None:
    """Its settings may need fewer steps of the network than guidance by the network itself, which `fit` counts."""
    cell = cell_folder(folder, "mvar", "2", 0)
    (scores,) = json.loads((cell / "scores.json").read_text())
    counted = SamplingCosts(token_steps_per_image=42, flops_per_sampled_image=1234)._asdict()
    write_json(cell / "scores.json", [scores | counted])
    measures = read_results(folder).cells[0].measures
    assert {name: measures[name] for name in counted} == counted
    assert measures["parameters"] == sweep_folder.parameters("mvar", "2")


def test_means_and_deviations_are_numpys(written: Path) -> None:
    for mixer, depth in ORDER:
        one = variant(written, mixer, depth)
        for measure, function in (("val/loss", sweep_folder.loss), ("frechet_distance", sweep_folder.distance)):
            values = [function(mixer, depth, seed) for seed in SEEDS]
            stat = one.stat(measure)
            assert (stat.mean, stat.deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-4)
            assert stat.n == 3
    assert one.stat("images_per_s") is None


def test_differences_are_paired_by_seed_and_tested_as_scipy_does(written: Path) -> None:
    variants = variants_of(read_results(written))
    comparisons = {(c.variant, c.measure): c for c in compare(variants, choose_baseline(variants, "var-depth2"))}
    assert len(comparisons) == 2 * 5
    for mixer, depth in ORDER:
        for measure, function in (("val/loss", sweep_folder.loss), ("frechet_distance", sweep_folder.distance)):
            if mixer == "var":  # the baseline, or it plus a constant
                continue
            ours = [function(mixer, depth, seed) for seed in SEEDS]
            theirs = [function("var", "2", seed) for seed in SEEDS]
            test, comparison = stats.ttest_rel(ours, theirs), comparisons[f"{mixer}-depth{depth}", measure]
            interval = test.confidence_interval(0.95)
            assert comparison.mean == pytest.approx(np.mean(ours) - np.mean(theirs), rel=1e-4)
            assert comparison.deviation == pytest.approx(np.std(np.subtract(ours, theirs), ddof=1), rel=1e-3)
            assert comparison.interval == pytest.approx((interval.low, interval.high), rel=1e-3)
            assert comparison.p == pytest.approx(test.pvalue, rel=1e-3)
    constant = comparisons["var-depth10", "frechet_distance"]
    assert (constant.mean, constant.reason) == (-8.0, "the differences do not vary")


def test_holms_correction_is_that_of_all_subsets(written: Path) -> None:
    """Holm's method is the closed Bonferroni test: every subset with the hypothesis has p < 0.05 / size."""
    variants = variants_of(read_results(written))
    (some, *_) = compare(variants, variants[0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        ps = rng.uniform(0, 0.04, 5)
        corrected = holm_correction([type(some)("v", "val/loss", [0, 1], p=p) for p in ps])
        subsets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
        expected = [all(min(ps[list(s)]) < 0.05 / len(s) for s in subsets if i in s) for i in range(5)]
        assert [comparison.significant for comparison in corrected] == expected


def test_the_smallest_significant_difference_has_p_at_the_level() -> None:
    values = np.array([-1.0, 0.0, 1.0])  # deviation 1
    smallest = smallest_significant_difference(3, 4)
    assert stats.ttest_1samp(values + smallest, 0).pvalue == pytest.approx(0.05 / 4)


def test_unfinished_cells_are_listed_and_excluded(folder: Path) -> None:
    write_attempts(cell_folder(folder, "mvar", "2", 0), [1, 1])
    write_attempts(cell_folder(folder, "mvar", "2", 1), [None, 130])
    write_attempts(cell_folder(folder, "var", "2", 0), [0, None])
    write_attempts(cell_folder(folder, "var", "10", 0), [-9])
    shutil.rmtree(cell_folder(folder, "var", "2", 1))
    write_attempts(cell_folder(folder, "var", "2", 2), [None, 1, 0])
    sweep = read_results(folder)
    assert {c.name: (c.status, c.tries, c.seconds) for c in sweep.unfinished} == {
        "mvar-depth2-seed0": ("crashed", 2, 120),
        "mvar-depth2-seed1": ("interrupted", 2, 60),
        "var-depth2-seed0": ("interrupted", 2, 60),
        "var-depth10-seed0": ("interrupted", 1, 60),
        "var-depth2-seed1": ("waiting", 0, 0),
    }
    first = variant(folder, "mvar", "2")
    assert (list(first.cells), first.missing) == ([2], [0, 1])
    assert first.stat("val/loss").mean == pytest.approx(sweep_folder.loss("mvar", "2", 2))
    assert first.stat("val/loss").deviation is None
    variants = variants_of(sweep)
    assert {c.reason for c in compare(variants, first)} == {"fewer than 2 seeds in common"}
    assert sweep.cells[8].tries == 3


def test_the_last_value_of_a_repeated_step_counts(folder: Path) -> None:
    logs = cell_folder(folder, "mvar", "2", 0) / "logs"
    shutil.rmtree(logs)
    sweep_folder.write_events(logs, "var", "10", 2)
    sweep_folder.write_events(logs, "mvar", "2", 0)
    cell = read_results(folder).cells[0]
    assert len(cell.curves["val/loss"]) == len(STEPS)
    assert cell.measures["val/loss"] == pytest.approx(sweep_folder.loss("mvar", "2", 0))


def test_values_on_other_tokens_or_under_other_conditions_are_not_compared(folder: Path) -> None:
    for seed in SEEDS:
        cell = cell_folder(folder, "var", "2", seed)
        shutil.rmtree(cell / "logs")
        sweep_folder.write_events(cell / "logs", "var", "2", seed, tokenizer="outputs/raster/tokenizer")
        scores = json.loads((cell_folder(folder, "markov", "2", seed) / "scores.json").read_text())
        write_json(cell_folder(folder, "markov", "2", seed) / "scores.json", [scores[0] | {"num_samples": 100}])
    variants = variants_of(read_results(folder))
    reasons = {(c.variant, c.measure): c.reason for c in compare(variants, variants[0])}
    assert reasons["var-depth2", "val/loss"] == "tokens of another tokenizer"
    assert reasons["markov-depth2", "frechet_distance"] == "scored under other conditions"
    assert reasons["var-depth2", "frechet_distance"] == reasons["markov-depth2", "val/loss"] == ""


def test_a_diverged_run_affects_only_its_variant(folder: Path) -> None:
    with SummaryWriter(str(cell_folder(folder, "var", "2", 0) / "logs")) as writer:
        writer.add_scalar("val/loss", float("nan"), STEPS[-1] + 1)
    variants = variants_of(read_results(folder))
    comparisons = {c.variant: c for c in compare(variants, variants[0]) if c.measure == "val/loss"}
    assert comparisons["var-depth2"].reason == "a value is not finite"
    assert np.isnan(variant(folder, "var", "2").stat("val/loss").deviation)
    assert comparisons["markov-depth2"].reason == ""


def test_listed_cells_choose_from_the_axes(folder: Path) -> None:
    yaml = (folder / "sweep.yaml").read_text()
    (folder / "sweep.yaml").write_text(yaml + "cells: [{mixer: [var, mvar], depth: 10}, {mixer: mvar, depth: 2}]\n")
    for mixer, depth in ORDER:
        if mixer == "markov" or (mixer, depth) == ("var", "2"):
            for seed in SEEDS:
                shutil.rmtree(cell_folder(folder, mixer, depth, seed))
    assert [v.name for v in variants_of(read_results(folder))] == ["var-depth10", "mvar-depth10", "mvar-depth2"]
    (folder / "sweep.yaml").write_text(yaml + "cells: [{mixer: var, model.network.depth: 10}]\n")
    with pytest.raises(InputError, match=r"mvar-depth10-seed0 has axes .* that .*sweep\.yaml does not"):
        read_results(folder)


def test_cells_without_a_folder_have_the_names_that_the_sweep_will_use(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "fit: --config run.yaml\n"
        "axes: {mixer: [a/mvar.yaml, a/var.yaml], model.network.qk_norm: [true], recipe: {slow: --x 1, fast: --x 2}}"
    )
    names = ["mvar-qk_normTrue-slow", "mvar-qk_normTrue-fast", "var-qk_normTrue-slow", "var-qk_normTrue-fast"]
    sweep = read_results(tmp_path)
    assert [cell.name for cell in sweep.cells] == [f"{name}-seed0" for name in names]
    assert {cell.status for cell in sweep.cells} == {"waiting"}
    (tmp_path / "sweep.yaml").write_text("fit: --config run.yaml\nseeds: [3]\n")
    assert [(cell.name, cell.axes) for cell in read_results(tmp_path).cells] == [("fit-seed3", {})]


def test_a_cell_that_is_locked_is_running(folder: Path) -> None:
    cell = cell_folder(folder, "mvar", "2", 0)
    sweep_folder.write_attempts(cell, [None])
    lock = FileLock.try_acquire(cell / "lock")
    assert lock is not None
    (cell / "lock").chmod(0o444)
    status = {result.name: result.status for result in read_results(folder).cells}
    assert status.pop(cell.name) == "running"
    assert set(status.values()) == {"finished"}
    lock.release()
    assert [result.status for result in read_results(folder).unfinished] == ["interrupted"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sweep.yaml", None, "is not the folder of a sweep"),
        ("sweep.yaml", "seeds: [0", r"sweep\.yaml is not valid YAML"),
        ("sweep.yaml", "fit: a\naxes: {mixer: 3}", r"sweep\.yaml: axis mixer needs a list of values"),
        ("cell.json", None, r"mvar-depth2-seed0/cell\.json is missing"),
        ("cell.json", "{", r"mvar-depth2-seed0/cell\.json is damaged"),
        ("cell.json", "[]", r"mvar-depth2-seed0/cell\.json is damaged \(cell\.json: .*: remove its folder"),
        ("attempts.jsonl", '{"begin": 1}\n', r"attempts\.jsonl is damaged at"),
        ("costs.json", None, r"costs\.json is missing"),
        ("costs.json", '{"parameters": 3}', r"costs\.json is damaged \(KeyError: 'flops_per_training_image'\)"),
        ("scores.json", "[]", r"scores\.json is damaged"),
        ("scores.json", '[{"precision": "high"}]', r"scores\.json is damaged .*: run the command of cell\.json"),
        ("scores.json", '[{"precision": -1e308}]', r"scores\.json is damaged \(precision is -1e\+308, beyond float32"),
        ("scores.json", '[{"precision": NaN}]', r"scores\.json is damaged \(.* is not valid JSON \(it holds NaN\)"),
        ("logs", None, r"logs has no TensorBoard events"),
    ],
)
def test_damaged_and_missing_files_are_named(folder: Path, file: str, content: str | None, message: str) -> None:
    path = folder / file if file == "sweep.yaml" else cell_folder(folder, "mvar", "2", 0) / file
    if content is not None:
        path.write_text(content)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(InputError, match=message):
        read_results(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("cell.json", b"[" * 100_000, "nested too deeply|recursion"),
        ("cell.json", b'{"name": "\\ud800", "axes": {}, "seed": 0, "commands": []}', "a string without NUL"),
        ("cell.json", b'{"name": "a", "axes": {}, "seed": Infinity, "commands": []}', "it holds Infinity"),
        ("costs.json", b'{"parameters": 1%s}' % (b"0" * 400), "parameters is 1000.*"),
        ("scores.json", b'[{"precision": true}]', "precision: the content is True; it must be a finite number"),
        ("attempts.jsonl", b'{"attempt": 1, "begin": "x", "seconds": "x"}\n', "seconds is 'x'"),
        ("attempts.jsonl", b'{"attempt": 1, "begin": "x", "seconds": 1e308}\n', "seconds is 1e\\+308"),
        ("attempts.jsonl", b'{"attempt": 1, "begin": "x", "code": [1]}\n', r"code is \[1\]"),
        ("attempts.jsonl", b"\xff\xfe\n", "is damaged at"),
    ],
)
def test_values_that_no_sweep_writes_are_refused(folder: Path, file: str, content: bytes, message: str) -> None:
    (cell_folder(folder, "mvar", "2", 0) / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(file)} .*({message})") as error:
        read_results(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["cell.json", "attempts.jsonl", "costs.json", "logs/events.out.tfevents.9.x"])
def test_pipes_are_refused(folder: Path, file: str) -> None:
    path = cell_folder(folder, "mvar", "2", 0) / file
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"{re.escape(file)} is not a regular file"):
        read_results(folder)


@pytest.mark.parametrize("position", [0.0, 0.5, 0.999])
def test_a_damaged_record_of_the_logs_is_found(folder: Path, position: float) -> None:
    (path,) = (cell_folder(folder, "mvar", "2", 0) / "logs").iterdir()
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{path.name} is damaged: a checksum differs"):
        read_results(folder)


def test_a_half_written_record_at_the_end_of_the_logs_is_no_damage(folder: Path) -> None:
    (path,) = (cell_folder(folder, "mvar", "2", 0) / "logs").iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    assert read_results(folder).cells[0].finished


@pytest.mark.parametrize("name", ["abc", "9" * 5000, "2x"])
def test_losses_of_unknown_scales_are_refused(folder: Path, name: str) -> None:
    with SummaryWriter(str(cell_folder(folder, "mvar", "2", 0) / "logs")) as writer:
        writer.add_scalar(f"val_scale_loss/{name}", 1.0, 1)
    with pytest.raises(InputError, match=r"logs is damaged: 'val_scale_loss/.* names no scale"):
        read_results(folder)


def test_oblong_scales_are_sorted_by_height(folder: Path) -> None:
    with SummaryWriter(str(cell_folder(folder, "mvar", "2", 0) / "logs")) as writer:
        writer.add_scalar("val_scale_loss/3x10", 1.0, 1)
    tags = scale_tags(variants_of(read_results(folder)))
    assert tags == [f"val_scale_loss/{name}" for name in ("1", "2", "3x10", "4")]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (float("nan"), "global_batch: the content is nan"),
        (float("inf"), "global_batch: the content is inf"),
        ("abc", "global_batch: the content is 'abc'"),
        (-4.0, "global_batch is -4"),
        (None, "has no hyperparameter 'global_batch'"),
        (b"\xff\xff\xff", "logs is damaged"),
    ],
)
def test_damaged_hyperparameters_are_refused(folder: Path, batch: Any, message: str) -> None:
    logs = cell_folder(folder, "mvar", "2", 0) / "logs"
    shutil.rmtree(logs)
    summary = row_summary({"tokenizer": "x"} if batch is None else {"global_batch": str(batch), "tokenizer": "x"})
    plugin = summary.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    if batch is None:
        content.session_start_info.hparams["global_batch"].Clear()
    elif isinstance(batch, float):
        content.session_start_info.hparams["global_batch"].number_value = batch
    plugin.content = batch if isinstance(batch, bytes) else content.SerializeToString()
    with SummaryWriter(str(logs)) as writer:
        writer._get_file_writer().add_summary(summary, -1)
    with pytest.raises(InputError, match=message):
        read_results(folder)


def test_the_baseline_must_have_finished(folder: Path) -> None:
    for seed in SEEDS:
        write_attempts(cell_folder(folder, "mvar", "2", seed), [1])
    variants = variants_of(read_results(folder))
    assert choose_baseline(variants, None).name == "mvar-depth10"
    message = "--baseline mvar-depth2 is not a variant with finished cells; choose one of mvar-"
    with pytest.raises(InputError, match=message):
        choose_baseline(variants, "mvar-depth2")
    with pytest.raises(InputError, match="no cell of the sweep has finished"):
        choose_baseline(variants[:1], None)


def test_sampling_seeds_are_averaged_within_training_seeds(tmp_path: Path) -> None:
    sweep = read_results(write_run_sweep(tmp_path / "run"))
    variants = variants_of(sweep)
    draws = np.array([[[recall(w, seed, s) for s in (5, 6)] for seed in SEEDS] for w in range(3)])
    means = draws.mean(axis=2)
    for w, group in enumerate(variants):
        stat = group.stat("recall")
        assert stat is not None
        assert stat.mean == pytest.approx(means[w].mean())
        assert stat.deviation == pytest.approx(means[w].std(ddof=1))
        assert stat.standard_error == pytest.approx(stats.sem(means[w]))
        assert stat.sampling_deviation == pytest.approx(np.sqrt(draws[w].var(axis=1, ddof=1).mean()))
        assert stat.n == len(SEEDS)
    baseline = choose_baseline(variants, sweep.plan.baseline)
    comparisons = compare(variants, baseline, sweep.plan.compare)
    assert [(c.variant, c.measure) for c in comparisons] == [("w0", "recall"), ("w2", "recall")]
    for comparison, w in zip(comparisons, (0, 2), strict=True):
        expected = stats.ttest_rel(means[w], means[1])
        assert comparison.mean == pytest.approx((means[w] - means[1]).mean())
        assert comparison.p == pytest.approx(expected.pvalue)
        assert comparison.interval == pytest.approx(expected.confidence_interval(0.95))


def test_scores_of_a_sampling_seed_must_exist(tmp_path: Path) -> None:
    folder = write_run_sweep(tmp_path / "run")
    (folder / "cells/w1-seed0/scores-6.json").unlink()
    with pytest.raises(InputError, match=r"scores-6\.json is missing: run the command of cell\.json that writes it"):
        read_results(folder)
