"""Every YAML parses, alone or with what its header says it belongs to, and builds a network of the stated size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from lightning_mvar import MVAR, MVARConfig, Tokenizer, TokenizerConfig
from lightning_mvar.checkpoints import config_from_dict
from lightning_mvar.cli import run
from lightning_mvar.commands.train_tokenizer import TokenizerCLI
from lightning_mvar.commands.training import TrainingCLI, run_cli
from lightning_mvar.data.datamodule import ImageDataModule, TokenDataModule
from lightning_mvar.module import LitMVAR
from lightning_mvar.tokenizer_module import LitTokenizer

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
COMMAND = re.compile(r"^#\s+lightning-mvar (fit|train-tokenizer) (.*)$", re.MULTILINE)


def header_commands(config: str) -> list[tuple[str, list[str]]]:
    """The commands in the comment at the top of a file, continued lines joined, optional parts taken."""
    text = (ROOT / config).read_text().replace("\\\n#", " ").replace("[--", "--").replace("yaml]", "yaml")
    return [(match[1], match[2].split()) for match in COMMAND.finditer(text)]


class Parsed(Exception):
    """Carries the configuration out of a command line that has parsed and would now build."""


def parse(command: str, options: list[str]) -> Namespace:
    """What the command line would build: parsed and validated, not built."""
    base = TokenizerCLI if command == "train-tokenizer" else TrainingCLI

    class ParsingCLI(base):  # type: ignore[misc, valid-type]
        def before_instantiate_classes(self) -> None:
            raise Parsed(self.config.get(command, self.config))

    if command == "train-tokenizer":
        classes, settings = (LitTokenizer, ImageDataModule), {"args": options, "run": False}
    else:
        classes, settings = (LitMVAR, TokenDataModule), {"args": [command, *options]}
    with pytest.raises(Parsed) as parsed:
        run_cli(ParsingCLI, *classes, **settings)
    return parsed.value.args[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_commands_of_every_header_parse(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = header_commands(config)
    assert commands, f"{config} does not say how to run it"
    assert any(config in options for _, options in commands)
    for command, options in commands:
        model = parse(command, options).model
        with torch.device("meta"):
            if command == "fit":
                network = MVAR(config_from_dict(MVARConfig, model.network.as_dict(), config))
                check_stated_size(config, network)
            else:
                Tokenizer(config_from_dict(TokenizerConfig, model.tokenizer.as_dict(), config))


def check_stated_size(config: str, network: MVAR) -> None:
    """Where the header states the size as M-VAR, the network has it."""
    stated = re.search(r"([\d,.]+)M parameters as M-VAR", (ROOT / config).read_text())
    if stated:
        assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == float(stated[1].replace(",", ""))


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
