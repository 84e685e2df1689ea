"""`train-tokenizer`: LightningCLI of LitTokenizer; writes the tokenizer to the trainer's root folder."""

from __future__ import annotations

from pathlib import Path

from lightning_mvar.checkpoints import save_folder
from lightning_mvar.checkpoints.folders import CONFIG, TOKENIZER
from lightning_mvar.cli.starting import RunFolders
from lightning_mvar.cli.training import TrainingCLI, run_cli
from lightning_mvar.errors import InputError
from lightning_mvar.training.datamodules import ImageDataModule
from lightning_mvar.training.strategies import unsharded_copy
from lightning_mvar.training.tokenizer import TOKENIZER_KEY, LitTokenizer


class TokenizerFolders(RunFolders):
    """Folders of a run that writes its tokenizer to the root folder."""

    def refuse_earlier_run(self, ckpt_path: str | None, resume: bool) -> None:
        super().refuse_earlier_run(ckpt_path, resume)
        if not self.is_own(ckpt_path) and (self.root / CONFIG).exists():
            raise InputError(
                f"{self.root} holds a finished tokenizer: continue its training with --resume, replace it with "
                f"--overwrite, or choose another --trainer.default_root_dir for a new one"
                + (" (--resume found no complete checkpoint of it)" if resume else "")
            )

    def remove_earlier_run(self, logs: list[Path]) -> None:
        super().remove_earlier_run(logs)
        for name in (CONFIG, TOKENIZER):
            (self.root / name).unlink(missing_ok=True)


class TokenizerCLI(TrainingCLI):
    """TrainingCLI of `train-tokenizer`."""

    module, data, folders, checkpoint_key = LitTokenizer, ImageDataModule, TokenizerFolders, TOKENIZER_KEY

    def finish(self) -> None:
        """Writes the tokenizer."""
        tokenizer = unsharded_copy(self.model.averaged)
        folder = self.run_folders.root
        if self.trainer.is_global_zero:
            save_folder(folder, tokenizer)
            print(f"tokenizer {tokenizer.fingerprint()} in {folder}")


def main(argv: list[str]) -> None:
    run_cli(TokenizerCLI, argv)
