"""Frozen parameters keep their values under every strategy and need no optimizer state."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_network, write_token_shards
from lit_modules import make_module, make_trainer
from processes import start
from training_runs import FIT, TWO_RANKS, act_in_step, largest_difference, train, weights

from lightning_mvar import Tokenizer
from lightning_mvar.callbacks import Checkpoint
from lightning_mvar.checkpoints.training import NETWORK_KEY
from lightning_mvar.errors import InputError
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.freezing import freeze_parameters, trainable_parameters
from lightning_mvar.training.optim import OptimizerConfig
from lightning_mvar.training.strategies import FSDP2Strategy, build_network, full_tensor


@pytest.mark.parametrize(
    ("patterns", "trains"),
    [
        (["*_embed*"], lambda name: "_embed" not in name),
        (["blocks.0.*"], lambda name: not name.startswith("blocks.0.")),
        (["*", "!*.mixers.*"], lambda name: ".mixers." in name),
        (
            ["*.mixers.*", "!blocks.1.*", "blocks.1.mixers.1.*"],
            lambda name: ".mixers." not in name or "1.mixers.0" in name,
        ),
    ],
)
def test_the_last_pattern_that_matches_a_name_counts(patterns: list[str], trains) -> None:  # type: ignore[no-untyped-def]
    network = tiny_network()
    freeze_parameters(network, patterns)
    assert {name: p.requires_grad for name, p in network.named_parameters()} == {
        name: trains(name) for name, _ in network.named_parameters()
    }
    expected = sum(p.numel() for name, p in network.named_parameters() if trains(name))
    assert trainable_parameters(network.config, patterns) == expected


def test_patterns_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(InputError, match=r"'block.0.\*' matches no parameter; their names are like start_embed, "):
        freeze_parameters(tiny_network(), ["*_embed*", "block.0.*"])
    with pytest.raises(InputError, match="leaves nothing to train"):
        freeze_parameters(tiny_network(), ["*"])


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_frozen_parameters_have_neither_gradient_nor_optimizer_state(
    checkpointing: str, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Weight decay would change them too. The average, which moves with the weights, stays exact."""
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [32])
    options = {"freeze": ("*", "!blocks.1.*"), "ema_decay": 0.5, "activation_checkpointing": checkpointing}
    module = make_module(tokenizer_folder, options)
    initial = build_network(module.network_config, torch.device("cpu"), module.seed).state_dict()
    trainer = make_trainer(tmp_path, 3)
    trainer.fit(module, TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16))
    assert module.ema is not None
    for name, parameter in module.network.named_parameters():
        frozen = not name.startswith("blocks.1.")
        assert torch.equal(parameter, initial[name]) == frozen, name
        assert torch.equal(module.ema.get_parameter(name), initial[name]) == frozen, name
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.network.blocks[1].parameters()}


def test_a_sharded_run_that_trains_matrices_and_biases_alone_resumes(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Muon trains the matrices; nothing else of the mixers decays."""
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [64])
    data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16)

    def fit(ckpt_path: Path | None) -> dict[str, torch.Tensor]:
        options = {"freeze": ("*", "!*.mixers.*")}
        module = make_module(tokenizer_folder, options, mixers=("block_causal_attention",))
        module.optimizer_config = OptimizerConfig(base_lr=0.05, muon=True)
        saving = Checkpoint(str(tmp_path / "run"), every_n_train_steps=2)
        sharded = {"callbacks": [saving], "enable_checkpointing": True, "strategy": FSDP2Strategy(), "devices": 1}
        trainer = make_trainer(tmp_path, 4, **sharded)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        assert [group["decays"] for group in trainer.optimizers[0].param_groups] == [False, True]
        return {name: full_tensor(tensor) for name, tensor in module.state_dict().items()}

    with mock.patch.dict(os.environ):  # Lightning describes the rank there
        try:
            expected, resumed = fit(None), fit(tmp_path / "run/step=00000002.ckpt")
        finally:
            dist.destroy_process_group()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_run_resumes_with_the_same_frozen_parameters_only(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [32])
    data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16)

    def fit(freeze: tuple[str, ...], ckpt_path: Path | None) -> None:
        saving = Checkpoint(str(tmp_path / "run"), every_n_train_steps=1)
        trainer = make_trainer(tmp_path, 2, callbacks=[saving], enable_checkpointing=True)
        trainer.fit(make_module(tokenizer_folder, {"freeze": freeze}), data, ckpt_path=ckpt_path)

    fit(("*_embed*",), None)
    saved = tmp_path / "run/step=00000001.ckpt"
    with pytest.raises(
        InputError, match=r"freeze is \['\*_embed\*'\] in the checkpoint and \[\] in this run; set it as before"
    ):
        fit((), saved)
    content = torch.load(saved, weights_only=True)
    del content[NETWORK_KEY]["run"]["freeze"]  # as in older versions
    torch.save(content, saved)
    fit(("*_embed*",), saved)


def kill_in_step_4(rank: int) -> None:
    act_in_step(rank, 4, lambda module, batch: os.kill(os.getpid(), signal.SIGKILL))


def test_frozen_blocks_train_alike_under_every_strategy_and_resume(plain_run_folder: Path) -> None:
    text = (plain_run_folder / "run.yaml").read_text()
    (plain_run_folder / "run.yaml").write_text(
        text.replace("ema_decay: 0.9", "ema_decay: 0.9, freeze: ['*', '!blocks.1.mixers.*', '!blocks.0.mlp.*']")
    )
    six_steps = ["--trainer.max_steps", "6"]
    train(plain_run_folder, "one", six_steps)
    train(plain_run_folder, "ddp", [*six_steps, *TWO_RANKS, "ddp"], devices=2)
    fsdp2 = [*six_steps, *TWO_RANKS, "fsdp2"]
    killed = start([*FIT, *fsdp2, "--trainer.default_root_dir", "fsdp2"], plain_run_folder, 2, kill_in_step_4)
    assert killed.wait() != [0, 0]
    train(plain_run_folder, "fsdp2", fsdp2, devices=2)
    for name in ("ddp", "fsdp2"):
        assert largest_difference(weights(plain_run_folder / name), weights(plain_run_folder / "one")) < 1e-5
