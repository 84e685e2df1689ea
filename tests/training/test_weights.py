"""Training that starts from a trained network: any file, other classes, another schedule, any strategy."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import SCHEDULE, LiveMemory, scalars, tiny_network, write_token_shards
from lit_modules import Losses, make_trainer
from processes import start
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from training_runs import FIT, TWO_RANKS, act_in_step, largest_difference, train, weights

from lightning_mvar import MVAR, ScaleSchedule, Tokenizer
from lightning_mvar.callbacks import Checkpoint
from lightning_mvar.checkpoints import StoredModel, open_trained, save_folder
from lightning_mvar.checkpoints.published import network_from_published, network_to_published
from lightning_mvar.checkpoints.training import (
    NETWORK_KEY,
    NetworkRecord,
    RunRecord,
    TokenizerRecord,
    publish,
    size_and_crc,
)
from lightning_mvar.cli import run
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import save_torch
from lightning_mvar.models.config import MVARConfig, NetworkOptions
from lightning_mvar.models.mvar import Block
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.optim import OptimizerConfig
from lightning_mvar.training.references import Reference
from lightning_mvar.training.strategies import FSDP2Strategy, build_network, full_tensor
from lightning_mvar.training.weights import InitialWeights

CLASSES = [str(label) for label in range(10)]


@pytest.fixture
def trained() -> MVAR:
    return tiny_network(head_dim=64)  # as published networks have


def record_of(network: MVAR, tokenizer: Tokenizer, folder: Path, ema: bool) -> dict[str, object]:
    record = TokenizerRecord(str(folder), tokenizer.fingerprint())
    return asdict(NetworkRecord(network.config, record, CLASSES, RunRecord(ema, (0, 0), 1, 4, 0.9 if ema else None)))


def checkpoint_weights(network: MVAR) -> dict[str, torch.Tensor]:
    """Weights that are zero, and an average that is the network."""
    average = {f"ema.{name}": tensor for name, tensor in network.state_dict().items()}
    return {f"network.{name}": torch.zeros_like(value) for name, value in network.state_dict().items()} | average


def write_folder(path: Path, network: MVAR, tokenizer: Tokenizer, folder: Path) -> None:
    save_folder(path, tokenizer, network, CLASSES)


def write_checkpoint(path: Path, network: MVAR, tokenizer: Tokenizer, folder: Path) -> None:
    entry = record_of(network, tokenizer, folder, ema=True)
    torch.save({"state_dict": checkpoint_weights(network), NETWORK_KEY: entry}, path)


def write_sharded(path: Path, network: MVAR, tokenizer: Tokenizer, folder: Path) -> None:
    unfinished = path.with_name("unfinished")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"state_dict": checkpoint_weights(network)}, checkpoint_id=unfinished, no_dist=True)
    torch.save({NETWORK_KEY: record_of(network, tokenizer, folder, ema=True)}, unfinished / "meta.pt")
    publish(unfinished, path, {file.name: size_and_crc(file) for file in unfinished.iterdir()})


def write_published(path: Path, network: MVAR, tokenizer: Tokenizer, folder: Path) -> None:
    save_torch(network_to_published(network), path)


KINDS = {
    "export": write_folder,
    "run.ckpt": write_checkpoint,
    "sharded.ckpt": write_sharded,
    "mvar_d2.pth": write_published,
}


@pytest.mark.parametrize("name", KINDS)
def test_the_first_loss_is_that_of_the_trained_network(
    name: str, trained: MVAR, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Its validation loss comes from a plain loop; the weight average starts as the trained weights too."""
    KINDS[name](tmp_path / name, trained, tokenizer, tokenizer_folder)
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [16])
    data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16)
    where = str(tokenizer_folder) if name == "mvar_d2.pth" else None  # published weights do not say
    losses = Losses()
    module = LitMVAR(tokenizer=where, label_drop=0.0, ema_decay=0.5, weights=str(tmp_path / name))
    start_weights: dict[str, torch.Tensor] = {}

    class Start(Losses):
        def on_train_start(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
            start_weights.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    make_trainer(tmp_path / "run", 1, callbacks=[losses, Start()]).fit(module, data)
    for key, value in trained.state_dict().items():
        assert torch.equal(start_weights[f"network.{key}"], value), key
        assert torch.equal(start_weights[f"ema.{key}"], value), key
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        logits = trained(batch.labels, tokenizer.scale_inputs(batch.tokens))
    expected = F.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten())
    assert losses.train[0] == pytest.approx(float(expected), rel=1e-5)
    assert module.network_config == trained.config


