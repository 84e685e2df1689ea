"""JSON schema of a training command's configuration files, for editors; built from source code like the help."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

from lightning_mvar.cli.help import signatures_of
from lightning_mvar.cli.signatures import Option, signature, tree_of

Schema = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"  # the draft that editors support best
TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object"}
LISTS = ("list", "tuple", "Iterable", "Sequence")
ANY: list[Schema] = [{}]
NULL: Schema = {"type": "null"}
PATH: Schema = {"type": "string", "pattern": r"\.ya?ml$"}  # of a file with the options of a section
INTERPOLATION: Schema = {"type": "string", "pattern": r"\$\{"}  # refers to another option, in place of any value
CALLBACKS = "lightning_mvar.callbacks"


def config_schema(command: str) -> Schema:
    """Returns the schema of a training command's `--config` files."""
    sections: dict[str, list[Option]] = {}
    for option in signatures_of(command)[""].options:
        section, _, name = option.name.rpartition(".")
        sections.setdefault(section, []).append(replace(option, name=name))
    schema = object_schema(sections.pop(""))
    schema["properties"] |= {name: {"anyOf": [object_schema(options), PATH]} for name, options in sections.items()}
    trainer = schema["properties"]["trainer"]["anyOf"][0]["properties"]
    callback = {"$ref": "#/definitions/callback"}
    trainer["callbacks"] = trainer["callbacks+"] = {"anyOf": [{"type": "array", "items": callback}, callback, NULL]}
    schema["properties"]["$schema"] = {"type": "string"}  # lets a file name its schema
    title, definitions = f"configuration of lightning-mvar {command}", {"callback": callback_schema()}
    return {"$schema": DRAFT, "title": title, "definitions": definitions, **schema}


def object_schema(options: list[Option]) -> Schema:
    """Returns the schema of a section. A list `x` also has a key `x+`, which appends to the inherited list.

    Dotted keys such as `trainer.max_steps` accept any value; the commands check them.
    """
    properties = {}
    for option in options:
        properties[option.name] = option_schema(option)
        if re.search(rf"\b({'|'.join(LISTS)})\[", option.kind):
            properties[f"{option.name}+"] = option_schema(option)
    return {
        "type": "object",
        "properties": properties,
        "patternProperties": {r"\.": {}},
        "additionalProperties": False,
    }


def option_schema(option: Option) -> Schema:
    default = f" Default: {option.default}." if option.default else ""
    schema: Schema = {"description": option.text.rstrip(".") + "." + default} if option.text else {}
    if option.fields:
        nullable = [NULL] if "None" in option.kind else []
        return schema | {"anyOf": [object_schema([*option.fields]), PATH, *nullable]}
    members = kind_schemas(ast.parse(option.kind or "object", mode="eval").body)
    return schema if {} in members else schema | {"anyOf": [*members, INTERPOLATION]}


def kind_schemas(kind: ast.expr) -> list[Schema]:
    """Returns the schemas that an annotation accepts; `ANY` if it names a class, which would have to be imported."""
    match kind:
        case ast.BinOp(left=left, right=right):
            return kind_schemas(left) + kind_schemas(right)
        case ast.Constant(value=None):
            return [NULL]
        case ast.Name(id=name) if name in TYPES:
            return [{"type": TYPES[name]}]
        case ast.Subscript(value=ast.Name(id="Literal")):
            return [{"enum": list(literals(kind.slice))}]
        case ast.Subscript(value=ast.Name(id="Optional")):
            return [*kind_schemas(kind.slice), NULL]
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            return [schema for member in members for schema in kind_schemas(member)]
        case ast.Subscript(value=ast.Name(id="dict")):
            return [{"type": "object"}]
        case ast.Subscript(value=ast.Name(id=name)) if name in LISTS:
            element = kind.slice.elts[0] if isinstance(kind.slice, ast.Tuple) else kind.slice
            return [{"type": "array", "items": {"anyOf": kind_schemas(element)}}]
    return ANY


def literals(values: ast.expr) -> tuple[Any, ...]:
    read = ast.literal_eval(values)
    return read if isinstance(read, tuple) else (read,)


def callback_schema() -> Schema:
    """Returns the schema of a callback: the path of a file, or a class with arguments, listed for our own classes."""
    imports = [node for node in tree_of(CALLBACKS).body if isinstance(node, ast.ImportFrom) and node.level == 0]
    names = [alias.name for node in imports if node.module != "__future__" for alias in node.names]
    paths = {f"{CALLBACKS}.{name}": object_schema(signature(CALLBACKS, name).options) for name in names}
    for arguments in paths.values():
        arguments["additionalProperties"] = True  # those of Lightning's base class
    arguments_of_class = [
        {"if": {"properties": {"class_path": {"const": path}}}, "then": {"properties": {"init_args": arguments}}}
        for path, arguments in paths.items()
    ]
    class_path = {"anyOf": [{"enum": [*paths]}, {"type": "string"}]}
    described = {"type": "object", "required": ["class_path"], "properties": {"class_path": class_path}}
    return {"anyOf": [{"type": "string"}, described | {"allOf": arguments_of_class}]}
