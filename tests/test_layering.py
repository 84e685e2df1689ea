"""Layers of the package: imports go down only, and nothing bypasses them."""

import ast
import re
from functools import cache
from pathlib import Path

import lightning_mvar

PACKAGE = Path(lightning_mvar.__file__).parent
LAYERS = [  # each may import earlier layers; packages of one layer may not import each other
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
    ["analysis", "bench", "sweeps", "projects", "pipeline"],
    ["web"],
    ["commands"],
]
GROUND = LAYERS[0]  # its modules may import each other
LIGHTNING_USERS = {"training", "callbacks", "cli", "commands"}


@cache
def modules() -> dict[str, ast.Module]:
    """Returns syntax trees by dotted name within the package; `__init__.py` has the name of its folder."""
    paths = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    names = {name.removesuffix("/__init__").replace("/", "."): path for name, path in paths.items()}
    return {name: ast.parse(path.read_text()) for name, path in names.items() if name != "__init__"}


@cache
def imports(tree: ast.AST) -> set[str]:
    """Returns the modules that a file imports, including those under TYPE_CHECKING and those named in strings."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if re.fullmatch(r"lightning_mvar(\.\w+)+", node.value) else set()
    return names


@cache
def own_imports(tree: ast.AST) -> set[str]:
    return {name.removeprefix("lightning_mvar.") for name in imports(tree)} & modules().keys()


def package_of(name: str) -> str:
    return name.split(".")[0]


def layer_of(name: str) -> int:
    layers = [i for i, packages in enumerate(LAYERS) if package_of(name) in packages]
    assert layers, f"{name} is in no layer: add it to LAYERS"
    return layers[0]


def test_imports_go_down_only() -> None:
    violations = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        for target in own_imports(tree)
        if package_of(target) != package_of(name)
        and (
            layer_of(target) > layer_of(name) or (layer_of(target) == layer_of(name) and package_of(name) not in GROUND)
        )
    ]
    assert violations == []


def test_there_are_no_circular_imports() -> None:
    """Includes imports inside a package, except the module that sweeps.forkserver_signals preloads."""
    graph = {name: own_imports(tree) - {name, "sweeps.forkserver_signals"} for name, tree in modules().items()}
    resolved: set[str] = set()
    while leaves := [name for name in graph.keys() - resolved if graph[name] <= resolved]:
        resolved |= set(leaves)
    assert graph.keys() - resolved == set()


def test_only_the_outer_layers_import_lightning() -> None:
    users = {
        package_of(name)
        for name, tree in modules().items()
        if any(package_of(target) == "lightning" for target in imports(tree))
    }
    assert users == LIGHTNING_USERS


def test_options_are_parsed_before_lightning_is_imported() -> None:
    """Importing it takes seconds; only the commands whose options are Lightning's need it to parse."""
    before = {name: at_module_level(tree) for name, tree in modules().items()}
    for name in before:
        if name.startswith("commands.") and name not in ("commands.fit", "commands.train_tokenizer", "commands.sweep"):
            reached, pending = set[str](), [name]
            while pending:
                module = pending.pop()
                assert not any(package_of(target) == "lightning" for target in before[module]), (name, module)
                own = {target.removeprefix("lightning_mvar.") for target in before[module]} & before.keys()
                pending += own - reached
                reached |= own


def at_module_level(tree: ast.Module) -> set[str]:
    return imports(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []))


def test_nothing_imports_a_command() -> None:
    for name, tree in modules().items():
        others = {target for target in own_imports(tree) if target.startswith("commands.") and target != name}
        assert others <= ({"commands.evaluate"} if name == "commands.sweep" else set()), name


def test_no_module_is_imported_by_name() -> None:
    """Only the command line does, so that it loads one command only."""
    users = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
        and "import_module" in (getattr(node, "attr", ""), getattr(node, "id", ""))
    }
    assert users == {"cli"}


def test_data_code_never_accesses_the_lightning_module() -> None:
    """A module asks the datamodule in `setup`; the datamodule never reads the module."""
    for name in ("training.datamodules", *(other for other in modules() if package_of(other) == "data")):
        names = {node.attr for node in ast.walk(modules()[name]) if isinstance(node, ast.Attribute)}
        assert not {"lightning_module", "datamodule"} & names, name


def test_no_import_of_the_package_is_under_type_checking() -> None:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                assert not {target for target in imports(node) if target.startswith("lightning_mvar")}, name


def test_no_module_has_a_catch_all_name() -> None:
    assert not {"utils", "misc", "helpers", "common"} & {part for name in modules() for part in name.split(".")}