def initial(stored: Path, config: MVARConfig, names: list[str], log: pytest.LogCaptureFixture) -> tuple[MVAR, MVAR]:
    """Returns the network with its initial weights outside the blocks, and with the stored ones."""
    log.set_level(logging.INFO)
    load = InitialWeights(open_trained(stored), config, names).load
    fresh = build_network(config, torch.device("cpu"), 3, load=lambda part, prefix: None)
    return fresh, build_network(config, torch.device("cpu"), 3, load=load)


def test_classes_of_the_same_names_keep_their_embeddings(
    trained: MVAR, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_folder(tmp_path / "export", tokenizer, trained, [f"digit {label}" for label in range(10)])
    names = ["Digit_7", "cat", "digit 2"]
    config = MVARConfig(**(vars(trained.config) | {"num_classes": 3}))
    fresh, network = initial(tmp_path / "export", config, names, caplog)
    before, rows = trained.class_embed.weight, network.class_embed.weight
    assert torch.equal(rows, torch.stack([before[7], fresh.class_embed.weight[1], before[2], before[10]]))
    for name, value in network.state_dict().items():
        assert name == "class_embed.weight" or torch.equal(value, trained.state_dict()[name]), name
    assert "has 10 classes, this network 3: the embeddings of 2 common classes" in caplog.text


def test_the_same_classes_keep_their_embeddings_if_two_have_one_name(
    trained: MVAR, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["crane", "crane", *CLASSES[2:]]
    save_folder(tmp_path / "export", tokenizer, trained, names)
    _, network = initial(tmp_path / "export", trained.config, names, caplog)
    assert torch.equal(network.class_embed.weight, trained.class_embed.weight)


@pytest.mark.parametrize("sides", [(1, 2, 4, 6, 7), (1, 3)])
def test_another_schedule_resizes_the_positions_of_each_scale(
    sides: tuple[int, ...], trained: MVAR, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_folder(tmp_path / "export", tokenizer, trained, CLASSES)
    config = MVARConfig(**(vars(trained.config) | {"schedule": ScaleSchedule(sides)}))
    fresh, network = initial(tmp_path / "export", config, CLASSES, caplog)
    maps = trained.pos_embed[0].split(SCHEDULE.lengths)
    for k, positions in enumerate(network.pos_embed[0].split(config.schedule.lengths)):
        source = min(k, 3)
        before = maps[source].reshape(SCHEDULE.side_lengths[source], SCHEDULE.side_lengths[source], -1)
        for channel in (0, 17):
            expected = F.interpolate(before[None, None, :, :, channel], sides[k], mode="bicubic")
            torch.testing.assert_close(positions[:, channel], expected.flatten())
    kept = min(len(sides), 4)
    assert torch.equal(network.scale_embed.weight[:kept], trained.scale_embed.weight[:kept])
    assert torch.equal(network.scale_embed.weight[kept:], fresh.scale_embed.weight[kept:])
    assert torch.equal(network.start_embed, trained.start_embed)
    assert f"{kept} of {len(sides)} scale embeddings are kept" in caplog.text


@pytest.mark.parametrize("name", ["export", "sharded.ckpt"])
def test_no_more_than_a_block_is_in_memory(
    name: str, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Finished blocks are freed, as sharding does. The weights of a file are mapped, which takes no memory."""
    network = tiny_network(depth=5, head_dim=64)
    KINDS[name](tmp_path / name, network, tokenizer, tokenizer_folder)
    block = sum(parameter.nbytes for parameter in network.blocks[0].parameters())
    load = InitialWeights(open_trained(tmp_path / name), network.config, CLASSES).load
    most = 0

    def finish(part: torch.nn.Module) -> None:
        nonlocal most
        most = max(most, memory.bytes())
        if isinstance(part, Block):
            part.to("meta")

    with LiveMemory() as memory:
        build_network(network.config, torch.device("cpu"), 0, finish, load)
    assert block <= most < 2 * block


def test_weights_of_d12_fit_by_name_and_shape(tmp_path: Path) -> None:
    """On the meta device, with the classes and the schedule of 512 px."""
    with torch.device("meta"):
        network = MVAR(MVARConfig.for_size("d12"))
    config, weights = network_from_published(network_to_published(network), "mvar_d12.pth")
    stored = StoredModel("mvar_d12.pth", config, weights, [], lambda: None)  # type: ignore[arg-type,return-value]
    larger = MVARConfig(**(vars(config) | {"schedule": ScaleSchedule.for_resolution(512), "num_classes": 2}))
    InitialWeights(stored, larger, ["tench", "n01443537"])


def test_validation_of_trained_weights_needs_no_checkpoint(
    plain_run_folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(plain_run_folder)
    assert run(["validate", "--config", "run.yaml"]) == 1
    assert "validate needs --ckpt_path" in capsys.readouterr().err
    write_folder(plain_run_folder / "export", tiny_network(width=32, head_dim=16), tokenizer, plain_run_folder)
    assert run(["validate", "--config", "run.yaml", "--model.weights", "export"]) == 0
    assert "val/loss" in capsys.readouterr().out


def forge(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(path / "network.safetensors")
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, path / "network.safetensors")


def test_weights_that_do_not_fit_are_refused_in_one_line(
    trained: MVAR, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [16])
    write_checkpoint(tmp_path / "run.ckpt", trained, tokenizer, tokenizer_folder)
    torn = (tmp_path / "run.ckpt").read_bytes()[:-200]
    (tmp_path / "torn.ckpt").write_bytes(torn)
    for name in ("shape", "nan"):
        save_folder(tmp_path / name, tokenizer, trained, CLASSES)
    forge(tmp_path / "shape", "blocks.1.mlp.0.weight", lambda value: value[:5])
    forge(tmp_path / "nan", "pos_embed", lambda value: value * torch.nan)
    other = Tokenizer(tokenizer.config)
    save_folder(tmp_path / "other", other)
    cases = {
        ("missing", None): "missing does not exist",
        ("other", None): "describes no network",
        ("torn.ckpt", None): "torn.ckpt is damaged",
        ("shape", None): r"blocks.1.mlp.0.weight as torch.float32 \(5, 64\), not float32 \(256, 64\)",
        ("nan", None): "NaN or infinite values in pos_embed",
        ("run.ckpt", "other"): "was trained with tokenizer .* --model.tokenizer",
        ("run.ckpt", "depth"): "its depth is 2, not 5; leave out network.depth",
        ("", None): "set model.tokenizer",
    }
    for (source, change), message in cases.items():
        options = NetworkOptions(depth=5) if change == "depth" else NetworkOptions()
        where = str(tmp_path / "other") if change == "other" else None
        module = LitMVAR(options, where, weights=str(tmp_path / source) if source else None)
        data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16)
        with pytest.raises(InputError, match=message):
            make_trainer(tmp_path / "run", 1).fit(module, data)


def kill_in_step_4(rank: int) -> None:
    act_in_step(rank, 4, lambda module, batch: os.kill(os.getpid(), signal.SIGKILL))


def test_strategies_agree_and_a_resumed_run_needs_no_weights(plain_run_folder: Path, tokenizer: Tokenizer) -> None:
    """The run on two ranks is killed, and resumes without the weights that it started from."""
    write_folder(plain_run_folder / "export", tiny_network(), tokenizer, plain_run_folder)
    text = (plain_run_folder / "run.yaml").read_text()
    begin, end = text.index(",\n  network:"), text.index("}}\ndata")
    (plain_run_folder / "run.yaml").write_text(f"{text[:begin]}, weights: export{text[end + 1 :]}")
    six_steps = ["--trainer.max_steps", "6"]
    train(plain_run_folder, "one", six_steps)
    train(plain_run_folder, "fsdp2", [*six_steps, *TWO_RANKS, "fsdp2"], devices=2)
    (plain_run_folder / "own.yaml").write_text(
        "trainer: {callbacks+: [{class_path: lightning_mvar.callbacks.OwnPrefixCallback, init_args: {images: 16}}]}"
    )
    ddp = ["--config", "own.yaml", *six_steps, *TWO_RANKS, "ddp"]
    killed = start([*FIT, *ddp, "--trainer.default_root_dir", "ddp"], plain_run_folder, 2, kill_in_step_4)
    assert killed.wait() != [0, 0]
    shutil.rmtree(plain_run_folder / "export")
    train(plain_run_folder, "ddp", ddp, devices=2)
    expected = scalars(plain_run_folder / "one/logs")
    assert len(expected["train/loss"]) == 6
    for name in ("ddp", "fsdp2"):
        assert largest_difference(weights(plain_run_folder / name), weights(plain_run_folder / "one")) < 1e-5
        for tag in ("train/loss", "val/loss"):
            actual = scalars(plain_run_folder / name / "logs")[tag]
            assert [value for _, value in actual] == pytest.approx([value for _, value in expected[tag]], abs=1e-5)


def test_a_run_that_is_continued_from_python_needs_no_weights(
    trained: MVAR, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Frozen parameters stay frozen, and the weights and their average are those of an uninterrupted run."""
    save_folder(tmp_path / "export", tokenizer, trained, CLASSES)
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [64])
    options = {"freeze": ("*_embed*",), "ema_decay": 0.5, "optimizer": OptimizerConfig(base_lr=0.05)}

    def fit(module: LitMVAR, steps: int, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=16, seed=0)
        checkpoint = Checkpoint(str(tmp_path / "run"), every_n_train_steps=2)
        trainer = make_trainer(tmp_path, steps, callbacks=[checkpoint], enable_checkpointing=True, limit_val_batches=0)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module.state_dict()

    torch.manual_seed(0)
    expected = fit(LitMVAR(tokenizer=str(tokenizer_folder), weights=str(tmp_path / "export"), **options), 3)
    shutil.rmtree(tmp_path / "export")
    middle = tmp_path / "run/step=00000002.ckpt"
    torch.manual_seed(0)
    resumed = fit(LitMVAR.load_from_checkpoint(middle, **options), 3, middle)
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    assert torch.equal(resumed["network.pos_embed"], trained.pos_embed)


def test_a_reference_is_sharded_block_by_block(trained: MVAR, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_folder(tmp_path / "export", tokenizer, trained, CLASSES)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        strategy = FSDP2Strategy()
        strategy._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        strategy.parallel_devices, strategy.cluster_environment = [torch.device("cpu")], None
        of_run = trained.config, CLASSES, tokenizer, "tokenizer", strategy
        reference = Reference(str(tmp_path / "export"), "ema", *of_run)
        whole: list[bool] = []
        load = reference.weights.load

        def watch(part: torch.nn.Module, prefix: str) -> None:
            load(part, prefix)
            whole.append(isinstance(part, Block) or all(isinstance(p, DTensor) for p in part.blocks.parameters()))

        reference.weights.load = watch  # type: ignore[method-assign]
        reference.build()
    finally:
        dist.destroy_process_group()
    assert whole == [True] * 3
    assert not reference.network.training
    assert not any(parameter.requires_grad for parameter in reference.network.parameters())
    for name, value in reference.network.state_dict().items():
        assert torch.equal(full_tensor(value), trained.state_dict()[name]), name
