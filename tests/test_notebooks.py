"""Tests of the notebooks: run in order with tiny settings in an empty folder; committed cells are checked."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from sweep_folder import write_sweep

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
TINY: dict[str, dict[str, object]] = {
    "01_quickstart": {"tokenizer_steps": 2, "network_steps": 10, "validate_every": 10, "views": 1, "per_class": 1},
    "02_inside_mvar": {"network_steps": 2, "count": 20, "resolutions": (256,)},
    "03_editing": {"count": 2},
    "04_ablation_report": {"folder": "../outputs/sweep/tiny"},
}
OUTPUT_FILES = ["tokenizer/config.json", "shards/train/manifest.json", "shards/val/manifest.json", "export/config.json"]
CHECKPOINTS = ["mvar/checkpoints/step=00000010.ckpt", "var/checkpoints/step=00000002.ckpt"]
MAX_NOTEBOOK_BYTES = 600_000
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'`(\[=:])(?:/\w|~/|[A-Z]:\\)""", re.MULTILINE)


def read(name: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def assigned_names(source: str) -> set[str]:
    """Returns the names that a cell assigns."""
    return {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def text_outputs(cell: NotebookNode) -> Iterator[str]:
    """Yields the text outputs of a cell."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def figure_counts(notebook: NotebookNode) -> list[int]:
    """Returns the number of images that each code cell shows."""
    return [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code_cells(notebook)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clone")
    (root / "notebooks").mkdir()
    write_sweep(root / "outputs/sweep/tiny")
    return root


@pytest.fixture(scope="module")
def executed(folder: Path) -> dict[str, NotebookNode]:
    notebooks = {name: read(name) for name in NOTEBOOKS}
    resources = {"metadata": {"path": str(folder / "notebooks")}}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # more threads than free cores only wait for each other
    for name, notebook in notebooks.items():
        settings = code_cells(notebook)[0]
        tiny = "".join(f"\n{setting} = {value!r}" for setting, value in TINY[name].items())
        settings.source = f"%reset -f\n{settings.source}{tiny}"
    # One kernel runs the cells of all: importing torch and Lightning takes seconds.
    cells = [cell for notebook in notebooks.values() for cell in notebook.cells]
    together = NotebookNode(cells=cells, metadata=NotebookNode(), nbformat=4, nbformat_minor=5)
    NotebookClient(together, timeout=300, kernel_name="python3", resources=resources).execute(env=environment)
    return notebooks


def test_they_run_and_write_their_outputs(executed: dict[str, NotebookNode], folder: Path) -> None:
    for name in [*OUTPUT_FILES, *CHECKPOINTS]:
        assert (folder / "outputs/notebooks" / name).is_file(), name
    assert {path.name for path in folder.iterdir()} == {"notebooks", "outputs"}
    assert not list((folder / "notebooks").iterdir())
    for cell in (cell for notebook in executed.values() for cell in code_cells(notebook)):
        # A failed command prints this and returns 1.
        assert "lightning-mvar: error" not in "".join(text_outputs(cell)), cell.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_they_show_as_many_figures_as_committed(name: str, executed: dict[str, NotebookNode]) -> None:
    assert figure_counts(executed[name]) == figure_counts(read(name))
    assert sum(figure_counts(read(name))) >= 4


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_their_first_code_cell_holds_the_settings(name: str) -> None:
    first, *others = code_cells(read(name))
    assert first.metadata["tags"] == ["parameters"]
    assert set(TINY[name]) <= assigned_names(first.source)
    for cell in others:
        assert not assigned_names(cell.source) & assigned_names(first.source)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_they_define_no_functions_or_classes(name: str) -> None:
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    for cell in code_cells(read(name)):
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, definitions)], cell.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_they_are_committed_executed_without_errors_or_absolute_paths(name: str) -> None:
    assert NOTEBOOKS[name].stat().st_size < MAX_NOTEBOOK_BYTES
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"], cell.source
        assert not [text for text in text_outputs(cell) if ABSOLUTE_PATH.search(text)], cell.source


def test_absolute_paths_are_recognized() -> None:
    for path in ("/home/me/x.py:3: UserWarning", "saved in '/tmp/x'", "C:\\x", "~/x", "at\n/root/x"):
        assert ABSOLUTE_PATH.search(path), path
    for harmless in ("../outputs/notebooks/export", "images/s 3/4", "1,347 samples in outputs/x", "3 / 4"):
        assert not ABSOLUTE_PATH.search(harmless), harmless
