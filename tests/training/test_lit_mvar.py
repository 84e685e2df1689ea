"""Training through Lightning: loss, label drop, clipping, resuming, skipped steps and the weight average."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import MIXERS, SCHEDULE, write_token_shards
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lit_modules import Losses, make_module, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mvar import Tokenizer
from lightning_mvar.callbacks import Checkpoint
from lightning_mvar.checkpoints.training import NetworkRecord, RunRecord, TokenizerRecord, newest_intact
from lightning_mvar.errors import DivergedError, InputError
from lightning_mvar.training.batches import token_batch
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.optim import OptimizerConfig

SAMPLES = [20, 20, 12]


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), SAMPLES)
    return tmp_path / "shards"


def test_the_loss_is_the_mean_cross_entropy_of_all_tokens(
    tokenizer: Tokenizer, tokenizer_folder: Path, shards: Path, tmp_path: Path
) -> None:
    module = make_module(tokenizer_folder)
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    losses = Losses()
    trainer = make_trainer(tmp_path, 1, callbacks=[losses], val_check_interval=1)
    trainer.validate(module, data, verbose=False)
    assert list(trainer.progress_bar_metrics) == ["val/loss"]
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


@pytest.mark.parametrize(
    "network",
    [
        *({"mixers": mixers} for mixers in MIXERS.values()),
        {"mixers": ("mamba1", "gated_linear_attention"), "scan_order": "alternating"},
        {"mixers": (("window_attention", "linear_attention"), ("markov_attention",)), "parallel": True},
        {"mixers": MIXERS["var"], "prediction": "token"},
    ],
    ids=str,
)
def test_training_lowers_the_loss(
    tokenizer_folder: Path, shards: Path, tmp_path: Path, network: dict[str, object]
) -> None:
    losses = Losses()
    module = make_module(tokenizer_folder, **network)
    module.optimizer_config = OptimizerConfig(base_lr=0.2)
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    make_trainer(tmp_path, 24, callbacks=[losses]).fit(module, data)
    assert losses.train[0] == pytest.approx(torch.tensor(48.0).log().item(), abs=0.3)
    assert sum(losses.train[-5:]) / 5 < losses.train[0] - 0.2


def test_float16_with_loss_scaling_trains(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """The initial scale is so high that the first steps overflow: they are skipped, and the scale decreases."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    losses = Losses()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = make_module(tokenizer_folder)
    module.optimizer_config = OptimizerConfig(base_lr=0.2)
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    make_trainer(tmp_path, 30, callbacks=[losses], plugins=[plugin]).fit(module, data)
    assert scaler.get_scale() < 2.0**26
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert sum(losses.train[-5:]) / 5 < losses.train[0] - 0.2


def test_gradients_are_clipped_by_their_norm(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """Compares the norms before and after clipping with a plain loop; the logged norm is the one before."""
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
    batch = token_batch((torch.zeros(20_000, SCHEDULE.num_tokens, dtype=torch.long), labels), module.network_config)
    dropped = [module.drop_labels(batch, batch_idx) == 10 for batch_idx in (0, 0, 1)]
    assert float(dropped[0].float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])


def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """The run stops in the middle of the second epoch."""

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


