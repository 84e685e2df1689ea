import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_mvar import MVAR, Tokenizer, TokenizerConfig
from lightning_mvar.errors import InputError
from lightning_mvar.projects.files import project_files
from lightning_mvar.projects.pictures import Pictures
from lightning_mvar.projects.recipes import (
    CODE_DIM,
    CPU,
    GPU,
    LAYOUTS,
    RECIPES,
    Machine,
    Plan,
    Recipe,
    check_resolution,
    make_plan,
    recipe_table,
)
from lightning_mvar.scales import ScaleSchedule

PAGE = Path(__file__).parents[2] / "docs/own_images.md"


def pictures(count: int = 2000, size: tuple[int, int] = (100, 100), classes: int = 3, broken: int = 0) -> Pictures:
    names = [f"class {i}" for i in range(classes)]
    sizes = np.array([size]).repeat(count - broken, axis=0)
    return Pictures(count, count // 10, names, [], sizes, 0, [f"{i}.png" for i in range(broken)])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("resolution", LAYOUTS)
def test_every_recipe_makes_a_network_and_a_tokenizer_of_its_resolution(recipe: Recipe, resolution: int) -> None:
    plan = Plan(pictures(), resolution, recipe)
    options = {"channels": recipe.channels, "multipliers": plan.multipliers, "norm_groups": recipe.channels // 4}
    schedule = ScaleSchedule(plan.side_lengths)
    config = TokenizerConfig(schedule, recipe.vocab_size, CODE_DIM, **options)
    assert config.shape == (resolution, resolution)
    network = recipe.network(plan.side_lengths, num_classes=3)
    assert network.width == 64 * network.heads
    assert (network.schedule, network.vocab_size, network.code_dim) == (schedule, config.vocab_size, config.code_dim)


def test_a_recipe_of_each_machine_builds() -> None:
    plan = make_plan(pictures(), 32, CPU)
    network = MVAR(plan.recipe.network(plan.side_lengths, 3))
    assert plan.num_parameters == sum(p.numel() for p in network.parameters())
    options = {"channels": plan.recipe.channels, "multipliers": plan.multipliers, "norm_groups": 4, "blocks": 1}
    Tokenizer(TokenizerConfig(ScaleSchedule(plan.side_lengths), plan.recipe.vocab_size, CODE_DIM, **options))


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_recipes_are_sorted_and_grow_with_the_number_of_pictures(machine: Machine) -> None:
    rows = [row for row in RECIPES if row.machine == machine]
    assert rows[-1].max_pictures == math.inf
    for name in ("max_pictures", "vocab_size", "tokenizer_steps", "depth", "width", "steps"):
        values = [getattr(row, name) for row in rows]
        assert values == sorted(values), name
    for row in rows[:-1]:
        assert make_plan(pictures(int(row.max_pictures)), 32, machine).recipe == row
        assert make_plan(pictures(int(row.max_pictures) + 1), 32, machine).recipe != row
        assert make_plan(pictures(int(row.max_pictures) + 1, broken=1), 32, machine).recipe == row


@pytest.mark.parametrize(
    ("size", "machine", "resolution"),
    [((20, 20), CPU, 32), ((64, 70), CPU, 64), ((63, 300), CPU, 32), ((500, 400), CPU, 64), ((500, 400), GPU, 256)],
)
def test_the_resolution_is_one_that_pictures_and_machine_have(
    size: tuple[int, int], machine: Machine, resolution: int
) -> None:
    assert make_plan(pictures(size=size), None, machine).resolution == resolution


def test_only_oblong_pictures_are_cropped_at_random() -> None:
    square, oblong = (make_plan(pictures(size=size), None, CPU) for size in ((64, 64), (64, 80)))
    assert (square.margin, square.views) == (1.0, 1)
    assert (oblong.margin, oblong.views) == (1.125, 8)
    assert make_plan(pictures(50_000, (64, 80)), None, CPU).views == 1


@pytest.mark.parametrize(
    ("machine", "count", "batches", "log_interval"),
    [(CPU, 120, (4, 8), 10), (GPU, 120, (64, 64), 1), (GPU, 1000, (64, 128), 7)],
)
def test_an_epoch_has_a_batch_and_an_entry_in_the_log(
    machine: Machine, count: int, batches: tuple[int, int], log_interval: int
) -> None:
    plan = make_plan(pictures(count), 64, machine)
    assert (plan.tokenizer_batch, plan.batch_size) == batches
    assert plan.log_interval == log_interval


def test_an_unknown_resolution_and_too_few_pictures_are_refused() -> None:
    with pytest.raises(InputError, match=r"--resolution 48 has no recipe: choose one of 32, 64, 128, 256"):
        check_resolution(48)
    with pytest.raises(InputError, match="99 pictures are too few to train on: give at least 100"):
        make_plan(pictures(100, broken=1), None, CPU)
    for held_out in (0, 200):
        with pytest.raises(InputError, match=rf"{held_out} of 200 pictures would be held out for validation"):
            make_plan(replace(pictures(200), num_held_out=held_out), None, CPU)


def test_a_class_that_nothing_would_train_is_refused() -> None:
    with pytest.raises(InputError, match=r"^class 1, class 2: no picture is left to train on, .*: add some, or remove"):
        make_plan(replace(pictures(), untrained=["class 1", "class 2"]), None, CPU)


def test_broken_pictures_of_a_sample_stand_for_those_of_the_set() -> None:
    sampled = replace(pictures(5_000, broken=100), count=50_000)
    assert sampled.num_broken == 1_000
    assert "max_failures: 1500 #" in project_files(make_plan(sampled, None, CPU), "/pics", "")["tokenize.yaml"]
    assert make_plan(replace(sampled, count=5_050), None, CPU).recipe == make_plan(pictures(4_949), None, CPU).recipe


def test_the_page_has_the_table() -> None:
    assert "\n".join(recipe_table()) in PAGE.read_text()


def test_without_classes_drawing_is_not_guided() -> None:
    guidance = {
        classes: [
            line.split(" #")[0]
            for line in project_files(make_plan(pictures(classes=classes), None, CPU), "/pics", "")[
                "sample.yaml"
            ].splitlines()
            if line.startswith(("guidance", "per_class"))
        ]
        for classes in (1, 10)
    }
    assert guidance == {1: ["per_class: 500", "guidance: 0.0"], 10: ["per_class: 50", "guidance: 0.5"]}
