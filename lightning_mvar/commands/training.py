"""`fit`, `validate` and `test`: LightningCLI over LitMVAR and the token datamodule."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_mvar.checkpoints import CHECKPOINT_KEY
from lightning_mvar.data.datamodule import TokenDataModule
from lightning_mvar.errors import InputError
from lightning_mvar.module import LitMVAR
from lightning_mvar.weights import read_torch

# Interpolation that sees every --config file and the overrides after them, with keys relative to the subcommand.
PARSER = {"parser_mode": "omegaconf+", "exit_on_error": False}
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class TrainingCLI(LightningCLI):
    """LightningCLI whose command line always wins over what a checkpoint remembers."""

    checkpoint_key = CHECKPOINT_KEY  # what a checkpoint of this command holds

    def _parse_ckpt_path(self) -> None:
        """Refuse at once a checkpoint that cannot be read or is not ours.

        Lightning's own would let the checkpoint's hyperparameters override the command line, silently.
        """
        command = self.config.get("subcommand")
        path = self.config.get(command, self.config).get("ckpt_path")
        if path is None and command in ("validate", "test"):
            raise InputError(f"{command} needs --ckpt_path: without it the network is untrained")
        if path is not None and self.checkpoint_key not in read_torch(Path(path)):
            raise InputError(f"--ckpt_path {path} is not a checkpoint of this command")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate", "test")}


def main(argv: list[str]) -> None:
    run_cli(TrainingCLI, LitMVAR, TokenDataModule, args=argv)


def run_cli(cli: type[LightningCLI], model: type, data: type, **options: Any) -> LightningCLI:
    """Parse, build and run.

    Raises:
        InputError: if this machine does not have the devices or the precision that are asked for.
    """
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # we pass on what the console script was given
    try:
        return cli(
            model,
            data,
            parser_kwargs=PARSER,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            **options,
        )
    except MisconfigurationException as error:
        raise InputError(" ".join(str(error).split())) from error
