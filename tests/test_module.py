"""Training through Lightning: the loss, label drop, resuming, and two processes against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import MIXERS, SCHEDULE, write_images, write_token_shards
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_mvar import MVARConfig, Tokenizer
from lightning_mvar.data.datamodule import TokenDataModule
from lightning_mvar.module import LitMVAR
from lightning_mvar.optim import OptimizerConfig

NETWORK = {"depth": 2, "width": 32, "heads": 2, "vocab_size": 48, "code_dim": 8, "num_classes": 10}
SAMPLES = [20, 20, 12]


class Losses(Callback):
    """Keeps the loss of every step and what every validation logged."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.train.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: L.Trainer, pl_module) -> None:
        self.val.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), SAMPLES)
    return tmp_path / "shards"


def make_module(tokenizer_folder: Path, model: dict[str, object] | None = None, **overrides: object) -> LitMVAR:
    """`model` are options of the module, the others of the network."""
    torch.manual_seed(0)
    network = MVARConfig(SCHEDULE, **(NETWORK | {"mamba_head_dim": 16} | overrides))
    return LitMVAR(network, str(tokenizer_folder), OptimizerConfig(base_lr=0.05), **(model or {}))


def make_trainer(root: Path, max_steps: int, **options: object) -> L.Trainer:
    settings = {
        "accelerator": "cpu",
        "max_steps": max_steps,
        "gradient_clip_val": 2.0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(root),
    }
    return L.Trainer(**(settings | options))


def test_the_loss_is_the_mean_cross_entropy_of_all_tokens(
    tokenizer: Tokenizer, tokenizer_folder: Path, shards: Path, tmp_path: Path
) -> None:
    module = make_module(tokenizer_folder)
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    losses = Losses()
    make_trainer(tmp_path, 1, callbacks=[losses], val_check_interval=1).validate(module, data, verbose=False)
    total, per_scale, correct, count = 0.0, torch.zeros(4), 0, 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            for tokens, label, valid in zip(batch.tokens, batch.labels, batch.valid, strict=True):
                if not valid:
                    continue
                logits = module.network(label[None], tokenizer.scale_inputs(tokens[None]))[0]
                each = F.cross_entropy(logits, tokens, reduction="none")
                total, count = total + float(each.mean()), count + 1
                per_scale += torch.stack([part.mean() for part in each.split(SCHEDULE.lengths)])
                correct += int((logits.argmax(dim=1) == tokens).sum())
    assert count == sum(SAMPLES)
    assert losses.val[0]["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert losses.val[0]["val/loss_last_scale"] == pytest.approx(float(per_scale[-1]) / count, rel=1e-5)
    assert losses.val[0]["val/acc"] == pytest.approx(correct / count / SCHEDULE.num_tokens, abs=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_lowers_the_loss(tokenizer_folder: Path, shards: Path, tmp_path: Path, mixer: str) -> None:
    losses = Losses()
    module = make_module(tokenizer_folder, mixers=MIXERS[mixer])
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    make_trainer(tmp_path, 60, callbacks=[losses]).fit(module, data)
    assert losses.train[0] == pytest.approx(torch.tensor(48.0).log().item(), abs=0.3)
    assert sum(losses.train[-5:]) / 5 < losses.train[0] - 0.2


def test_float16_with_loss_scaling_trains(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """The scaler begins so high that the first steps overflow: they are skipped, and the scale comes down."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    losses = Losses()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = make_module(tokenizer_folder)
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    make_trainer(tmp_path, 50, callbacks=[losses], plugins=[plugin]).fit(module, data)
    assert scaler.get_scale() < 2.0**26
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert sum(losses.train[-5:]) / 5 < losses.train[0] - 0.2


def test_gradients_are_clipped_by_their_norm(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """What reaches the optimizer, against a plain loop over all gradients; the logged norm is that before clipping."""
    seen = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module, optimizer) -> None:
            gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}
            seen["before"] = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5

        def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
            clipped = [p.grad for p in trainer.lightning_module.parameters()]
            seen["after"] = sum(float(g.square().sum()) for g in clipped) ** 0.5
            seen["logged"] = float(trainer.callback_metrics["train/grad_norm"])

    module = make_module(tokenizer_folder)
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    make_trainer(tmp_path, 1, callbacks=[Watch()], gradient_clip_val=0.01).fit(module, data)
    assert seen["before"] > 0.02
    assert seen["logged"] == pytest.approx(seen["before"], rel=1e-4)
    assert seen["after"] == pytest.approx(0.01, rel=1e-3)


def test_labels_are_dropped_at_the_given_rate_and_differ_from_batch_to_batch(
    tokenizer_folder: Path, shards: Path, tmp_path: Path
) -> None:
    module = make_module(tokenizer_folder)
    make_trainer(tmp_path, 1).fit(module, TokenDataModule(str(shards), str(shards), batch_size=16))
    labels = torch.arange(20_000) % 10
    dropped = [module.drop_labels(labels, batch_idx) == 10 for batch_idx in (0, 0, 1)]
    assert float(dropped[0].float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])


def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of the second epoch."""

    def run(max_steps: int, resume: str | None, **options: object) -> LitMVAR:
        torch.manual_seed(0)
        module = make_module(tokenizer_folder)
        data = TokenDataModule(str(shards), str(shards), batch_size=16)
        make_trainer(tmp_path, max_steps, **options).fit(module, data, ckpt_path=resume)
        return module

    checkpoint = ModelCheckpoint(dirpath=tmp_path / "run", every_n_train_steps=5, save_top_k=-1)
    expected = run(8, None, callbacks=[checkpoint], enable_checkpointing=True)
    (saved,) = (path for path in (tmp_path / "run").iterdir() if "step=5" in path.name)
    resumed = run(8, str(saved))
    weights = resumed.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in expected.state_dict().items())


class Interruption(Callback):
    """Stops the run in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module, optimizer) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")


def test_an_interrupted_step_is_done_again(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """The checkpoint that an exception leaves behind goes on with the batch that was interrupted."""

    def run(resume: str | None, callbacks: list[Callback]) -> LitMVAR:
        torch.manual_seed(0)
        module, data = make_module(tokenizer_folder), TokenDataModule(str(shards), str(shards), batch_size=16)
        trainer = make_trainer(tmp_path, 8, callbacks=callbacks, enable_checkpointing=bool(callbacks))
        trainer.fit(module, data, ckpt_path=resume)
        return module

    saving = ModelCheckpoint(dirpath=tmp_path / "run", save_on_exception=True, save_top_k=1)
    with pytest.raises(RuntimeError, match="interrupted"):
        run(None, [saving, Interruption(4)])
    (saved,) = (str(path) for path in (tmp_path / "run").iterdir() if "step=4" in path.name)
    resumed, expected = run(saved, []), run(None, [])
    weights = resumed.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in expected.state_dict().items())


def test_the_tokenizer_is_neither_trained_nor_saved(tokenizer_folder: Path) -> None:
    module = make_module(tokenizer_folder)
    assert not module.tokenizer.training
    assert all(name.startswith("network.") for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in module.tokenizer.parameters())


def test_padded_samples_do_not_count(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """52 samples in batches of 16 and of 52 score the same, though the former's last batch is filled up."""
    results = []
    for batch_size in (16, 52):
        data = TokenDataModule(str(shards), str(shards), batch_size=batch_size)
        (result,) = make_trainer(tmp_path, 1).validate(make_module(tokenizer_folder), data, verbose=False)
        results.append(result)
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], rel=1e-5), name


