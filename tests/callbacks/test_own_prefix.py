"""Losses after own draws: against full passes over mixed tokens, and the same on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SCHEDULE, random_tokens, scalars, write_token_shards
from lit_modules import Losses, make_module, make_trainer
from processes import start
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mvar import MVAR, Tokenizer
from lightning_mvar.callbacks import OwnPrefixCallback
from lightning_mvar.callbacks.own_prefix import score_own_prefixes
from lightning_mvar.errors import InputError
from lightning_mvar.sampling.philox import TOKENS, image_keys, uniform
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import draw
from lightning_mvar.training.datamodules import TokenDataModule

NAMES = [*(str(side) for side in SCHEDULE.side_lengths[1:]), "mean"]
PLAIN = SamplingSettings(guidance=0, top_k=0, top_p=0)


@torch.no_grad()
def reference(
    network: MVAR, tokenizer: Tokenizer, tokens: Tensor, labels: Tensor, keys: Tensor, k: int, own: int
) -> tuple[Tensor, Tensor]:
    """Returns loss and entropy (b,) of scale k after `own` drawn scales, from one full pass per drawn scale."""
    uniforms, mixed = uniform(keys, 0, SCHEDULE.num_tokens, TOKENS), tokens.clone()
    spans = [slice(o, o + n) for o, n in zip(SCHEDULE.offsets, SCHEDULE.lengths, strict=True)]
    for j in range(max(0, k - own), k):
        logits = network(labels, tokenizer.scale_inputs(mixed))[:, spans[j]]
        mixed[:, spans[j]] = draw(logits, uniforms[:, spans[j]], PLAIN)
    before = [[*tokenizer.quantizer.f_hats(each)][k - 1] for each in (tokens, mixed)]
    error = F.adaptive_avg_pool2d(before[0] - before[1], SCHEDULE.shapes[k]).flatten(2).transpose(1, 2)
    codebook = tokenizer.quantizer.codebook.weight
    targets = torch.cdist(codebook[tokens[:, spans[k]]] + error, codebook).argmin(dim=-1)
    logits = network(labels, tokenizer.scale_inputs(mixed))[:, spans[k]]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses.mean(dim=1), torch.distributions.Categorical(logits=logits).entropy().mean(dim=1)


@torch.no_grad()
@pytest.mark.parametrize("own_scales", [1, 2, 9])
def test_scores_equal_those_of_full_passes_over_mixed_tokens(
    network: MVAR, tokenizer: Tokenizer, own_scales: int
) -> None:
    tokens, labels, keys = random_tokens(5), torch.arange(5), image_keys(3, range(5))
    scores = score_own_prefixes(network, tokenizer.quantizer, tokens, labels, keys, own_scales)
    for k in range(1, SCHEDULE.num_scales):
        own, entropy = reference(network, tokenizer, tokens, labels, keys, k, own_scales)
        true, entropy_before = reference(network, tokenizer, tokens, labels, keys, k, 0)  # teacher forcing
        expected = torch.stack([own, true, entropy - entropy_before], dim=1)
        torch.testing.assert_close(scores[:, :, k - 1], expected, atol=1e-4, rtol=1e-4)


def test_a_validation_logs_means_over_the_first_images(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """In batches of 16 with padding, of which the last counted one is cut; training is as without the callback."""
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [37])
    data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16)
    losses = []
    for callbacks in ([], [OwnPrefixCallback(images=35, seed=7)]):
        module, recorded = make_module(tokenizer_folder), Losses()
        trainer = make_trainer(tmp_path, 2, val_check_interval=1, callbacks=[*callbacks, recorded])
        trainer.fit(module, data)
        losses.append(recorded.train)
    assert losses[0] == losses[1]
    batches = [*data.val_dataloader()]
    tokens, labels = (torch.cat([batch[i] for batch in batches])[:35] for i in (0, 1))
    network, keys = module.network.eval(), image_keys(7, range(35))
    scores = score_own_prefixes(network, tokenizer.quantizer, tokens, labels, keys, own_scales=1).mean(dim=0)
    lengths = torch.tensor(SCHEDULE.lengths[1:])
    for tag, row in zip(("val_own_prefix", "val_true_prefix", "val_entropy_shift"), scores, strict=True):
        expected = [*row.tolist(), float((row * lengths).sum() / lengths.sum())]
        logged = [float(trainer.callback_metrics[f"{tag}/{name}"]) for name in NAMES]
        assert logged == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_two_ranks_log_what_one_process_logs(plain_run_folder: Path) -> None:
    (plain_run_folder / "own.yaml").write_text(
        "trainer: {callbacks+: [{class_path: lightning_mvar.callbacks.OwnPrefixCallback, init_args: {images: 40}}]}"
    )
    fit = ["fit", "--config", "run.yaml", "--config", "own.yaml", "--trainer.max_steps", "2"]
    fit += ["--trainer.val_check_interval", "2", "--trainer.default_root_dir"]
    one = start([*fit, "one"], plain_run_folder, name="one")
    two = start([*fit, "two", "--trainer.strategy", "fsdp2", "--data.batch_size", "8"], plain_run_folder, 2, name="two")
    assert one.wait() == [0], one.printed()
    assert two.wait() == [0, 0], two.printed()
    logged = [scalars(plain_run_folder / name / "logs") for name in ("one", "two")]
    for tag in ("val_own_prefix", "val_true_prefix", "val_entropy_shift"):
        for name in NAMES:
            ((_, expected),), ((_, value),) = (curves[f"{tag}/{name}"] for curves in logged)
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("wrong", [{"images": 0}, {"own_scales": 0}, {"seed": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError):
        OwnPrefixCallback(**wrong)


def test_images_without_numbers_and_networks_of_single_tokens_are_refused(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    loader = DataLoader([(random_tokens(1)[0], 0)], batch_size=1)
    trainer = make_trainer(tmp_path, 1, callbacks=[OwnPrefixCallback()])
    with pytest.raises(InputError, match="use TokenDataModule"):
        trainer.fit(make_module(tokenizer_folder), loader, loader)
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [2])
    module = make_module(tokenizer_folder, mixers=("block_causal_attention",), prediction="token")
    data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=1)
    with pytest.raises(InputError, match="not single tokens"):
        make_trainer(tmp_path, 1, callbacks=[OwnPrefixCallback()]).fit(module, data)
