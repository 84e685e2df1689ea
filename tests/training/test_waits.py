"""Which operations of a training step would make the host wait for a GPU, found on a CPU by the operations' names."""

from __future__ import annotations

import traceback
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import SCHEDULE
from lit_modules import make_trainer
from test_lit_tokenizer import EVERYTHING, make_module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mvar.bench.launches import makes_host_wait
from lightning_mvar.tokenizer.discriminator import AdversaryConfig
from lightning_mvar.training.datamodules import ImageDataModule


class Waits(TorchDispatchMode):
    """Records where operations run whose result, or its shape, the host needs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if makes_host_wait(name, args):
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.found.append(f"{name} in {frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})")
        return func(*args, **(kwargs or {}))


class Watch(L.Callback):
    """Watches each step after the first one, from its batch to its end."""

    def __init__(self) -> None:
        self.waits, self.steps = Waits(), 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step:
            self.waits.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step > 1:
            self.waits.__exit__(None, None, None)
            self.steps += 1


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        (lambda t: t[t > 0], True),
        (lambda t: float(t[0]), True),
        (lambda t: (t > 0).nonzero(), True),
        (lambda t: t[torch.tensor([0, 1])], False),
        (lambda t: torch.where(t > 0, t, 0.0).sum(), False),
    ],
)
def test_waits_are_seen(operation, waits: bool) -> None:  # type: ignore[no-untyped-def]
    values: Tensor = torch.randn(4)
    with Waits() as found:
        operation(values)
    assert bool(found.found) == waits


def test_a_step_of_the_tokenizer_waits_for_nothing_but_the_norm_of_the_step_before(tmp_path: Path) -> None:
    """With all losses, and with codes that are revived in the third step."""
    adversary = AdversaryConfig(weight=0.5, channels=4, levels=3)
    module, watch = make_module(**EVERYTHING | {"adversary": adversary, "revive_every": 3}), Watch()
    trainer = make_trainer(tmp_path, 5, callbacks=[watch], log_every_n_steps=50, limit_val_batches=0)
    trainer.fit(module, ImageDataModule("digits:train", "digits:test", SCHEDULE.shapes[-1][0] * 8, batch_size=8))
    assert watch.steps == 4
    assert [wait.split(" (")[0] for wait in watch.waits.found] == ["_local_scalar_dense in __float__"] * 4
