"""Files of a project: the configuration of each command, filled in from templates."""

from __future__ import annotations

import math
from pathlib import Path
from string import Template

import yaml

from lightning_mvar.projects.recipes import CODE_DIM, Plan
from lightning_mvar.scales import ScaleSchedule

TEMPLATES = Path(__file__).parent / "templates"
COMMANDS = ("train-tokenizer", "tokenize", "fit", "sample", "evaluate")  # in the order in which they are run
VALIDATIONS = 5  # of a training run
SAMPLES = 500  # drawn for the grid and the scores


def command_lines() -> list[str]:
    return [f"lightning-mvar {command} --config {command}.yaml" for command in COMMANDS]


def project_files(plan: Plan, images: str, summary: str) -> dict[str, str]:
    """Returns the text of each file by its name.

    Args:
        plan: what to train.
        images: the source of the pictures, valid in any folder.
        summary: classes and number of the pictures, on one line.
    """
    values = {
        **shared_values(plan, images),
        **tokenizer_values(plan),
        **network_values(plan),
        "summary": summary,
        "commands": "\n".join(f"    {line}" for line in command_lines()),
    }
    names = [*(f"{command}.yaml" for command in COMMANDS), "serve.yaml", "README.md"]
    return {name: Template((TEMPLATES / name).read_text(encoding="utf-8")).substitute(values) for name in names}


def shared_values(plan: Plan, images: str) -> dict[str, object]:
    machine, pictures = plan.recipe.machine, plan.pictures
    return {
        "images": quoted(images),
        "train": quoted(f"{images}:train"),
        "val": quoted(f"{images}:val"),
        "accelerator": machine.accelerator,
        "precision": machine.precision,
        "tokenizer_batch": plan.tokenizer_batch,
        "batch_size": plan.batch_size,
        "log_interval": plan.log_interval,
        "num_workers": machine.num_workers,
        "margin": plan.margin,
        "views": plan.views,
        "max_failures": pictures.num_broken + pictures.count // 100,
    }


def tokenizer_values(plan: Plan) -> dict[str, object]:
    recipe = plan.recipe
    return {
        "num_tokens": ScaleSchedule(plan.side_lengths).num_tokens,
        "side_lengths": list(plan.side_lengths),
        "multipliers": list(plan.multipliers),
        "resolution": plan.resolution,
        "vocab_size": recipe.vocab_size,
        "code_dim": CODE_DIM,
        "channels": recipe.channels,
        "blocks": recipe.machine.blocks,
        "norm_groups": recipe.channels // 4,
        "tokenizer_steps": recipe.tokenizer_steps,
        "tokenizer_interval": recipe.tokenizer_steps // VALIDATIONS,
        "tokenizer_base_lr": recipe.tokenizer_base_lr,
    }


def network_values(plan: Plan) -> dict[str, object]:
    """Returns values of training, drawing and scoring."""
    recipe, classes = plan.recipe, len(plan.pictures.class_names)
    has_classes = classes > 1
    return {
        "depth": recipe.depth,
        "width": recipe.width,
        "heads": recipe.width // 64,
        "state_dim": recipe.machine.state_dim,
        "expand": recipe.machine.expand,
        "parameters": f"{plan.num_parameters / 1e6:.1f}M",
        "steps": recipe.steps,
        "interval": recipe.steps // VALIDATIONS,
        "network_base_lr": recipe.network_base_lr,
        "per_class": math.ceil(SAMPLES / classes),
        "guidance": 0.5 if has_classes else 0.0,
        "about_guidance": "more for clearer classes, less for variety" if has_classes else "needs classes",
        "about_extractor": (
            "a classifier of the training pictures"
            if has_classes
            else "without classes, it learns how far a training picture is rotated"
        ),
    }


def quoted(text: str) -> str:
    """Returns a text as a double-quoted scalar of YAML, on one line."""
    return yaml.safe_dump(text, default_style='"', width=math.inf, allow_unicode=True).strip()
