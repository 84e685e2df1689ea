"""`report`: its Markdown, CSV and PNG files, and its events read by TensorBoard's own reader."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import sweep_folder
from PIL import Image
from sweep_folder import DEPTHS, MIXERS, SEEDS, cell_folder, write_attempts, write_run_sweep, write_sweep
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_mvar.cli import run

FIGURES = ["axis_depth.png", "distance_cost.png", "loss_compute.png", "scale_losses.png"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a sweep with one crashed cell and its report; tests must not change it."""
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "tiny")
    write_attempts(cell_folder(folder, "var", "10", 1), [1, 1])
    assert run(["report", str(folder)]) == 0
    return folder


@pytest.fixture
def text(done: Path) -> str:
    return (done / "report/report.md").read_text()


def records(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Returns the tables of a Markdown text, by heading."""
    by_heading: dict[str, list[dict[str, str]]] = {}
    for section in text.split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if rows:
            by_heading[section.splitlines()[0]] = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    return by_heading


def test_it_writes_tables_figures_and_a_report_that_shows_them(done: Path, text: str) -> None:
    assert sorted(path.name for path in (done / "report").iterdir()) == sorted(
        [*FIGURES, "cells.csv", "hparams", "report.md", "variants.csv"]
    )
    for name in FIGURES:
        with Image.open(done / "report" / name) as image:
            assert image.width >= 900
        assert f"]({name})" in text
    assert "18 cells of 6 variants: 17 finished, 1 crashed" in text
    attempts = "attempts: 19, 19 min 0 s in total without those that were killed; cells with more than one attempt: 1"
    assert attempts in text
    assert "fit --seed_everything 0" in text
    assert sweep_folder.SWEEP_YAML.strip() in text


def test_crashed_cells_and_missing_seeds_are_listed(text: str) -> None:
    assert tables(text)["Cells that have not finished"] == [
        {"cell": "var-depth10-seed1", "state": "crashed", "tries": "2", "time": "120 s"}
    ]
    assert "- var-depth10: 2 of 3 seeds, missing 1" in text


def test_the_tables_agree_with_the_csv_file(done: Path, text: str) -> None:
    """Compares to the digits shown: mean ± deviation within half a unit of the last digit."""
    rows = {row["variant"]: row for row in records(done / "report/variants.csv")}
    columns = {
        "Results": {"validation loss": "val/loss", "Frechet distance": "frechet_distance", "recall": "recall"},
        "Loss of each scale": {"1": "val_scale_loss/1", "4": "val_scale_loss/4"},
        "Costs": {"training images/s": "perf/images_per_s"},
    }
    assert list(rows) == [f"{mixer}-depth{depth}" for mixer in MIXERS for depth in DEPTHS]
    for heading, names in columns.items():
        shown = tables(text)[heading]
        assert [row["variant"] for row in shown] == list(rows)
        for row in shown:
            exact = rows[row["variant"]]
            assert row["seeds"] == exact["seeds"] == ("2" if row["variant"] == "var-depth10" else "3")
            for title, name in names.items():
                mean, _, deviation = row[title].partition(" ± ")
                half = 0.5 * 10.0 ** -len(mean.partition(".")[2])
                assert float(mean) == pytest.approx(float(exact[f"{name}_mean"]), abs=1.01 * half)
                assert float(deviation or 0) == pytest.approx(float(exact[f"{name}_std"]), abs=1.01 * half)


def test_the_csv_files_hold_the_measurements(done: Path) -> None:
    cells = {row["cell"]: row for row in records(done / "report/cells.csv")}
    assert len(cells) == 18
    crashed = cells["var-depth10-seed1"]
    assert (crashed["status"], crashed["tries"], crashed["val/loss"]) == ("crashed", "2", "")
    for row in records(done / "report/variants.csv"):
        values = [
            float(c["frechet_distance"])
            for c in cells.values()
            if c["cell"].startswith(row["variant"] + "-") and c["frechet_distance"]
        ]
        seeds = [seed for seed in SEEDS if (row["variant"], seed) != ("var-depth10", 1)]
        assert values == [sweep_folder.distance(row["mixer"], row["depth"], seed) for seed in seeds]
        assert float(row["frechet_distance_mean"]) == pytest.approx(np.mean(values))
        assert float(row["frechet_distance_std"]) == pytest.approx(np.std(values, ddof=1))
    assert row["missing_seeds"] == ""


def test_costs_are_shown_with_prefixes(text: str) -> None:
    first = tables(text)["Costs"][0]
    assert (first["parameters"], first["FLOPs per training image"]) == ("200 k", "600 M")


def test_the_significance_note_counts_comparisons_and_degrees_of_freedom(text: str) -> None:
    rows = tables(text)["Differences to the baseline"]
    assert [row["variant"] for row in rows[:5]] == [
        "mvar-depth10",
        "var-depth2",
        "var-depth10",
        "markov-depth2",
        "markov-depth10",
    ]
    assert "Each variant minus mvar-depth2" in text
    tested = [row for row in rows if row["p"]]
    assert f"{len(tested)} comparisons" in text
    assert "With 3 seeds such a test has 2 degrees of freedom" in text
    assert {row["variant"] for row in rows if row["significant (Holm)"] == "**yes**"} == {"var-depth2"}


def test_tensorboard_reads_a_row_for_each_cell(done: Path) -> None:
    folders = sorted((done / "report/hparams").iterdir())
    assert len(folders) == 18
    events = EventAccumulator(str(done / "report/hparams/var-depth2-seed2"))
    events.Reload()
    contents = events.PluginTagToContent("hparams")
    session = HParamsPluginData.FromString(contents["_hparams_/session_start_info"]).session_start_info
    values = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in session.hparams.items()}
    assert values == {"mixer": "var", "depth": 2.0, "seed": 2.0}
    experiment = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment
    assert {info.name for info in experiment.hparam_infos} == values.keys()
    assert {info.name.tag for info in experiment.metric_infos} <= set(events.Tags()["scalars"])
    (distance,) = events.Scalars("frechet_distance")
    assert distance.value == sweep_folder.distance("var", "2", 2)


def test_a_second_report_replaces_the_first(done: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "tiny"))
    write_attempts(cell_folder(folder, "var", "10", 1), [1, 0])
    assert run(["report", str(folder), "--baseline", "var-depth10"]) == 0
    text = (folder / "report/report.md").read_text()
    assert "18 cells of 6 variants: 18 finished" in text
    assert "Each variant minus var-depth10" in text
    assert all(len(list(cell.iterdir())) == 1 for cell in (folder / "report/hparams").iterdir())


@pytest.mark.parametrize("link", ["report", "report/hparams", "report/hparams/zz", "report/.lock"])
def test_a_report_changes_no_files_behind_links(
    done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], link: str
) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "tiny", ignore=shutil.ignore_patterns("report")))
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "events.out.tfevents.1").write_text("precious")
    (folder / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / link).symlink_to(logs)
    assert run(["report", str(folder)]) == 1
    assert f"{folder / link} is a link: remove it" in capfd.readouterr().err
    assert [path.read_text() for path in logs.iterdir()] == ["precious"]


def test_it_prints_the_main_table_and_can_write_elsewhere(
    done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (done / "report/report.md").read_text()
    assert run(["report", str(done), "--out", str(tmp_path / "other")]) == 0
    printed = capfd.readouterr().out
    assert tables("\n## Results\n" + printed)["Results"] == tables(before)["Results"]
    assert "1 of 18 cells have not finished" in printed
    assert (tmp_path / "other/report.md").read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere does not exist; it must be the folder of a sweep"),
        (
            ["{done}", "--baseline", "vra"],
            "--baseline vra is not a variant with finished cells; choose one of mvar-depth2",
        ),
        ([], "FOLDER"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    done: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(["report", *(option.format(done=done) for option in options)]) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("lightning-mvar: error: ")
    assert message in line


def test_a_sweep_of_commands_has_one_record_per_sampling_seed_and_a_table_of_both_spreads(tmp_path: Path) -> None:
    folder = write_run_sweep(tmp_path / "run")
    assert run(["report", str(folder)]) == 0
    rows = records(folder / "report/cells.csv")
    assert [(row["cell"], row["sampling_seed"]) for row in rows[:3]] == [
        ("w0-seed0", "5"),
        ("w0-seed0", "6"),
        ("w0-seed1", "5"),
    ]
    assert float(rows[3]["recall"]) == sweep_folder.recall(0, 1, 6)
    text = (folder / "report/report.md").read_text()
    assert "- sampling seeds of each cell: 5, 6" in text
    assert "Each variant minus w1, paired by seed." in text
    spread = tables(text)["Spread"][0]
    assert (spread["variant"], spread["measure"], spread["seeds"]) == ("w0", "recall", "3")
    assert spread["deviation between sampling seeds"] == "0.016"
    assert "Costs" not in tables(text)
    assert sorted(path.name for path in (folder / "report").glob("*.png")) == ["axis_w.png"]
