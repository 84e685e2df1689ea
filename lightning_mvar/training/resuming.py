"""What a run must share with the checkpoint that it continues, and how it keeps its place in the epoch."""

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
            f"--ckpt_path is of another configuration: {name} is {saved} in the checkpoint and {current} in this run; "
            f"{remedy}"
        )


def require_same_network(record: NetworkRecord, network: MVARConfig, tokenizer: str) -> None:
    """Raises InputError unless a checkpoint has this network and a tokenizer of this fingerprint; names the field."""
    saved = asdict(record.network)
    for name, current in asdict(network).items():
        require_same(name, saved[name], current, f"{AS_BEFORE}, or {NEW_RUN}" if name in ADAPTABLE else AS_BEFORE)
    remedy = f"set --model.tokenizer to the one of the checkpoint, which was {record.tokenizer.path}"
    require_same("tokenizer", record.tokenizer.fingerprint, tokenizer, remedy)


def adapt_to_devices(run: RunRecord, world_size: int, batch_of_all_ranks: int, fit_loop: dict[str, Any]) -> None:
    """Keeps the place in the epoch if the run resumes with other devices or batch sizes, and reports what changes.

    The order of the samples does not depend on the devices. Lightning counts batches, so its counts are converted.

    Args:
        run: state of the run in the checkpoint.
        world_size: number of ranks now.
        batch_of_all_ranks: images per batch now, all ranks together.
        fit_loop: state of Lightning's loop in the checkpoint, changed in place.
    """
    before, now = run.batch_of_all_ranks, batch_of_all_ranks
    if before is not None and before != now:
        current = fit_loop["epoch_loop.batch_progress"]["current"]
        repeated = current["completed"] * before % now
        for name, batches in current.items():
            current[name] = batches * before // now
        rank_zero_info(
            f"resuming with batches of {now} images over all ranks, not {before}: the order of the samples is the "
            f"same, {repeated} of them are repeated; dropped labels follow the new batch size, and so does the "
            f"learning rate unless the global batch is the same"
        )
    elif before is not None and run.world_size != world_size:
        rank_zero_info(
            f"resuming on {world_size} ranks, not {run.world_size}: batches and dropped labels are the same; drop path "
            f"draws other random numbers, sums round differently"
        )
