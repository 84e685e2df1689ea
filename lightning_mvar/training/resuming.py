"""Checks that a run matches the checkpoint that it continues, and adapts its position in the epoch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_mvar.checkpoints.training import NetworkRecord, RunRecord
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.training.weights import ADAPTABLE

AS_BEFORE = "set it as before"
NEW_RUN = "start a new run from the checkpoint with --model.weights"


def require_same(name: str, saved: Any, current: Any, remedy: str = f"{AS_BEFORE}, or {NEW_RUN}") -> None:
    """Raises InputError if a setting differs between a checkpoint and the run that continues it."""
    if saved != current:
        raise InputError(
            f"--ckpt_path has another configuration: {name} is {saved} in the checkpoint and {current} in this run; "
            f"{remedy}"
        )


def require_same_network(record: NetworkRecord, network: MVARConfig, tokenizer: str) -> None:
    """Raises InputError that names the field unless a checkpoint has this network and this tokenizer fingerprint."""
    saved = asdict(record.network)
    for name, current in asdict(network).items():
        require_same(name, saved[name], current, f"{AS_BEFORE}, or {NEW_RUN}" if name in ADAPTABLE else AS_BEFORE)
    remedy = f"set --model.tokenizer to the one of the checkpoint, which was {record.tokenizer.path}"
    require_same("tokenizer", record.tokenizer.fingerprint, tokenizer, remedy)


def adapt_to_devices(run: RunRecord, world_size: int, batch_of_all_ranks: int, fit_loop: dict[str, Any]) -> None:
    """Keeps the position in the epoch if a run resumes with other devices or batch sizes, and reports what changes.

    The order of the samples does not depend on the devices. Lightning counts batches, so its counts are converted.

    Args:
        run: state of the run in the checkpoint.
        world_size: current number of ranks.
        batch_of_all_ranks: current number of images per batch over all ranks.
        fit_loop: state of Lightning's loop in the checkpoint, changed in place.
    """
    before, now = run.batch_of_all_ranks, batch_of_all_ranks
    if before is not None and before != now:
        current = fit_loop["epoch_loop.batch_progress"]["current"]
        repeated = current["completed"] * before % now
        for name, batches in current.items():
            current[name] = batches * before // now
        rank_zero_info(
            f"resuming with batches of {now} images over all ranks instead of {before}: the order of the samples is "
            f"the same, and {repeated} of them are repeated; dropped labels depend on the batch size, and so does the "
            f"learning rate unless the global batch is the same"
        )
    elif before is not None and run.world_size != world_size:
        rank_zero_info(
            f"resuming on {world_size} ranks instead of {run.world_size}: batches and dropped labels are the same, but "
            f"drop path draws other random numbers and sums round differently"
        )
