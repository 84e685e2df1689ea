"""All uses of Lightning's private members, with the reason for each.

Lightning may change them without notice: before an upgrade, compare its source with this file. No other file of the
package uses a Lightning name that starts with an underscore.
"""

from __future__ import annotations

from abc import abstractmethod
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any

import lightning as L
from lightning.fabric.strategies.launchers import _SubprocessScriptLauncher as FabricLauncher
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as TrainerLauncher
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.optim import Optimizer

from lightning_mvar.checkpoints.sealed import save_sharded
from lightning_mvar.checkpoints.training import Checksums
from lightning_mvar.errors import InputError


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Returns a module's trainer, or None if it has none yet, where the public property would raise."""
    return module._trainer


def training_loader(trainer: L.Trainer) -> Any:
    """Returns the loaders given to `fit`, or None; the public property is set too late for LearningRateFinder."""
    source = trainer.fit_loop._data_source.instance
    return None if isinstance(source, L.LightningModule) else source


def loggers_see_this_step(trainer: L.Trainer) -> bool:
    """Returns whether loggers record the current step, so that other steps copy no values from the device."""
    return bool(trainer._logger_connector.should_update_logs)


def logged_step(trainer: L.Trainer) -> int:
    """Returns the step under which loggers record values now: in a validation, the last step before it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def correct_logged_step(trainer: L.Trainer, step: int) -> None:
    """Sets the step number of the loggers, which Lightning sets one too high if it resumes right after a validation."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def silence_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Removes Lightning's broadcast of a SIGTERM flag before every batch, which makes the host wait for the device."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def has_process_group(strategy: Any) -> bool:
    """Returns whether a strategy uses a process group, as strategies for several devices do."""
    return hasattr(strategy, "_timeout")


def collective_timeout(trainer: L.Trainer) -> timedelta | None:
    """Returns the timeout of the strategy's collectives, to be used for other groups as well."""
    return getattr(trainer.strategy, "_timeout", None)


def setup_with_timeout(strategy: Any, timeout: timedelta) -> None:
    """Creates the process group with a separate timeout for ranks that never start; collectives keep their timeout.

    The first collective is included: a rank of an old run can join the store of another run with the same MASTER_PORT.
    The group is then complete, but its first collective never ends.
    """
    run_timeout, strategy._timeout = strategy._timeout, timeout
    try:
        strategy.setup_environment()
        strategy.barrier("start")
    finally:
        strategy._timeout = run_timeout
    _get_default_store().set_timeout(run_timeout)
    mesh = getattr(strategy, "_device_mesh", None)
    for group in [None, *([] if mesh is None else mesh.get_all_groups())]:
        _set_pg_timeout(run_timeout, group)


def started_processes(strategy: Any) -> list[Popen[bytes]]:
    """Returns the processes that a strategy of Fabric or a trainer has started here; they must not outlive an error."""
    launcher = strategy.launcher
    return launcher.procs if isinstance(launcher, FabricLauncher | TrainerLauncher) else []


def dump_checkpoint(trainer: L.Trainer, weights_only: bool) -> dict[str, Any]:
    """Returns the content of a checkpoint, which `trainer.save_checkpoint` would also write and synchronize."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


def restore_choice_of_rank_zero(trainer: L.Trainer) -> None:
    """Makes all ranks restore the checkpoint that rank 0 has chosen.

    In Lightning, each rank looks for the path itself, and ranks on a network file system may see different files.
    """
    connector = trainer._checkpoint_connector
    resume = connector.resume_start

    def resume_start(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        resume(trainer.strategy.broadcast(checkpoint_path), weights_only)

    connector.resume_start = resume_start  # type: ignore[method-assign]


class CheckpointHooks(ModelCheckpoint):
    """ModelCheckpoint with overridable file operations, for which Lightning has no public hooks."""

    @abstractmethod
    def write(self, trainer: L.Trainer, path: Path) -> None:
        """Writes a checkpoint; called on all ranks."""

    @abstractmethod
    def delete(self, trainer: L.Trainer, path: Path) -> None:
        """Removes a checkpoint; called on all ranks."""

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.write(trainer, Path(filepath))

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.delete(trainer, Path(filepath))

    def mark_saved(self, trainer: L.Trainer, path: Path | None = None) -> None:
        """Marks the current step as saved, at `path` if given."""
        self._last_global_step_saved = trainer.global_step
        if path is not None:
            self._last_checkpoint_saved = str(path)

    @property
    def last_saved(self) -> str:
        return self._last_checkpoint_saved

    def skips_saving(self, trainer: L.Trainer) -> bool:
        """Returns whether to save nothing now: the step is already saved, or this is a sanity check or fast_dev_run."""
        return self._should_skip_saving_checkpoint(trainer)


class DataParallelStrategy(ModelParallelStrategy):
    """ModelParallelStrategy with data parallelism only; its default is one replica per node with tensor parallelism.

    The device mesh has the dimensions (replicate, shard): consecutive ranks shard the weights of one replica.
    """

    replicas: int = 1

    def setup_environment(self) -> None:
        """Creates the process group and the mesh; raises InputError if the replicas do not divide the ranks."""
        ranks = self.num_nodes * self.num_processes
        if ranks % self.replicas:
            raise InputError(f"data_parallel_replicate {self.replicas} must divide the number of ranks, {ranks}")
        super(ModelParallelStrategy, self).setup_environment()  # without the mesh of ModelParallelStrategy
        self._setup_distributed()
        shape = (self.replicas, ranks // self.replicas)
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        assert self.lightning_module is not None
        self._device_mesh = self.lightning_module._device_mesh = mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Gives every rank different data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the weights. Shards stay on their device, because writers copy them to the host anyway."""
        if not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state of the optimizer; shards stay on their device, like those of the weights."""
        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(self.model, plain)

    def write_checkpoint(self, checkpoint: dict[str, Any], path: Path, group: ProcessGroup | None = None) -> Checksums:
        """Writes a checkpoint; all ranks must call this with the same path.

        Unlike `save_checkpoint`, it uses no collectives except those of `group`, so it can run in a thread. It hashes
        shards while writing them and returns the checksums of this rank's shards; none for a single file.
        """
        if self._save_distributed_checkpoint:
            return save_sharded(checkpoint, path, self.is_global_zero, group)
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, path)
        return {}
