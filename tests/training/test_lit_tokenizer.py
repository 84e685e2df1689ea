from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import SCHEDULE, write_images
from torch import nn

from lightning_mvar import ScaleSchedule, Tokenizer, TokenizerConfig
from lightning_mvar.callbacks import Checkpoint
from lightning_mvar.checkpoints import load_tokenizer, save_folder
from lightning_mvar.checkpoints.published import tokenizer_to_published
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import save_torch
from lightning_mvar.tokenizer.codebook import CodebookConfig
from lightning_mvar.tokenizer.discriminator import AdversaryConfig
from lightning_mvar.tokenizer.perceptual import FeatureDistance
from lightning_mvar.training.datamodules import ImageDataModule
from lightning_mvar.training.optim import OptimizerConfig
from lightning_mvar.training.tokenizer import LitTokenizer


class BlockMeans(nn.Module):
    """A feature extractor that averages an image to 4 x 4."""

    num_features = 48

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images, 4).flatten(1)


def make_module(**options: object) -> LitTokenizer:
    torch.manual_seed(0)
    config = TokenizerConfig(SCHEDULE, 64, 8, channels=8, multipliers=(1, 1, 2, 2), blocks=1, num_phi=2)
    return LitTokenizer(config, **{"optimizer": OptimizerConfig(base_lr=0.02, weight_decay=0.0), **options})


def fit(module: LitTokenizer, root: Path, steps: int) -> dict[str, float]:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(root),
    )
    trainer.fit(module, datamodule=ImageDataModule("digits:train", "digits:test", 32, batch_size=32))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_loss_is_what_the_docstring_says() -> None:
    module, images = make_module(), torch.rand(4, 3, 32, 32) * 2 - 1
    reconstruction = module.tokenizer(images)
    losses, _ = module.loss.terms(images, reconstruction, reconstruction.decoded)
    features, steps = module.tokenizer.features(images), reconstruction.steps
    decoded = module.tokenizer.decode_features(steps[-1].f_hat)
    quantization = sum(F.mse_loss(step.f_hat, features) for step in steps) / len(steps)
    expected = F.mse_loss(decoded, images) + 0.5 * F.l1_loss(decoded, images) + 1.25 * quantization
    torch.testing.assert_close(losses["loss"], expected)


def test_gradients_pass_the_quantizer_straight_through() -> None:
    """The image loss alone trains the encoder if there is no commitment loss."""
    module = make_module(commitment=0.0)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    reconstruction = module.tokenizer(images)
    losses, _ = module.loss.terms(images, reconstruction, reconstruction.decoded)
    (losses["l2"]).backward()
    gradient = module.tokenizer.encoder.conv_in.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert module.tokenizer.quantizer.codebook.weight.grad is None


def test_training_on_digits_lowers_the_error_and_uses_the_codebook(tmp_path: Path) -> None:
    module = make_module(revive_every=10)
    metrics = fit(module, tmp_path, 30)
    images = next(iter(ImageDataModule("digits:test", "digits:test", 32).val_dataloader())).images
    with torch.no_grad():
        before = float(F.mse_loss(make_module().tokenizer(images).decoded, images))
    assert metrics["val/l2"] < 0.5 * before
    assert metrics["val/codebook_usage"] > 0.3
    usage = [metrics[f"codebook_usage/{side}"] for side in SCHEDULE.side_lengths]
    assert all(0 < part <= metrics["val/codebook_usage"] + 1e-6 for part in usage)