def test_an_interrupted_step_is_repeated(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """The checkpoint saved on an exception resumes with the batch that was interrupted."""

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


class NanGradients(Callback):
    """Makes one gradient NaN in the given steps, and records the state and the first tokens after each step."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.weights, self.tokens = steps, [], []

    def on_after_backward(self, trainer: L.Trainer, pl_module: LitMVAR) -> None:
        if trainer.global_step in self.steps:
            pl_module.network.head.weight.grad[0, 0] = torch.nan

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitMVAR, outputs, batch, batch_idx) -> None:
        state = trainer.optimizers[0].state_dict()["state"]
        everything = [*pl_module.state_dict().values(), *(moment for s in state.values() for moment in s.values())]
        self.weights.append([tensor.clone() for tensor in everything])
        self.tokens.append(batch.tokens[:, 0].tolist())


def test_a_step_with_gradients_that_are_not_finite_is_skipped_and_its_images_are_listed(
    tokenizer_folder: Path, shards: Path, tmp_path: Path
) -> None:
    """Weights, their average, and the optimizer's moments and counters stay unchanged."""
    nan_gradients, module = NanGradients(3, 4), make_module(tokenizer_folder, model={"ema_decay": 0.5})
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    with pytest.warns(UserWarning, match=r"step 3 is skipped: its gradient norm is nan \(1 skipped so far, 1 in a row"):
        make_trainer(tmp_path, 6, callbacks=[nan_gradients]).fit(module, data)
    moved = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in zip(nan_gradients.weights, nan_gradients.weights[1:], strict=False)
    ]
    assert moved == [True, True, False, False, True]
    assert (module.skipped_steps, module.skipped_in_a_row) == (2, 0)
    lines = [json.loads(line) for line in (tmp_path / "skipped_steps/rank0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    for line in lines:
        assert [int(key.removeprefix("image")) % 48 for key in line["keys"]] == nan_gradients.tokens[line["step"]]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_skips_the_step_even_if_its_gradient_is_finite(
    tokenizer_folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    module = make_module(tokenizer_folder)
    score = module.score

    def infinite(*arguments):  # type: ignore[no-untyped-def]
        losses, correct = score(*arguments)
        return losses + (value if module.global_step == 1 else 0), correct

    monkeypatch.setattr(module, "score", infinite)
    nan_gradients = NanGradients()
    with pytest.warns(UserWarning, match="step 1 is skipped"):
        make_trainer(tmp_path, 3, callbacks=[nan_gradients]).fit(
            module, TokenDataModule(str(shards), str(shards), batch_size=16)
        )
    assert all(torch.equal(a, b) for a, b in zip(nan_gradients.weights[0], nan_gradients.weights[1], strict=True))
    assert module.skipped_steps == 1
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_training_ends_after_too_many_skipped_steps_and_keeps_the_checkpoint_before(
    tokenizer_folder: Path, shards: Path, tmp_path: Path
) -> None:
    module = make_module(tokenizer_folder, model={"max_skipped_steps": 3})
    checkpoint = Checkpoint(str(tmp_path / "run"), every_n_train_steps=2)
    trainer = make_trainer(tmp_path, 20, callbacks=[NanGradients(*range(3, 20)), checkpoint], enable_checkpointing=True)
    message = "3 steps in a row had gradients that are not finite, the last one step 5"
    with pytest.raises(DivergedError, match=message), pytest.warns():
        trainer.fit(module, TokenDataModule(str(shards), str(shards), batch_size=16))
    assert newest_intact(tmp_path / "run").name == "step=00000004.ckpt"


def test_the_average_follows_the_weights(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """Compares the average with a plain loop over the weights after each step."""
    module = make_module(tokenizer_folder, model={"ema_decay": 0.6})

    class Average(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: LitMVAR) -> None:
            self.expected = {name: tensor.double() for name, tensor in pl_module.network.state_dict().items()}
            assert all(torch.equal(t, pl_module.ema.state_dict()[n].double()) for n, t in self.expected.items())

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitMVAR, *_: object) -> None:
            step = trainer.global_step - 1
            decay = min(0.6, (1 + step) / (10 + step))
            for name, tensor in pl_module.network.state_dict().items():
                self.expected[name] = decay * self.expected[name] + (1 - decay) * tensor.double()

    average = Average()
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    make_trainer(tmp_path, 9, callbacks=[average]).fit(module, data)
    for name, tensor in module.ema.state_dict().items():
        torch.testing.assert_close(tensor.double(), average.expected[name], atol=1e-6, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in module.ema.parameters())
    assert module.averaged is module.ema


def test_a_run_with_an_average_refuses_to_resume_one_without(
    tokenizer_folder: Path, shards: Path, tmp_path: Path
) -> None:
    data = TokenDataModule(str(shards), str(shards), batch_size=16)
    checkpoint = Checkpoint(str(tmp_path / "run"), every_n_train_steps=2)
    make_trainer(tmp_path, 2, callbacks=[checkpoint], enable_checkpointing=True).fit(
        make_module(tokenizer_folder), data
    )
    module = make_module(tokenizer_folder, model={"ema_decay": 0.9})
    with pytest.raises(InputError, match=r"\(ema_decay\) is False in the checkpoint and True in this run"):
        make_trainer(tmp_path, 4).fit(module, data, ckpt_path=str(tmp_path / "run/last.ckpt"))


def test_shards_with_their_classes_in_another_order_are_refused(
    tokenizer_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    names = [f"class {label}" for label in range(10)]
    for folder, class_names in (("shards", names), ("swapped", [*names[:3], names[4], names[3], *names[5:]])):
        manifest = write_token_shards(tmp_path / folder, tokenizer.fingerprint(), SAMPLES)
        manifest.class_names = class_names
        manifest.save(tmp_path / folder)
    data, swapped = (
        TokenDataModule(str(tmp_path / f), str(tmp_path / f), batch_size=16) for f in ("shards", "swapped")
    )
    checkpoint = Checkpoint(str(tmp_path / "run"), every_n_train_steps=1)
    make_trainer(tmp_path, 1, callbacks=[checkpoint], enable_checkpointing=True).fit(
        make_module(tokenizer_folder), data
    )
    path = str(tmp_path / "run/last.ckpt")
    make_trainer(tmp_path, 2).validate(make_module(tokenizer_folder), data, ckpt_path=path, verbose=False)
    message = "swapped do not fit the model: class 3 is 'class 4' in the shards and 'class 3' in the model"
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, 2).fit(make_module(tokenizer_folder), swapped, ckpt_path=path)
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, 2).validate(make_module(tokenizer_folder), swapped, ckpt_path=path, verbose=False)
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, 2).validate(LitMVAR.load_from_checkpoint(path), swapped, verbose=False)


def test_the_tokenizer_is_neither_trained_nor_saved(tokenizer_folder: Path) -> None:
    module = make_module(tokenizer_folder)
    module.configure_model()
    assert not module.tokenizer.training
    assert module.state_dict()
    assert all(name.startswith("network.") for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in module.tokenizer.parameters())


def test_padded_samples_do_not_count(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    """52 samples in batches of 16 and of 52 score the same, although the former's last batch is padded."""
    results = []
    for batch_size in (16, 52):
        data = TokenDataModule(str(shards), str(shards), batch_size=batch_size)
        (result,) = make_trainer(tmp_path, 1).validate(make_module(tokenizer_folder), data, verbose=False)
        results.append(result)
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], rel=1e-5), name


