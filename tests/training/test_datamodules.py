"""A stated global batch on any number of devices, and a data order that follows the run's seed."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import write_token_shards
from lit_modules import Losses, make_module, make_trainer
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_mvar import Tokenizer
from lightning_mvar.data.images.examples import collate
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import NetworkOptions
from lightning_mvar.training.datamodules import ImageDataModule, TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.optim import OptimizerConfig


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Tokenizer) -> str:
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [20, 20, 12])
    return str(tmp_path / "shards")


def divided(devices: int, accumulated: int = 1, **options: int) -> tuple[int, int]:
    """Images per device and batch, and batches per step, on a trainer with so many devices."""
    data = ImageDataModule("digits:train", "digits:test", **options)
    strategy = SimpleNamespace(broadcast=lambda value: value)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=devices,
        global_rank=0,
        accumulate_grad_batches=accumulated,
        strategy=strategy,
        val_check_interval=100 * accumulated,
    )
    data.setup("fit")
    assert data.trainer.val_check_interval == 100 * data.trainer.accumulate_grad_batches  # as many steps as before
    return data.batch_size, data.trainer.accumulate_grad_batches


def test_every_division_of_a_global_batch_has_its_size() -> None:
    for devices, most in itertools.product((1, 2, 3, 4, 6, 8), (1, 5, 16, 100, 768)):
        per_device, batches = divided(devices, global_batch_size=768, max_batch_size=most)
        assert devices * per_device * batches == 768
        assert per_device <= most
        fewer = [n for n in range(1, batches) if 768 % (devices * n) == 0 and 768 // (devices * n) <= most]
        assert fewer == []


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_batches_are_pinned_for_a_trainer_on_gpus_alone(
    shards: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where CUDA is available to a trainer on CPUs; and as a whole, which dataclasses would not be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trainer = make_trainer(Path(), 1)
    trainer.strategy._root_device = torch.device(kind)  # type: ignore[attr-defined]
    tokens = TokenDataModule(shards, shards, batch_size=4)
    images = ImageDataModule("digits:train", "digits:test", 32)
    for data in (tokens, images):
        data.trainer = trainer
    tokens.setup("fit")
    loaders = [data.train_dataloader() for data in (tokens, images)] + [
        tokens.val_dataloader(),
        images.val_dataloader(),
    ]
    assert [loader.pin_memory for loader in loaders] == [kind == "cuda"] * 4
    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor.shape) or tensor)
    batch = collate([images.images("val")[i] for i in range(3)])
    assert pin_memory(batch) == batch
    assert pinned == [batch.images.shape, batch.labels.shape]


def test_images_per_device_can_be_given_instead() -> None:
    assert divided(4, batch_size=96) == (96, 1)
    assert divided(4, accumulated=2, batch_size=96) == (96, 2)
    assert divided(2, accumulated=4, global_batch_size=64) == (8, 4)
    assert divided(1) == (64, 1)


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        (5, {"global_batch_size": 768}, "data.global_batch_size 768 cannot be divided among 5 devices"),
        (2, {"global_batch_size": 1}, "data.global_batch_size 1 cannot be divided among 2 devices"),
        (1, {"global_batch_size": 0}, "data.global_batch_size must be at least 1, got 0"),
        (1, {"batch_size": 0}, "data.batch_size must be at least 1"),
        (1, {"max_batch_size": 0}, "data.max_batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_divided_is_refused(devices: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        divided(devices, **options)


def test_accumulation_keeps_learning_rate_and_losses(tokenizer_folder: Path, shards: str, tmp_path: Path) -> None:
    losses, rates = [], []
    for most in (16, 8):
        module, recorded = make_module(tokenizer_folder, model={"label_drop": 0.0}), Losses()
        data = TokenDataModule(shards, shards, global_batch_size=16, max_batch_size=most, seed=0)
        trainer = make_trainer(
            tmp_path / str(most), 4, callbacks=[recorded], val_check_interval=2, check_val_every_n_epoch=None
        )
        trainer.fit(module, data)
        assert trainer.accumulate_grad_batches == 16 // most
        assert module.global_batch == 16
        assert len(recorded.val) == 2  # after two steps and after four, not batches
        per_step = torch.tensor(recorded.train).view(-1, 16 // most).mean(dim=1)
        losses.append(per_step)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert rates[0] == rates[1]


def test_the_order_of_the_data_follows_the_seed_of_the_run(shards: str) -> None:
    def order(seed: int | None, of_the_run: int) -> list[int]:
        L.seed_everything(of_the_run)
        data = TokenDataModule(shards, shards, batch_size=4, seed=seed)
        data.setup("fit")
        return [i for batch in data.train_dataloader() for i in batch.ids.tolist()]

    assert order(None, 1) == order(None, 1) == order(1, 2)
    assert order(None, 1) != order(None, 2)


def test_margins_of_training_and_validation_must_be_equal(shards: str, tmp_path: Path) -> None:
    manifest = Manifest.load(Path(shards))
    other = str(shutil.copytree(shards, tmp_path / "other"))
    replace(manifest, margin=1.0).save(Path(other))
    data = TokenDataModule(other, other)
    data.setup("fit")
    assert data.margin == 1.0
    with pytest.raises(InputError, match=r"different margins, 1.125 in .*shards and 1.0 in .*other: tokenize all"):
        TokenDataModule(shards, other).setup("fit")
    own = replace(manifest, source="samples of a network: network=0", margin=1.125)
    own.save(Path(shards))
    TokenDataModule(other, other, own=shards).setup("fit")  # samples have no margin


def test_what_tokenizer_and_shards_say_needs_not_be_repeated(
    tokenizer: Tokenizer, tokenizer_folder: Path, shards: str, tmp_path: Path
) -> None:
    open_options = NetworkOptions(depth=1, width=32, heads=2, head_dim=16)
    module = LitMVAR(open_options, str(tokenizer_folder), OptimizerConfig())
    make_trainer(tmp_path, 1).fit(module, TokenDataModule(shards, shards, batch_size=16))
    config = module.network_config
    assert (config.schedule, config.vocab_size, config.code_dim) == (tokenizer.config.schedule, 48, 8)
    assert config.num_classes == 10
    assert module.network.head.weight.shape == (48, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vocab_size": 64}, "does not fit the network: vocab_size is 48 there, 64 in the network"),
        ({"num_classes": 11}, "num_classes is 10 in the shards and 11 in the model"),
    ],
)
def test_what_is_given_nevertheless_is_checked(
    given: dict[str, int], message: str, tokenizer_folder: Path, shards: str, tmp_path: Path
) -> None:
    options = NetworkOptions(depth=1, width=32, heads=2, head_dim=16, **given)
    module = LitMVAR(options, str(tokenizer_folder), OptimizerConfig())
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, 1).fit(module, TokenDataModule(shards, shards, batch_size=16))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mixers": ("nonsense",)}, "mixer"), ({"window": 4}, "window"), ({"width": 7}, "width"), ({"depth": 0}, "depth")],
)
def test_wrong_options_are_refused_before_anything_is_read(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NetworkOptions(**options)
