"""Sweep files: the cells they describe, and the mistakes they are refused for."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.sweeps.plan import Budget
from lightning_mvar.sweeps.sweep_file import read_sweep

FULL = """
prepare: [tokenize --images "my images" --out shards]
fit: --config run.yaml --trainer.max_steps 300
evaluate: --reference digits:test --per_class 30
axes:
  mixer: [mixers/mvar.yaml, mixers/var.yaml]
  model.network.depth: [2, 4]
  recipe: {slow: "--model.optimizer.base_lr 1e-3", fast: --config other.yaml --data.batch_size 8}
seeds: [0, 7]
budget: {parameters: 5e5, by: width}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mixers").mkdir()
    for name in ("mvar", "var"):
        Path(f"mixers/{name}.yaml").write_text("model: {}")
    path = Path("sweep.yaml")
    path.write_text(FULL)
    return path


def edited(file: Path, *changes: tuple[str, str]) -> Path:
    text = file.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    file.write_text(text)
    return file


def test_the_grid_is_the_product_of_the_axes_in_order(file: Path) -> None:
    names = [variant.name for variant in read_sweep(file).variants()]
    mixers = [
        [f"{mixer}-depth{depth}-{recipe}" for depth in (2, 4) for recipe in ("slow", "fast")]
        for mixer in ("mvar", "var")
    ]
    assert names == [*mixers[0], *mixers[1]]


def test_a_cell_has_the_arguments_of_its_values_then_of_budget_seed_and_folder(file: Path) -> None:
    sweep = read_sweep(file)
    cell = sweep.cell(sweep.variants()[5], 7, Path("out put"), ("--model.network.width", "48"))
    assert cell.folder == Path("out put/cells/var-depth2-fast-seed7")
    assert cell.axes == {"mixer": "var", "depth": "2", "recipe": "fast"}
    folder = str(cell.folder)
    fit, evaluate = (shlex.split(command) for command in cell.commands)
    assert fit == [
        *("fit", "--config", "run.yaml", "--trainer.max_steps", "300", "--config", "mixers/var.yaml"),
        *("--model.network.depth", "2", "--config", "other.yaml", "--data.batch_size", "8"),
        *("--model.network.width", "48", "--seed_everything", "7", "--trainer.default_root_dir", folder, "--resume"),
    ]
    assert evaluate == [
        *("evaluate", "--ckpt_path", f"{folder}/checkpoints/last.ckpt", "--samples", f"{folder}/samples.npz"),
        *("--json", f"{folder}/scores.json", "--seed", "7", "--reference", "digits:test", "--per_class", "30"),
    ]


def test_preparation_budget_and_seeds(file: Path) -> None:
    sweep = read_sweep(file)
    assert sweep.prepare == (("tokenize", "--images", "my images", "--out", "shards"),)
    assert sweep.budget == Budget("width", parameters=500_000)
    assert sweep.seeds == (0, 7)


