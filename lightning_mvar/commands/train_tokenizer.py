"""`train-tokenizer`: LightningCLI of LitTokenizer; writes the tokenizer to the trainer's root folder."""

from __future__ import annotations

from pathlib import Path

from lightning_mvar.checkpoints import save_folder
from lightning_mvar.cli.training import TrainingCLI, run_cli
from lightning_mvar.errors import InputError
from lightning_mvar.training.datamodules import ImageDataModule
from lightning_mvar.training.strategies import unsharded_copy
from lightning_mvar.training.tokenizer import TOKENIZER_KEY, LitTokenizer

CONFIG, WEIGHTS = "config.json", "tokenizer.safetensors"  # of a finished tokenizer


class TokenizerCLI(TrainingCLI):
    """TrainingCLI of `train-tokenizer`."""

    module, data, checkpoint_key = LitTokenizer, ImageDataModule, TOKENIZER_KEY

    def refuse_other_runs(self, ckpt_path: str | None, resume: bool) -> None:
        super().refuse_other_runs(ckpt_path, resume)
        folder = Path(self.trainer.default_root_dir)
        if not self.is_own(ckpt_path) and (folder / CONFIG).exists():
            raise InputError(
                f"{folder} holds a finished tokenizer: continue its training with --resume, replace it with "
                f"--overwrite, or choose another --trainer.default_root_dir for a new one"
                + (" (--resume found no complete checkpoint of it)" if resume else "")
            )

    def remove_run(self, logs: list[Path]) -> None:
        super().remove_run(logs)
        for name in (CONFIG, WEIGHTS):
            (Path(self.trainer.default_root_dir) / name).unlink(missing_ok=True)

    def finish(self) -> None:
        """Writes the tokenizer."""
        tokenizer = unsharded_copy(self.model.averaged)
        folder = Path(self.trainer.default_root_dir)
        if self.trainer.is_global_zero:
            save_folder(folder, tokenizer)
            print(f"tokenizer {tokenizer.fingerprint()} in {folder}")


def main(argv: list[str]) -> None:
    run_cli(TokenizerCLI, argv)
