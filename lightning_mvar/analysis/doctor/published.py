"""Published scores with their protocol, as results for `differences.compare`, read from `published.json`.

Values that neither a paper nor its repository states are missing; `unverified` names those that were not checked
against the source. `guidance` follows this package's convention: conditional and unconditional logits are weighted by
1 + g and -g.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from lightning_mvar.analysis.doctor.differences import Result
from lightning_mvar.errors import InputError
from lightning_mvar.io.json_files import parse_json

TABLE = "published.json"


@dataclass(frozen=True)
class PublishedTable:
    """The contents of `published.json`: the evaluation protocols that rows refer to, and the rows by name."""

    protocols: dict[str, Result]
    rows: dict[str, Result]


def read_table() -> PublishedTable:
    return parse_json((files(__package__) / TABLE).read_bytes(), PublishedTable, TABLE)


def published_result(name: str) -> Result:
    """Returns a row of the table together with its protocol; raises InputError if there is no row of this name."""
    table = read_table()
    if name not in table.rows:
        raise InputError(f"there are no published scores of {name!r}; the table has {', '.join(table.rows)}")
    row = table.rows[name]
    protocol = table.protocols[row["protocol"]]
    return protocol | row | {"unverified": [*protocol.get("unverified", []), *row.get("unverified", [])]}
