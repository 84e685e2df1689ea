"""Each objective against a plain computation of its loss, in a module that trains with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SCHEDULE, write_token_shards
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_modules import make_module, make_trainer
from test_waits import Watch
from torch import Tensor

from lightning_mvar import MVAR, Tokenizer
from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.errors import InputError
from lightning_mvar.models.scoring import draw_in_parts
from lightning_mvar.sampling.philox import TOKENS, uniform
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.objectives import Objective, SelfCorrecting, TeacherForced


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_token_shards(folder, tokenizer.fingerprint(), [20, 20, 12])
    return str(folder)


class Runs:
    """Trains tiny modules with an objective."""

    def __init__(self, tokenizer_folder: Path, shards: str, root: Path) -> None:
        self.tokenizer_folder, self.shards, self.root = tokenizer_folder, shards, root

    def fit(self, objective: Objective, max_steps: int = 1, ckpt_path: str | None = None, **trainer: object) -> LitMVAR:
        module = make_module(self.tokenizer_folder, model={"objective": objective}, drop_path=0.1)
        data = TokenDataModule(self.shards, self.shards, batch_size=8)
        make_trainer(self.root, max_steps, limit_val_batches=0, **trainer).fit(module, data, ckpt_path=ckpt_path)
        return module


@pytest.fixture
def runs(tokenizer_folder: Path, shards: str, tmp_path: Path) -> Runs:
    return Runs(tokenizer_folder, shards, tmp_path)


def first_batch(module: LitMVAR) -> TokenBatch:
    return next(iter(module.trainer.datamodule.train_dataloader()))


def logits_of(module: LitMVAR, labels: Tensor, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module.network.eval()(labels, inputs)


def same_weights(a: LitMVAR, b: LitMVAR) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_weighted_and_smoothed_losses_equal_plain_sums(runs: Runs) -> None:
    weights = [3.0, 0.0, 2.0, 1.0]
    module = runs.fit(TeacherForced(weights, label_smoothing=0.2))
    batch = first_batch(module)
    logits = logits_of(module, batch.labels, module.tokenizer.scale_inputs(batch.tokens))
    total, norm = 0.0, sum(w * n for w, n in zip(weights, SCHEDULE.lengths, strict=True))
    for row, tokens in zip(logits.log_softmax(dim=-1), batch.tokens, strict=True):
        each = -0.8 * row.gather(1, tokens[:, None])[:, 0] - 0.2 * row.mean(dim=1)
        total += sum(w * float(part.sum()) for w, part in zip(weights, each.split(SCHEDULE.lengths), strict=True))
    loss = module.objective(module, batch, batch.labels, 0).loss
    assert float(loss) == pytest.approx(total / norm / len(batch.labels), rel=1e-5)
    even = TeacherForced([0.5] * 4)(module, batch, batch.labels, 0)
    assert float(even.loss) == pytest.approx(float(even.losses.mean()), rel=1e-6)


def test_self_correction_that_replaces_nothing_is_teacher_forcing(runs: Runs) -> None:
    assert same_weights(runs.fit(SelfCorrecting(max_share=0), 3), runs.fit(TeacherForced(), 3))


@pytest.mark.parametrize("replacement", ["neighbours", "own"])
def test_self_correction_scores_the_targets_of_a_corrupted_pyramid(replacement: str, runs: Runs) -> None:
    """The objective's loss, computed again image by image from its random numbers."""
    module = runs.fit(SelfCorrecting(0.8, replacement, neighbours=4))
    module.network.eval()
    batch, quantizer = first_batch(module), module.tokenizer.quantizer
    keys = module.image_keys(batch, 5, "self-correction")
    which, by, share = uniform(keys, torch.arange(3)[:, None], SCHEDULE.num_tokens, TOKENS).unbind(1)
    distances = torch.cdist(quantizer.codebook.weight, quantizer.codebook.weight)
    own = logits_of(module, batch.labels, module.tokenizer.scale_inputs(batch.tokens)).softmax(dim=-1)
    losses, shares = [], []
    for i, tokens in enumerate(batch.tokens):
        replaced = which[i] < 0.8 * share[i, 0]
        shares.append(float(replaced.float().mean()))
        f_hat, f_true, inputs, targets = quantizer.empty(1), quantizer.empty(1), [], []
        for k, true in enumerate(tokens[None].split(SCHEDULE.lengths, dim=1)):
            inputs.append(quantizer.downsample(f_hat, k))
            target = quantizer.nearest(quantizer.codebook(true) + quantizer.downsample(f_true - f_hat, k))
            targets.append(target)
            chosen = target.clone()
            for j, position in enumerate(range(SCHEDULE.offsets[k], SCHEDULE.offsets[k] + SCHEDULE.lengths[k])):
                if replaced[position] and k < 3:
                    cdf = own[i, position].cumsum(dim=0) if replacement == "own" else torch.arange(1, 5) / 4
                    pick = int((cdf <= by[i, position] * cdf[-1]).sum())
                    chosen[0, j] = pick if replacement == "own" else distances[target[0, j]].argsort()[1 + pick]
            f_hat = quantizer.accumulate(f_hat, quantizer.codebook(chosen), k)
            f_true = quantizer.accumulate(f_true, quantizer.codebook(true), k)
        logits = logits_of(module, batch.labels[i : i + 1], torch.cat(inputs[1:], dim=1))
        losses.append(float(F.cross_entropy(logits[0], torch.cat(targets, dim=1)[0])))
    assert min(shares) < 0.2 < max(shares)
    scores = module.objective(module, batch, batch.labels, 5)
    assert float(scores.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert 0 < float(scores.scalars["repaired"]) < 1


def test_an_image_has_the_same_random_numbers_on_any_number_of_ranks(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = runs.fit(TeacherForced())
    batch, half = first_batch(module), TokenBatch(*(t[:4] for t in first_batch(module)))
    expected = module.image_keys(batch, 2, "test")
    assert len(expected.unique(dim=0)) == 8
    assert not torch.equal(expected, module.image_keys(batch, 3, "test"))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(LitMVAR, "global_rank", rank)
        parts.append(module.image_keys(half, 2, "test"))
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("replacement", ["neighbours", "own"])
def test_a_resumed_self_correcting_run_equals_an_uninterrupted_one(replacement: str, runs: Runs) -> None:
    checkpoint = ModelCheckpoint(dirpath=runs.root / "run", every_n_train_steps=4, save_top_k=-1)
    objective = SelfCorrecting(replacement=replacement)
    expected = runs.fit(objective, 8, callbacks=[checkpoint], enable_checkpointing=True)
    (saved,) = (path for path in (runs.root / "run").iterdir() if "step=4" in path.name)
    assert same_weights(runs.fit(objective, 8, str(saved)), expected)


@pytest.mark.parametrize("replacement", ["neighbours", "own"])
def test_a_self_correcting_step_waits_for_nothing_but_the_norm_of_the_step_before(replacement: str, runs: Runs) -> None:
    watch = Watch()
    runs.fit(SelfCorrecting(replacement=replacement), 4, callbacks=[watch], log_every_n_steps=50)
    assert [wait.split(" (")[0] for wait in watch.waits.found] == ["_local_scalar_dense in __float__"] * 3


@torch.no_grad()
def test_redrawn_tokens_follow_the_predictions(network: MVAR, tokenizer: Tokenizer) -> None:
    tokens = torch.zeros(1, SCHEDULE.num_tokens, dtype=torch.long)
    inputs, labels = tokenizer.scale_inputs(tokens), torch.tensor([3])
    probabilities = network(labels, inputs)[0].softmax(dim=-1)  # (l, v)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    x, cond = network.hidden(labels, inputs)
    repeated = x.expand(4000, -1, -1), cond.expand(4000, -1), uniforms[:, None].expand(-1, 30)
    drawn = draw_in_parts(network.logits, *repeated, vocab_size=48)
    for position in (0, 29):
        frequencies = torch.bincount(drawn[:, position], minlength=48) / 4000
        torch.testing.assert_close(frequencies, probabilities[position], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TeacherForced([1.0, -1.0]), "loss_weights must be at least 0 and not all 0"),
        (lambda: TeacherForced([0.0]), "loss_weights must be at least 0 and not all 0"),
        (lambda: TeacherForced(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: SelfCorrecting(max_share=1.5), r"max_share must be in \[0, 1\], got 1.5"),
        (lambda: SelfCorrecting(neighbours=0), "neighbours must be at least 1, got 0"),
        (lambda: SelfCorrecting(temperature=0.0), "temperature must be positive, got 0.0"),
    ],
)
def test_wrong_options_are_refused(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize(
    ("objective", "network", "message"),
    [
        (TeacherForced([1.0, 1.0]), {}, "loss_weights has 2 weights for 4 scales; give one per scale"),
        (SelfCorrecting(neighbours=48), {}, "neighbours is 48, but a code has only 47 others"),
        (
            SelfCorrecting(),
            {"prediction": "token", "mixers": ("block_causal_attention",)},
            "SelfCorrecting needs a network that predicts scales, not single tokens",
        ),
    ],
)
def test_objectives_that_do_not_suit_the_network_are_refused(
    objective: Objective, network: dict[str, object], message: str, runs: Runs
) -> None:
    module = make_module(runs.tokenizer_folder, model={"objective": objective}, **network)
    with pytest.raises(InputError, match=message):
        make_trainer(runs.root, 1).fit(module, TokenDataModule(runs.shards, runs.shards, batch_size=8))