SCRIPT = """
import sys, torch, lightning as L
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_module import Losses, TokenDataModule, make_module, make_trainer
from lightning_mvar.callbacks import FIDCallback
from conftest import Pixels
if __name__ == "__main__":
    losses, devices = Losses(), int(sys.argv[1])
    fid = FIDCallback(Pixels(), {images!r}, num_samples=21, batch_size=16 // devices // 2, cache={cache!r})
    module = make_module(Path({tokenizer!r}))
    data = TokenDataModule({shards!r}, {shards!r}, batch_size=16 // devices)
    options = {{"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "callbacks": [fid, losses]}}
    make_trainer(Path({root!r}), 6, val_check_interval=3, check_val_every_n_epoch=None, **options).fit(module, data)
    if module.global_rank == 0:
        torch.save((losses.train, losses.val), {root!r} + f"/{{devices}}.pt")
"""


def test_two_processes_equal_one(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """Same global batch: same validation scores, same Frechet distance after the same steps."""
    write_images(tmp_path / "images")
    script = tmp_path / "run.py"
    script.write_text(
        SCRIPT.format(
            tests=str(Path(__file__).parent),
            images=str(tmp_path / "images"),
            cache=str(tmp_path / "cache"),
            tokenizer=str(tokenizer_folder),
            shards=str(shards),
            root=str(tmp_path),
        )
    )
    results = []
    for devices in ("1", "2"):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RANK", "LOCAL_RANK"))}
        subprocess.run([sys.executable, str(script), devices], check=True, env=environment | {"OMP_NUM_THREADS": "1"})
        results.append(torch.load(tmp_path / f"{devices}.pt"))
    (_, one), (_, two) = results
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=1e-6), name
    assert isinstance(results[0][1][0]["val/fid"], float)
