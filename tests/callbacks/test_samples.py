"""TensorBoard histograms of sampled and encoded codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SCHEDULE, tiny_network, write_images, write_token_shards
from lightning.pytorch.loggers import TensorBoardLogger
from lit_modules import make_module, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, HistogramValue

from lightning_mvar import Tokenizer, TokenizerConfig
from lightning_mvar.callbacks import ReconstructionsCallback, SamplesCallback, samples
from lightning_mvar.callbacks.tensorboard import add_counts
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.errors import InputError
from lightning_mvar.sampling.generate import generate
from lightning_mvar.sampling.grids import image_grid
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.training.datamodules import ImageDataModule, TokenDataModule
from lightning_mvar.training.tokenizer import LitTokenizer

SCALES = [str(side) for side in SCHEDULE.side_lengths]


def histograms(logs: Path) -> dict[str, HistogramValue]:
    """Returns the last histogram of each tag."""
    events = EventAccumulator(str(logs))
    events.Reload()
    return {tag: events.Histograms(tag)[-1].histogram_value for tag in events.Tags()["histograms"]}


def make_logger(root: Path) -> TensorBoardLogger:
    return TensorBoardLogger(str(root), name="", version="logs")


def counts_of(histogram: HistogramValue, vocab_size: int) -> list[int]:
    """Returns the count per code of a histogram with one bucket per code, whose upper limit is the code plus one."""
    counts = dict(zip(histogram.bucket_limit, histogram.bucket, strict=True))
    return [int(counts.get(code + 1, 0)) for code in range(vocab_size)]


@pytest.mark.parametrize("options", [{}, {"guidance_network": "weaker", "temperature": 0.9}], ids=str)
def test_histograms_count_the_codes_of_the_shown_samples(
    options: dict[str, Any],
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_folder(Path("weaker"), tokenizer, tiny_network(depth=1))
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [32])
    module = make_module(tokenizer_folder)
    data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16)
    callbacks, logger = [SamplesCallback(3, 2, SamplingSettings(**options))], make_logger(tmp_path)
    make_trainer(tmp_path, 1, val_check_interval=1, callbacks=callbacks, logger=logger).fit(module, data)
    logged = histograms(tmp_path / "logs")
    assert logged.keys() == {f"sampled_codes/{scale}" for scale in [*SCALES, "all"]}
    labels = torch.linspace(0, 9, 3).long().repeat_interleave(2)
    network = module.network.eval()
    keys = image_keys(0, range(6))
    _, tokens = generate(network, tokenizer, labels, generator=keys, return_tokens=True, **options)
    scales = tokens.split(SCHEDULE.lengths, dim=1)
    for scale, sampled in [*zip(SCALES, scales, strict=True), ("all", tokens)]:
        assert counts_of(logged[f"sampled_codes/{scale}"], 48) == sampled.flatten().bincount(minlength=48).tolist()


def test_images_are_drawn_in_batches_and_shared_by_ranks(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two ranks draws half of five images, the last one twice, in batches of two."""
    module = make_module(tokenizer_folder)
    module.trainer = make_trainer(tmp_path, 1)
    module.configure_model()
    labels, callback = torch.arange(5), SamplesCallback()
    expected = callback.draw(module.trainer, module, labels)
    monkeypatch.setattr(samples, "max_batch_size", lambda config: 2)
    shares = []

    def draw_share(rank: int, gather: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        strategy = SimpleNamespace(precision_plugin=module.trainer.precision_plugin, all_gather=gather)
        trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy)
        return callback.draw(trainer, module, labels)

    draw_share(1, lambda share: shares.append(share) or torch.stack([share, share]))
    assert [len(share) for share in shares] == [3, 3]
    drawn = draw_share(0, lambda share: torch.stack([share, shares.pop(0)]))
    for actual, wanted in zip(drawn, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_histograms_count_the_codes_of_all_validation_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images")  # 18 of them
    config = TokenizerConfig(SCHEDULE, 24, 4, channels=8, multipliers=(1, 2), blocks=1, num_phi=2)
    module = LitTokenizer(config)
    data = ImageDataModule(str(tmp_path / "images"), str(tmp_path / "images"), 8, batch_size=4)
    options = {"callbacks": [ReconstructionsCallback(images=2)], "logger": make_logger(tmp_path)}
    make_trainer(tmp_path, 1, val_check_interval=1, **options).fit(module, data)
    logged = histograms(tmp_path / "logs")
    with torch.no_grad():
        tokens = torch.cat([module.tokenizer.encode(batch.images) for batch in data.val_dataloader()])
    assert logged["encoded_codes/all"].num == 18 * SCHEDULE.num_tokens
    scales = tokens.split(SCHEDULE.lengths, dim=1)
    for scale, chosen in [*zip(SCALES, scales, strict=True), ("all", tokens)]:
        assert counts_of(logged[f"encoded_codes/{scale}"], 24) == chosen.flatten().bincount(minlength=24).tolist()


@pytest.mark.parametrize(
    ("batch_size", "images", "expected"), [(4, 3, [0, 8, 16]), (18, 3, [0, 8, 17]), (4, 50, [*range(17)])]
)
def test_reconstructions_are_spread_over_the_validation_images(
    batch_size: int, images: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images")  # 18 of them
    config = TokenizerConfig(SCHEDULE, 24, 4, channels=8, multipliers=(1, 2), blocks=1, num_phi=2)
    data = ImageDataModule(str(tmp_path / "images"), str(tmp_path / "images"), 8, batch_size=batch_size)
    logged: list[torch.Tensor] = []
    monkeypatch.setattr(samples, "log_image", lambda trainer, tag, image: logged.append(image))
    callback = ReconstructionsCallback(images)
    trainer = make_trainer(tmp_path, 1, callbacks=[callback])
    trainer.validate(LitTokenizer(config), data, verbose=False)
    originals = torch.cat([batch.images for batch in data.val_dataloader()]) / 2 + 0.5
    shown = originals[expected]
    (grid,) = logged
    upper = slice(grid.shape[1] // 2)
    torch.testing.assert_close(grid[:, upper], image_grid(shown, len(shown))[:, upper])


@pytest.mark.parametrize("vocab_size", [1, 64, 100, 4096])
def test_a_histogram_of_counts_equals_one_of_the_codes(vocab_size: int, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(vocab_size // 4, vocab_size, 1000)
    logger = make_logger(tmp_path)
    add_counts(logger.experiment, "codes", torch.from_numpy(codes).bincount(minlength=vocab_size), 0)
    logger.experiment.flush()
    (logged,) = histograms(tmp_path / "logs").values()
    assert (logged.min, logged.max, logged.num) == (codes.min(), codes.max() + 1, 1000)
    assert (logged.sum, logged.sum_squares) == (codes.sum(), (codes**2).sum())
    assert len(logged.bucket) == min(vocab_size, 64)
    edges = np.concatenate([[0], logged.bucket_limit])
    np.testing.assert_array_equal(logged.bucket, np.histogram(codes, edges)[0])


def test_callbacks_that_would_show_nothing_are_refused() -> None:
    for make in (lambda: SamplesCallback(classes=0), lambda: SamplesCallback(per_class=0)):
        with pytest.raises(InputError, match=r"SamplesCallback's .* must be at least 1, got 0"):
            make()
    with pytest.raises(InputError, match="ReconstructionsCallback's images must be at least 1, got -1"):
        ReconstructionsCallback(images=-1)
