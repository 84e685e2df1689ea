"""Configs: the commands in each YAML header parse and build a network of the stated size."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from lightning_mvar import MVAR, MVARConfig, ScaleSchedule, Tokenizer, TokenizerConfig
from lightning_mvar.cli import run
from lightning_mvar.cli.checks import check_options
from lightning_mvar.cli.training import TrainingCLI, parse_command
from lightning_mvar.commands.sweep import plan_cells
from lightning_mvar.commands.train_tokenizer import TokenizerCLI
from lightning_mvar.io.json_files import checked
from lightning_mvar.models.config import BASELINES
from lightning_mvar.models.costs import training_bytes
from lightning_mvar.sweeps.sweep_file import read_sweep

MIXERS = {"M-VAR": ("scale_attention", "mamba2"), "VAR": ("block_causal_attention",)}
ROOT = Path(__file__).parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
SWEEPS = [config for config in CONFIGS if config.startswith("configs/sweep/")]
BLOCKS = [config for config in CONFIGS if config.startswith(("configs/base/logger", "configs/base/callbacks/"))]
COMMAND = re.compile(r"^#\s+lightning-mvar (fit|train-tokenizer|sweep) (.*)$", re.MULTILINE)


def header_commands(config: str) -> list[tuple[str, list[str]]]:
    """Returns the commands in the header of a file, with continued lines joined and optional parts included."""
    text = (ROOT / config).read_text().replace("\\\n#", " ").replace("[--", "--").replace("yaml]", "yaml")
    return [(match[1], match[2].split()) for match in COMMAND.finditer(text)]


def parse(command: str, options: list[str]) -> Namespace:
    """Parses and validates a command line without building anything."""
    return parse_command([command, *options], TrainingCLI if command == "fit" else TokenizerCLI)


@cache
def parsed_header(config: str) -> list[tuple[str, Namespace]]:
    """Returns the names and the parsed options of the commands in the header of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return [(command, parse(command, options)) for command, options in header_commands(config)]


@pytest.mark.parametrize("config", SWEEPS)
def test_every_cell_of_a_sweep_parses(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert ("sweep", config) in [(command, options[0]) for command, options in header_commands(config)]
    plan = read_sweep(Path(config))
    assert len(plan_cells(plan, Path("out"))) == len(plan.variants()) * len(plan.seeds)
    for _, (command, *options) in plan.preparation():
        check_options(command, *options)
        if command == "train-tokenizer":
            parse(command, options)


def network_config(model: Namespace, config: str) -> MVARConfig:
    """Returns the network config of a parsed command line; fields that the tokenizer sets take ImageNet's values."""
    values = {name: value for name, value in model.network.as_dict().items() if value is not None}
    resolution = next((int(r) for r in (512, 1024) if f"imagenet_{r}" in (ROOT / config).read_text()), 256)
    published = {"schedule": {"side_lengths": ScaleSchedule.for_resolution(resolution).side_lengths}}
    return checked(published | values, MVARConfig, config)


@pytest.mark.parametrize("config", BLOCKS)
def test_blocks_are_used_by_other_configs(config: str) -> None:
    block = config.removeprefix("configs/base/")
    assert any(block in (ROOT / other).read_text() for other in CONFIGS if other != config)


@pytest.mark.parametrize("config", sorted(set(CONFIGS) - set(SWEEPS) - set(BLOCKS)))
def test_the_commands_of_every_header_parse(config: str) -> None:
    commands = header_commands(config)
    assert commands, f"the header of {config} has no command that runs it"
    assert any(config in options for _, options in commands)
    for command, namespace in parsed_header(config):
        with torch.device("meta"):
            if command == "fit":
                network = MVAR(network_config(namespace.model, config))
                check_stated_size(config, network)
            else:
                Tokenizer(checked(namespace.model.tokenizer.as_dict(), TokenizerConfig, config))


def check_stated_size(config: str, network: MVAR) -> None:
    """Asserts the parameter counts that a header states for M-VAR and VAR."""
    text = (ROOT / config).read_text().replace("\n#", "")
    for kind, mixers in MIXERS.items():
        for stated in re.findall(rf"([\d,.]+)M(?: parameters)? as {kind}\b", text):
            with torch.device("meta"):
                same_size = MVAR(replace(network.config, mixers=mixers))
            assert round(sum(p.numel() for p in same_size.parameters()) / 1e6, 1) == float(stated.replace(",", ""))


@pytest.mark.parametrize(
    ("size", "depth", "batch", "epochs", "base_lr", "gate", "final_lr", "final_decay"),
    [
        ("d12", 12, 768, 200, 1e-4, 1e-3, 0.1, None),
        ("d16", 16, 768, 200, 1e-4, 1e-3, 0.1, None),
        ("d20", 20, 768, 250, 1e-4, 1e-3, 0.1, None),
        ("d24", 24, 768, 350, 8e-5, 1e-4, 0.01, None),
        ("d30", 30, 1024, 350, 8e-5, 1e-5, 0.01, 0.08),
        ("d32", 32, 1024, 350, 8e-5, 1e-5, 0.01, 0.08),
        ("d36s", 36, 768, 350, 8e-5, 5e-6, 0.01, 0.08),
    ],
)
def test_sizes_carry_their_published_recipe(
    size: str, depth: int, batch: int, epochs: int, base_lr: float, gate: float, final_lr: float, final_decay: float
) -> None:
    config = f"configs/size/{size}.yaml"
    ((_, namespace),) = parsed_header(config)
    network, optimizer = network_config(namespace.model, config), namespace.model.optimizer
    trainer = namespace.trainer
    assert (network.depth, network.width, network.heads) == (depth, 64 * depth, depth)
    assert network.drop_path == pytest.approx(0.1 * depth / 24, rel=1e-5)
    assert network.qk_norm
    assert namespace.data.global_batch_size == batch
    assert (trainer.max_epochs, trainer.gradient_clip_val) == (epochs, 2.0)
    assert (optimizer.base_lr, network.adaln_gate_init) == (base_lr, gate)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.05)
    assert (optimizer.final_lr_ratio, optimizer.final_weight_decay) == (final_lr, final_decay)
    assert (optimizer.warmup, optimizer.initial_lr_ratio, namespace.model.label_drop) == (0.02, 0.005, 0.1)


