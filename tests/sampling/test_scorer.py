"""Scorer of drafts: its folder, and what it depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import OBLONG, SCHEDULE, tiny_network

from lightning_mvar import ScaleSchedule
from lightning_mvar.errors import InputError
from lightning_mvar.sampling.scorer import FORMAT, Scorer, ScorerConfig, load_scorer, save_scorer


def tiny_scorer(schedule: ScaleSchedule = SCHEDULE, **overrides: object) -> Scorer:
    """Builds a scorer that fits `tiny_network`."""
    torch.manual_seed(0)
    config = ScorerConfig(FORMAT.number, list(schedule.side_lengths), 8, 10, 8, "0" * 16, "sampled by a test")
    return Scorer(replace(config, **overrides)).eval()


@pytest.mark.parametrize("schedule", [SCHEDULE, OBLONG, ScaleSchedule((1, 3, 16)), ScaleSchedule((1,))], ids=str)
def test_each_image_has_a_score_of_its_own(schedule: ScaleSchedule) -> None:
    scorer, labels = tiny_scorer(schedule), torch.tensor([0, 3, 9])
    f_hats = torch.randn(3, 8, *schedule.shapes[-1])
    for k in range(schedule.num_scales):
        scores = scorer(f_hats, labels, k)
        alone = [scorer(f_hats[i : i + 1], labels[i : i + 1], k) for i in range(3)]
        torch.testing.assert_close(scores, torch.cat(alone))
        assert scores.unique().numel() == 3


def test_the_score_depends_on_class_and_scale() -> None:
    scorer, f_hat = tiny_scorer(), torch.randn(1, 8, 4, 4).expand(2, -1, -1, -1)
    first, other = scorer(f_hat, torch.tensor([0, 1]), 1)
    assert first != other
    assert first != scorer(f_hat, torch.tensor([0, 1]), 2)[0]


def test_a_folder_keeps_the_scorer(tmp_path: Path) -> None:
    scorer, f_hat = tiny_scorer(OBLONG), torch.randn(2, 8, 3, 6)
    save_scorer(scorer, tmp_path)
    loaded = load_scorer(tmp_path)
    assert loaded.config == scorer.config
    assert not loaded.training
    assert torch.equal(loaded(f_hat, torch.tensor([1, 2]), 3), scorer(f_hat, torch.tensor([1, 2]), 3))


def test_a_failed_write_leaves_the_earlier_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_scorer(tiny_scorer(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("lightning_mvar.io.files.sync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(InputError, match="disk full"):
        save_scorer(tiny_scorer(width=16), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a scorer; train one with `lightning-mvar train-scorer`"):
        load_scorer(tmp_path)
    save_scorer(tiny_scorer(), tmp_path)
    (tmp_path / "scorer.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"scorer\.safetensors"):
        load_scorer(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("width", 6), ("width", 0), ("code_dim", 0), ("num_classes", 0)])
def test_impossible_sizes_are_refused(name: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"{name} (must be at least 1, got )?{value}\b"):
        tiny_scorer(**{name: value})


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        ({"side_lengths": [1, 2, 4]}, r"side_lengths is \(1, 2, 4\) there, \(1, 2, 3, 4\) in the network"),
        ({"code_dim": 4}, "code_dim is 4 there, 8 in the network"),
        ({"num_classes": 3}, "num_classes is 3 there, 10 in the network"),
    ],
)
def test_a_scorer_of_other_pyramids_is_refused(overrides: dict[str, object], difference: str) -> None:
    with pytest.raises(InputError, match=f"the scorer in DIR does not fit the network: {difference}"):
        tiny_scorer(**overrides).config.check(tiny_network().config, "DIR")
