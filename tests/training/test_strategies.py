"""One process, DDP and FSDP2 train the same network and sample the same images."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import pictures, scalars
from hostile import Malicious
from processes import start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_mvar.checkpoints import load_trained
from lightning_mvar.checkpoints.sharded import ShardReader
from lightning_mvar.checkpoints.training import SEAL, publish, read_tensors, remove_checkpoint, size_and_crc
from lightning_mvar.cli import run
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR, Block
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.strategies import FSDP2Strategy, build_network, gathered

FIT = ["fit", "--config", "run.yaml"]
KEEP_SHARDED = [f"--trainer.callbacks.{name}.keep_sharded=true" for name in ("SamplesCallback", "FIDCallback")]
FSDP2 = ["--trainer.strategy", "lightning_mvar.training.strategies.FSDP2Strategy"]
BFLOAT16 = [*FSDP2, "--trainer.strategy.param_dtype", "bfloat16"]
RUNS = {
    "one": (1, []),
    "ddp": (2, ["--trainer.strategy", "ddp"]),
    "fsdp2": (2, ["--trainer.strategy", "fsdp2"]),
    "frugal": (2, ["--trainer.strategy", "fsdp2", "--model.activation_checkpointing", "full"]),
    "half": (2, [*BFLOAT16, "--trainer.precision", "bf16-mixed"]),
}


def options(name: str) -> list[str]:
    devices, options = RUNS[name]
    return [*options, "--data.batch_size", str(16 // devices), "--trainer.default_root_dir", name]


def make_step_3_nan(rank: int) -> None:
    """Makes the last rank's loss NaN in step 3."""
    step = LitMVAR.training_step

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        loss = step(self, batch, batch_idx)
        return loss * torch.nan if self.global_step == 3 and rank == self.trainer.world_size - 1 else loss

    LitMVAR.training_step = training_step


def test_strategies_agree_on_losses_weights_scores_and_samples(run_folder: Path) -> None:
    """All runs train on the same global batches and skip one step.

    `frugal` keeps the network sharded during sampling; `half` gathers it in bfloat16.
    """
    text = (run_folder / "run.yaml").read_text()
    (run_folder / "frugal.yaml").write_text(text.replace("batch_size: 3", "batch_size: 3, keep_sharded: true"))
    for name in RUNS:
        config = ["fit", "--config", "frugal.yaml" if name == "frugal" else "run.yaml", "--model.power_ema", "[0.1]"]
        config += ["--trainer.max_steps", "6", "--trainer.val_check_interval", "3"]
        devices = RUNS[name][0]
        ranks = start([*config, *options(name)], run_folder, devices, make_step_3_nan, name)
        assert ranks.wait() == [0] * devices, ranks.printed()
        assert "step 3 is skipped: its gradient norm is nan" in ranks.printed()
        for rank in range(devices):
            (line,) = (run_folder / name / f"skipped_steps/rank{rank}.jsonl").read_text().splitlines()
            assert len(json.loads(line)["keys"]) == 16 // devices
    one = scalars(run_folder / "one/logs")
    assert len(one["train/loss"]) == 6
    assert len(one["val/fid"]) == 2
    expected = {part: last_weights(run_folder / "one", part) for part in ("network.", "ema.", "power_averages.0.")}
    for name in ("ddp", "fsdp2", "frugal"):
        other = scalars(run_folder / name / "logs")
        assert other.keys() == one.keys()
        for tag in one:
            tolerance = {"rel": 1e-4} if "fid" in tag or "frechet" in tag else {"abs": 1e-5, "rel": 1e-4}
            assert [step for step, _ in other[tag]] == [step for step, _ in one[tag]]
            values = [value for _, value in one[tag]]
            assert [value for _, value in other[tag]] == pytest.approx(values, nan_ok=True, **tolerance), (name, tag)
        assert pictures(run_folder / name / "logs", "samples") == pictures(run_folder / "one/logs", "samples")
        for part, weights in expected.items():
            for key, tensor in last_weights(run_folder / name, part).items():
                torch.testing.assert_close(tensor, weights[key], atol=1e-5, rtol=1e-4)
    half = [value for _, value in scalars(run_folder / "half/logs")["train/loss"]]
    assert half == pytest.approx([value for _, value in one["train/loss"]], abs=2e-3)


