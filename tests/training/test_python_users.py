"""Both modules in Python, without a datamodule: own DataLoaders, validation, prediction, loading of checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, SCHEDULE, Pixels, random_tokens, write_images, write_token_shards
from lightning.pytorch.callbacks import LearningRateFinder
from lit_modules import make_module, make_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_mvar import Tokenizer, TokenizerConfig, generate
from lightning_mvar.callbacks import Checkpoint, FIDCallback, SamplesCallback
from lightning_mvar.checkpoints import load_trained
from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.models.config import NetworkOptions
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.scorer import FORMAT, Scorer, ScorerConfig, save_scorer
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.training.datamodules import ImageDataModule, TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.optim import OptimizerConfig
from lightning_mvar.training.tokenizer import LitTokenizer


@pytest.fixture
def loader() -> DataLoader:
    return DataLoader(TensorDataset(random_tokens(20), torch.arange(20) % 10), batch_size=8)


def test_own_loaders_train_validate_and_resume(tokenizer_folder: Path, loader: DataLoader, tmp_path: Path) -> None:
    def fit(steps: int, ckpt_path: Path | None = None) -> LitMVAR:
        module = make_module(tokenizer_folder, model={"ema_decay": 0.5})
        checkpoint = Checkpoint(str(tmp_path / "checkpoints"), every_n_train_steps=2)
        trainer = make_trainer(tmp_path, steps, callbacks=[checkpoint], enable_checkpointing=True)
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
        assert trainer.global_step == steps
        assert module.global_batch == 8
        return module

    module = fit(4)
    resumed = fit(6, tmp_path / "checkpoints/last.ckpt")
    assert resumed.class_names == [str(i) for i in range(10)]
    (scores,) = make_trainer(tmp_path, 1).validate(resumed, loader, verbose=False)
    assert 0 < scores["val/loss"] < 10
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(module, loader)
    trainer.validate(module, loader, verbose=False)
    trainer.save_checkpoint(tmp_path / "after_validation.ckpt")


def test_a_checkpoint_gives_its_module(tokenizer_folder: Path, loader: DataLoader, tmp_path: Path) -> None:
    trained = make_module(tokenizer_folder, model={"ema_decay": 0.5})
    trainer = make_trainer(tmp_path, 3)
    trainer.fit(trained, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitMVAR.load_from_checkpoint(tmp_path / "a.ckpt", optimizer=OptimizerConfig(base_lr=0.1))
    assert loaded.ema_decay == 0.5
    for name, weights in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights)
    (before,), (after,) = (make_trainer(tmp_path, 1).validate(m, loader, verbose=False) for m in (trained, loaded))
    assert before == after
    make_trainer(tmp_path, 1).fit(loaded, loader)
    with pytest.raises(InputError, match="does not exist"):
        LitMVAR.load_from_checkpoint(tmp_path / "none.ckpt")
    older = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del older["lightning_mvar"]["run"]["ema_decay"]
    torch.save(older, tmp_path / "older.ckpt")
    with pytest.raises(InputError, match=r"older.ckpt does not record the decay of its weight average: pass ema_decay"):
        LitMVAR.load_from_checkpoint(tmp_path / "older.ckpt")
    assert LitMVAR.load_from_checkpoint(tmp_path / "older.ckpt", ema_decay=0.9).ema_decay == 0.9
    assert LitMVAR.load_from_checkpoint(tmp_path / "older.ckpt", ema_decay=None).ema is None


def test_predictions_are_the_images_of_their_labels(
    tokenizer: Tokenizer, tokenizer_folder: Path, loader: DataLoader, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, 2)
    module = make_module(tokenizer_folder)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    labels = torch.tensor([3, 1, 4, 1, 5])
    module.sampling = SamplingSettings(guidance=0.5, seed=7)
    network = load_trained(tmp_path / "a.ckpt").network
    expected = generate(network, tokenizer, labels, guidance=0.5, generator=image_keys(7, range(5)))
    pairs = TensorDataset(torch.zeros(5, 2), labels)
    for data in (DataLoader(labels, batch_size=2), DataLoader(TensorDataset(labels)), DataLoader(pairs, batch_size=4)):
        images = torch.cat(trainer.predict(module, data))
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    guided = {"guidance": 0.5, "guidance_network": str(tmp_path / "a.ckpt")}
    module.sampling = SamplingSettings(**guided, seed=7)
    expected = generate(network, tokenizer, labels, **guided, generator=image_keys(7, range(5)))
    images = torch.cat(trainer.predict(module, DataLoader(labels, batch_size=2)))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    write_token_shards(tmp_path / "shards", module.tokenizer_fingerprint, [6])
    shards = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=4)
    assert [len(batch) for batch in trainer.predict(module, shards)] == [4, 2]  # without the padding
    padding = TokenBatch(
        random_tokens(4), torch.zeros(4).long(), torch.zeros(4, dtype=torch.bool), torch.zeros(4).long()
    )
    (none,) = trainer.predict(module, DataLoader([padding], batch_size=None))
    assert none.shape == (0, 3, 8, 8)


def test_bad_scorers_are_refused_before_anything_is_trained_or_drawn(
    tokenizer_folder: Path, loader: DataLoader, tmp_path: Path
) -> None:
    config = ScorerConfig(FORMAT.number, [*SCHEDULE.side_lengths], 8, 10, 8, "0" * 16, "a test")
    save_scorer(Scorer(config), tmp_path / "scorer")
    sampling = SamplingSettings(drafts=2, draft_scorer=str(tmp_path / "scorer"))
    module, message = make_module(tokenizer_folder), f"was trained with quantizer {'0' * 16}, but the network uses"
    callbacks = (SamplesCallback(sampling=sampling), FIDCallback(Pixels(), "digits:test", sampling=sampling))
    for callback in callbacks:
        with pytest.raises(InputError, match=message):
            make_trainer(tmp_path, 1, callbacks=[callback]).fit(module, loader)
    module.sampling = sampling
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, 1).predict(module, DataLoader(torch.tensor([3]), batch_size=1))
    save_scorer(Scorer(replace(config, quantizer=fingerprint(module.tokenizer.quantizer))), tmp_path / "scorer")
    (tmp_path / "scorer/scorer.safetensors").write_bytes(b"torn")
    for callback in callbacks:
        with pytest.raises(InputError, match=r"scorer\.safetensors"):
            make_trainer(tmp_path, 1, callbacks=[callback]).fit(module, loader)


def test_what_own_loaders_cannot_tell_is_asked_for(tokenizer_folder: Path, loader: DataLoader, tmp_path: Path) -> None:
    module, trainer = make_module(tokenizer_folder), make_trainer(tmp_path, 1)
    tokens, labels = random_tokens(8), torch.arange(8)
    cases: list[tuple[object, str]] = [
        (tokens, "a pair"),
        (TensorDataset(tokens[:, :-1], labels), r"integer tensor \(b, 30\)"),
        (TensorDataset(tokens + 40, labels), r"must be in \[0, 47\]"),
        (TensorDataset(tokens, labels + 10), r"labels must be in \[0, 10\]"),
        (TensorDataset(tokens, labels.float()), "labels must be an integer tensor"),
    ]
    for data, message in cases:
        with pytest.raises(InputError, match=message):
            trainer.validate(module, DataLoader(data, batch_size=4), verbose=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="labels must be"):
        trainer.predict(module, DataLoader(torch.tensor([11])))
    batches = DataLoader(TensorDataset(tokens, labels), batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(InputError, match="cannot scale the learning rate: the DataLoader has no batch_size"):
        trainer.fit(make_module(tokenizer_folder), batches)
    open_ended = LitMVAR(NetworkOptions(depth=1, width=32, heads=1, head_dim=32), str(tokenizer_folder))
    with pytest.raises(InputError, match=r"set network.num_classes: without token shards it is unknown"):
        trainer.validate(open_ended, loader, verbose=False)


def test_the_learning_rate_finder_sets_base_lr(tokenizer_folder: Path, loader: DataLoader, tmp_path: Path) -> None:
    module = make_module(tokenizer_folder)
    finder = LearningRateFinder(max_lr=1.0, num_training_steps=20)
    make_trainer(tmp_path, 30, callbacks=[finder]).fit(module, loader)
    assert finder.optimal_lr is not None
    tried, suggested = finder.optimal_lr.results["lr"], finder.optimal_lr.suggestion()
    assert tried[0] < 1e-6
    assert tried[-1] > 1e-3  # it was in charge of the rate
    assert module.optimizer_config.base_lr * 8 / 256 == pytest.approx(suggested)
    assert module.total_steps == 30


def test_the_tokenizer_too(tmp_path: Path) -> None:
    config = TokenizerConfig(SCHEDULE, 16, 4, channels=8, multipliers=(1, 2), blocks=1, num_phi=3, norm_groups=4)
    images = torch.rand(12, 3, 8, 8) * 2 - 1
    loader = DataLoader(TensorDataset(images, torch.arange(12)), batch_size=4)
    module = LitTokenizer(config, ema_decay=0.5)
    trainer = make_trainer(tmp_path, 4)
    trainer.fit(module, loader, DataLoader(images, batch_size=4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitTokenizer.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.ema_decay == 0.5
    for name, weights in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights)
    (before,), (after,) = (make_trainer(tmp_path, 1).validate(m, loader, verbose=False) for m in (module, loaded))
    assert before["val/loss"] == after["val/loss"]
    reconstructions = torch.cat(trainer.predict(loaded, loader))
    assert reconstructions.shape == images.shape
    with pytest.raises(InputError, match=r"float tensor \(b, 3, 8, 8\)"):
        trainer.validate(loaded, DataLoader(images[..., :4]), verbose=False)
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.raises(InputError, match="not a checkpoint of `lightning-mvar train-tokenizer`"):
        LitTokenizer.load_from_checkpoint(tmp_path / "b.ckpt")


@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_overfitting_repeats_the_same_batches(tokenizer_folder: Path, tmp_path: Path, kind: str) -> None:
    seen: list[list[str]] = []
    if kind == "tokens":
        module: LitMVAR | LitTokenizer = make_module(tokenizer_folder)
        write_token_shards(tmp_path / "shards", module.tokenizer_fingerprint, [20, 20])  # type: ignore[union-attr]
        data: TokenDataModule | ImageDataModule = TokenDataModule(*[str(tmp_path / "shards")] * 2, batch_size=4)
    else:
        write_images(tmp_path / "images")
        config = TokenizerConfig(SCHEDULE, 16, 4, channels=8, multipliers=(1, 2), blocks=1, num_phi=3, norm_groups=4)
        module = LitTokenizer(config)
        data = ImageDataModule(*[str(tmp_path / "images")] * 2, resolution=8, batch_size=4)
        assert len(CLASSES) * 6 > 8

    step = type(module).training_step

    def training_step(batch, batch_idx):  # type: ignore[no-untyped-def]
        seen.append(batch.ids.tolist() if kind == "tokens" else batch.images.tolist())
        return step(module, batch, batch_idx)

    module.training_step = training_step  # type: ignore[method-assign, assignment]
    make_trainer(tmp_path, 6, overfit_batches=2).fit(module, data)
    assert seen[0] != seen[1]
    assert seen[:2] == seen[2:4] == seen[4:]
