"""Training with revealed tokens against plain loops; resumption; strategies."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SCHEDULE, pictures, tiny_network
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_modules import Losses, make_module, make_trainer
from training_runs import TWO_RANKS, largest_difference, train, weights

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.errors import InputError
from lightning_mvar.models.mvar import Revealed
from lightning_mvar.sampling.philox import TOKENS, image_keys, uniform
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.objectives import (
    ConditionContrastive,
    DirectDiscriminative,
    Objective,
    SelfCorrecting,
    TeacherForced,
)
from lightning_mvar.training.revealing import HIDDEN, draw_revealed


def fit(folder: Path, shards: str, root: Path, steps: int, ckpt_path: str | None = None, **options: object) -> LitMVAR:
    """Trains a tiny network that reads revealed tokens; `options` are those of the trainer, or `model`."""
    model = options.pop("model", {})
    module = make_module(folder, model=model, reveal=True, drop_path=0.1)  # type: ignore[arg-type]
    data = TokenDataModule(shards, shards, batch_size=8, seed=0)
    make_trainer(root, steps, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


def first_batch(module: LitMVAR) -> TokenBatch:
    return next(iter(module.trainer.datamodule.train_dataloader()))


def test_revealed_tokens_agree_with_a_plain_loop() -> None:
    keys = image_keys(3, range(20))
    revealed = draw_revealed(keys, SCHEDULE)
    token, scale = uniform(keys, torch.arange(2)[:, None], SCHEDULE.num_tokens, TOKENS).unbind(1)
    for i in range(20):
        for k, (begin, n) in enumerate(zip(SCHEDULE.offsets, SCHEDULE.lengths, strict=True)):
            u = float(scale[i, k])
            share = 0.0 if u < 0.5 else 1 - math.cos(math.pi / 2 * (2 * u - 1))
            assert revealed[i, begin : begin + n].tolist() == [float(x) < share for x in token[i, begin : begin + n]]


def test_half_of_the_scales_are_hidden_and_the_expected_share_is_known() -> None:
    revealed = draw_revealed(image_keys(0, range(4000)), SCHEDULE)
    assert float((~revealed).float().mean()) == pytest.approx(HIDDEN, abs=0.01)
    last = revealed[:, SCHEDULE.offsets[-1] :].float().mean(dim=1)
    share_of_few = 0.5 * (2 / math.pi) * math.acos(1 - 1 / 32)  # less than half a token of 16 is expected
    assert 0.5 < float((last == 0).float().mean()) < 0.5 + 2 * share_of_few
    first, second = revealed[:, 0], revealed[:, 1:5].any(dim=1)
    both = float((first & second).float().mean())
    assert both == pytest.approx(float(first.float().mean()) * float(second.float().mean()), abs=0.01)


@pytest.mark.parametrize("loss_weights", [None, [3.0, 0.0, 2.0, 1.0]])
def test_the_loss_equals_a_loop_over_hidden_tokens(
    loss_weights: list[float] | None, tokenizer_folder: Path, shards: str, tmp_path: Path
) -> None:
    module = fit(tokenizer_folder, shards, tmp_path, 2, model={"objective": TeacherForced(loss_weights)})
    module.network.eval()
    batch = first_batch(module)
    mask = draw_revealed(module.image_keys(batch, 4, "reveal"), SCHEDULE)
    revealed = Revealed(module.tokenizer.quantizer.codebook(batch.tokens), mask)
    with torch.no_grad():
        logits = module.network(batch.labels, module.tokenizer.scale_inputs(batch.tokens), revealed)
    by_token = [(loss_weights or [1.0] * 4)[k] for k in SCHEDULE.scale_ids.tolist()]
    total = sum(
        by_token[j] * float(F.cross_entropy(logits[i, j], batch.tokens[i, j]))
        for i in range(8)
        for j in range(SCHEDULE.num_tokens)
        if not mask[i, j]
    )
    scores = module.objective(module, batch, batch.labels, 4)
    expected = total / HIDDEN / sum(by_token) / 8
    assert 0 < int(mask.sum()) < mask.numel()
    assert float(scores.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert bool(((scores.losses == 0) == mask).all())


def test_validation_reveals_nothing(tokenizer_folder: Path, shards: str, tmp_path: Path) -> None:
    losses = Losses()
    module = fit(tokenizer_folder, shards, tmp_path, 3, callbacks=[losses], val_check_interval=3)
    total = count = 0.0
    for batch in module.trainer.datamodule.val_dataloader():
        with torch.no_grad():
            logits = module.network.eval()(batch.labels, module.tokenizer.scale_inputs(batch.tokens))
        each = F.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten(), reduction="none").view_as(batch.tokens)
        total, count = total + float(each[batch.valid].sum()), count + float(batch.valid.sum()) * SCHEDULE.num_tokens
    assert losses.val[-1]["val/loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer_folder: Path, shards: str, tmp_path: Path) -> None:
    """The run stops in the middle of the second epoch."""
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "run", every_n_train_steps=10, save_top_k=-1)
    expected = fit(tokenizer_folder, shards, tmp_path, 14, callbacks=[checkpoint], enable_checkpointing=True)
    (saved,) = (str(path) for path in (tmp_path / "run").iterdir() if "step=10" in path.name)
    resumed = fit(tokenizer_folder, shards, tmp_path, 14, saved).state_dict()
    assert expected.network.reveal_proj.weight.abs().sum() > 0
    assert all(torch.equal(value, resumed[name]) for name, value in expected.state_dict().items())


def test_strategies_train_the_same_network_and_draw_the_same_images(run_folder: Path) -> None:
    """The callback draws each scale in up to three steps."""
    options = ["--model.network.reveal", "true", "--trainer.max_steps", "4"]
    text = (run_folder / "run.yaml").read_text()
    (run_folder / "run.yaml").write_text(text.replace("per_class: 2", "per_class: 2, sampling: {steps: 3}"))
    train(run_folder, "one", options)
    expected = weights(run_folder / "one")
    assert expected["network.reveal_proj.bias"].abs().sum() > 0
    for strategy in ("ddp", "fsdp2"):
        train(run_folder, strategy, [*options, *TWO_RANKS, strategy], devices=2)
        assert largest_difference(weights(run_folder / strategy), expected) < 1e-4
        assert pictures(run_folder / strategy / "logs", "samples") == pictures(run_folder / "one/logs", "samples")


@pytest.mark.parametrize("objective", [SelfCorrecting, DirectDiscriminative, ConditionContrastive])
def test_objectives_that_reveal_nothing_refuse_such_networks(objective: type[Objective]) -> None:
    with pytest.raises(InputError, match=r"reveals no tokens: set network\.reveal to false, or use TeacherForced"):
        objective().check(tiny_network(reveal=True).config)


def test_weights_of_a_plain_network_learn_to_read_revealed_tokens(
    tokenizer: Tokenizer, tokenizer_folder: Path, shards: str, tmp_path: Path
) -> None:
    """Such a run starts as the plain network, whatever is revealed."""
    plain = tiny_network(width=32, head_dim=16)
    save_folder(tmp_path / "plain", tokenizer, plain)
    module = fit(tokenizer_folder, shards, tmp_path, 0, model={"weights": str(tmp_path / "plain")})
    module.network.eval()
    batch = first_batch(module)
    with torch.no_grad():
        expected, _ = plain.score(batch.labels, tokenizer.scale_inputs(batch.tokens), batch.tokens)
        losses, _ = module.score(batch, batch.labels, revealed=batch.tokens > 20)
    torch.testing.assert_close(losses, expected)
