"""Power-function averages during training, and those that `merge --ema` computes from their snapshots."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import write_token_shards
from lightning.pytorch.callbacks import Callback
from lit_modules import make_module, make_trainer
from torch import Tensor

from lightning_mvar import Tokenizer
from lightning_mvar.callbacks import Checkpoint, SnapshotCheckpoint
from lightning_mvar.checkpoints import load_trained
from lightning_mvar.checkpoints.power_ema import exponent_of
from lightning_mvar.checkpoints.training import NETWORK_KEY
from lightning_mvar.cli import run
from lightning_mvar.errors import InputError
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.mvar import LitMVAR

SIGMAS = [0.05, 0.10]


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> TokenDataModule:
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [20, 20, 12])
    return TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16)


class Trajectory(Callback):
    """Records the weights after each step as one vector, and makes a gradient NaN in one step."""

    def __init__(self, skipped: int | None = None) -> None:
        self.skipped, self.weights = skipped, []

    def on_after_backward(self, trainer: L.Trainer, pl_module: LitMVAR) -> None:
        if trainer.global_step == self.skipped:
            pl_module.network.head.weight.grad[0, 0] = torch.nan

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitMVAR, *_: object) -> None:
        self.weights.append(vector(pl_module.network))

    def average(self, sigma_rel: float) -> Tensor:
        """Averages by the definition; a skipped step leaves the average alone."""
        average = torch.zeros_like(self.weights[0])
        for step, weights in enumerate(self.weights, start=1):
            beta = (1 - 1 / step) ** (exponent_of(sigma_rel) + 1)
            if step - 1 != self.skipped:
                average = beta * average + (1 - beta) * weights
        return average


def vector(network: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in network.parameters()])


def test_averages_follow_the_weights_and_skip_skipped_steps(
    tokenizer_folder: Path, data: TokenDataModule, tmp_path: Path
) -> None:
    trajectory, module = Trajectory(skipped=5), make_module(tokenizer_folder, model={"power_ema": SIGMAS})
    with pytest.warns(UserWarning, match="step 5 is skipped"):
        make_trainer(tmp_path, 9, callbacks=[trajectory]).fit(module, data)
    for average, sigma_rel in zip(module.power_averages, SIGMAS, strict=True):
        torch.testing.assert_close(vector(average), trajectory.average(sigma_rel), atol=1e-6, rtol=1e-5)
        assert not any(parameter.requires_grad for parameter in average.parameters())
    assert module.averaged is module.network


def test_merge_reconstructs_the_average_of_another_width(
    tokenizer_folder: Path, data: TokenDataModule, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Compares with the average of the recorded weights, in units of its distance from the last weights."""
    snapshots, trajectory = SnapshotCheckpoint(str(tmp_path / "snapshots"), every_n_train_steps=2), Trajectory()
    module = make_module(tokenizer_folder, model={"power_ema": SIGMAS})
    make_trainer(tmp_path, 16, callbacks=[snapshots, trajectory], enable_checkpointing=True).fit(module, data)
    paths = sorted(str(path) for path in (tmp_path / "snapshots").glob("*.ckpt"))
    assert len(paths) == 8
    for sigma_rel, tolerance in ((0.10, 1e-4), (0.075, 0.02)):
        assert run(["merge", *paths, "--ema", str(sigma_rel), "--out", str(tmp_path / f"{sigma_rel}")]) == 0
        assert f"sigma_rel {sigma_rel:g} at step 16 from 8 snapshots, relative error" in capfd.readouterr().out
        expected = trajectory.average(sigma_rel)
        difference = vector(load_trained(tmp_path / f"{sigma_rel}").network) - expected
        assert difference.norm() < tolerance * (trajectory.weights[-1] - expected).norm()
    command = ["merge", *paths[:2], "--out", str(tmp_path / "out"), "--ema"]
    for options, message in (
        (["0.4"], "--ema 0.4 is not a relative width"),
        (["0.1", "--coefficients", "1", "1"], "--ema computes the coefficients itself"),
        (["0.1", "--weights", "raw"], "drop --weights raw"),
    ):
        assert run([*command, *options]) == 1
        assert message in capfd.readouterr().err
    assert run(["merge", paths[0], paths[0], "--ema", "0.1", "--out", str(tmp_path / "out")]) == 1
    assert "are both of step 2" in capfd.readouterr().err
    assert run(["merge", str(tmp_path / "0.1"), "--ema", "0.1", "--out", str(tmp_path / "out")]) == 1
    assert "0.1 is not a snapshot: name checkpoints of a run with model.power_ema" in capfd.readouterr().err
    for key, value in (("power_ema", [0.05, 0.11]), ("drop_path", 0.25)):
        content = torch.load(paths[0], weights_only=True)
        part = "run" if key == "power_ema" else "network"
        content[NETWORK_KEY][part][key] = value
        torch.save(content, tmp_path / "other.ckpt")
        command = ["merge", str(tmp_path / "other.ckpt"), paths[1], "--ema", "0.1", "--out", str(tmp_path / "out")]
        assert run(command) == 1
        assert f"is a snapshot of another run than {tmp_path / 'other.ckpt'}: its {key} is" in capfd.readouterr().err


def test_averages_resume_to_the_bit_and_load_with_the_module(
    tokenizer_folder: Path, data: TokenDataModule, tmp_path: Path
) -> None:
    def fit(resume: Path | None, name: str, power_ema: list[float]) -> dict[str, Tensor]:
        module = make_module(tokenizer_folder, model={"power_ema": power_ema})
        saving = Checkpoint(str(tmp_path / name), every_n_train_steps=4)
        trainer = make_trainer(tmp_path, 7, callbacks=[saving], enable_checkpointing=True)
        trainer.fit(module, data, ckpt_path=resume)
        return module.state_dict()

    expected, middle = fit(None, "whole", SIGMAS), tmp_path / "whole/step=00000004.ckpt"
    resumed = fit(middle, "resumed", SIGMAS)
    loaded = LitMVAR.load_from_checkpoint(tmp_path / "whole/last.ckpt").state_dict()
    for state in (resumed, loaded):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    with pytest.raises(InputError, match=r"power_ema is \[0.05, 0.1\] in the checkpoint and \[\] in this run"):
        fit(middle, "other", [])


def test_mistakes(tokenizer_folder: Path, data: TokenDataModule, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.power_ema 0.3 is not a relative width"):
        make_module(tokenizer_folder, model={"power_ema": [0.1, 0.3]})
    snapshots = SnapshotCheckpoint(str(tmp_path / "run"), every_n_train_steps=2)
    checkpoint = Checkpoint(str(tmp_path / "run"), every_n_train_steps=2)
    for model, callbacks, message in (
        ({}, [snapshots], "needs model.power_ema"),
        ({"power_ema": SIGMAS}, [checkpoint, snapshots], "Checkpoint and SnapshotCheckpoint both write to"),
    ):
        with pytest.raises(InputError, match=message):
            make_trainer(tmp_path, 2, callbacks=callbacks, enable_checkpointing=True).fit(
                make_module(tokenizer_folder, model=model), data
            )
