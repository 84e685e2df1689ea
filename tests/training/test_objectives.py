"""Each objective against a plain computation of its loss, in a module that trains with it."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import SCHEDULE, scalars, tiny_network, write_token_shards
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lit_modules import make_module, make_trainer
from safetensors.torch import load_file, save_file
from test_waits import Watch
from torch import Tensor
from training_runs import TWO_RANKS, largest_difference, train, weights

from lightning_mvar import MVAR, ScaleSchedule, Tokenizer
from lightning_mvar.callbacks import Checkpoint
from lightning_mvar.checkpoints import open_trained, save_folder
from lightning_mvar.checkpoints.training import NETWORK_KEY
from lightning_mvar.data.tokens.manifest import SAMPLED, Manifest
from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint_of
from lightning_mvar.models.scoring import draw_in_parts
from lightning_mvar.sampling.philox import TOKENS, uniform
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.objectives import (
    ConditionContrastive,
    DirectDiscriminative,
    Objective,
    SelfCorrecting,
    TeacherForced,
)


class Runs:
    """Trains tiny modules with an objective."""

    def __init__(self, tokenizer_folder: Path, shards: str, root: Path) -> None:
        self.tokenizer_folder, self.shards, self.root = tokenizer_folder, shards, root

    def fit(
        self,
        objective: Objective,
        max_steps: int = 1,
        ckpt_path: str | None = None,
        own: bool = False,
        drop_path: float = 0.1,
        **trainer: object,
    ) -> LitMVAR:
        """Trains from the weights in `network`, if there are any, which are then the reference of objectives."""
        folder = self.root / "network"
        options = {"objective": objective, "weights": str(folder) if folder.exists() else None}
        module = make_module(self.tokenizer_folder, model=options, drop_path=drop_path)
        data = TokenDataModule(self.shards, self.shards, own=self.own() if own else None, batch_size=8, seed=0)
        make_trainer(self.root, max_steps, limit_val_batches=0, **trainer).fit(module, data, ckpt_path=ckpt_path)
        return module

    def own(self, **settings: object) -> str:
        """Writes the shards again as those of samples of the network in `network`, and returns their folder."""
        folder = self.root / "own"
        if not folder.exists():
            shutil.copytree(self.shards, folder)
        mark_as_samples(folder, self.root / "network", settings)
        return str(folder)


@pytest.fixture
def runs(tokenizer_folder: Path, shards: str, tmp_path: Path) -> Runs:
    return Runs(tokenizer_folder, shards, tmp_path)


@pytest.fixture
def tuned(runs: Runs, tokenizer: Tokenizer) -> Runs:
    """Runs that start from a trained network."""
    save_folder(runs.root / "network", tokenizer, tiny_network(width=32, head_dim=16))
    return runs


def mark_as_samples(folder: Path, network: Path, settings: dict[str, object]) -> None:
    """Makes token shards those of samples of a network, drawn without guidance and truncation unless `settings`."""
    drawn = {"guidance": 0.0, "top_k": 0, "top_p": 0.0, "network": fingerprint_of(open_trained(network).weights)}
    manifest = Manifest.load(folder)
    manifest.source = SAMPLED + " ".join(f"{name}={value}" for name, value in (drawn | settings).items())
    manifest.save(folder)


def first_batch(module: LitMVAR) -> TokenBatch:
    return next(iter(module.trainer.datamodule.train_dataloader()))


def logits_of(module: LitMVAR, labels: Tensor, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module.network.eval()(labels, inputs)


def plain_ratios(module: LitMVAR, tokens: Tensor, labels: Tensor) -> list[float]:
    """Returns log(p / p_reference) of each image, computed one image at a time, without drop path."""
    sums = []
    for row, label in zip(tokens, labels, strict=True):
        pair = []
        for network in (module.network, module.reference.network):
            with torch.no_grad():
                logits = network.eval()(label[None], module.tokenizer.scale_inputs(row[None]))[0]
            pair.append(float(-F.cross_entropy(logits, row, reduction="sum")))
        sums.append(pair[0] - pair[1])
    return sums


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


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


@pytest.mark.parametrize("replacement", ["neighbors", "own"])
def test_self_correction_scores_the_targets_of_a_corrupted_pyramid(replacement: str, runs: Runs) -> None:
    """The objective's loss, computed again image by image from its random numbers."""
    module = runs.fit(SelfCorrecting(0.8, replacement, neighbors=4))
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


