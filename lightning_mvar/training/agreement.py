"""Agreement of all ranks on the data that they read, before the first batch."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch.distributed as dist

from lightning_mvar.devices import in_process_group
from lightning_mvar.errors import InputError

T = TypeVar("T")


class Report(NamedTuple):
    """What one rank has read: a digest by option, or the message of its error."""

    host: str
    digests: dict[str, str]
    error: str = ""


def read_on_all_ranks(read: Callable[[], tuple[T, dict[str, str]]]) -> T:
    """Reads data on every rank and compares its digests, in one collective that every rank reaches.

    Ranks on different machines may read different files under one name, and would silently train on both. If one
    rank cannot read its data, the others end with its message instead of waiting for it.

    Args:
        read: returns this rank's data, and a digest by the option that names a part of it.

    Returns:
        this rank's data.

    Raises:
        InputError: on all ranks, if one cannot read its data, or reads other data than rank 0.
    """
    if not in_process_group():
        return read()[0]
    host, data = socket.gethostname(), None
    try:
        data, digests = read()
        report = Report(host, digests)
    except InputError as error:
        report = Report(host, {}, str(error))
    reports: list[Report] = [report] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    require_same(reports, report)
    return cast(T, data)


def require_same(reports: list[Report], own: Report) -> None:
    """Raises InputError if a rank has failed, this one first, or has other digests than rank 0."""
    for rank, report in enumerate(reports):
        if report.error:
            raise InputError(own.error or f"rank {rank} on {report.host}: {report.error}")
    first = reports[0]
    for rank, report in enumerate(reports):
        for option, digest in report.digests.items():
            if digest != first.digests[option]:
                raise InputError(
                    f"rank {rank} on {report.host} reads other data in {option} than rank 0 on {first.host}: give "
                    f"every rank the same files"
                )
