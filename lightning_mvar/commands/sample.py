"""`sample`: images from a checkpoint or an exported folder, as npz or PNG files, with a grid and a strip to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lightning_mvar.checkpoints import TrainedModel, WhichWeights, load_trained
from lightning_mvar.commands.device import choose_device
from lightning_mvar.commands.parsing import call
from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path
from lightning_mvar.pictures import formation_strip, image_grid, save_image, to_uint8
from lightning_mvar.sampling import DTYPES, Precision, compile_steps, generate, image_generators

GRID_COLUMNS, STRIP_ROWS = 10, 10


def sample(
    ckpt_path: str,
    out: str,
    classes: str | None = None,
    per_class: int = 1,
    seed: int = 0,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    grid: str | None = None,
    strip: str | None = None,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    batch_size: int = 100,
    device: str = "auto",
    precision: Precision = "float32",
    compile: bool = False,
) -> None:
    """Draw images. The same seed gives the same images, in float32 whatever the batch size.

    Args:
        ckpt_path: a checkpoint of `fit`, sharded or not, or a folder of `export`.
        out: NAME.npz (arr_0 uint8 N x H x W x 3, arr_1 int64 labels), or a folder for CLASS/NUMBER.png.
        classes: comma-separated class names or numbers; all classes where not given.
        per_class: images of each class.
        seed: of the sampling.
        guidance: classifier-free guidance, 0 for none.
        top_k: draw among the k most likely tokens, 0 for all.
        top_p: then among the fewest whose probability reaches p, 1 for all.
        smooth: mix codes for smoother pictures; never for scores.
        grid: PNG file for a picture with a row of up to 10 images for each class.
        strip: PNG file for a picture of one image of each class, up to 10, forming scale by scale.
        tokenizer: folder of the tokenizer, if it is no longer where the checkpoint remembers.
        weights: of a checkpoint, `ema` for those averaged over training where it has them, `raw` for the last.
        batch_size: images drawn at once.
        device: auto, cpu, cuda or cuda:N.
        precision: of network and decoder. bfloat16 is faster on GPUs and on CPUs with AMX; it may choose otherwise
            between tokens that are nearly as likely, so images differ, and may differ from batch size to batch size.
        compile: make a graph of each scale with torch.compile: minutes at the start, for many images on a GPU.
    """
    if per_class < 1 or batch_size < 1:
        raise InputError("--per_class and --batch_size must be at least 1")
    target, where = Path(out), choose_device(device)
    check_target(target)
    model = load_trained(ckpt_path, tokenizer, weights)
    model.network.to(where).lower(DTYPES[precision])
    model.tokenizer.to(where).lower(DTYPES[precision])
    if compile:
        compile_steps(model.network)
    labels = torch.tensor(resolve_classes(classes, model)).repeat_interleave(per_class)
    settings = {"guidance": guidance, "top_k": top_k, "top_p": top_p, "smooth": smooth}
    images, tokens = draw_all(model, labels.to(where), seed, batch_size, settings)
    if target.suffix == ".npz":
        with atomic_path(target) as path:
            np.savez(path, arr_0=images, arr_1=labels.numpy())
    else:
        save_pngs(images, labels, target, model.class_names)
    print(f"{len(labels)} images in {target}")
    shown = torch.arange(len(labels)).view(-1, per_class)[:, :GRID_COLUMNS]
    if grid is not None:
        chosen = torch.from_numpy(images[shown.flatten().numpy()]).movedim(-1, 1) / 255
        save_image(image_grid(chosen, shown.shape[1]), grid)
        print(f"grid in {grid}")
    if strip is not None:
        with torch.no_grad():
            save_image(formation_strip(model.tokenizer, tokens[shown[:STRIP_ROWS, 0]].to(where)), strip)
        print(f"strip in {strip}")


def check_target(target: Path) -> None:
    """Raise InputError for an --out that images cannot go to, before anything is computed."""
    if target.suffix not in ("", ".npz"):
        raise InputError(f"--out {target} must be NAME.npz or a folder for PNG files")
    if target.suffix == "" and target.is_file():
        raise InputError(f"--out {target} is a file; name a folder, or NAME.npz")


def resolve_classes(classes: str | None, model: TrainedModel) -> list[int]:
    """Labels of comma-separated class names or numbers.

    Raises:
        InputError: naming the first that is unknown.
    """
    names, count = model.class_names, model.network.config.num_classes
    if classes is None:
        return list(range(count))
    labels = []
    for wanted in (part.strip() for part in classes.split(",")):
        if wanted in names:
            labels.append(names.index(wanted))
        elif wanted.isdecimal() and int(wanted) < count:
            labels.append(int(wanted))
        else:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            or_names = f" or names ({known})" if names else ""
            raise InputError(f"--classes: there is no class {wanted!r}; use numbers 0 to {count - 1}{or_names}")
    return labels


def draw_all(
    model: TrainedModel, labels: Tensor, seed: int, batch_size: int, settings: dict[str, Any]
) -> tuple[NDArray[np.uint8], Tensor]:
    """Images (n, H, W, 3) uint8 and tokens (n, l) int64, on the CPU."""
    images, tokens = [], []
    with tqdm(total=len(labels), unit="img", desc="sample") as bar:
        for first in range(0, len(labels), batch_size):
            part = labels[first : first + batch_size]
            generators = image_generators(seed, first, len(part))
            drawn = generate(model.network, model.tokenizer, part, generator=generators, return_tokens=True, **settings)
            images.append(to_uint8(drawn[0]))
            tokens.append(drawn[1].cpu())
            bar.update(len(part))
    return np.concatenate(images), torch.cat(tokens)


def save_pngs(images: NDArray[np.uint8], labels: Tensor, folder: Path, class_names: list[str]) -> None:
    """Write folder/CLASS/NUMBER.png, numbered by the position in the run; each file is whole or absent."""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        name = class_names[label] if class_names else str(label)
        with atomic_path(folder / name / f"{number:06d}.png") as path:
            Image.fromarray(image).save(path)


def main(argv: list[str]) -> None:
    call(sample, argv)
