"""Typed reading of foreign JSON."""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.io.json_files import parse_json, read_json
from lightning_mvar.models.config import MVARConfig, NetworkOptions
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import TokenizerConfig

TOO_DEEP = "Stack overflow" if sys.version_info >= (3, 14) else "maximum recursion depth"


@dataclass(frozen=True)
class Part:
    name: str
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise InputError(f"part.size must be at least 0, got {self.size}")


@dataclass
class Whole:
    parts: list[Part]
    rate: float = 0.5
    mode: Literal["fast", "exact"] = "fast"
    flag: bool = False
    note: str | None = None
    side: int | tuple[int, int] = 1
    errors: dict[str, str] = field(default_factory=dict)
    extra: Any = None


def whole(**values: Any) -> str:
    return json.dumps({"parts": []} | values)


def test_types_are_built_and_only_lists_and_whole_numbers_are_converted() -> None:
    parsed = parse_json(whole(parts=[{"name": "a"}], rate=1, side=[2, 3], errors={"k": "é"}), Whole, "x.json")
    assert parsed == Whole([Part("a")], 1.0, side=(2, 3), errors={"k": "é"})
    assert isinstance(parsed.rate, float)
    assert parse_json("\ufeff[[1], []]".encode(), list[tuple[int, ...]], "x.json") == [(1,), ()]  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    "config",
    [
        MVARConfig(mixers=(("scale_attention", "mamba2"), ("scale_attention",)), drop_path=0.1),
        NetworkOptions(depth=2),
        TokenizerConfig(schedule=ScaleSchedule((1, (2, 3), 4))),
    ],
)
def test_our_configs_read_back(config: Any) -> None:
    assert parse_json(json.dumps(asdict(config)), type(config), "config.json") == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "is not valid JSON (Expecting value"),
        (b"\xff{}", "is not valid JSON ('utf-8' codec"),
        ('{"parts": [], "parts": []}', "it repeats the field 'parts'"),
        ('{"parts": [], "rate": NaN}', "it holds NaN"),
        ('{"parts": [], "rate": -Infinity}', "it holds -Infinity"),
        ('{"parts": [], "rate": 1e309}', "rate is inf; it must be a finite number"),
        ('{"parts": [], "rate": 1' + "0" * 400 + "}", "rate is 1000"),
        ('{"parts": [], "extra": {"a": [1e999]}}', "extra.a[0] is inf"),
        ('{"parts": [], "extra": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        ("[" * 100_000, f"is not valid JSON ({TOO_DEEP}"),
        ('{"parts": [], "extra": ' + "[" * 900 + "]" * 900 + "}", "is nested too deeply"),
        ("{}", "parts is missing; it must be [an object, ...]"),
        ("null", "the content is None; it must be an object"),
        (whole(parts={}), "parts is {}; it must be [an object, ...]"),
        (whole(parts=[{"name": 3}]), "parts[0].name is 3; it must be a string"),
        (whole(parts=[{"name": "a\0b"}]), "parts[0].name is 'a\\x00b'; it must be a string without NUL"),
        (whole(parts=[{"name": "\ud800"}]), "it must be a string without NUL"),
        (whole(parts=[{"name": "a", "size": True}]), "parts[0].size is True; it must be an integer"),
        (whole(parts=[{"name": "a", "size": 1.0}]), "parts[0].size is 1.0; it must be an integer"),
        (whole(parts=[{"name": "a", "size": 2**63}]), "it must be an integer of 64 bits"),
        (whole(parts=[{"name": "a", "size": -1}]), "part.size must be at least 0, got -1"),
        (whole(parts=[{"name": "a", "color\n": 1}]), "parts[0].'color\\n' is not a field of this version; it knows"),
        (whole(mode="slow"), "mode is 'slow'; it must be one of 'fast', 'exact'"),
        (whole(flag=1), "flag is 1; it must be true or false"),
        (whole(note=[]), "note is []; it must be a string"),
        (whole(side=[1]), "side is [1]; it must be an integer of 64 bits or [an integer"),
        (whole(errors={"a": None}), "errors.a is None; it must be a string"),
        (whole(errors={"a\0": ""}), "errors.'a\\x00' is 'a\\x00'; it must be a string without NUL"),
        (whole(mode="x" * 10_000), "xxx'; it must be one of 'fast'"),
    ],
)
def test_errors_are_one_line_with_source_field_and_value(data: str | bytes, message: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_json(data, Whole, "folder/x.json")
    text = str(raised.value)
    assert text.startswith("folder/x.json")
    assert message in text
    assert text.isprintable()
    assert len(text) < 400


def test_files_that_are_no_files_or_too_large_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(InputError, match=r"x\.json does not exist"):
        read_json(path, Whole)
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"x\.json is not a regular file"):
        read_json(path, Whole)
    with pytest.raises(InputError, match="is not a regular file"):
        read_json(Path("/dev/zero"), Whole)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(InputError, match=r"has more than \d+ bytes"):
        read_json(path, Whole)


def test_every_mutation_of_a_config_is_read_or_refused() -> None:
    sound = json.dumps(asdict(NetworkOptions(depth=2)))
    rng = random.Random(0)
    for _ in range(1000):
        begin = rng.randrange(len(sound))
        piece = rng.choice(["", "null", "-1", "1e308", '"', "[", "{}", "\0", "NaN", "true", "9" * 30, '"depth": 1,'])
        data = sound[:begin] + piece + sound[begin + rng.randrange(8) :]
        with suppress(InputError):
            parse_json(data, NetworkOptions, "config.json")
