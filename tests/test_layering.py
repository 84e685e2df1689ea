"""Imports go down only (the order below), and few parts know of lightning."""

import ast
from functools import cache
from pathlib import Path

import lightning_mvar

PACKAGE = Path(lightning_mvar.__file__).parent
LAYERS = [  # each may import those before it, and its own
    ["errors", "version", "files", "locks", "processes", "server", "npz", "devices", "classes", "fingerprint"],
    ["weights", "scales", "ops", "hparams"],
    ["models", "tokenizer"],
    ["official", "resume", "attention_share", "costs", "sweeps"],
    ["data.embedded", "data.digits", "data.photos", "data.images"],
    ["data.decoding", "data.fetching", "data.labels", "data.encoded", "data.archives", "data.parquet"],
    ["data.crops", "data.sources"],
    [
        "data.sample_files",
        "data.shards",
        "data.inspection",
        "data.token_statistics",
        "data.remote",
        "data.loader",
    ],
    ["sampling", "encoding", "pictures", "sample_set", "checkpoints", "optim"],
    ["metrics", "pipeline", "data.datamodule", "strategies"],
    ["scheduled_module", "bench", "studio"],
    ["module"],
    ["tokenizer_module", "page"],
    ["callbacks"],
    ["cli", "commands", "__main__"],
]
LIGHTNING = ("strategies", "scheduled_module", "module", "tokenizer_module", "data.datamodule", "callbacks", "commands")


@cache
def package_modules() -> dict[str, ast.Module]:
    paths = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    names = {name.removesuffix("/__init__").replace("/", "."): path for name, path in paths.items()}
    return {name: ast.parse(path.read_text()) for name, path in names.items() if name != "__init__"}


def imports(tree: ast.AST) -> set[str]:
    """Modules that a file imports, except those for the type checker alone."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layer(name: str) -> int:
    places = [i for i, names in enumerate(LAYERS) if any(name == n or name.startswith(f"{n}.") for n in names)]
    assert places, f"{name} is in no layer: place it"
    return places[0]


def test_imports_go_down_only() -> None:
    modules = package_modules()
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules.items()
        if name != "data"
        for target in (found.removeprefix("lightning_mvar.") for found in imports(tree) if "lightning_mvar." in found)
        if target in modules and target != "data" and layer(target) > layer(name)
    ]
    assert wrong == []


def test_models_and_tokenizer_do_not_know_each_other() -> None:
    for name, tree in package_modules().items():
        for ours, other in (("models", "tokenizer"), ("tokenizer", "models")):
            if name.split(".")[0] == ours:
                assert not any(found.startswith(f"lightning_mvar.{other}") for found in imports(tree)), name


def test_only_the_outer_parts_import_lightning() -> None:
    using = {
        name for name, tree in package_modules().items() if any(i.split(".")[0] == "lightning" for i in imports(tree))
    }
    assert using
    assert {name for name in using if not name.startswith(LIGHTNING)} == set()


def test_commands_are_imported_by_nothing_but_themselves() -> None:
    for name, tree in package_modules().items():
        if not name.startswith(("commands", "cli")):
            assert not any(found.startswith("lightning_mvar.commands") for found in imports(tree)), name


def test_there_are_no_modules_without_a_subject() -> None:
    assert not {"utils", "misc", "helpers", "common"} & {part for name in package_modules() for part in name.split(".")}
