"""Muon and AdamW as one optimizer: against torch's own two, across strategies, resumed, and with skipped steps."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import scalars, tiny_network, write_token_shards
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_modules import make_module, make_trainer
from processes import start
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_mvar import ScaleSchedule, Tokenizer, TokenizerConfig
from lightning_mvar.checkpoints.training import read_tensors, remove_checkpoint
from lightning_mvar.cli import run
from lightning_mvar.errors import InputError
from lightning_mvar.models.parameters import UNDECAYED
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.freezing import freeze_parameters
from lightning_mvar.training.muon import MuonAdamW, orthogonalize
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.optim import OptimizerConfig, apply_schedule, build_optimizer, skip_step_unless

CONFIG = OptimizerConfig(base_lr=1e-2, muon=True)
FIT = ["fit", "--config", "run.yaml", "--model.optimizer.muon", "true"]
TOLERANCE = 1e-6  # of weights across strategies, whose gradients round differently


def set_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_step(network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    apply_schedule(optimizer, CONFIG, step, 10, 256)
    set_gradients(network, step)
    optimizer.step()


def values_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns copies of all parameters and of the optimizer's state."""
    state = [optimizer.state[p][name] for p in network.parameters() for name in sorted(optimizer.state[p])]
    return [tensor.detach().clone() for tensor in (*network.parameters(), *state)]


def test_the_matrices_of_the_blocks_are_trained_by_muon() -> None:
    network = tiny_network()
    optimizer = build_optimizer(network, CONFIG, undecayed_names=UNDECAYED)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    *others, matrices = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert {name for name in matrices if name.startswith("blocks.1.")} == {
        f"blocks.1.{name}.weight"
        for name in ("mixers.0.qkv", "mixers.0.proj", "mixers.1.in_proj", "mixers.1.out_proj", "mlp.0", "mlp.2")
    }
    assert sorted([*matrices, *others[0], *others[1]]) == sorted(names.values())
    plain = build_optimizer(network, OptimizerConfig(), undecayed_names=UNDECAYED)
    assert others[1] == [names[id(p)] for p in plain.param_groups[1]["params"]]


def test_steps_are_those_of_muon_and_adamw_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)  # torch's Muon computes bfloat16 on a CPU too
    network, reference = tiny_network(), tiny_network()
    optimizer = build_optimizer(network, CONFIG, undecayed_names=UNDECAYED)
    by_name = dict(reference.named_parameters())
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, undecayed, matrices = ([by_name[names[id(p)]] for p in g["params"]] for g in optimizer.param_groups)
    muon = torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": decayed}, {"params": undecayed}], betas=(0.9, 0.95), fused=True)
    for step in range(3):
        take_step(network, optimizer, step)
        lr, weight_decay = CONFIG.learning_rate(step, 10, 256), CONFIG.decay(step, 10)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"], group["weight_decay"] = lr, weight_decay
        adamw.param_groups[1]["weight_decay"] = 0.0
        set_gradients(reference, step)
        muon.step()
        adamw.step()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, by_name[name]), name


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_singular_values_become_nearly_equal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix).float()
    strengths = torch.linalg.diagonal(u.T @ result @ v.T) if min(shape) == shape[1] else torch.linalg.svdvals(result)
    assert 0.6 < strengths.min() < strengths.max() < 1.3


def test_a_kernel_is_a_matrix_with_a_row_per_output_channel() -> None:
    kernel = torch.randn(24, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(orthogonalize(kernel), orthogonalize(kernel.view(24, 45)).view(24, 5, 3, 3))


def test_muon_trains_the_convolutions_of_a_tokenizer_beside_a_later_group() -> None:
    tokenizer = Tokenizer(TokenizerConfig(ScaleSchedule((1, 2)), 8, 4, channels=4, multipliers=(1, 2), blocks=1))
    optimizer = build_optimizer(tokenizer, CONFIG)
    names = {id(parameter): name for name, parameter in tokenizer.named_parameters()}
    trained = {names[id(parameter)] for parameter in optimizer.param_groups[-1]["params"]}
    assert {"encoder.levels.0.blocks.0.conv1.weight", "decoder.middle.2.conv2.weight"} < trained
    assert not {"encoder.conv_in.weight", "decoder.conv_out.weight", "quantizer.phi.0.weight"} & trained
    later, reference = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [later]})
    adamw = torch.optim.AdamW([reference], lr=CONFIG.base_lr, betas=(CONFIG.beta1, CONFIG.beta2), fused=True)
    for parameter in (*tokenizer.parameters(), later, reference):
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    adamw.step()
    assert torch.equal(later, reference)
    assert "momentum_buffer" in optimizer.state[tokenizer.encoder.levels[0].blocks[0].conv1.weight]


def test_muon_can_train_alone() -> None:
    network = tiny_network()
    freeze_parameters(network, ["*", "!*.mlp.*.weight"])
    optimizer = build_optimizer(network, CONFIG)
    (group,) = optimizer.param_groups
    before = [parameter.detach().clone() for parameter in group["params"]]
    skip_step_unless(torch.tensor(True), optimizer)
    take_step(network, optimizer, 0)
    assert len(before) == 4
    assert not any(torch.equal(a, b) for a, b in zip(group["params"], before, strict=True))


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    network = tiny_network()
    optimizer = build_optimizer(network, CONFIG)
    take_step(network, optimizer, 0)
    before = values_of(network, optimizer)
    assert len(before) > 2 * len([*network.parameters()])
    set_gradients(network, 1)
    network.blocks[1].mlp[0].weight.grad[3, 5] = torch.inf  # type: ignore[index]
    skip_step_unless(torch.tensor(False), optimizer)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values_of(network, optimizer), before, strict=True))
    skip_step_unless(torch.tensor(True), optimizer)
    take_step(network, optimizer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=False))


