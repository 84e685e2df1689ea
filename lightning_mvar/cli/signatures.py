"""Options of the commands, read from source code, for help, suggestions and completion without importing torch.

Importing a command's module takes seconds, reading its source milliseconds. The options are the parameters of the
command's function, or of the classes that LightningCLI builds, followed through `**kwargs` as jsonargparse does.
jsonargparse still parses the command line and checks the values.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from docstring_parser.google import GoogleParser

PACKAGE = "lightning_mvar"
Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Args:
        name: name without dashes; with dots if it belongs to a class.
        kind: annotation as source text, with an alias of Literal expanded; empty if there is none.
        required: whether it has no default.
        default: default as source text; empty if it is None or not a plain value.
        text: description from the docstring, on one line.
        owner: name of the function or class that declares it.
        by_keyword: whether it is keyword-only in Python.
        positional: whether it is given without its name on the command line.
        fields: options of its fields, if it is a dataclass.
    """

    name: str
    kind: str
    required: bool
    default: str
    text: str
    owner: str
    by_keyword: bool = False
    positional: bool = False
    fields: tuple[Option, ...] = ()

    @property
    def choices(self) -> list[str]:
        """Allowed values of an option of type Literal; empty for other types."""
        literal = re.fullmatch(r"Literal(\[[^\]]*\])( \| None)?", self.kind)
        return [str(value) for value in ast.literal_eval(literal[1])] if literal else []

    def with_fields(self) -> Iterator[Option]:
        """Yields this option and, if it is a dataclass, its fields with dotted names."""
        yield self
        for field in self.fields:
            yield from replace(field, name=f"{self.name}.{field.name}").with_fields()


class Signature(NamedTuple):
    """Description and options of a command or subcommand."""

    description: str
    options: list[Option]