def test_revival_moves_unused_codes_onto_residuals_and_spares_the_others(tmp_path: Path) -> None:
    module = make_module(revive_every=0)
    fit(module, tmp_path, 1)
    steps = module.tokenizer(torch.rand(2, 3, 32, 32) * 2 - 1).steps
    module.usage["train"].zero_()
    module.count_usage("train", steps)
    used = module.usage["train"].sum(dim=0) > 0
    assert int(module.usage["train"].sum()) == 2 * SCHEDULE.num_tokens
    module.revive_until = 1.0
    before = module.tokenizer.quantizer.codebook.weight.detach().clone()
    module.log = lambda *_: None  # type: ignore[assignment]
    module.revive(steps)
    after = module.tokenizer.quantizer.codebook.weight.detach()
    assert torch.equal(after[used], before[used])
    queries = torch.cat([step.queries.flatten(0, 1) for step in steps])
    assert torch.cdist(after[~used], queries).min(dim=1).values.max() == pytest.approx(0, abs=1e-3)
    assert not module.usage["train"].any()


EVERYTHING = {
    "adversary": AdversaryConfig(weight=0.5, start_step=4, channels=4, levels=3),
    "codebook": CodebookConfig(learning="ema", entropy_weight=0.1, entropy_queries=100, scale_dropout=0.3),
    "ema_decay": 0.9,
    "perceptual": FeatureDistance(BlockMeans()),
}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """The run stops in the second epoch; covers sample order, random shifts of the digits and revived codes.

    Codes learn by gradient; running means are resumed in test_tokenizer_strategies.py.
    """
    by_gradient = CodebookConfig(entropy_weight=0.1, entropy_queries=100, scale_dropout=0.3)

    def run(root: Path, stop: int | None, resume: str | None) -> dict[str, torch.Tensor]:
        module = make_module(revive_every=3, **EVERYTHING | {"codebook": by_gradient})
        checkpoint = Checkpoint(str(root / "checkpoints"), every_n_train_steps=3)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=6,
            callbacks=[checkpoint, *([] if stop is None else [Stop(stop)])],
            logger=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(root),
        )
        data = ImageDataModule("digits:validation", "digits:test", 32, batch_size=80, crop="random")
        with pytest.raises(RuntimeError, match="stop") if stop else nullcontext():
            trainer.fit(module, datamodule=data, ckpt_path=resume)
        return module.state_dict()

    expected = run(tmp_path / "uninterrupted", None, None)
    run(tmp_path / "run", 5, None)
    assert (tmp_path / "run/checkpoints/step=00000005.ckpt").is_file()
    resumed = run(tmp_path / "run", None, str(tmp_path / "run/checkpoints/step=00000005.ckpt"))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


