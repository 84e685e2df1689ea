"""One process, DDP and FSDP2 train the same tokenizer, with all losses and networks switched on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import pictures, scalars, write_images
from processes import start

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.checkpoints.training import remove_checkpoint
from lightning_mvar.training.tokenizer import LitTokenizer

RUN_YAML = """
trainer: {accelerator: cpu, max_steps: 5, val_check_interval: 3, check_val_every_n_epoch: null, log_every_n_steps: 1,
  default_root_dir: run, enable_progress_bar: false, enable_model_summary: false, num_sanity_val_steps: 0,
  gradient_clip_val: 1.0,
  logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger,
           init_args: {save_dir: "${trainer.default_root_dir}", name: "", version: logs}},
  callbacks: [{class_path: lightning_mvar.callbacks.Checkpoint,
               init_args: {dirpath: "${trainer.default_root_dir}/checkpoints", every_n_train_steps: 3}},
              {class_path: lightning_mvar.callbacks.ReconstructionsCallback, init_args: {images: 4}},
              {class_path: lightning_mvar.callbacks.ReconstructionScoresCallback,
               init_args: {extractor: {class_path: conftest.Pixels}}}]}
model: {ema_decay: 0.9, optimizer: {base_lr: 0.02}, revive_every: 0, activation_checkpointing: true,
  perceptual: {class_path: lightning_mvar.tokenizer.perceptual.FeatureDistance,
               init_args: {extractor: {class_path: conftest.Pixels}}},
  adversary: {weight: 0.5, start_step: 2, lr_factor: 0.5, channels: 8, levels: 2},
  codebook: {entropy_weight: 0.1, entropy_queries: 10000, scale_dropout: 0.3},
  tokenizer: {schedule: {side_lengths: [1, 2, 3, 4]}, vocab_size: 24, code_dim: 8, channels: 8, multipliers: [1, 2, 2],
              blocks: 1, num_phi: 2, norm_groups: 4}}
data: {train: images, val: images, resolution: 16, batch_size: 8}
"""
STRATEGIES = {"one": (1, []), "ddp": (2, ["--trainer.strategy", "ddp"]), "fsdp2": (2, ["--trainer.strategy", "fsdp2"])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 24 images, three batches per epoch, and a run.yaml."""
    write_images(tmp_path / "images", per_class=8)
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    return tmp_path


