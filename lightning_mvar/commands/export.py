"""`export`: a checkpoint as one self-contained folder of safetensors and config.json, tokenizer included."""

from __future__ import annotations

from lightning_mvar.checkpoints import load_trained, save_folder
from lightning_mvar.commands.parsing import call


def export(ckpt_path: str, out: str, tokenizer: str | None = None) -> None:
    """Write network and tokenizer as one folder that `sample` takes.

    Args:
        ckpt_path: a checkpoint of `fit`.
        out: the folder to write.
        tokenizer: folder of the tokenizer, if it is no longer where the checkpoint remembers.
    """
    model = load_trained(ckpt_path, tokenizer)
    save_folder(out, model.tokenizer, model.network, model.class_names)
    print(f"network and tokenizer in {out}")


def main(argv: list[str]) -> None:
    call(export, argv)
