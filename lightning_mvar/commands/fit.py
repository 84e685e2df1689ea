"""`fit`, `validate` and `test`: LightningCLI of LitMVAR and the token datamodule."""

from __future__ import annotations

from lightning_mvar.cli.training import TrainingCLI, run_cli


def main(argv: list[str]) -> None:
    run_cli(TrainingCLI, argv)