def test_a_file_with_only_fit_is_one_cell_without_scores(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("fit: --config run.yaml")
    sweep = read_sweep(tmp_path / "a.yaml")
    (variant,) = sweep.variants()
    cell = sweep.cell(variant, 0, Path("out"))
    assert (cell.name, cell.axes, len(cell.commands)) == ("fit-seed0", {}, 1)


def test_listed_cells_replace_the_grid_and_lists_in_them_are_products(file: Path) -> None:
    cells = "cells: [{mixer: var, depth: 2, recipe: slow}, {mixer: [mvar, var], model.network.depth: 4, recipe: fast}]"
    edited(file, ("seeds", f"{cells}\nseeds"))
    names = [variant.name for variant in read_sweep(file).variants()]
    assert names == ["var-depth2-slow", "mvar-depth4-fast", "var-depth4-fast"]


def test_values_become_arguments_and_labels_that_a_folder_name_can_hold(file: Path) -> None:
    values = "[true, null, 1e-3, 0.5, [a, b], text]"
    edited(file, ("model.network.depth: [2, 4]", f"model.x: {values}"), ("  recipe", "  r"))
    (choices,) = (choices for axis, choices in read_sweep(file).axes.items() if axis == "x")
    assert [choice.args[1] for choice in choices] == ["true", "null", "1e-3", "0.5", '["a", "b"]', "text"]
    assert [choice.label for choice in choices] == ["xTrue", "xNone", "x1e-3", "x0.5", "xa_b", "xtext"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seeds:", "sedes:", "a sweep file has no key 'sedes'; its keys are fit, prepare"),
        ("fit: --config run.yaml", "fits: --config run.yaml", "'fits'"),
        ("300", "300 --seed_everything 3", "`fit` has --seed_everything, which the sweep sets"),
        ("300", "300 --trainer.default_root_dir=x", "leave it out"),
        ("--per_class 30", "--per_class 30 --json x", "`evaluate` has --json"),
        ("300", "300 'open", "No closing quotation"),
        ("mixers/var.yaml", "mixers/rav.yaml", "axis mixer names mixers/rav.yaml, which is not a file in"),
        ("mixers/var.yaml", "4", "axis mixer has YAML files and other values"),
        ("mixers/var.yaml", "mixers/mvar.yaml", "axis mixer has two values named mvar"),
        ("[2, 4]", "[]", "axis model.network.depth needs a list of values"),
        ("[2, 4]", "2", "axis model.network.depth needs a list of values"),
        ("model.network.depth", "model.mixer", "two axes are named mixer"),
        ('slow: "--model.optimizer.base_lr 1e-3"', "slow: 0", "`recipe.slow` must be a command line as text, got 0"),
        ("model.network.depth", "trainer.precision", "an axis cannot be named precision, as a report has a column"),
        ("model.network.depth", "seed", "seed cannot be an axis"),
        ("[0, 7]", "[0, 0]", "`seeds` names one twice"),
        ("[0, 7]", "3", "`seeds` must be a list"),
        ("[0, 7]", "[]", "`seeds` must be a list"),
        ("[0, 7]", "[true]", "`seeds` must be a list"),
        ("by: width", "by: heads", "`budget` must be"),
        ("parameters: 5e5", "params: 5e5", "`budget` must be"),
        ("parameters: 5e5", "parameters: many", "needs at least 1 as its number of parameters, got 'many'"),
        ("parameters: 5e5", "parameters: 0", "needs at least 1 as its number of parameters"),
        ("prepare: [tok", "prepare: tok [", "`prepare` must be a list"),
        ("seeds", "cells: [{mixer: var, depth: 2}]\nseeds", "does not give its recipe"),
        (
            "seeds",
            "cells: [{mixer: var, depth: 2, recipe: slow, width: 3}]\nseeds",
            "'width', which is not an axis",
        ),
        (
            "seeds",
            "cells: [{mixer: var, depth: 3, recipe: slow}]\nseeds",
            "axis depth has no value '3'; it has 2, 4",
        ),
        ("seeds", "cells: []\nseeds", "`cells` must list maps"),
        ("axes:", "axes: [", "is not valid YAML"),
    ],
)
def test_mistakes_are_named_with_the_file(file: Path, before: str, after: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_sweep(edited(file, (before, after))).check_overlays()
    assert message in str(error.value)
    assert str(error.value).startswith("sweep.yaml")
    assert "\n" not in str(error.value)


def test_a_cell_that_is_listed_twice_is_refused(file: Path) -> None:
    one = "{mixer: var, depth: 2, recipe: slow}"
    sweep = read_sweep(edited(file, ("seeds", f"cells: [{one}, {one}]\nseeds")))
    with pytest.raises(InputError, match="two cells would be named var-depth2-slow"):
        sweep.variants()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.yaml"):
        read_sweep(tmp_path / "nowhere.yaml")


LAUGHS = "\n".join(["a0: &a0 x", *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS, "aliases stand for more than 100000 values"),
        ("\n".join(f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 9 if i else [])}]" for i in range(9)), "aliases"),
        ("fit: 2023-02-30", "not valid YAML"),
        ('fit: !!int "abc"', "not valid YAML"),
        ('fit: !!int ""', "not valid YAML"),
        ("fit: !!bool x", "not valid YAML"),
        ("fit: !!timestamp x", "not valid YAML"),
        ("seeds: [" + "9" * 5000 + "]", "not valid YAML"),
        ("seeds: [0x" + "f" * 5000 + "]", "not valid YAML"),
        ("fit: " + "[" * 2000, "nested too deeply"),
        ('fit: "a\\0b"', "line 1: a character that no path can hold"),
        ("fit: a\0b", "not valid YAML"),
        ("fit: [" + "long, " * 1000 + "]", "`fit` must be a command line as text, got ['long', 'long'"),
        (
            "fit: a\naxes:\n" + "\n".join(f"  {axis}: {list(range(30))}" for axis in "abcdefgh"),
            "describes at least 656100000000 cells, more than 10000",
        ),
        (
            f"fit: a\naxes: {{a: [1, 2], b: [1, 2]}}\ncells: [{{a: {[1] * 101}, b: {[2] * 101}}}]",
            "describes at least 10201 cells",
        ),
    ],
)
def test_hostile_content_is_refused_at_once(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        read_sweep(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sweep.yaml")
    with pytest.raises(InputError, match="is not a regular file"):
        read_sweep(tmp_path / "sweep.yaml")


RUN = """
prepare: [tokenize --images x --out shards, "fit --config a.yaml --seed_everything {seed} --data.train shards"]
run:
  - export --ckpt_path base/{seed} --out {out}/merged{w}
  - sample --ckpt_path {out}/merged{w} {recipe}
evaluate: --ckpt_path {out}/merged{w} --guidance {guidance} --reference digits:train --x ${model.y}
axes: {w: [0, 0.5], guidance: [1], recipe: {plain: "", own: "--labels l{seed}.txt --top_k 3"}}
seeds: [3, 4]
sampling_seeds: [7, 8]
baseline: w0-guidance1-plain
compare: [recall]
"""


def test_placeholders_stand_for_seed_folder_and_values_of_axes(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(RUN)
    sweep = read_sweep(path)
    assert [variant.name for variant in sweep.variants()][1:3] == ["w0-guidance1-own", "w0.5-guidance1-plain"]
    folder = "a {w}/cells/w0.5-guidance1-own-seed4"  # the folder of the sweep is not a text with placeholders
    cell = sweep.cell(sweep.variants()[3], 4, Path("a {w}"))
    assert str(cell.folder) == folder
    scored = ("--guidance", "1", "--reference", "digits:train", "--x", "${model.y}")
    assert cell.argument_lists() == [
        ["export", "--ckpt_path", "base/4", "--out", f"{folder}/merged0.5"],
        ["sample", "--ckpt_path", f"{folder}/merged0.5", "--labels", "l4.txt", "--top_k", "3"],
        *(
            [
                *("evaluate", "--samples", f"{folder}/samples-{seed}.npz", "--json", f"{folder}/scores-{seed}.json"),
                *("--seed", str(seed), "--ckpt_path", f"{folder}/merged0.5", *scored),
            ]
            for seed in (7, 8)
        ),
    ]
    assert "" not in sweep.cell(sweep.variants()[2], 4, Path("out")).argument_lists()[1]  # a value of no arguments
    shared, *each = sweep.preparation()
    assert shared == (None, ("tokenize", "--images", "x", "--out", "shards"))
    assert each == [
        (seed, ("fit", "--config", "a.yaml", "--seed_everything", str(seed), "--data.train", "shards"))
        for seed in (3, 4)
    ]


def test_an_axis_with_a_placeholder_is_no_argument_of_fit(file: Path) -> None:
    path = edited(
        file, ("model.network.depth: [2, 4]", "per_class: [2, 4]"), ("--per_class 30", "--per_class {per_class}")
    )
    sweep = read_sweep(path)
    fit, evaluate = sweep.cell(sweep.variants()[2], 0, Path("out")).argument_lists()
    assert "--per_class" not in fit
    assert evaluate[-2:] == ["--per_class", "4"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("run:", "fit: x\nrun:", "give either `fit`, the first arguments of every fit, or `run`"),
        ("run:", "ran:", "has no key 'ran'"),
        (RUN, "axes: {}", "gives cells nothing to do: add `fit`, `run` or `evaluate`"),
        (
            "merged{w}",
            "merged{v}",
            "`run` has the placeholder {v}; it can have {guidance}, {out}, {recipe}, {seed}, {w}",
        ),
        ("--guidance {guidance}", "--guidance {g}", "`evaluate` has the placeholder {g}"),
        ("--guidance {guidance}", "", "axis guidance has no effect: write {guidance} in `run` or `evaluate`"),
        ("seed_everything {seed}", "seed_everything {out}", "`prepare` has the placeholder {out}; it can have {seed}"),
        ("l{seed}.txt", "l{w}.txt", "`axes` has the placeholder {w}; it can have {out}, {seed}"),
        ("evaluate: --ckpt_path {out}/merged{w}", "evaluate: ", "`evaluate` needs --ckpt_path"),
        ("evaluate: ", "evaluate: --seed 3 ", "`evaluate` has --seed"),
        ("[7, 8]", "[7, 7]", "`sampling_seeds` names one twice"),
        ("w0-guidance1-plain", "w0", "no variant is named 'w0', the `baseline`; w0-guidance1-plain is one"),
        ("[recall]", "[recal]", "`compare` has 'recal'; the measures are val/loss"),
        ("baseline:", "budget: {parameters: 5, by: width}\nbaseline:", "`budget` sets options of `fit`"),
        ("axes: {w:", "axes: {out: [1], w:", "out cannot be an axis"),
    ],
)
def test_mistakes_with_placeholders_are_named(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in RUN
    path = tmp_path / "sweep.yaml"
    path.write_text(RUN.replace(before, after))
    with pytest.raises(InputError) as error:
        read_sweep(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