MEMORY = 80 * 2**30 * 0.9  # of the devices that the headers assume; the rest is for the CUDA context and fragmentation
ON_EIGHT_GPUS = [config for config in CONFIGS if re.match(r"configs/(size/d|data/imagenet)", config)]


@pytest.mark.parametrize("config", ON_EIGHT_GPUS)
def test_recipes_fit_on_their_devices(config: str) -> None:
    ((_, namespace),) = parsed_header(config)
    share = namespace.data.global_batch_size // 8
    assert share % namespace.data.max_batch_size == 0
    shards = 8 if "FSDP2" in namespace.trainer.strategy.class_path else 1
    recompute = namespace.model.activation_checkpointing == "full"
    network = network_config(namespace.model, config)
    assert training_bytes(network, namespace.data.max_batch_size, recompute, shards) < MEMORY


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_overlays_of_their_names(name: str) -> None:
    config = "configs/prediction/next_token.yaml" if name == "ar_raster" else f"configs/mixer/{name}.yaml"
    network = network_config(parsed_header(config)[0][1].model, config)
    assert replace(network, **BASELINES[name]) == network


@pytest.mark.parametrize("config", ["base/imagenet", "data/imagenet_512", "data/imagenet_1024"])
def test_imagenet_configs_name_the_tokenizer_that_their_header_exports(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer sets the schedule, so the config must not."""
    monkeypatch.chdir(ROOT)
    model = parse("fit", ["--config=configs/base/imagenet.yaml", f"--config=configs/{config}.yaml"]).model
    resolution = config.partition("_")[2] or "256"
    assert f"--resolution {resolution} --out {model.tokenizer}\n" in (ROOT / f"configs/{config}.yaml").read_text()
    assert model.network.schedule is None


def test_interpolation_sees_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = ["--config", "configs/experiment/digits.yaml", "--trainer.default_root_dir", "elsewhere"]
    namespace = parse("fit", options)
    assert namespace.trainer.logger.init_args.save_dir == "elsewhere"
    assert namespace.trainer.callbacks[0].init_args.dirpath == "elsewhere/checkpoints"


def test_print_config_shows_overlays_applied_in_order(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    overlay = ["--config", "configs/mixer/var.yaml", "--data.batch_size", "17", "--print_config"]
    assert run(["fit", "--config", "configs/experiment/digits.yaml", *overlay]) == 0
    printed = capfd.readouterr().out
    assert "block_causal_attention" in printed
    assert "mamba2" not in printed
    assert "batch_size: 17" in printed