class Stop(L.Callback):
    """Raises in the middle of the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stop")


class WeightRecorder(L.Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        self.weights.append({name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()})


def fit_small(root: Path, steps: int, recorder: WeightRecorder | None = None, **options: object) -> LitTokenizer:
    """Trains on eighteen images of 16 x 16."""
    if not (root / "images").is_dir():
        write_images(root / "images")
    torch.manual_seed(0)
    config = TokenizerConfig(SCHEDULE, 24, 4, channels=8, multipliers=(1, 2, 2), blocks=1, num_phi=2, norm_groups=4)
    module = LitTokenizer(config, OptimizerConfig(base_lr=0.05, weight_decay=0.0), **options)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[recorder] if recorder else [],
        default_root_dir=str(root),
    )
    trainer.fit(module, datamodule=ImageDataModule(str(root / "images"), str(root / "images"), 16, batch_size=6))
    return module


def test_each_network_learns_from_its_own_loss_alone(tmp_path: Path) -> None:
    """Compares with the losses written out, with the other network frozen or the reconstructions detached (VQGAN)."""
    adversary = AdversaryConfig(weight=0.7, channels=8, levels=2)
    module = fit_small(tmp_path, 1, adversary=adversary)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    assert module.discriminator is not None
    module.zero_grad()
    losses, loss = module.loss.adversarial_terms(module.discriminator, images, module.tokenizer(images))
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}

    module.zero_grad()
    module.discriminator.requires_grad_(False)
    reconstruction = module.tokenizer(images)
    image_loss = F.mse_loss(reconstruction.decoded, images) + 0.5 * F.l1_loss(reconstruction.decoded, images)
    adversarial = -module.discriminator(reconstruction.decoded).mean()
    last = module.tokenizer.decoder.conv_out.weight
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (image_loss, adversarial)]
    weight = 0.7 * norms[0] / norms[1]
    (image_loss + weight.detach() * adversarial + reconstruction.codebook + 0.25 * reconstruction.commitment).backward()
    module.discriminator.requires_grad_(True)
    real, fake = module.discriminator(images), module.discriminator(reconstruction.decoded.detach())
    (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert losses["adversary_weight"].item() == pytest.approx(weight.item(), rel=1e-4)


def test_the_discriminator_affects_nothing_before_its_start_step(tmp_path: Path) -> None:
    baseline, recorder = WeightRecorder(), WeightRecorder()
    fit_small(tmp_path, 4, baseline)
    fit_small(tmp_path, 4, recorder, adversary=AdversaryConfig(weight=0.5, start_step=2, channels=8, levels=2))

    def moved(step: int) -> set[bool]:
        before, after = recorder.weights[step - 1], recorder.weights[step]
        return {not torch.equal(after[name], before[name]) for name in after if name.startswith("discriminator.")}

    same = [
        all(torch.equal(adversarial[n], t) for n, t in plain.items())
        for plain, adversarial in zip(*[w.weights for w in (baseline, recorder)], strict=True)
    ]
    assert same == [True, True, False, False]
    assert moved(1) == {False}
    assert moved(2) == moved(3) == {True}


def test_images_are_decoded_from_the_scales_that_are_drawn(tmp_path: Path) -> None:
    module = make_module()
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    scales = torch.tensor([4, 1, 3, 2])
    with torch.no_grad():
        decoded = module.tokenizer(images, scales).decoded.clamp(-1, 1)
        steps = torch.stack(list(module.tokenizer.decode_steps(module.tokenizer.encode(images))))
    torch.testing.assert_close(decoded, steps[scales - 1, torch.arange(4)], atol=1e-4, rtol=1e-4)


def test_scales_are_drawn_with_their_probability_and_the_same_for_any_number_of_ranks(tmp_path: Path) -> None:
    module = fit_small(tmp_path, 1, codebook=CodebookConfig(scale_dropout=0.4))
    module.trainer.datamodule.given_batch_size = 4000
    all_draws = module.draw_scale_counts(4000, 7)
    assert all_draws is not None
    counts = all_draws.bincount(minlength=5) / 4000
    assert counts.tolist() == pytest.approx([0, 0.4 / 3, 0.4 / 3, 0.4 / 3, 0.6], abs=0.03)
    module.trainer.datamodule.given_batch_size = 2000
    module.trainer.strategy.__class__.world_size = property(lambda self: 2)  # type: ignore[attr-defined]
    try:
        halves = []
        for rank in range(2):
            module.trainer.strategy.__class__.global_rank = property(lambda self, rank=rank: rank)  # type: ignore
            halves.append(module.draw_scale_counts(2000, 7))
    finally:
        del module.trainer.strategy.__class__.world_size, module.trainer.strategy.__class__.global_rank
    assert torch.equal(torch.cat(halves), all_draws)


def test_the_average_of_the_weights_is_kept_validated_and_saved(tmp_path: Path) -> None:
    recorder = WeightRecorder()
    module = fit_small(tmp_path, 6, recorder, ema_decay=0.6, revive_every=0)
    names = [name for name in recorder.weights[0] if name.startswith("tokenizer.")]
    torch.manual_seed(0)
    config = module.tokenizer.config
    average = {f"tokenizer.{name}": tensor.clone() for name, tensor in Tokenizer(config).state_dict().items()}
    for step, weights in enumerate(recorder.weights):
        decay = min(0.6, (1 + step) / (10 + step))
        for name in names:
            average[name] = decay * average[name] + (1 - decay) * weights[name]
    assert module.averaged is module.ema
    for name, tensor in module.averaged.state_dict().items():
        torch.testing.assert_close(tensor, average[f"tokenizer.{name}"], rtol=1e-4, atol=1e-6)
    batch = next(iter(module.trainer.datamodule.val_dataloader()))
    module.log_dict = lambda *_, **__: None  # type: ignore[assignment]
    with torch.no_grad():
        decoded = module.validation_step(batch, 0)
        assert module.ema is not None
        torch.testing.assert_close(decoded, module.ema.decode(module.ema.encode(batch.images)), atol=1e-4, rtol=1e-4)


def test_codes_may_be_running_means_instead_of_learning_by_gradient(tmp_path: Path) -> None:
    recorder = WeightRecorder()
    module = fit_small(tmp_path, 5, recorder, codebook=CodebookConfig(learning="ema", decay=0.5), revive_every=3)
    assert module.tokenizer.quantizer.codebook.weight.grad is None
    assert not torch.equal(*[weights["tokenizer.quantizer.codebook.weight"] for weights in recorder.weights[-2:]])
    last = recorder.weights[-1]
    sizes, sums = last["code_average.sizes"], last["code_average.sums"]
    smoothed = (sizes + 1e-5) / (sizes.sum() + 24e-5) * sizes.sum()
    torch.testing.assert_close(last["tokenizer.quantizer.codebook.weight"], sums / smoothed[:, None])
    assert sizes.max() > 2


def test_perplexity_is_the_exponential_of_the_entropy_of_the_choices(tmp_path: Path) -> None:
    module = fit_small(tmp_path, 1)
    images = torch.cat([batch.images for batch in module.trainer.datamodule.val_dataloader()])
    tokens = module.tokenizer.encode(images).split(SCHEDULE.lengths, dim=1)
    for side, scale in zip(SCHEDULE.side_lengths, tokens, strict=True):
        share = scale.flatten().bincount() / scale.numel()
        expected = float((-(share * share.clamp(min=1e-20).log()).sum()).exp())
        assert float(module.trainer.callback_metrics[f"codebook_perplexity/{side}"]) == pytest.approx(
            expected, rel=1e-4
        )
        used = len(scale.unique()) / 24
        assert float(module.trainer.callback_metrics[f"codebook_usage/{side}"]) == pytest.approx(used, rel=1e-5)


def test_training_starts_from_given_weights_also_for_another_schedule(tmp_path: Path) -> None:
    config = TokenizerConfig(SCHEDULE, 24, 4, channels=32, blocks=2)
    torch.manual_seed(5)
    tokenizer = Tokenizer(config).eval()
    save_folder(tmp_path / "folder", tokenizer)
    save_torch(tokenizer_to_published(tokenizer), tmp_path / "vae.pth")
    wider = TokenizerConfig(ScaleSchedule((1, 2, 4, 8)), 24, 4, channels=32, blocks=2)
    for source in ("folder", "vae.pth"):
        for target in (config, wider):
            module = LitTokenizer(target, weights=str(tmp_path / source), ema_decay=0.5)
            assert module.tokenizer.config == target
            for part in (module.tokenizer, module.averaged):
                weights = part.state_dict()
                assert all(torch.equal(weights[name], tensor) for name, tensor in tokenizer.state_dict().items())
            assert all(parameter.requires_grad for parameter in module.tokenizer.parameters())
    assert load_tokenizer(tmp_path / "folder").config == config


def test_weights_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    config = TokenizerConfig(SCHEDULE, 24, 4, channels=8, multipliers=(1, 2), blocks=1, num_phi=2)
    save_folder(tmp_path / "folder", Tokenizer(config))
    other = TokenizerConfig(SCHEDULE, 48, 4, channels=8, multipliers=(1, 2), blocks=1, num_phi=2)
    with pytest.raises(InputError, match="folder: vocab_size is 24 there, 48 in this run"):
        LitTokenizer(other, weights=str(tmp_path / "folder"))
    with pytest.raises(InputError, match="nowhere does not exist"):
        LitTokenizer(other, weights=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("l1_weight", -1.0),
        ("commitment", float("nan")),
        ("perceptual_weight", -0.5),
        ("revive_every", -3),
        ("revive_until", 1.5),
    ],
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"model.{name} must be "):
        make_module(**{name: value})


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    record = make_module().checkpoint_identity()
    make_module().check_checkpoint(record)
    for options, message in (
        ({"ema_decay": 0.9}, r"\(ema_decay\) is False in the checkpoint and True in this run"),
        ({"optimizer": OptimizerConfig(muon=True)}, "optimizer.muon is False in the checkpoint and True in this run"),
        ({"codebook": CodebookConfig(learning="ema")}, "codebook.learning is gradient in the checkpoint and ema in"),
        (
            {"adversary": AdversaryConfig(weight=1.0, levels=2)},
            "discriminator is None in the checkpoint and .'channels': 64, 'levels': 2",
        ),
    ):
        with pytest.raises(InputError, match=rf"{message}.* as before, or start a new .* --model.weights FOLDER$"):
            make_module(**options).check_checkpoint(record)
    wider = record | {"config": record["config"] | {"channels": 16}}
    with pytest.raises(InputError, match="set it as before; if only the schedule differs, start a new run from its"):
        make_module().check_checkpoint(wider)
    # A checkpoint from before an option existed had its default; options of a later version are refused.
    older = {name: value for name, value in record.items() if name not in ("codebook.learning", "muon")}
    older["config"] = {name: value for name, value in record["config"].items() if name != "norm_groups"}
    make_module().check_checkpoint(older)
    with pytest.raises(InputError, match=r"--ckpt_path.*newer_option"):
        make_module().check_checkpoint(record | {"config": record["config"] | {"newer_option": 1}})
    before = {name: value for name, value in record.items() if name != "ema"}
    before["ema_decay (an average of the weights)"] = "not kept"
    with pytest.raises(InputError, match="--ckpt_path is from an earlier version of lightning_mvar and cannot be"):
        make_module().check_checkpoint(before)
    with pytest.raises(InputError, match="scale_dropout needs a schedule of more than one scale"):
        LitTokenizer(TokenizerConfig(ScaleSchedule((4,)), 24, 4), codebook=CodebookConfig(scale_dropout=0.5))


def test_a_loaded_module_keeps_its_averages_or_starts_them_with_its_weights(tmp_path: Path) -> None:
    def save(module: LitTokenizer) -> dict[str, torch.Tensor]:
        checkpoint = {"state_dict": {name: torch.rand_like(tensor) for name, tensor in module.state_dict().items()}}
        module.on_save_checkpoint(checkpoint)
        save_torch(checkpoint, tmp_path / "a.ckpt")
        return checkpoint["state_dict"]

    averages = {"codebook": CodebookConfig(learning="ema"), "ema_decay": 0.5}
    saved, loaded = save(make_module(**averages)), LitTokenizer.load_from_checkpoint(tmp_path / "a.ckpt", **averages)
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())

    saved, loaded = save(make_module()), LitTokenizer.load_from_checkpoint(tmp_path / "a.ckpt", **averages)
    assert loaded.averaged is not loaded.tokenizer
    for part in (loaded.tokenizer, loaded.averaged):
        assert all(torch.equal(tensor, saved[f"tokenizer.{name}"]) for name, tensor in part.state_dict().items())
    assert loaded.code_average is not None
    assert torch.equal(loaded.code_average.sums, saved["tokenizer.quantizer.codebook.weight"])


def test_counts_of_codes_are_summed_on_the_device_also_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from a checkpoint on the CPU, whose tensors NCCL does not sum."""
    devices, module = [], make_module()

    def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
        devices.append(tensor.device.type)
        return torch.zeros(tensor.shape)

    monkeypatch.setattr("lightning_mvar.training.tokenizer.sum_over_ranks", sum_over_ranks)
    module.usage["train"] = torch.ones_like(module.usage["train"])
    module.to("meta").on_save_checkpoint({})
    assert devices == ["meta"]
