"""Tables of measurements on the terminal."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]  # flat; the keys include the units


def print_table(records: list[Record]) -> None:
    """Prints shared values in one line, then a table: two records as columns with their ratio, more as rows."""
    names = list(dict.fromkeys(name for record in records for name in record))
    shared = {n: records[0].get(n) for n in names if len(records) > 1 and len({str(r.get(n)) for r in records}) == 1}
    rest = [name for name in names if name not in shared]
    if shared:
        print(", ".join(f"{name} {format_value(value)}" for name, value in shared.items()))
    rows = [[name, *(format_value(record.get(name, "")) for record in records)] for name in rest]
    if len(records) == 2:
        rows = [[*row, ratio(*(record.get(row[0]) for record in records))] for row in rows]
        rows.insert(0, ["", "first", "versus", "ratio"])
    elif len(records) > 2:
        rows = [list(column) for column in zip(*rows, strict=True)]
    print_rows(rows)


def print_rows(rows: list[list[str]]) -> None:
    """Prints rows with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ratio(first: Any, second: Any) -> str:
    """Formats first / second; empty unless both are numbers."""
    numeric = all(isinstance(value, float | int) and not isinstance(value, bool) for value in (first, second))
    return f"{first / second:.3f}" if numeric and second else ""