class SyncCounter(TorchDispatchMode):
    """Counts operations that make the host wait for a GPU, such as reading a scalar or finding nonzeros."""

    NAMES = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        by_truth = func.__name__.startswith("index.") and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_truth or func.__name__.split(".")[0] in self.NAMES
        return func(*args, **(kwargs or {}))


def test_a_step_reads_only_the_outcome_of_the_previous_step_from_the_device(
    tokenizer_folder: Path, shards: Path, tmp_path: Path
) -> None:
    syncs = SyncCounter()

    class Steps(Callback):
        def __init__(self) -> None:
            self.counts: list[int] = []

        def on_train_batch_start(self, *_: object) -> None:
            self.counts.append(syncs.count)

    steps = Steps()
    data = TokenDataModule(str(shards), str(shards), batch_size=4)
    trainer = make_trainer(tmp_path, 12, callbacks=[steps], log_every_n_steps=6, limit_val_batches=0)
    with syncs:
        trainer.fit(make_module(tokenizer_folder, model={"ema_decay": 0.5}), data)
    in_step = [after - before for before, after in zip(steps.counts, steps.counts[1:], strict=False)]
    assert in_step[:5] == [0, 1, 1, 1, 1]
    # The sixth step is logged. From then on Lightning reads the loss in every step, but from its copy on the host.
    assert in_step[6:11] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_can_be_clipped_by_value(
    tokenizer_folder: Path, shards: Path, tmp_path: Path, precision: str
) -> None:
    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: LitMVAR, *_: object) -> None:
            self.before = [parameter.grad.clone() for parameter in pl_module.network.parameters()]

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitMVAR, *_: object) -> None:
            self.after = [parameter.grad for parameter in pl_module.network.parameters()]

    gradients = Gradients()
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value", "precision": precision}
    trainer = make_trainer(tmp_path, 1, callbacks=[gradients], **options)
    trainer.fit(make_module(tokenizer_folder), TokenDataModule(str(shards), str(shards), batch_size=16))
    assert max(float(gradient.abs().max()) for gradient in gradients.before) > 1e-3
    for before, after in zip(gradients.before, gradients.after, strict=True):
        assert torch.equal(after, before.clamp(-1e-3, 1e-3))


