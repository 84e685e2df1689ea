"""Model cards: the README.md of an exported folder, in the format of the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from lightning_mvar.checkpoints.pair import TrainedModel
from lightning_mvar.checkpoints.published import M_VAR, VAR
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path, open_regular
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.io.json_files import read_json

log = logging.getLogger(__name__)

Record = dict[str, Any]  # one result of `evaluate`

TEMPLATE = Path(__file__).with_name("model_card.md")
MARK = "<!-- Written by lightning-mvar. Its next export replaces this file, unless you remove this line. -->"
FAMILIES: dict[Any, tuple[str, list[str], str]] = {  # by mixers: name, tags and paper
    M_VAR: ("M-VAR", ["mvar"], "https://arxiv.org/abs/2411.10433"),
    VAR: ("VAR", ["var"], "https://arxiv.org/abs/2404.02905"),
}
TASK = "unconditional-image-generation"  # the Hub has no task for class-conditional images
QUOTED = re.compile(r"(['\"])((?:\\.|(?!\1).)*)\1")  # a string as `repr` writes it
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
SCORE = re.compile(  # names of scores, without the bounds of their intervals
    r"(?!.*_(low|high)$).*(frechet_distance|mind|kernel_distance|score|precision|recall|density|coverage|accuracy).*"
)
INDEXED = ("frechet_distance", "inception_score", "precision", "recall")  # scores that the Hub compares
PROTOCOL = (  # fields of a result that affect its scores most
    *("num_samples", "per_class", "guidance", "guidance_off_from", "top_k", "top_p", "drafts", "seed", "dtype"),
    *("extractor", "comparable_with", "crop", "interval"),
)


class Card(ModelCard):
    """A model card and the picture that it shows."""

    picture: Path | None = None

    def save(self, filepath: str | Path) -> None:
        """Writes the card, with its picture next to it, but keeps a card that somebody has edited.

        Raises:
            InputError: if a file cannot be written.
        """
        path = Path(filepath)
        if is_edited(path):
            log.warning("%s is kept: it was edited, or not written by this program", path)
            return
        if self.picture is not None:
            with atomic_path(path.with_name(picture_name(self.picture))) as temporary:
                shutil.copyfile(self.picture, temporary)
        with atomic_path(path) as temporary:
            super().save(temporary)


def model_card(
    model: TrainedModel,
    repository: str | None = None,
    license: str | None = None,
    datasets: tuple[str, ...] = (),
    scores: tuple[str, ...] = (),
    picture: str | None = None,
) -> Card:
    """Makes the model card of a network with its tokenizer.

    Args:
        model: network, tokenizer and class names.
        repository: for the model card, OWNER/NAME on the Hub to which the folder will be uploaded.
        license: for the model card, the license of the weights, as the Hub calls it: mit, cc-by-nc-4.0.
        datasets: for the model card, the training data, by their names on the Hub if they have any.
        scores: for the model card, JSON files that `evaluate` wrote for this network.
        picture: for the model card, a picture such as `sample --grid` draws; it is copied into the folder.

    Raises:
        InputError: if a file cannot be read or has the scores of another network, or the repository has no owner.
    """
    if repository is not None:
        require_owner(repository)
    records = [record for path in scores for record in read_scores(Path(path).expanduser(), model.network)]
    image = None if picture is None else existing_picture(Path(picture).expanduser())
    family, tags, paper = FAMILIES.get(model.network.config.mixers, ("Image generator", [], None))
    title = repository or f"{family} with {parameter_count(model.network)} parameters"
    card: Card = Card.from_template(
        metadata(title, tags, license, datasets, records),
        template_path=str(TEMPLATE),
        mark=MARK,
        title=title,
        place=repository or "OWNER/NAME",
        family=family,
        paper=paper,
        network=model.network.config,
        network_size=parameter_count(model.network),
        tokenizer=model.tokenizer.config,
        tokenizer_size=parameter_count(model.tokenizer),
        names=[" ".join(name.split()) for name in model.class_names],
        chosen_class=json.dumps(next(iter(model.class_names), 0), ensure_ascii=False),
        picture=None if image is None else picture_name(image),
        results=[
            (record, protocol_of(record), shown_scores(record), json.dumps(record, indent=2, ensure_ascii=False))
            for record in records
        ],
    )
    card.picture = image
    return card


def require_owner(repository: str) -> None:
    """Raises InputError if the name of a repository lacks its owner: nobody could load it by that name."""
    if "/" not in repository:
        raise InputError(f"repository {repository} has no owner: use OWNER/{repository}")


def read_scores(path: Path, network: nn.Module) -> list[Record]:
    """Reads results of `evaluate`; private folders are removed from absolute paths.

    Raises:
        InputError: if the file does not hold results, or those of another network.
    """
    records: list[Record] = read_json(path, list[dict[str, Any]])
    ours = fingerprint(network)
    for record in records:
        if not all(isinstance(record.get(name), str) for name in ("reference", "extractor")):
            raise InputError(f"{path} has no scores of `lightning-mvar evaluate --json FILE`")
        if (scored := record.get("network", ours)) != ours:
            raise InputError(
                f"{path} has the scores of network {scored}, but this one is {ours}: evaluate this one, or export the "
                f"one that was evaluated (--weights ema or raw)"
            )
    return [public(record) for record in records]


def public(record: Record) -> Record:
    """Reduces absolute paths and URLs in a result to their last parts, also in the extractor's arguments."""
    places: Record = {name: last_part(record[name]) for name in ("samples", "reference") if name in record}
    if "extractor_class" in record:
        arguments = QUOTED.sub(
            lambda quoted: f"{quoted[1]}{last_part(quoted[2])}{quoted[1]}", record["extractor_class"]
        )
        places["extractor_class"] = arguments
    return record | places