@pytest.mark.cuda
def test_fsdp2_on_one_gpu_trains_as_one_process_does(plain_run_folder: Path) -> None:
    on_gpu = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.default_root_dir"]
    for name, strategy in (("one", []), ("fsdp2", ["--trainer.strategy", "fsdp2"])):
        ranks = start([*FIT, *on_gpu, name, *strategy], plain_run_folder, name=name)
        assert ranks.wait() == [0], ranks.printed()
    one, fsdp2 = (scalars(plain_run_folder / name / "logs")["train/loss"] for name in ("one", "fsdp2"))
    assert [loss for _, loss in fsdp2] == pytest.approx([loss for _, loss in one], rel=1e-4)
    expected = last_weights(plain_run_folder / "one", "network.")
    for key, tensor in last_weights(plain_run_folder / "fsdp2", "network.").items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-4, rtol=1e-3)


def last_weights(root: Path, prefix: str) -> dict[str, torch.Tensor]:
    return read_tensors((root / "checkpoints/last.ckpt").resolve(), prefix)


def test_a_sharded_checkpoint_resumes_on_other_devices_and_exports_to_a_folder(
    plain_run_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    six_steps = [*FIT, "--trainer.max_steps", "6"]
    first = start([*six_steps, *options("fsdp2")], plain_run_folder, 2)
    assert first.wait() == [0, 0], first.printed()
    monkeypatch.chdir(plain_run_folder)
    expected = last_weights(Path("fsdp2"), "network.")
    remove_checkpoint(Path("fsdp2/checkpoints/last.ckpt").resolve())
    Path("fsdp2/checkpoints/last.ckpt").unlink()
    Path("fsdp2/checkpoints/last.ckpt").symlink_to("step=00000003.ckpt")
    checkpoint = Path("fsdp2/checkpoints/last.ckpt").resolve()
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "meta.pt",
        "seal.json",
    ]
    assert run(["export", "--ckpt_path", str(checkpoint), "--out", "export"]) == 0
    for weights, prefix in (("ema", "ema."), ("raw", "network.")):
        network = load_trained(checkpoint, weights=weights).network.state_dict()
        saved = read_tensors(checkpoint, prefix)
        assert all(torch.equal(network[name], tensor) for name, tensor in saved.items())
        exported = load_trained("export").network.state_dict()
        assert all(torch.equal(exported[name], network[name]) for name in network) == (weights == "ema")
    assert run(["sample", "--ckpt_path", str(checkpoint), "--out", "samples.npz"]) == 0
    assert run([*FIT, "--resume", "--trainer.default_root_dir", "fsdp2"]) == 1
    assert "is sharded: it needs --trainer.strategy fsdp2" in capfd.readouterr().err
    one_rank = ["--trainer.strategy", "fsdp2", "--data.batch_size", "16", "--trainer.default_root_dir", "fsdp2"]
    resumed = start([*six_steps, *one_rank, "--resume", "--trainer.devices", "1"], plain_run_folder)
    assert resumed.wait() == [0], resumed.printed()
    assert "resuming on 1 ranks instead of 2" in resumed.printed()
    for key, tensor in last_weights(Path("fsdp2"), "network.").items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-4)


def test_two_sharded_replicas_train_as_one_process_does_and_resume_as_one(run_folder: Path) -> None:
    """Each replica is sharded over two ranks; a single rank without replicas resumes from the middle of the run."""
    short = [*FIT, "--trainer.max_steps", "4", "--trainer.default_root_dir"]
    replicas = ["--trainer.strategy.data_parallel_replicate", "2", "--data.batch_size", "4"]
    one = start([*short, "one"], run_folder, name="one")
    hybrid = start([*short, "hybrid", *FSDP2, *replicas], run_folder, 4, name="hybrid")
    assert one.wait() == [0], one.printed()
    assert hybrid.wait() == [0] * 4, hybrid.printed()
    shutil.copytree(run_folder / "hybrid", run_folder / "resumed", symlinks=True)
    remove_checkpoint(run_folder / "resumed/checkpoints/step=00000004.ckpt")
    plain = ["--trainer.strategy", "fsdp2", "--trainer.devices", "1", "--resume"]
    resumed = start([*short, "resumed", *plain], run_folder, name="resumed")
    assert resumed.wait() == [0], resumed.printed()
    assert "resuming on 1 ranks instead of 4" in resumed.printed()
    expected = scalars(run_folder / "one/logs")
    assert len(expected["train/loss"]) == len(expected["train/grad_norm"]) == 4
    assert len(expected["val/fid"]) == 1
    for name in ("hybrid", "resumed"):
        logged = scalars(run_folder / name / "logs")
        assert logged.keys() == expected.keys()
        for tag, points in expected.items():
            assert [step for step, _ in logged[tag]] == [step for step, _ in points]
            values = [value for _, value in points]
            assert [value for _, value in logged[tag]] == pytest.approx(values, abs=1e-5, rel=1e-4), (name, tag)
        assert pictures(run_folder / name / "logs", "samples") == pictures(run_folder / "one/logs", "samples")
        for part in ("network.", "ema."):
            weights = last_weights(run_folder / "one", part)
            for key, tensor in last_weights(run_folder / name, part).items():
                torch.testing.assert_close(tensor, weights[key], atol=1e-5, rtol=0)