@cache
def tree_of(module: str) -> ast.Module:
    """Parses a module of this package, or of Lightning, without importing it."""
    package, *parts = module.split(".")
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent.joinpath(*parts)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def find(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """Returns the definition of a name that a module uses, and its module; None if it is from another package."""
    for node in tree_of(module).body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return find(node.module, alias.name)
    return None


def command_signatures(module: str, name: str, positional: bool) -> dict[str, Signature]:
    """Returns a command's signatures by the names of its subcommands, or by "" if it has none.

    Args:
        module: module of the command.
        name: name of its function, or of a dictionary of functions by subcommand.
        positional: whether required arguments are positional.
    """
    found = find(module, name)
    if found is not None and isinstance(found[1], ast.Assign) and isinstance(found[1].value, ast.Dict):
        functions = found[1].value
        names = [ast.literal_eval(key) for key in functions.keys if key is not None]
        return {name: signature(module, ast.unparse(f)) for name, f in zip(names, functions.values, strict=True)}
    read = signature(module, name)
    if positional:
        read = read._replace(options=[replace(o, positional=o.required and not o.by_keyword) for o in read.options])
    return {"": read}


def signature(module: str, name: str) -> Signature:
    """Returns the description and options of a function or class."""
    found = find(module, name)
    assert found is not None
    assert isinstance(found[1], Definition)
    description = (ast.get_docstring(found[1]) or "").partition("\n\nArgs:")[0]
    return Signature(description, list(options_of(*found)))


def options_of(module: str, node: ast.stmt) -> Iterator[Option]:
    """Yields the options of a function, dataclass or class, followed by those of what it passes `**kwargs` to."""
    assert isinstance(node, Definition)
    function = initializer(node) if isinstance(node, ast.ClassDef) else node
    documented = GoogleParser().parse(ast.get_docstring(node) or "").params
    texts = {param.arg_name: " ".join((param.description or "").split()) for param in documented}
    seen = set()
    for name, annotation, default, by_keyword in parameters(node if function is None else function):
        seen.add(name)
        kind, text, fields = kind_of(module, annotation), texts.get(name, ""), fields_of(module, annotation)
        yield Option(
            name, kind, default is None, plain(module, default), text, node.name, by_keyword, fields=tuple(fields)
        )
    if function is None or function.args.kwarg is None:
        return
    for target, given in receivers(module, node, function, function.args.kwarg.arg):
        for number, option in enumerate(options_of(*target)):
            if number >= given.positional and option.name not in given.keywords | seen:
                seen.add(option.name)
                yield option


def fields_of(module: str, annotation: ast.expr | None) -> Iterator[Option]:
    """Yields the fields of a dataclass in an annotation, with missing texts taken from its base class.

    For other types, the class is known only from the option's value.
    """
    for name in [node.id for node in ast.walk(annotation or ast.Tuple([])) if isinstance(node, ast.Name)]:
        found = find(module, name) if name[0].isupper() else None
        if found is None or not isinstance(found[1], ast.ClassDef) or not is_dataclass(found[1]):
            continue
        bases = [find(found[0], base.id) for base in found[1].bases if isinstance(base, ast.Name)]
        texts = {option.name: option.text for base in bases if base is not None for option in options_of(*base)}
        for option in options_of(*found):
            yield replace(option, text=option.text or texts.get(option.name, ""))


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def initializer(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def parameters(node: Definition) -> Iterator[tuple[str, ast.expr | None, ast.expr | None, bool]]:
    """Yields (name, annotation, default, is keyword-only) of each parameter of a function or field of a dataclass."""
    if isinstance(node, ast.ClassDef):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield field.target.id, field.annotation, field.value, False
        return
    positional = [*node.args.posonlyargs, *node.args.args]
    missing = [None] * (len(positional) - len(node.args.defaults))
    defaults: list[Any] = [*missing, *node.args.defaults, *node.args.kw_defaults]
    for argument, default in zip([*positional, *node.args.kwonlyargs], defaults, strict=True):
        if argument.arg != "self":
            yield argument.arg, argument.annotation, default, argument in node.args.kwonlyargs


class Given(NamedTuple):
    """Arguments that a call passes besides `**kwargs`."""

    positional: int
    keywords: set[str]


def receivers(
    module: str, node: Definition, function: ast.FunctionDef, kwargs: str
) -> Iterator[tuple[tuple[str, ast.stmt], Given]]:
    """Yields the definitions that a function passes its `**kwargs` to, except methods of unknown classes."""
    for call in ast.walk(function):
        if not isinstance(call, ast.Call):
            continue
        starred = [k.value for k in call.keywords if k.arg is None]
        if not any(isinstance(value, ast.Name) and value.id == kwargs for value in starred):
            continue
        callee = call.func
        if ast.unparse(callee) == "super().__init__" and isinstance(node, ast.ClassDef):
            callee = node.bases[0]
        found = find(module, callee.id) if isinstance(callee, ast.Name) else None
        if found is not None:
            yield found, Given(len(call.args), {k.arg for k in call.keywords if k.arg is not None})


def kind_of(module: str, annotation: ast.expr | None) -> str:
    """Returns an annotation as text, with an alias of Literal expanded."""
    if annotation is None:
        return ""
    text = ast.unparse(annotation)
    found = find(module, text) if isinstance(annotation, ast.Name) else None
    if found is not None and isinstance(found[1], ast.Assign):
        return ast.unparse(found[1].value)
    return text


def plain(module: str, default: ast.expr | None) -> str:
    """Returns a default as text, with a constant of the package replaced by its value; empty if not a plain value."""
    if isinstance(default, ast.Name) and (found := find(module, default.id)) is not None:
        default = found[1].value if isinstance(found[1], ast.Assign) else None
    if isinstance(default, ast.Constant) and default.value is not None:
        return str(default.value).lower() if isinstance(default.value, bool) else str(default.value)
    return ast.unparse(default) if isinstance(default, ast.Tuple) and default.elts else ""
