"""`train-tokenizer`: LightningCLI of LitTokenizer; writes the tokenizer to the trainer's root folder."""

from __future__ import annotations

from pathlib import Path

from lightning_mvar.checkpoints import save_folder
from lightning_mvar.cli.training import TrainingCLI, add_start_options, run_cli, stop_trainer_ranks_on_error
from lightning_mvar.errors import InputError
from lightning_mvar.training.datamodules import ImageDataModule
from lightning_mvar.training.strategies import unsharded_copy
from lightning_mvar.training.tokenizer import TOKENIZER_KEY, LitTokenizer

CONFIG, WEIGHTS = "config.json", "tokenizer.safetensors"  # of a finished tokenizer


class TokenizerCLI(TrainingCLI):
    """TrainingCLI of a single command without subcommands."""

    checkpoint_key = TOKENIZER_KEY

    def refuse_other_runs(self, ckpt_path: str | None, resume: bool) -> None:
        super().refuse_other_runs(ckpt_path, resume)
        folder = Path(self.trainer.default_root_dir)
        if not self.is_own(ckpt_path) and (folder / CONFIG).exists():
            raise InputError(
                f"{folder} holds a finished tokenizer: continue its training with --resume, replace it with "
                f"--overwrite, or choose another --trainer.default_root_dir for a new one"
                + (" (--resume found no complete checkpoint of it)" if resume else "")
            )

    def remove_run(self, ckpt_path: str | None) -> None:
        super().remove_run(ckpt_path)
        for name in (CONFIG, WEIGHTS):
            (Path(self.trainer.default_root_dir) / name).unlink(missing_ok=True)

    def add_arguments_to_parser(self, parser):  # type: ignore[no-untyped-def]
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume from")
        add_start_options(parser)


def main(argv: list[str]) -> None:
    cli = run_cli(TokenizerCLI, LitTokenizer, ImageDataModule, args=argv[1:], run=False)
    trainer = cli.trainer
    with cli.own_folders("train-tokenizer"):
        ckpt_path = cli.choose_checkpoint(cli.config, training=True)
        with stop_trainer_ranks_on_error(trainer):
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
            tokenizer = unsharded_copy(cli.model.averaged)
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            save_folder(folder, tokenizer)
            print(f"tokenizer {tokenizer.fingerprint()} in {folder}")
