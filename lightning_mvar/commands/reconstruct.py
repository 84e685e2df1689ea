"""`reconstruct`: measures how well a tokenizer reconstructs real images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.cli.arguments import refuse_overwriting, require_suffix
from lightning_mvar.cli.progress import read_images
from lightning_mvar.cli.tables import Record, print_table
from lightning_mvar.data.images.examples import OnCorrupt, spaced_evenly
from lightning_mvar.data.images.protocols import MARGIN, CropProtocol
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.json_files import write_json
from lightning_mvar.metrics.accuracy import classifier_for
from lightning_mvar.metrics.perturbation import PerturbedScores
from lightning_mvar.metrics.reconstruction import ReconstructionScores
from lightning_mvar.metrics.reference import open_reference
from lightning_mvar.metrics.summary import extractor_metadata, prepare
from lightning_mvar.sampling.grids import image_grid, save_image
from lightning_mvar.tokenizer.tokenizer import Tokenizer

PICTURE_IMAGES = 8


def reconstruct(
    tokenizer: str,
    images: str,
    extractor: nn.Module | None = None,
    crop: CropProtocol = "var",
    margin: float = MARGIN,
    perturb: bool = False,
    picture: str | None = None,
    json: str | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
    cache: str = "outputs/statistics",
    device: str = "auto",
) -> None:
    """Encodes and decodes real images and scores the result: PSNR and SSIM (means over images, RGB in [0, 1]), codebook
    usage, and the Frechet distance between originals and reconstructions.

    With InceptionV3 the Frechet distance is rFID. PSNR is unbounded, SSIM is at most 1.

    Args:
        tokenizer: folder that `train-tokenizer` or `export` wrote, published file, or vae-ch160v4096z32.
        images: image source, as for `lightning-mvar tokenize`; images are center-cropped.
        extractor: InceptionV3 or DINOv2, downloaded on first use (or --extractor.weights FILE); Timm or Transformers,
            with --extractor.model; ImageClassifier, trained on --extractor.images; or the class path of an nn.Module
            with num_features that maps images in [0, 1] to features. The default for digits and photos is a small
            classifier. Without an extractor there is no Frechet distance.
        crop: how images in files are resized before the center crop; see `evaluate`.
        margin: for --crop var, ratio of the resized shorter side to the crop; 1 keeps square images whole.
        perturb: also report the perturbed Frechet distance (pFID with InceptionV3): between originals and images
            decoded after 50, 70 or 90 % of the tokens were replaced at random by one of the nearest 1/64, 1/32 or 1/16
            of the codes; the mean of these nine distances. Decodes ten times as many images.
        picture: PNG file for 8 images spread over the source, originals above reconstructions.
        json: write the scores to this JSON file.
        batch_size: images per batch.
        num_workers: processes that decode image files; 0 decodes in the main process.
        on_corrupt: `raise` an error for an image that cannot be decoded, or `skip`, report and count it.
        cache: folder that caches trained classifiers.
        device: auto, cpu, cuda or cuda:N.
    """
    require_in("[1, inf)", "--", batch_size=batch_size)
    require_in("[0, inf)", "--", num_workers=num_workers)
    refuse_overwriting({"--picture": picture, "--json": json}, {"--tokenizer": tokenizer, "--images": images})
    require_suffix((".png",), {"--picture": picture})
    target = choose_device(device)
    model = load_tokenizer(tokenizer).to(target)
    source = open_images(images, model.config.shape, on_corrupt, crop=crop, margin=margin)
    if extractor is None:
        extractor = classifier_for(open_reference(images), cache)
    if extractor is None and perturb:
        raise InputError("--perturb compares features: pass an --extractor, for example InceptionV3")
    prepared = None if extractor is None else prepare(extractor, target)
    comparison = Comparison(model, prepared, target, perturb, set(spaced_evenly(len(source), PICTURE_IMAGES).tolist()))
    for batch in read_images(source, batch_size, num_workers, "reconstruct"):
        comparison.update(batch.images.to(target))
    record: Record = {
        "tokenizer": tokenizer,
        "fingerprint": model.fingerprint(),
        "images": images,
        "crop": source.crop,
        "height": model.config.shape[0],
        "width": model.config.shape[1],
        "skipped_images": len(source) - comparison.count,
    }
    record |= comparison.compute(images)
    print_table([record])
    if json is not None:
        write_json(json, [record])
    if picture is not None:
        save_image(comparison.picture(), picture)
        print(f"originals above reconstructions in {picture}")


class Comparison:
    """Reconstructs images and accumulates their scores in bounded memory.

    Args:
        tokenizer: on `device`, in eval mode.
        extractor: prepared, on `device`; None to skip the Frechet distance.
        device: device to compute on.
        perturb: whether to score images decoded from perturbed tokens too.
        shown: indices of the images for the picture, in the order of `update`.
    """

    def __init__(
        self, tokenizer: Tokenizer, extractor: nn.Module | None, device: torch.device, perturb: bool, shown: set[int]
    ) -> None:
        self.tokenizer, self.extractor, self.shown, self.count = tokenizer, extractor, shown, 0
        self.used_codes = torch.zeros(tokenizer.config.vocab_size, dtype=torch.bool, device=device)
        self.scores = ReconstructionScores(extractor, device)
        self.perturbed = PerturbedScores(tokenizer, extractor) if extractor is not None and perturb else None
        self.picture_pairs: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Reconstructs and scores images (b, 3, H, W) in [-1, 1]."""
        tokens = self.tokenizer.encode(images)
        originals, decoded = (images + 1) / 2, (self.tokenizer.decode(tokens) + 1) / 2
        self.used_codes[tokens.flatten()] = True
        self.scores.update(originals, decoded)
        if self.perturbed is not None:
            self.perturbed.update(tokens)
        chosen = [i for i in range(len(images)) if self.count + i in self.shown]
        self.picture_pairs.append((originals[chosen].cpu(), decoded[chosen].cpu()))
        self.count += len(images)

    def compute(self, name: str) -> Record:
        """Returns all scores of the images in source `name`.

        Raises:
            InputError: if there was no image, or only one and the Frechet distance is requested.
        """
        if self.count < (1 if self.extractor is None else 2):
            raise InputError(f"{self.count} images of {name} could be decoded: too few to compare")
        scores = self.scores.compute()
        record: Record = {
            "num_images": self.count,
            "psnr_db": scores["psnr"],
            "ssim": scores["ssim"],
            "codebook_usage": float(self.used_codes.float().mean()),
        }
        if self.extractor is not None:
            record |= extractor_metadata(self.extractor) | {"frechet_distance": scores["rfid"]}
        if self.perturbed is not None:
            record["perturbed_frechet_distance"] = self.perturbed.compute(self.scores.originals.compute())
        return record

    def picture(self) -> Tensor:
        """Returns a grid (3, H, W) of originals above reconstructions."""
        originals, decoded = (torch.cat(part) for part in zip(*self.picture_pairs, strict=True))
        return image_grid(torch.cat([originals, decoded]), len(originals))
