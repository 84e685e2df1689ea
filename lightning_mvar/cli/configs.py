"""Configuration files of the training commands: strict YAML with interpolations, which saved files keep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_dumper, set_loader
from jsonargparse._common import parser_context  # the only way to parse without resolving interpolations
from lightning.pytorch.utilities.rank_zero import WarningCache
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_mvar.cli.arguments import check_values
from lightning_mvar.errors import InputError, one_line
from lightning_mvar.io.configs import YAML_ERRORS, compose, config_words, find_config, yaml_problem
from lightning_mvar.io.json_files import shown

PARSER_MODE = "omegaconf+"  # in this mode, jsonargparse accepts an interpolation for an option of any type
UNSERIALIZABLE = "Unable to serialize instance "  # jsonargparse's placeholder for a default that is not a plain value
messages = WarningCache()  # prints each message once per process
RESUMABLE_OVERLAYS = ("strategy", "callbacks")  # folders of overlays that may be added or dropped when a run resumes


def load_yaml(text: str, path: str | None, sections: Iterable[str]) -> Any:
    """Loads a configuration file, a section of one, or a value from the command line.

    Args:
        text: YAML.
        path: name of the `--config` file, whose text may be empty; None for other text.
        sections: dotted names of the sections.

    Raises:
        InputError: if a key has no value or occurs twice, or a section is not a mapping: each would silently discard
            settings of other files.
        yaml.YAMLError: if a value from the command line is not YAML.
    """
    where = "" if path is None else f"{path}, "
    try:
        node = None if path is None else compose(text)
        value = get_loader("yaml")(text)
        if path is None and isinstance(value, dict | list):
            node = compose(text)
    except RecursionError as error:
        raise InputError(f"{where}YAML is nested too deeply, or an alias refers to itself") from error
    except YAML_ERRORS as error:
        if path is None:
            raise yaml.YAMLError(one_line(error)) from error
        raise InputError(f"{path} is not valid YAML: {yaml_problem(error)}") from error
    check_keys(node, where)
    if path is None:
        return value
    for section in sections if isinstance(value, dict) else ():
        content = section_of(value, section.split("."))
        if not isinstance(content, dict | str):  # a string is the path of a file
            found = "null" if content is None else shown(content)
            raise InputError(
                f"{path}: {section} is {found}, not a mapping of options: remove the key to keep the inherited section"
            )
    return {} if value is None else value


def section_of(config: Any, names: list[str]) -> Any:
    """Returns the value at a path of keys; an empty dictionary if there is none."""
    for name in names:
        config = config.get(name, {}) if isinstance(config, dict) else {}
    return config


def check_keys(node: yaml.Node | None, where: str) -> None:
    """Raises InputError with the line number if a key of a node has no value or occurs twice."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if is_empty(item):
                raise InputError(f"{where}line {item.start_mark.line + 1}: a list item is empty: remove it")
            check_keys(item, where)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = f"{where}line {key.start_mark.line + 1}: {key.value}"
            if key.value in seen:
                raise InputError(f"{line} occurs twice in one section: merge the two")
            if is_empty(value):
                raise InputError(f"{line} has no value: give it one (`null` for none), or remove the line")
            seen.add(key.value)
            check_keys(value, where)


def is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null" and node.value == ""


def dump_yaml(config: dict[str, Any]) -> str:
    """Returns a configuration as YAML, without values that YAML cannot hold.

    Those are defaults of classes, such as a `torch.device`, and apply again when the file is read.
    """
    return yaml.safe_dump(plain_values(config), default_flow_style=False, allow_unicode=True, sort_keys=False)


def plain_values(value: Any) -> Any:
    """Returns a tree of dictionaries and lists without values that are not plain."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items() if is_plain(item)}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value if is_plain(item)]
    return str.__str__(value) if isinstance(value, str) else value  # a string enumeration becomes a string


def is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return not value.startswith(UNSERIALIZABLE)
    return value is None or isinstance(value, bool | int | float | dict | list | tuple)


set_dumper(PARSER_MODE, dump_yaml)


def parse(parser: ArgumentParser, args: Sequence[str]) -> tuple[Namespace, Namespace]:
    """Parses a command line into a configuration with unresolved interpolations and one with resolved ones.

    Interpolations such as `${trainer.default_root_dir}` use full option names, even in included files, and are resolved
    after all files and overrides have been merged.

    Returns:
        Configuration to save, configuration to build.

    Raises:
        argparse.ArgumentError: if an option is unknown or has the wrong type.
        InputError: if an interpolation cannot be resolved, or a value is invalid.
    """

    def load(text: str, path: str | None = None) -> Any:
        return load_yaml(text, path, parser.groups or ())

    set_loader(PARSER_MODE, load, (yaml.YAMLError,))
    try:
        with parser_context(lenient_check=True):
            written = parser.parse_args(args)
    except UnicodeDecodeError as error:
        raise InputError(f"a --config file is not text: {error.reason} at byte {error.start}") from error
    config = parser.parse_object(resolve(written), defaults=False)  # `written` already has the defaults
    try:
        parser.validate(config, skip_unset=False)  # finds nulls that the types of options do not allow
    except TypeError as error:
        raise InputError(one_line(error)) from error
    return written, check_values(config)


def resolve(config: Namespace) -> dict[str, Any]:
    """Returns a configuration with all interpolations resolved.

    Raises:
        InputError: if one refers to an option or an environment variable that does not exist.
    """
    try:
        tree = OmegaConf.create(config.as_dict(), flags={"allow_objects": True})
        return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ")
        raise InputError(f"{error.full_key or 'an interpolation'} cannot be resolved: {reason}") from error


def find_configs(argv: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Replaces configuration files that do not exist here with the package's files of the same names.

    Returns:
        The command line, and its configuration files in order.
    """
    found, files = [*argv], []
    for number, prefix, name in config_words(argv):
        path = find_and_report_config(name)
        found[number] = prefix + path
        files.append(Path(os.path.expanduser(path)))
    return found, files


def find_and_report_config(name: str) -> str:
    """Returns `find_config(name)`; if it is a file of the package, prints a message once per process."""
    if (path := find_config(name)) != name:
        messages.info(f"{name} is not in this folder: using the packaged file {path}")
    return path


def run_folder(command: str, files: Sequence[Path]) -> str:
    """Returns the default folder of a run: outputs/ followed by the names of its configuration files.

    Overlays in `strategy` and `callbacks` are left out, because a run may resume with others.
    """
    names = [file.stem for file in files if file.parent.name not in RESUMABLE_OVERLAYS]
    return "/".join(["outputs", "-".join(names) or command])
