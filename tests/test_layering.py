"""The package's floors: imports go down only, and nothing goes around them."""

import ast
import re
from functools import cache
from pathlib import Path

import lightning_mvar

PACKAGE = Path(lightning_mvar.__file__).parent
FLOORS = [  # each may import those before it, and itself; rooms of one floor do not know each other
    ["scales", "devices", "errors", "version"],
    ["io"],
    ["ops"],
    ["models", "tokenizer"],
    ["checkpoints"],
    ["data"],
    ["sampling"],
    ["metrics"],
    ["training"],
    ["callbacks"],
    ["cli"],
    ["__main__"],
    ["analysis", "bench", "sweeps", "pipeline"],
    ["web"],
    ["commands"],
]
GROUND = FLOORS[0]  # its modules may import each other
KNOW_LIGHTNING = {"training", "callbacks", "cli", "commands"}


@cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name within the package; a folder's own file goes by the folder's name."""
    paths = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    names = {name.removesuffix("/__init__").replace("/", "."): path for name, path in paths.items()}
    return {name: ast.parse(path.read_text()) for name, path in names.items() if name != "__init__"}


def imports(tree: ast.AST) -> set[str]:
    """Modules that a file imports, those for the type checker alone and those named in strings included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if re.fullmatch(r"lightning_mvar(\.\w+)+", node.value) else set()
    return found


def own_imports(tree: ast.AST) -> set[str]:
    return {name.removeprefix("lightning_mvar.") for name in imports(tree)} & modules().keys()


def room(name: str) -> str:
    return name.split(".")[0]


def floor(name: str) -> int:
    places = [i for i, rooms in enumerate(FLOORS) if room(name) in rooms]
    assert places, f"{name} is on no floor: place it"
    return places[0]


def test_imports_go_down_only() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        for target in own_imports(tree)
        if room(target) != room(name)
        and (floor(target) > floor(name) or (floor(target) == floor(name) and room(name) not in GROUND))
    ]
    assert wrong == []


def test_modules_import_each_other_in_no_circle() -> None:
    """Inside a room too, but for what a server of processes is told to import."""
    graph = {name: own_imports(tree) - {name, "sweeps.server"} for name, tree in modules().items()}
    done: set[str] = set()
    while leaves := [name for name in graph.keys() - done if graph[name] <= done]:
        done |= set(leaves)
    assert graph.keys() - done == set()


def test_only_the_outer_floors_import_lightning() -> None:
    using = {
        room(name) for name, tree in modules().items() if any(room(found) == "lightning" for found in imports(tree))
    }
    assert using == KNOW_LIGHTNING


def test_nothing_imports_a_command() -> None:
    for name, tree in modules().items():
        others = {target for target in own_imports(tree) if target.startswith("commands.") and target != name}
        assert others <= ({"commands.evaluate"} if name == "commands.sweep" else set()), name


def test_no_module_is_looked_up_by_name() -> None:
    """But the command that a command line names: 16 others stay unread."""
    looking = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
        and "import_module" in (getattr(node, "attr", ""), getattr(node, "id", ""))
    }
    assert looking == {"cli"}


def test_the_data_knows_no_module_and_the_trainer_is_no_passage() -> None:
    """Modules get from the datamodule what they ask it for, in `setup`; the datamodule never reads the module."""
    for name in ("training.datamodules", *(other for other in modules() if room(other) == "data")):
        names = {node.attr for node in ast.walk(modules()[name]) if isinstance(node, ast.Attribute)}
        assert not {"lightning_module", "datamodule"} & names, name


def test_nothing_is_hidden_from_these_tests() -> None:
    """Imports for the type checker alone go down like all others."""
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                hidden = {found for found in imports(node) if found.startswith("lightning_mvar")}
                assert hidden == set(), name


def test_every_folder_has_a_subject() -> None:
    assert not {"utils", "misc", "helpers", "common"} & {part for name in modules() for part in name.split(".")}