def write_malicious_checkpoint(sharded: Path, path: Path, where: str, owned: Path) -> None:
    """Seals a copy of a sharded checkpoint with code in its metadata, or in a file that the optimizer's state is in."""
    checkpoint = Path(shutil.copytree(sharded, path.with_name("copy")))
    metadata = ShardReader(checkpoint).metadata
    if where == "metadata":
        metadata.planner_data = Malicious(owned)
    else:
        hostile = path.with_name("hostile")
        dcp.save({"code": Malicious(owned)}, checkpoint_id=hostile, no_dist=True)
        (entry,) = ShardReader(hostile).metadata.storage_data.values()
        (hostile / "__0_0.distcp").rename(checkpoint / "__1_0.distcp")
        for index in metadata.storage_data:
            if index.fqn.endswith("betas"):
                metadata.storage_data[index] = replace(entry, relative_path="__1_0.distcp")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal = {file.name: size_and_crc(file) for file in checkpoint.iterdir() if file.name != SEAL}
    publish(checkpoint, path, seal)


def test_resuming_runs_no_code_of_a_sharded_checkpoint(plain_run_folder: Path) -> None:
    command = [*FIT, "--trainer.strategy", "fsdp2", "--trainer.devices", "1", "--trainer.max_steps"]
    first, owned = start([*command, "1"], plain_run_folder), plain_run_folder / "owned"
    assert first.wait() == [0], first.printed()
    for where, damaged in (("metadata", ".metadata is damaged"), ("optimizer", "betas is damaged")):
        folder = plain_run_folder / where / "checkpoints"
        folder.mkdir(parents=True)
        sharded = plain_run_folder / "run/checkpoints/step=00000001.ckpt"
        write_malicious_checkpoint(sharded, folder / "step=00000002.ckpt", where, owned)
        resumed = start([*command, "3", "--resume", "--trainer.default_root_dir", where], plain_run_folder)
        assert resumed.wait() == [1], resumed.printed()
        assert damaged in resumed.printed()
        assert "Traceback" not in resumed.printed()
        assert not owned.exists()


def test_each_part_of_a_network_is_initialized_and_finished_before_the_next() -> None:
    config, cpu = MVARConfig(depth=3, width=32, heads=2, head_dim=32), torch.device("cpu")
    finished: list[nn.Module] = []

    def finish(part: nn.Module) -> None:
        """Frees a block's memory, as sharding does."""
        assert all(parameter.is_meta for block in finished for parameter in block.parameters())
        assert not any(parameter.is_meta for parameter in part.parameters(recurse=isinstance(part, Block)))
        if isinstance(part, Block):
            part.to("meta")
        finished.append(part)

    build_network(config, cpu, 0, finish)
    assert [type(part) for part in finished] == [Block, Block, Block, MVAR]
    first = build_network(config, cpu, 0).state_dict()
    torch.manual_seed(123)
    second = build_network(config, cpu, 0).state_dict()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
        assert tensor.isfinite().all(), name
    assert not torch.equal(first["blocks.0.mlp.0.weight"], first["blocks.1.mlp.0.weight"])


def test_only_the_last_block_stays_gathered_between_forward_and_backward_pass(tmp_path: Path) -> None:
    config, cpu = MVARConfig(depth=3, width=32, heads=2, head_dim=32), torch.device("cpu")
    labels, inputs = torch.tensor([3]), torch.randn(1, config.schedule.num_tokens - 1, config.code_dim)
    expected = build_network(config, cpu, 0)(labels, inputs)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        strategy = FSDP2Strategy()
        strategy._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        network = build_network(config, cpu, 0, strategy.shard)
        logits = network(labels, inputs)
        torch.testing.assert_close(logits, expected)
        assert [isinstance(block.mlp[0].weight, DTensor) for block in network.blocks] == [True, True, False]
        logits.sum().backward()
        assert all(isinstance(parameter, DTensor) for parameter in network.blocks.parameters())
        with gathered(network, gather=True):
            network(labels, inputs)
            assert not any(isinstance(parameter, DTensor) for parameter in network.parameters())
        network(labels, inputs)
        assert [isinstance(block.mlp[0].weight, DTensor) for block in network.blocks] == [True, True, False]
    finally:
        dist.destroy_process_group()
