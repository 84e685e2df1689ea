"""Linear combinations of networks on disk, computed and written tensor by tensor."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mvar.checkpoints.folders import CONFIG, FORMAT, FolderConfig, MergedNetwork, read_config, write_folder
from lightning_mvar.checkpoints.stored import StoredModel
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import remove_unfinished
from lightning_mvar.io.tensors import StateDict, check_finite, check_kinds, check_state_dict, is_finite, save_lazily
from lightning_mvar.tokenizer.tokenizer import Tokenizer

TRAINING_ONLY = ("drop_path", "adaln_gate_init")  # config fields without effect on what the weights compute


class Term(NamedTuple):
    """One network of a linear combination and the factor on its weights."""

    coefficient: float
    model: StoredModel


def merge(terms: list[Term], out: Path) -> None:
    """Writes a network with the weights sum_i coefficient_i * weights_i, and its tokenizer, in the format of `export`.

    Sums are computed in float64 and rounded once. Memory holds the tokenizer and about six copies of one tensor, plus
    the mapped pages of the networks' files. `config.json` names the networks and coefficients.

    Raises:
        InputError: if a network cannot be read, or differs from the first in architecture, classes or tokenizer; if the
            combination is not finite; or if `out` holds anything but this same combination.
    """
    merged = [MergedNetwork(model.source, model.part, coefficient) for coefficient, model in terms]
    if (out / CONFIG).exists() and read_config(out, "network", "").merged != merged:
        raise InputError(f"{out} holds another network or a tokenizer: name another --out")
    first = terms[0].model
    for _, model in terms:
        check_architecture(first, model)
    class_names = common_class_names([model for _, model in terms])
    tokenizer = common_tokenizer([model for _, model in terms])
    shapes = first.meta_network().state_dict()
    for _, model in terms:
        named = {name: shapes.get(name, torch.empty(0)) for name in model.weights}
        check_state_dict(shapes, named, f"{model.source} does not fit MVAR")
    config = FolderConfig(FORMAT.number, tokenizer.config, first.config, class_names, merged)
    remove_unfinished(out / "network.safetensors")
    write_folder(out, config, tokenizer, partial(save_lazily, shapes, partial(combine, terms, shapes)))


def combine(terms: list[Term], shapes: StateDict, name: str) -> Tensor:
    """Returns one tensor of the linear combination, after checking that tensor in all networks."""
    total = torch.zeros(shapes[name].shape, dtype=torch.float64)
    for coefficient, model in terms:
        weights, expected = {name: model.weights[name]}, {name: shapes[name]}
        check_state_dict(expected, weights, f"{model.source} does not fit MVAR")
        check_kinds(expected, weights, model.source)
        check_finite(weights, model.source)
        total.add_(weights[name], alpha=coefficient)
    result = total.float()
    if not is_finite(result):
        factors = ", ".join(f"{coefficient:g}" for coefficient, _ in terms)
        raise InputError(f"{name} is not finite in the merged network: its coefficients {factors} are too large")
    return result


def check_architecture(first: StoredModel, other: StoredModel) -> None:
    """Raises InputError that names the first differing field unless both networks compute the same function."""
    ours, theirs = asdict(first.config), asdict(other.config)
    for field in ours:
        if field not in TRAINING_ONLY and ours[field] != theirs[field]:
            raise InputError(
                f"{other.source} differs from {first.source}: {field} is {theirs[field]} there, {ours[field]} in the "
                f"first"
            )


def common_class_names(models: list[StoredModel]) -> list[str]:
    """Returns the class names, from the networks that have any; raises InputError if they differ."""
    named = [model for model in models if model.class_names]
    for model in named:
        for label, (ours, theirs) in enumerate(zip(named[0].class_names, model.class_names, strict=True)):
            if ours != theirs:
                raise InputError(
                    f"{model.source} has other classes than {named[0].source}: class {label} is {theirs!r} there, "
                    f"{ours!r} in the first"
                )
    return named[0].class_names if named else []


def common_tokenizer(models: list[StoredModel]) -> Tokenizer:
    """Loads the tokenizer of the first network; raises InputError if another network has a different one."""
    tokenizer = models[0].load_tokenizer()
    ours = tokenizer.fingerprint()
    for model in models[1:]:
        theirs = model.tokenizer_fingerprint or model.load_tokenizer().fingerprint()
        if ours != theirs:
            raise InputError(
                f"{model.source} has another tokenizer than {models[0].source}: {theirs} there, {ours} in the first; "
                f"networks of different tokenizers cannot be merged"
            )
    return tokenizer