def test_a_loaded_state_continues_to_the_bit() -> None:
    network, resumed = tiny_network(), tiny_network()
    optimizer = build_optimizer(network, CONFIG)
    take_step(network, optimizer, 0)
    resumed.load_state_dict(network.state_dict())
    second = build_optimizer(resumed, CONFIG)
    second.load_state_dict(deepcopy(optimizer.state_dict()))
    for step in (1, 2):
        take_step(network, optimizer, step)
        take_step(resumed, second, step)
    assert all(
        torch.equal(a, b) for a, b in zip(values_of(network, optimizer), values_of(resumed, second), strict=True)
    )


@pytest.mark.parametrize("finite", [True, False])
def test_a_sharded_matrix_takes_the_step_of_a_whole_one(finite: bool, tmp_path: Path) -> None:
    whole = nn.Parameter(torch.randn(7, 12))
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
        other = {"params": [nn.Parameter(torch.ones(1))]}
        options = {"lr": 0.1, "betas": (0.9, 0.95), "momentum": 0.95, "fused": True}
        optimizers = [MuonAdamW([other], {"params": [matrix]}, **options) for matrix in (whole, sharded)]
        gradient = torch.randn(7, 12)
        whole.grad, sharded.grad = gradient, distribute_tensor(gradient, mesh, [Shard(0)])  # type: ignore[assignment]
        for optimizer in optimizers:
            skip_step_unless(torch.tensor(finite), optimizer)
            optimizer.step()
        assert isinstance(sharded, DTensor)
        assert torch.equal(sharded.full_tensor(), whole)
    finally:
        dist.destroy_process_group()


def test_a_resumed_run_equals_an_uninterrupted_one(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [64])
    data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16)

    def fit(resume: str | None, muon: bool = True, **options: object) -> LitMVAR:
        module = make_module(tokenizer_folder)
        module.optimizer_config = OptimizerConfig(base_lr=0.05, muon=muon)
        make_trainer(tmp_path, 4, **options).fit(module, data, ckpt_path=resume)
        return module

    checkpoint = ModelCheckpoint(dirpath=tmp_path / "run", every_n_train_steps=2, save_top_k=-1)
    expected = fit(None, callbacks=[checkpoint], enable_checkpointing=True).state_dict()
    (saved,) = (str(path) for path in (tmp_path / "run").iterdir() if "step=2" in path.name)
    resumed = fit(saved).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    with pytest.raises(InputError, match=r"optimizer.muon is True in the checkpoint and False in this run"):
        fit(saved, muon=False)
    content = torch.load(saved, weights_only=True)
    buffers = [
        entry["momentum_buffer"] for entry in content["optimizer_states"][0]["state"].values() if len(entry) == 1
    ]
    buffers[-1][0, 0] = torch.nan
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(InputError, match=r"momentum_buffer"):
        fit(str(tmp_path / "damaged.ckpt"))


def last_weights(root: Path) -> dict[str, Tensor]:
    return read_tensors((root / "checkpoints/last.ckpt").resolve(), "network.")


def test_strategies_agree_and_sharded_momentum_resumes_on_one_rank(
    plain_run_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    strategies = {name: ["--trainer.strategy", name] for name in ("ddp", "fsdp2")}
    runs = {"one": (1, []), **{name: (2, strategy) for name, strategy in strategies.items()}}
    short = [*FIT, "--trainer.max_steps", "5", "--trainer.val_check_interval", "5"]
    started = []
    for name, (devices, strategy) in runs.items():
        options = [*strategy, "--data.batch_size", str(16 // devices), "--trainer.default_root_dir", name]
        started.append(start([*short, *options], plain_run_folder, devices, name=name))
    for ranks in started:
        assert set(ranks.wait()) == {0}, ranks.printed()
    expected, losses = last_weights(plain_run_folder / "one"), scalars(plain_run_folder / "one/logs")["train/loss"]
    monkeypatch.chdir(plain_run_folder)
    sharded = Path("fsdp2/checkpoints")
    saved = {"ddp": last_weights(Path("ddp")), "fsdp2": last_weights(Path("fsdp2"))}
    remove_checkpoint((sharded / "last.ckpt").resolve())
    (sharded / "last.ckpt").unlink()
    (sharded / "last.ckpt").symlink_to("step=00000003.ckpt")
    one_rank = ["--resume", "--trainer.strategy", "fsdp2", "--trainer.default_root_dir", "fsdp2"]
    assert run([*short, *one_rank, "--trainer.devices", "1", "--model.optimizer.muon", "false"]) == 1
    assert "optimizer.muon is True in the checkpoint and False in this run" in capfd.readouterr().err
    resumed = start([*short, *one_rank, "--trainer.devices", "1"], plain_run_folder)
    assert resumed.wait() == [0], resumed.printed()
    saved["resumed"] = last_weights(Path("fsdp2"))
    for name in ("ddp", "fsdp2"):
        values = [value for _, value in scalars(Path(name) / "logs")["train/loss"]]
        assert values == pytest.approx([value for _, value in losses], rel=1e-4)
    for weights in saved.values():
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[key], atol=TOLERANCE, rtol=1e-4)