def test_validation_reads_nothing_from_the_device(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    syncs, counts = SyncCounter(), []

    class Batches(Callback):
        def on_validation_batch_start(self, *_: object) -> None:
            counts.append(syncs.count)

    data = TokenDataModule(str(shards), str(shards), batch_size=8)
    trainer = make_trainer(tmp_path, 1, callbacks=[Batches()])
    with syncs:
        trainer.validate(make_module(tokenizer_folder), data, verbose=False)
    assert len(counts) == 7  # the last batch has padding
    assert len(set(counts)) == 1


@pytest.mark.cuda
def test_no_step_waits_for_the_gpu(tokenizer_folder: Path, shards: Path, tmp_path: Path) -> None:
    class Watch(Callback):
        """Makes synchronizing with the GPU an error from the second step on."""

        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step else "default")

        def on_exception(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

        def on_train_epoch_end(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    data = TokenDataModule(str(shards), str(shards), batch_size=4)
    options = {"accelerator": "gpu", "precision": "bf16-mixed", "log_every_n_steps": 50, "limit_val_batches": 0}
    make_trainer(tmp_path, 12, callbacks=[Watch()], **options).fit(make_module(tokenizer_folder), data)


def test_a_checkpoint_from_before_an_option_existed_had_its_default(tokenizer_folder: Path) -> None:
    """Options of a later version are refused."""
    module = make_module(tokenizer_folder)
    tokenizer, state = TokenizerRecord("", module.tokenizer_fingerprint), RunRecord(False, (0, 0), 1, 4)
    record = asdict(NetworkRecord(module.network_config, tokenizer, [], state))
    older = {name: value for name, value in record["network"].items() if name not in ("qk_norm", "scan_order")}
    module.check_checkpoint(record | {"network": older})
    with pytest.raises(InputError, match=r"qk_norm is True in .* and False in this run; set it as before$"):
        make_module(tokenizer_folder, qk_norm=False).check_checkpoint(record | {"network": older})
    with pytest.raises(InputError, match=r"drop_path is 0.0 in .* set it as before, or start a new run .*weights$"):
        make_module(tokenizer_folder, drop_path=0.5).check_checkpoint(record | {"network": older})
    other = asdict(TokenizerRecord("/tokenizers/other", "0123456789abcdef"))
    with pytest.raises(InputError, match=r"tokenizer is 01234567.* in .*set --model.tokenizer .*/tokenizers/other$"):
        module.check_checkpoint(record | {"tokenizer": other})
    with pytest.raises(InputError, match=r"--ckpt_path.*newer_option"):
        module.check_checkpoint(record | {"network": older | {"newer_option": 1}})