def last_part(place: str) -> str:
    """Returns the last part of an absolute path or a URL; other places, such as digits:test, are unchanged."""
    if "://" in place:
        return Path(urlsplit(place).path).name
    return Path(place).name if place.startswith(("/", "~")) else place


def is_edited(path: Path) -> bool:
    """Returns whether a card exists that somebody has edited or that this program did not write."""
    if not path.exists():
        return False
    with open_regular(path) as file:
        return MARK.encode() not in file.read()


def existing_picture(path: Path) -> Path:
    if not path.is_file() or path.suffix.lower() not in PICTURES:
        raise InputError(f"{path} is not a picture file: name one that ends in {', '.join(PICTURES)}")
    return path


def picture_name(path: Path) -> str:
    """Returns the name of the picture in the model's folder."""
    return f"samples{path.suffix.lower()}"


def parameter_count(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.1f}M"


def metadata(
    title: str, tags: list[str], license: str | None, datasets: tuple[str, ...], records: list[Record]
) -> ModelCardData:
    """Returns the metadata at the top of the card, which the Hub indexes."""
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=record["reference"],
            dataset_name=record["reference"],
            metric_type=metric_name(name, record),
            metric_value=record[name],
            metric_args=protocol_of(record),
        )
        for record in records
        for name in INDEXED
        if name in record
    ]
    return ModelCardData(
        library_name="lightning_mvar",
        pipeline_tag=TASK,
        tags=["image-generation", "class-conditional", *tags],
        license=license,
        datasets=list(datasets) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def protocol_of(record: Record) -> Record:
    """Returns the settings that affect the scores of a result most, if they are set."""
    return {name: record[name] for name in PROTOCOL if record.get(name) is not None}


def score_names(record: Record) -> list[str]:
    return [name for name, value in record.items() if isinstance(value, float) and SCORE.fullmatch(name)]


def metric_name(name: str, record: Record) -> str:
    """Returns the name of a score; a Frechet distance is an FID only with features of InceptionV3."""
    return "fid" if (name, record["extractor"]) == ("frechet_distance", "InceptionV3") else name


def shown_scores(record: Record) -> dict[str, str]:
    """Formats the scores, each with the bounds of its interval if it has one."""
    shown = {}
    for name in score_names(record):
        bounds = [f"{record[bound]:.4g}" for bound in (f"{name}_low", f"{name}_high") if bound in record]
        shown[metric_name(name, record)] = f"{record[name]:.4g}" + (f" ({' to '.join(bounds)})" if bounds else "")
    return shown