def train(folder: Path, strategy: str, out: str, *options: str) -> str:
    """Trains a tokenizer to the end and returns the output of all ranks."""
    devices, strategy_options = STRATEGIES[strategy]
    command = ["train-tokenizer", "--config", "run.yaml", "--data.batch_size", str(8 // devices), *strategy_options]
    ranks = start([*command, "--trainer.default_root_dir", out, *options], folder, devices, name=out)
    assert ranks.wait() == [0] * devices, ranks.printed()
    return ranks.printed()


@pytest.mark.parametrize(("learning", "strategies"), [("gradient", ["ddp", "fsdp2"]), ("ema", ["fsdp2"])])
def test_strategies_agree_on_losses_scores_and_weights(folder: Path, learning: str, strategies: list[str]) -> None:
    for name in ("one", *strategies):
        train(folder, name, name, "--model.codebook.learning", learning)
    one = scalars(folder / "one/logs")
    assert len(one["train/loss"]) == 5
    assert len(one["train/adversarial"]) == 3
    assert one["train/grad_norm_discriminator"][1][1] == 0 < one["train/grad_norm_discriminator"][2][1]
    assert {"val/psnr", "val/ssim", "val/rfid", "codebook_perplexity/3", "train/perceptual"} <= one.keys()
    expected = load_tokenizer(folder / "one").state_dict()
    for name in strategies:
        other = scalars(folder / name / "logs")
        assert other.keys() == one.keys()
        for tag in one:
            values = [value for _, value in one[tag]]
            assert [value for _, value in other[tag]] == pytest.approx(values, abs=1e-5, rel=1e-3), (name, tag)
        for key, tensor in load_tokenizer(folder / name).state_dict().items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-4, rtol=1e-3)
        assert len(pictures(folder / name / "logs", "reconstructions")) == 1


# With 512 codes, each rank uses different ones between the checkpoint and the next revival.
MANY_CODES = ["--model.tokenizer.vocab_size", "512", "--model.revive_every", "5", "--model.revive_until", "1.0"]


@pytest.mark.parametrize(("strategy", "revival"), [("ddp", MANY_CODES), ("fsdp2", ["--model.revive_every", "2"])])
def test_ranks_resume_exactly(folder: Path, strategy: str, revival: list[str]) -> None:
    """Running means and revived codes are the same on all ranks, also after resuming."""
    options = ["--model.codebook.learning", "ema", *revival]
    train(folder, strategy, "run", *options)
    expected = load_tokenizer(folder / "run").state_dict()
    remove_checkpoint((folder / "run/checkpoints/last.ckpt").resolve())
    (folder / "run/config.json").unlink()
    printed = train(folder, strategy, "run", *options, "--resume")
    assert f"resuming from {folder}/run/checkpoints/step=00000003.ckpt" in printed
    for key, tensor in load_tokenizer(folder / "run").state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def fail_on_rank_0(rank: int) -> None:
    """Rank 0 fails in the middle of step 4, while the other waits for its gradients."""

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        if rank == 0 and self.global_step == 4:
            raise RuntimeError("this rank breaks")
        return step(self, batch, batch_idx)

    step, LitTokenizer.training_step = LitTokenizer.training_step, training_step


def test_rank_0_of_ddp_shows_its_own_exception_and_saves_alone(folder: Path) -> None:
    options = ["--model.revive_every", "2", "--trainer.default_root_dir", "run", "--trainer.val_check_interval", "8"]
    command = ["train-tokenizer", "--config", "run.yaml", "--data.batch_size", "4", "--trainer.strategy", "ddp"]
    failed = start([*command, *options], folder, 2, prepare=fail_on_rank_0)
    assert failed.wait(60) == [70, 1], failed.printed()
    rank_0, rank_1 = (path.read_text() for path in failed.outputs)
    assert "RuntimeError: this rank breaks" in rank_0
    assert "lost another rank" not in rank_0
    assert "step=00000004.ckpt; --resume continues from there" in rank_0
    assert "rank 1 lost another rank" in rank_1
    train(folder, "ddp", "run", *options[:2], "--resume")
    assert "config.json" in {path.name for path in (folder / "run").iterdir()}


def print_collectives(rank: int) -> None:
    """Makes each rank print the collectives of its steps that Python calls: not DDP's own of the gradients."""
    calls: list[str] = []
    for name in [name for name in dir(dist) if name.startswith(("all_", "barrier", "broadcast", "reduce"))]:

        def counted(*args, name=name, call=getattr(dist, name), **kwargs):  # type: ignore[no-untyped-def]
            if not kwargs.get("async_op"):  # as the exchange of signals is
                calls.append(name)
            return call(*args, **kwargs)

        setattr(dist, name, counted)

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        calls.clear()
        return step(self, batch, batch_idx)

    def after_step(self) -> None:  # type: ignore[no-untyped-def]
        after(self)
        print(f"step {self.global_step}: {' '.join(calls)}")

    step, LitTokenizer.training_step = LitTokenizer.training_step, training_step
    after, LitTokenizer.after_step = LitTokenizer.after_step, after_step


def test_a_step_takes_four_collectives_however_many_scales_there_are(folder: Path) -> None:
    """Two of the entropies, one of the adversary's weight, one of the codes; two more where codes are revived."""
    options = ["--model.codebook.learning", "ema", "--model.adversary.start_step", "0", "--model.revive_every", "3"]
    options += ["--trainer.max_steps", "4", "--trainer.log_every_n_steps", "9", "--trainer.limit_val_batches", "0"]
    command = ["train-tokenizer", "--config", "run.yaml", "--data.batch_size", "4", "--trainer.strategy", "ddp"]
    ranks = start([*command, *options], folder, 2, prepare=print_collectives)
    assert ranks.wait() == [0, 0], ranks.printed()
    for path in ranks.outputs:
        counts = [line.split()[2:] for line in path.read_text().splitlines() if line.startswith("step ")]
        revival = ["all_reduce", "all_reduce", "all_reduce", "all_reduce", "broadcast", "all_reduce"]
        assert counts == [["all_reduce"] * 4, ["all_reduce"] * 4, revival, ["all_reduce"] * 4]
