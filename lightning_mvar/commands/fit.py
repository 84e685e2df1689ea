"""`fit`, `validate` and `test`: LightningCLI of LitMVAR and the token datamodule."""

from __future__ import annotations

from lightning_mvar.cli.training import TrainingCLI, run_cli
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.mvar import LitMVAR


def main(argv: list[str]) -> None:
    run_cli(TrainingCLI, LitMVAR, TokenDataModule, args=argv)
