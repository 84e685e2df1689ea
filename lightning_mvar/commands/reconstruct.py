"""`reconstruct`: what a tokenizer loses of real images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.cli.arguments import call
from lightning_mvar.cli.progress import check_reading, read_images
from lightning_mvar.cli.tables import Record, print_table, write_records
from lightning_mvar.data.images.examples import OnCorrupt
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.judges import kept_classifier
from lightning_mvar.metrics.reconstruction import ReconstructionScores
from lightning_mvar.metrics.summary import prepare
from lightning_mvar.sampling.grids import image_grid, save_image
from lightning_mvar.tokenizer.tokenizer import Tokenizer

SHOWN = 8  # images of the picture


def reconstruct(
    tokenizer: str,
    images: str,
    extractor: nn.Module | None = None,
    picture: str | None = None,
    json: str | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
    cache: str = "outputs/statistics",
    device: str = "auto",
) -> None:
    """Encode and decode real images, and compare: PSNR and SSIM (means over the images, of RGB in [0, 1]), how many of
    the codes are used, and the Frechet distance between the two sets in the features of an extractor.

    With InceptionV3 that distance is rFID. PSNR has no upper end, SSIM at most 1.

    Args:
        tokenizer: folder that `train-tokenizer` or `export` wrote.
        images: named as for `lightning-mvar tokenize`; resized and cropped at the centre.
        extractor: InceptionV3 (with --extractor.weights FILE), or the class path of an nn.Module with num_features,
            images in [0, 1] -> features; for digits and photos a small classifier. Without one there is no Frechet
            distance.
        picture: PNG file for the first 8 images, originals above reconstructions.
        json: write what the table shows to this file.
        batch_size: images at once.
        num_workers: processes that decode image files; 0 decodes in the main process.
        on_corrupt: what an image that cannot be decoded does: raise, or be skipped, named and counted.
        cache: folder that keeps the classifiers of digits and photos.
        device: auto, cpu, cuda or cuda:N.
    """
    check_reading(batch_size, num_workers)
    where = choose_device(device)
    model = load_tokenizer(tokenizer).to(where)
    source = open_images(images, model.config.shape, on_corrupt)
    if extractor is None:
        extractor = kept_classifier(images, cache)
    comparison = Comparison(model, None if extractor is None else prepare(extractor, where), where)
    for batch in read_images(source, batch_size, num_workers, "reconstruct"):
        comparison.update(batch.images.to(where))
    record: Record = {
        "tokenizer": tokenizer,
        "fingerprint": model.fingerprint(),
        "images": images,
        "height": model.config.shape[0],
        "width": model.config.shape[1],
        "skipped_images": len(source) - comparison.count,
    }
    record |= comparison.compute(images)
    print_table([record])
    if json is not None:
        write_records([record], json)
    if picture is not None:
        save_image(comparison.picture(), picture)
        print(f"originals above reconstructions in {picture}")


class Comparison:
    """Accumulates images and their reconstructions, in bounded memory.

    Args:
        tokenizer: on `device`, in eval mode.
        extractor: prepared, on `device`; None for no Frechet distance.
        device: where to compute.
    """

    def __init__(self, tokenizer: Tokenizer, extractor: nn.Module | None, device: torch.device) -> None:
        self.tokenizer, self.extractor, self.count = tokenizer, extractor, 0
        self.used = torch.zeros(tokenizer.config.vocab_size, dtype=torch.bool, device=device)
        self.scores = ReconstructionScores(extractor, device)
        self.shown: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Images (b, 3, H, W) in [-1, 1]."""
        tokens = self.tokenizer.encode(images)
        originals, decoded = (images + 1) / 2, (self.tokenizer.decode(tokens) + 1) / 2
        self.used[tokens.flatten()] = True
        self.scores.update(originals, decoded)
        room = SHOWN - self.count
        if room > 0:
            self.shown.append((originals[:room].cpu(), decoded[:room].cpu()))
        self.count += len(images)

    def compute(self, name: str) -> Record:
        """All scores.

        Raises:
            InputError: if there was no image, or but one and a Frechet distance is wanted.
        """
        if self.count < (1 if self.extractor is None else 2):
            raise InputError(f"{self.count} images of {name} could be decoded: too few to compare")
        scores = self.scores.compute()
        record: Record = {
            "num_images": self.count,
            "psnr_db": scores["psnr"],
            "ssim": scores["ssim"],
            "codebook_usage": float(self.used.float().mean()),
        }
        if self.extractor is not None:
            record |= {"extractor": type(self.extractor).__name__, "frechet_distance": scores["rfid"]}
        return record

    def picture(self) -> Tensor:
        """(3, H, W): originals above reconstructions."""
        originals, decoded = (torch.cat(part) for part in zip(*self.shown, strict=True))
        return image_grid(torch.cat([originals, decoded]), len(originals))


def main(argv: list[str]) -> None:
    call(reconstruct, argv)
