"""What commands measure: a table for people, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_mvar.files import atomic_path

Record = dict[str, Any]  # flat; units are in the names


def print_record(record: Record) -> None:
    width = max(map(len, record))
    for name, value in record.items():
        print(f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def write_records(records: list[Record], path: str | Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(records, indent=2) + "\n")
