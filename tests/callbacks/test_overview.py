"""The overview of a run, read from its event files as TensorBoard's tabs read it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import prepare_run, scalars, write_images
from processes import start
from stages import TOKENIZER_YAML
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_BOOL, DATA_TYPE_FLOAT64, DATA_TYPE_STRING
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import load_trained
from lightning_mvar.models.costs import costs_of


def load_events(logs: Path) -> EventAccumulator:
    events = EventAccumulator(str(logs), size_guidance={"tensors": 0})
    events.Reload()
    return events


def strings(logs: Path, tag: str) -> list[bytes]:
    return [event.tensor_proto.string_val[0] for event in load_events(logs).Tensors(tag)]


def hparams(logs: Path) -> tuple[dict[str, int], list[str], dict[str, object]]:
    """Returns hyperparameter columns with their types, metric columns, and the run's hyperparameter values."""
    contents = load_events(logs).PluginTagToContent("hparams")
    experiment = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment
    session = HParamsPluginData.FromString(contents["_hparams_/session_start_info"]).session_start_info
    values = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in session.hparams.items()}
    assert session.group_name == ""
    types = {info.name: info.type for info in experiment.hparam_infos}
    return types, [info.name.tag for info in experiment.metric_infos], values


def charts(logs: Path) -> dict[str, list[str]]:
    """Returns the logged tags that each chart shows, by title."""
    tags = load_events(logs).Tags()["scalars"]
    layout = Layout.FromString(strings(logs, "custom_scalars__config__")[-1])
    patterns = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    return {
        title: [tag for tag in tags if any(re.match(pattern, tag) for pattern in group)]
        for title, group in patterns.items()
    }


@pytest.fixture(scope="module")
def finished_run(tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("done")
    prepare_run(folder, tokenizer, tokenizer_folder)
    fit(folder, "--trainer.max_steps", "4")
    return folder


@pytest.fixture
def logs(finished_run: Path) -> Path:
    """Logs of the finished run; tests must not change them."""
    return finished_run / "run/logs"


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, for tests that continue it."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy", symlinks=True))


def fit(folder: Path, *options: str, devices: int = 1) -> None:
    ranks = start(["fit", "--config", "run.yaml", *options], folder, devices)
    assert ranks.wait() == [0] * devices, ranks.printed()


def test_the_configuration_is_shown_as_text(logs: Path) -> None:
    (shown,) = strings(logs, "config/text_summary")
    fence, _, content = shown.decode().partition("\n")
    assert (fence, content[-4:]) == ("```yaml", "\n```")
    saved = yaml.safe_load((logs / "config.yaml").read_text())
    assert yaml.safe_load(content[:-4]) == saved
    assert saved["trainer"]["max_steps"] == 4


def test_costs_of_the_network_are_recorded(finished_run: Path, logs: Path) -> None:
    costs = json.loads((finished_run / "run/costs.json").read_text())
    network = load_trained(finished_run / "run/checkpoints/last.ckpt").network
    assert costs == costs_of(network.config)._asdict()
    assert costs.items() <= hparams(logs)[2].items()


def test_hyperparameters_are_flat_and_metrics_are_curves_without_points_of_their_own(logs: Path) -> None:
    columns, metrics, values = hparams(logs)
    expected = {
        "network.depth": 2.0,
        "network.schedule.side_lengths": "1, 2, 3, 4",
        "network.mixers": "scale_attention, mamba2",
        "network.qk_norm": True,
        "optimizer.base_lr": 0.05,
        "ema_decay": 0.9,
        "global_batch": 16.0,
        "devices": 1.0,
        "max_steps": 4.0,
        "seed": 0.0,
    }
    assert expected.items() <= values.items()
    not_given = {
        "max_epochs",
        "optimizer.final_weight_decay",
        "weights",
        "power_ema",
        "objective.init_args.loss_weights",
    }
    assert columns.keys() - values.keys() == not_given
    assert columns["network.qk_norm"] == DATA_TYPE_BOOL
    assert columns["network.mixers"] == DATA_TYPE_STRING
    assert columns["optimizer.base_lr"] == columns["network.depth"] == DATA_TYPE_FLOAT64
    curves = scalars(logs)
    assert set(metrics) - curves.keys() == {"val/is"}  # this run's extractor has no inception score
    assert [step for step, _ in curves["val/loss"]] == [step for step, _ in curves["val/fid"]] == [3]


def test_related_curves_share_a_chart(logs: Path) -> None:
    shown = charts(logs)
    assert shown["training loss of each scale"] == [f"scale_loss/{side}" for side in (1, 2, 3, 4)]
    assert shown["validation loss of each scale"] == [f"val_scale_loss/{side}" for side in (1, 2, 3, 4)]
    assert set(shown["precision and recall"]) == {"val/precision", "val/recall"}
    assert set(shown["loss"]) == {"train/loss", "val/loss"}
    assert [title for title, tags in shown.items() if not tags] == ["inception score"]


def test_a_resumed_run_stays_one_and_shows_its_new_configuration(copy: Path) -> None:
    logs = copy / "run/logs"
    before = hparams(logs)
    fit(copy, "--trainer.max_steps", "6", "--resume")
    assert hparams(logs) == before
    assert b"max_steps: 6" in strings(logs, "config/text_summary")[-1]
    assert [step for step, _ in scalars(logs)["train/loss"]] == list(range(6))


def test_a_run_restarted_in_the_same_folder_keeps_its_overview(copy: Path) -> None:
    """A restart purges all steps from 0 on in TensorBoard's slower reader."""
    shutil.rmtree(copy / "run/checkpoints")
    fit(copy, "--trainer.max_steps", "2")
    assert b"max_steps: 2" in strings(copy / "run/logs", "config/text_summary")[-1]
    assert charts(copy / "run/logs").keys() >= {"loss", "accuracy"}


def test_only_rank_zero_writes(run_folder: Path) -> None:
    options = ["--trainer.max_steps", "1", "--trainer.strategy", "ddp", "--data.batch_size", "8"]
    fit(run_folder, *options, devices=2)
    logs = run_folder / "run/logs"
    assert len(list(logs.glob("events*"))) == 1
    _, _, values = hparams(logs)
    assert (values["devices"], values["global_batch"]) == (2, 16)
    assert len(strings(logs, "config/text_summary")) == 1


def test_the_overview_of_a_tokenizer_has_its_own_curves(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "tokenizer.yaml").write_text(TOKENIZER_YAML)
    ranks = start(["train-tokenizer", "--config", "tokenizer.yaml"], tmp_path)
    assert ranks.wait() == [0], ranks.printed()
    columns, metrics, values = hparams(tmp_path / "tok/logs")
    assert (values["tokenizer.vocab_size"], values["tokenizer.multipliers"]) == (24, "1, 2")
    assert columns.keys() >= values.keys()
    assert set(metrics) <= scalars(tmp_path / "tok/logs").keys()
    assert all(charts(tmp_path / "tok/logs").values())
