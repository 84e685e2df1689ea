"""`sample`: images from a checkpoint or an exported folder, as npz or PNG files, with a grid and a strip to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_mvar.checkpoints import TrainedModel, WhichWeights, load_trained
from lightning_mvar.commands.parsing import call
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError
from lightning_mvar.fingerprint import fingerprint
from lightning_mvar.pictures import formation_strip, image_grid, save_image, to_uint8
from lightning_mvar.sample_set import NpzFile, PngFolder, SampleSet
from lightning_mvar.sampling import DTYPES, Precision, check_arguments, compile_steps, generate, image_generators

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
    """Draw images. The same seed gives the same images, in float32 whatever the batch size. They are written as they
    are drawn: started again after an interruption, the same command draws those that are missing.

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
    labels = torch.tensor(resolve_classes(classes, model)).repeat_interleave(per_class)
    settings = {"guidance": guidance, "top_k": top_k, "top_p": top_p, "smooth": smooth}
    check_arguments(model.network, model.tokenizer, labels, guidance, top_k, top_p, None)  # before anything is written
    about = settings | {"seed": seed, "precision": precision, "classes": classes, "per_class": per_class}
    images = open_set(target, about, model, labels)
    model.network.to(where).lower(DTYPES[precision])
    model.tokenizer.to(where).lower(DTYPES[precision])
    if compile:
        compile_steps(model.network)

    def draw(numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Images (n, 3, H, W) and tokens (n, l) of some numbers."""
        chosen, generators = labels[numbers].to(where), image_generators(seed, numbers)
        return generate(model.network, model.tokenizer, chosen, generator=generators, return_tokens=True, **settings)

    missing = images.missing()
    with tqdm(total=len(labels), initial=len(labels) - len(missing), unit="img", desc="sample") as bar:
        for begin in range(0, len(missing), batch_size):
            numbers = missing[begin : begin + batch_size]
            images.write(numbers, to_uint8(draw(numbers)[0]))
            bar.update(len(numbers))
    shown = torch.arange(len(labels)).view(-1, per_class)[:, :GRID_COLUMNS]
    if grid is not None:
        chosen = torch.from_numpy(images.read(shown.flatten().tolist())).movedim(-1, 1) / 255
        save_image(image_grid(chosen, shown.shape[1]), grid)
        print(f"grid in {grid}")
    if strip is not None:
        _, tokens = draw(shown[:STRIP_ROWS, 0].tolist())
        with torch.no_grad():
            save_image(formation_strip(model.tokenizer, tokens), strip)
        print(f"strip in {strip}")
    images.finish(labels.numpy())
    print(f"{len(labels)} images in {target}")


def open_set(target: Path, about: dict[str, Any], model: TrainedModel, labels: Tensor) -> SampleSet:
    """Where the images go; `about` says how they are drawn, to which the weights are added."""
    about = about | {"network": fingerprint(model.network), "tokenizer": model.tokenizer.fingerprint()}
    if target.suffix == ".npz":
        return NpzFile(target, about, len(labels), model.tokenizer.config.resolution)
    return PngFolder(target, about, [model.class_names[i] if model.class_names else str(i) for i in labels.tolist()])


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


def main(argv: list[str]) -> None:
    call(sample, argv)