def test_an_objective_finds_neighbors_anew_with_another_tokenizer(runs: Runs) -> None:
    """On another codebook on the same device, it draws what a new objective draws."""
    module, reused, draws = runs.fit(TeacherForced()), SelfCorrecting(neighbors=4), []
    batch, uniforms = first_batch(module), torch.rand(8, SCHEDULE.num_tokens)
    for _ in range(2):
        for objective in (reused, SelfCorrecting(neighbors=4)):
            draw = objective.draw_neighbors(module, batch, batch.labels, uniforms)
            draws.append(draw(batch.tokens, slice(None)))
        module.hidden_tokenizer[0] = Tokenizer(module.tokenizer.config)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[2], draws[3])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("paired", [False, True])
def test_an_image_has_the_same_random_numbers_on_any_number_of_ranks(
    paired: bool, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With own samples, each rank has a part of both halves of the global batch."""
    module = runs.fit(TeacherForced())
    batch = first_batch(module)._replace(own=torch.arange(8) >= 4 if paired else None)
    keys = module.image_keys(batch, 2, "test")
    assert len(keys.unique(dim=0)) == 8
    assert not torch.equal(keys, module.image_keys(batch, 3, "test"))
    module.label_drop = 0.5
    labels = module.drop_labels(batch, 4)
    assert 0 < int((labels == 10).sum()) < 8
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    for rank, rows in enumerate(([0, 1, 4, 5], [2, 3, 6, 7]) if paired else ([0, 1, 2, 3], [4, 5, 6, 7])):
        monkeypatch.setattr(LitMVAR, "global_rank", rank)
        part = TokenBatch(*(None if tensor is None else tensor[rows] for tensor in batch))
        assert torch.equal(module.image_keys(part, 2, "test"), keys[rows])
        assert torch.equal(module.drop_labels(part, 4), labels[rows])


@pytest.mark.parametrize("replacement", ["neighbors", "own"])
def test_a_resumed_self_correcting_run_equals_an_uninterrupted_one(replacement: str, runs: Runs) -> None:
    checkpoint = ModelCheckpoint(dirpath=runs.root / "run", every_n_train_steps=4, save_top_k=-1)
    objective = SelfCorrecting(replacement=replacement)
    expected = runs.fit(objective, 8, callbacks=[checkpoint], enable_checkpointing=True)
    (saved,) = (path for path in (runs.root / "run").iterdir() if "step=4" in path.name)
    assert same_weights(runs.fit(objective, 8, str(saved)), expected)


@pytest.mark.parametrize("replacement", ["neighbors", "own"])
def test_a_self_correcting_step_waits_for_nothing_but_the_norm_of_the_step_before(replacement: str, runs: Runs) -> None:
    watch = Watch()
    runs.fit(SelfCorrecting(replacement=replacement), 4, callbacks=[watch], log_every_n_steps=50)
    assert [wait.split(" (")[0] for wait in watch.waits.found] == ["_local_scalar_dense in __float__"] * 3


def test_a_failure_while_own_tokens_are_drawn_leaves_the_network_in_training_mode(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = runs.fit(SelfCorrecting(replacement="own"))
    batch = first_batch(module)
    module.network.train()
    monkeypatch.setattr(MVAR, "redraw", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.objective(module, batch, batch.labels, 0)
    assert module.network.training


OBJECTIVES = {
    "discriminative": lambda: DirectDiscriminative(alpha=2.0, beta=0.1),
    "contrastive": lambda: ConditionContrastive(beta=0.1, weight=3.0),
}


@pytest.mark.parametrize("per_token", [False, True])
def test_the_discriminative_loss_equals_a_loop_over_images(per_token: bool, tuned: Runs) -> None:
    objective = DirectDiscriminative(alpha=3.0, beta=0.7, per_token=per_token)
    module = tuned.fit(objective, 4, own=True, drop_path=0.0)
    batch = first_batch(module)
    ratios = plain_ratios(module, batch.tokens, batch.labels)
    logits = [0.7 * ratio / (SCHEDULE.num_tokens if per_token else 1) for ratio in ratios]
    assert batch.own.tolist() == [False] * 4 + [True] * 4
    assert module.trainer.datamodule.keys(batch) == [f"image{i}" for i in batch.ids.tolist()]
    scores = objective(module, batch, batch.labels, 0)
    expected = sum(softplus(-z) for z in logits[:4]) / 4 + 3 * sum(softplus(z) for z in logits[4:]) / 4
    assert float(scores.loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(scores.scalars["logit_real"]) == pytest.approx(sum(logits[:4]) / 4, rel=1e-3, abs=1e-4)
    assert float(scores.scalars["logit_own"]) == pytest.approx(sum(logits[4:]) / 4, rel=1e-3, abs=1e-4)
    assert float(scores.scalars["separated"]) == sum((z > 0) == (i < 4) for i, z in enumerate(logits)) / 8
    real = module.score(batch, batch.labels)[0][:4]
    assert float(scores.losses.mean().detach()) == pytest.approx(float(real.mean().detach()), rel=1e-5)


def test_the_contrastive_loss_equals_a_loop_over_images(tuned: Runs) -> None:
    """Row 1 is unconditional, rows 4 and 5 have one label: these count as the images' own labels."""
    objective = ConditionContrastive(beta=0.3, weight=5.0)
    module = tuned.fit(objective, 4, drop_path=0.0)
    batch = first_batch(module)
    true = torch.tensor([1, 2, 3, 4, 5, 5, 6, 7])
    labels, others = torch.tensor([1, 10, 3, 4, 5, 5, 6, 7]), torch.tensor([2, 10, 4, 3, 5, 5, 7, 6])
    own, other = (plain_ratios(module, batch.tokens, given) for given in (labels, others))
    expected = 0.0
    for i in range(8):
        expected += softplus(-0.3 * own[i])
        expected += softplus(-0.3 * other[i]) if i in (1, 4, 5) else 5 * softplus(0.3 * other[i])
    scores = objective(module, batch._replace(labels=true), labels, 0)
    assert float(scores.loss.detach()) == pytest.approx(expected / 8 / 5, rel=1e-4)
    assert float(scores.scalars["logit_other"]) == pytest.approx(0.3 * sum(other) / 8, rel=1e-3, abs=1e-4)


class FirstLogits(Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 1:
            self.logged = {k: float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_begins_at_the_reference_which_never_changes_and_is_not_saved(name: str, tuned: Runs) -> None:
    """All logits are 0 in the first step, with drop path, so both networks draw the same; then they differ."""
    first, checkpoint = FirstLogits(), Checkpoint(str(tuned.root / "run"), every_n_train_steps=3)
    module = tuned.fit(
        OBJECTIVES[name](), 3, own=name == "discriminative", callbacks=[first, checkpoint], enable_checkpointing=True
    )
    logits = [value for key, value in first.logged.items() if key.startswith("train/logit")]
    assert logits == [0, 0]
    terms = first.logged["train/loss"] / math.log(2)
    assert terms == pytest.approx(3) if name == "discriminative" else 2 / 3 < terms <= 4 / 3 + 1e-6
    stored = open_trained(tuned.root / "network").weights
    assert all(torch.equal(tensor, stored[key]) for key, tensor in module.reference.network.state_dict().items())
    assert not any(torch.equal(stored["head.weight"], p) for p in module.network.parameters())
    saved = torch.load(tuned.root / "run/step=00000003.ckpt", weights_only=True)
    assert {key.partition(".")[0] for key in saved["state_dict"]} == {"network"}
    record = saved[NETWORK_KEY]["run"]["reference"]
    assert record == {"path": str(tuned.root / "network"), "fingerprint": fingerprint_of(stored)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_with_a_reference_resumes_exactly_and_only_with_it(name: str, tuned: Runs) -> None:
    """The run stops in the middle of the second epoch; own samples are in their third then."""
    checkpoint = ModelCheckpoint(dirpath=tuned.root / "run", every_n_train_steps=15, save_top_k=-1)
    own = name == "discriminative"
    expected = tuned.fit(OBJECTIVES[name](), 18, own=own, callbacks=[checkpoint], enable_checkpointing=True)
    (saved,) = (str(path) for path in (tuned.root / "run").iterdir() if "step=15" in path.name)
    assert same_weights(tuned.fit(OBJECTIVES[name](), 18, saved, own), expected)
    with pytest.raises(InputError, match=r"reference, but this run has no network: set model\.objective"):
        tuned.fit(TeacherForced(), 18, saved)
    changed = load_file(tuned.root / "network/network.safetensors")
    save_file(changed | {"head.bias": changed["head.bias"] + 1}, tuned.root / "network/network.safetensors")
    with pytest.raises(InputError, match=r"whose objective has .*network \(.* as its reference, but this run has"):
        tuned.fit(OBJECTIVES[name](), 18, saved, own)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_with_a_reference_waits_for_nothing_but_the_norm_of_the_step_before(name: str, tuned: Runs) -> None:
    watch = Watch()
    tuned.fit(OBJECTIVES[name](), 4, own=name == "discriminative", callbacks=[watch], log_every_n_steps=50)
    assert [wait.split(" (")[0] for wait in watch.waits.found] == ["_local_scalar_dense in __float__"] * 3


def test_strategies_agree_with_a_reference_and_own_samples(plain_run_folder: Path, tokenizer: Tokenizer) -> None:
    """Each rank has a part of both halves of each batch."""
    save_folder(plain_run_folder / "network", tokenizer, tiny_network(width=32, head_dim=16))
    write_token_shards(plain_run_folder / "own", tokenizer.fingerprint(), [30])
    mark_as_samples(plain_run_folder / "own", plain_run_folder / "network", {})
    start = ["--model.weights", "network", "--model.network.drop_path", "0", "--trainer.max_steps", "4"]
    objective = ["--model.objective", "DirectDiscriminative", "--model.objective.beta", "0.3"]
    options = [*start, *objective, "--data.own", "own", "--data.seed", "3"]
    train(plain_run_folder, "one", options)
    train(plain_run_folder, "ddp", [*options, *TWO_RANKS, "ddp"], devices=2)
    train(plain_run_folder, "fsdp2", [*options, *TWO_RANKS, "fsdp2"], devices=2)
    expected = scalars(plain_run_folder / "one/logs")
    assert len(expected["train/logit_own"]) == 4
    for name in ("ddp", "fsdp2"):
        actual = scalars(plain_run_folder / name / "logs")
        for tag in ("train/loss", "train/logit_real", "train/logit_own", "train/separated"):
            values = [value for _, value in expected[tag]]
            assert [value for _, value in actual[tag]] == pytest.approx(values, abs=1e-4), tag
        assert largest_difference(weights(plain_run_folder / name), weights(plain_run_folder / "one")) < 1e-5


def test_own_samples_are_required_or_refused_and_need_an_even_batch(runs: Runs, tuned: Runs) -> None:
    with pytest.raises(InputError, match=r"DirectDiscriminative needs --data\.own"):
        tuned.fit(DirectDiscriminative())
    with pytest.raises(InputError, match=r"TeacherForced does not use data\.own: leave it out"):
        tuned.fit(TeacherForced(), own=True)
    module = make_module(runs.tokenizer_folder, model={"objective": DirectDiscriminative()})
    data = TokenDataModule(runs.shards, runs.shards, own=tuned.own(), batch_size=7)
    with pytest.raises(InputError, match=r"needs a reference network: set model\.weights or"):
        make_trainer(runs.root, 1).fit(module, data)
    module = make_module(runs.tokenizer_folder, model={"objective": DirectDiscriminative(str(tuned.root / "network"))})
    with pytest.raises(InputError, match=r"7 images per device cannot be half real .* an even --data\.batch_size"):
        make_trainer(runs.root, 1).fit(module, data)


def test_own_samples_must_be_those_of_the_reference(tuned: Runs) -> None:
    def fit(own: str) -> None:
        module = make_module(tuned.tokenizer_folder, model={"objective": DirectDiscriminative(network)})
        data = TokenDataModule(tuned.shards, tuned.shards, own=own, batch_size=8)
        make_trainer(tuned.root, 1, limit_val_batches=0).fit(module, data)

    network = str(tuned.root / "network")
    with pytest.raises(InputError, match=r"data\.own .* holds tokens of images, not samples of .*network: draw them"):
        fit(tuned.shards)
    with pytest.raises(InputError, match=r"data\.own .* holds samples of the network 123abc, but the reference"):
        fit(tuned.own(network="123abc"))
    with pytest.raises(InputError, match=r"data\.own .* does not say how its samples were drawn"):
        fit(tuned.own(top_k="many"))
    changes = [{"guidance": 0.5}, {"guidance": "0.0,0.5"}, {"top_k": 47}, {"top_p": 0.9}, {"temperature": 0.9}]
    for settings in (*changes, {"drafts": 4}):
        with pytest.warns(UserWarning, match=r"assumes samples of the plain network: sample with --guidance 0"):
            fit(tuned.own(**settings))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*plain network")
        fit(tuned.own(top_k=48, top_p=1.0))


def test_a_reference_of_other_classes_schedule_or_tokenizer_is_refused(tuned: Runs, tokenizer: Tokenizer) -> None:
    """Such weights can be trained on, but what would be added to them at random is nothing to compare with."""
    other = Tokenizer(tokenizer.config)
    cases = {
        "classes": (tokenizer, tiny_network(width=32, head_dim=16, num_classes=7), "has other classes than this run"),
        "scales": (
            tokenizer.with_schedule(shorter := ScaleSchedule((1, 4))),
            tiny_network(shorter, width=32, head_dim=16),
            "has another scale schedule than this run",
        ),
        "codes": (other, tiny_network(width=32, head_dim=16), "this tokenizer with --model.objective.reference"),
    }
    for name, (encoder, network, message) in cases.items():
        save_folder(tuned.root / name, encoder, network)
        with pytest.raises(InputError, match=message):
            tuned.fit(ConditionContrastive(str(tuned.root / name)))


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
        (lambda: SelfCorrecting(neighbors=0), "neighbors must be at least 1, got 0"),
        (lambda: SelfCorrecting(temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: DirectDiscriminative(alpha=0.0), r"objective\.alpha must be positive, got 0.0"),
        (lambda: ConditionContrastive(beta=-1.0), r"objective\.beta must be positive, got -1.0"),
    ],
)
def test_wrong_options_are_refused(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize(
    ("objective", "network", "message"),
    [
        (TeacherForced([1.0, 1.0]), {}, "loss_weights has 2 weights for 4 scales; give one per scale"),
        (SelfCorrecting(neighbors=48), {}, "neighbors is 48, but a code has only 47 others"),
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
