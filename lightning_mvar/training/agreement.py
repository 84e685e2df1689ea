"""Checks before the first batch that all ranks read the same data."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch.distributed as dist

from lightning_mvar.devices import in_process_group
from lightning_mvar.errors import InputError

T = TypeVar("T")


class Report(NamedTuple):
    """What one rank has read: digests by option, or an error message."""

    host: str
    digests: dict[str, str]
    error: str = ""


def read_on_all_ranks(read: Callable[[], tuple[T, dict[str, str]]]) -> T:
    """Reads data on every rank and compares digests, in a single collective that every rank reaches.

    Ranks on different machines may read different files with the same name and would silently train on both. If a rank
    cannot read its data, the others end with its message instead of waiting for it.

    Args:
        read: returns this rank's data, and a digest of each part by the option that names it.

    Returns:
        This rank's data.

    Raises:
        InputError: on all ranks, if one of them cannot read its data, or its data differs from rank 0's.
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
    """Raises InputError if a rank has failed, with this rank's own error first, or its digests differ from rank 0's."""
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
