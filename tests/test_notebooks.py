"""The notebooks: executed in order with tiny settings in a folder like a clone, and what is committed of them."""

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
    "02_inside_mvar": {"network_steps": 2, "count": 20, "resolutions": (256, 512)},
    "03_editing": {"count": 2},
    "04_ablation_report": {"folder": "../outputs/sweep/tiny"},
}
PRODUCTS = ["tokenizer/config.json", "shards/train/manifest.json", "shards/val/manifest.json", "export/config.json"]
CHECKPOINTS = ["mvar/checkpoints/step=00000010.ckpt", "var/checkpoints/step=00000002.ckpt"]
LARGEST = 600_000  # bytes of a committed notebook
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'`(\[=:])(?:/\w|~/|[A-Z]:\\)""", re.MULTILINE)


def read(name: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def assigned(source: str) -> set[str]:
    """Names that a cell gives values to."""
    return {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def texts(cell: NotebookNode) -> Iterator[str]:
    """What a cell has printed or shown in words."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def figures(notebook: NotebookNode) -> list[int]:
    """How many pictures each code cell shows."""
    return [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code_cells(notebook)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clone")
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "notebooks").mkdir()
    write_sweep(root / "outputs/sweep/tiny")
    return root


@pytest.fixture(scope="module")
def executed(folder: Path) -> dict[str, NotebookNode]:
    notebooks = {name: read(name) for name in NOTEBOOKS}
    where = {"metadata": {"path": str(folder / "notebooks")}}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads wait for each other where cores are shared
    for name, notebook in notebooks.items():
        settings = code_cells(notebook)[0]
        settings.source += "".join(f"\n{setting} = {value!r}" for setting, value in TINY[name].items())
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute(env=environment)
    return notebooks


def test_they_run_and_leave_what_they_make(executed: dict[str, NotebookNode], folder: Path) -> None:
    for name in [*PRODUCTS, *CHECKPOINTS]:
        assert (folder / "outputs/notebooks" / name).is_file(), name
    assert {path.name for path in folder.iterdir()} == {"configs", "notebooks", "outputs"}
    assert not list((folder / "notebooks").iterdir())
    for cell in (cell for notebook in executed.values() for cell in code_cells(notebook)):
        assert "lightning-mvar: error" not in "".join(texts(cell)), cell.source  # a command tells, and gives 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_they_show_the_same_figures_as_those_committed(name: str, executed: dict[str, NotebookNode]) -> None:
    assert figures(executed[name]) == figures(read(name))
    assert sum(figures(read(name))) >= 4


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_their_first_cell_of_code_holds_the_settings(name: str) -> None:
    first, *others = code_cells(read(name))
    assert first.metadata["tags"] == ["parameters"]
    assert set(TINY[name]) <= assigned(first.source)
    for cell in others:
        assert not assigned(cell.source) & assigned(first.source)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_they_define_nothing(name: str) -> None:
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    for cell in code_cells(read(name)):
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, definitions)], cell.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_they_are_committed_executed_and_say_nothing_of_a_machine(name: str) -> None:
    assert NOTEBOOKS[name].stat().st_size < LARGEST
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"], cell.source
        assert not [text for text in texts(cell) if ABSOLUTE_PATH.search(text)], cell.source


def test_absolute_paths_are_recognised() -> None:
    for path in ("/home/me/x.py:3: UserWarning", "saved in '/tmp/x'", "C:\\x", "~/x", "at\n/root/x"):
        assert ABSOLUTE_PATH.search(path), path
    for harmless in ("../outputs/notebooks/export", "images/s 3/4", "1,347 samples in outputs/x", "3 / 4"):
        assert not ABSOLUTE_PATH.search(harmless), harmless
