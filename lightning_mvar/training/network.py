"""Lightning module of a network: its tokenizer and weight averages, and the checkpoints that hold them."""

from __future__ import annotations

import os.path
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_mvar.checkpoints import WhichWeights, load_tokenizer
from lightning_mvar.checkpoints.pair import check_pair
from lightning_mvar.checkpoints.power_ema import check_sigma_rel, power_decay
from lightning_mvar.checkpoints.training import (
    EMA_PREFIX,
    NETWORK_KEY,
    NETWORK_PREFIX,
    POWER_PREFIX,
    NetworkRecord,
    RunRecord,
    TokenizerRecord,
    open_part,
    read_plain_part,
    read_record,
    resolve_last,
)
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.json_files import checked
from lightning_mvar.models.config import TOKEN_FIELDS, MVARConfig, NetworkOptions
from lightning_mvar.models.mvar import MVAR, Block
from lightning_mvar.models.parameters import UNDECAYED
from lightning_mvar.tokenizer.tokenizer import Tokenizer
from lightning_mvar.training.base import ScheduledModule, update_ema, warm_up_decay
from lightning_mvar.training.blocks import ActivationCheckpointing, configure_block
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.freezing import freeze_parameters
from lightning_mvar.training.lightning_internals import attached_trainer
from lightning_mvar.training.optim import OptimizerConfig
from lightning_mvar.training.references import Reference, require_same_reference
from lightning_mvar.training.resuming import adapt_to_devices, require_same, require_same_network
from lightning_mvar.training.strategies import build_network, shard_function
from lightning_mvar.training.weights import InitialWeights, Start, check_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self


class NetworkModule(ScheduledModule):
    """Holds a network, averages of its weights and its frozen tokenizer; saves and restores them. See `LitMVAR`.

    The tokenizer is not a registered submodule, so it is neither trained nor sharded nor saved; a checkpoint records
    its path and fingerprint. Once it knows the devices, the trainer calls `configure_model`, which builds the network,
    sharded block by block with the strategy `fsdp2`.

    `load_from_checkpoint` passes subclasses the network, the tokenizer, `ema_decay`, `power_ema` and the caller's
    options by keyword; their constructors must have defaults for all other arguments.
    """

    undecayed = UNDECAYED

    def __init__(
        self,
        *,
        network: MVARConfig,
        tokenizer: str | None,
        optimizer: OptimizerConfig,
        ema_decay: float | None,
        power_ema: list[float] | None,
        compile: bool,
        activation_checkpointing: ActivationCheckpointing,
        max_skipped_steps: int,
        weights: str | None,
        weights_kind: WhichWeights,
        freeze: tuple[str, ...],
    ) -> None:
        super().__init__(optimizer, max_skipped_steps)
        require_in("[0, 1)", "model.", ema_decay=ema_decay)
        self.power_ema = power_ema or []
        for sigma_rel in self.power_ema:
            check_sigma_rel(sigma_rel, "model.power_ema")
        self.network_options, self.ema_decay = network, ema_decay
        self.given_tokenizer = None if tokenizer is None else os.path.expanduser(tokenizer)
        self.weights, self.start, self.freeze_patterns = weights, Start(weights, weights_kind), freeze
        self.compile_blocks, self.activation_checkpointing = compile, activation_checkpointing
        self.known_class_names: list[str] = []
        self.reference: Reference | None = None  # frozen network to which the objective compares the trained one
        self.network: MVAR
        self.ema: MVAR | None = None
        self.power_averages = nn.ModuleList()  # in the order of `power_ema`

    def setup(self, stage: str) -> None:
        """Checks that tokenizer and shards match the network, including the classes of its initial weights, if any.

        Raises:
            InputError: naming the first field that differs.
        """
        super().setup(stage)
        self.start.share(self.trainer.strategy)
        network, data, stored = self.network_config, self.token_data, self.start.stored
        if stored is not None:
            check_tokenizer(stored, self.hidden_tokenizer[0], self.tokenizer_path)
            if data is None and network.num_classes == stored.config.num_classes:
                self.known_class_names = stored.class_names
        if data is not None:
            data.check_network(network, self.tokenizer_fingerprint)
            data.check_classes(self.known_class_names)

    @cached_property
    def network_config(self) -> MVARConfig:
        """Configuration of the network; known once the datamodule has read its shards.

        Raises:
            InputError: if the number of classes is neither given nor known from shards.
        """
        options = self.network_options
        if not isinstance(options, NetworkOptions):
            return options
        tokenizer, base = self.hidden_tokenizer[0].config, self.start.config
        known = {"schedule": tokenizer.schedule, "vocab_size": tokenizer.vocab_size, "code_dim": tokenizer.code_dim}
        if options.num_classes is None and self.token_data is not None:
            known["num_classes"] = len(self.class_names)
        elif options.num_classes is None and base is None:
            raise InputError("set network.num_classes: without token shards it is unknown")
        return options.complete(base, **known)

    @cached_property
    def tokenizer_path(self) -> str:
        """Folder, published file or name of the tokenizer.

        Raises:
            InputError: if it is neither given nor known from the initial weights.
        """
        if (folder := self.given_tokenizer or self.start.tokenizer_folder) is not None:
            return folder
        source = "" if self.weights is None else f": {self.weights} does not name the one it was trained with"
        raise InputError(f"set model.tokenizer to the folder of the tokenizer that encoded the tokens{source}")

    @property
    def token_data(self) -> TokenDataModule | None:
        """The datamodule, if it is a TokenDataModule."""
        return self.data if isinstance(self.data, TokenDataModule) else None

    @property
    def class_names(self) -> list[str]:
        """Class names in label order, from the shards or the checkpoint, or else the labels themselves."""
        if self.token_data is not None:
            return self.token_data.class_names
        return self.known_class_names or [str(label) for label in range(self.network_config.num_classes)]

    def configure_model(self) -> None:
        """Builds the network and its averages and shards each part as soon as it is built; see `build_network`."""
        if self.reference is not None:
            self.reference.build()
        if hasattr(self, "network"):
            return
        strategy = None if (trainer := attached_trainer(self)) is None else trainer.strategy
        device = self.device if strategy is None else strategy.root_device
        shard = shard_function(strategy)
        config, stored = self.network_config, self.start.stored
        load = None if stored is None else InitialWeights(stored, config, self.class_names).load

        def finish(part: nn.Module) -> None:
            self.configure_block(part)
            shard(part)

        def average() -> MVAR:  # starts as a copy, because it has the same seed
            return build_network(config, device, self.seed, shard, load).requires_grad_(False)

        self.network = build_network(config, device, self.seed, finish, load, self.freeze_patterns)
        self.ema = None if self.ema_decay is None else average()
        self.power_averages.extend(average() for _ in self.power_ema)

    def configure_block(self, part: nn.Module) -> None:
        if isinstance(part, Block):
            configure_block(part, self.compile_blocks, self.activation_checkpointing)

    @property
    def averaged(self) -> MVAR:
        """The network to sample from: the weight average if there is one, otherwise the trained weights."""
        return self.network if self.ema is None else self.ema

    def after_step(self) -> None:
        if self.ema is not None and self.ema_decay is not None:
            update_ema(self.ema, self.network, warm_up_decay(self.ema_decay, self.global_step), self.gradients_finite)
        for average, sigma_rel in zip(self.power_averages, self.power_ema, strict=True):
            update_ema(average, self.network, power_decay(sigma_rel, self.global_step + 1), self.gradients_finite)

    @cached_property
    def hidden_tokenizer(self) -> list[Tokenizer]:
        """The tokenizer, in a list that hides it from the module registry."""
        schedule = self.network_options.schedule or (None if self.start.config is None else self.start.config.schedule)
        tokenizer = load_tokenizer(self.tokenizer_path, schedule).requires_grad_(False)
        check_pair(self.network_options, tokenizer.config, f"the tokenizer in {self.tokenizer_path}")
        return [tokenizer]

    @property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer, on the device of the network."""
        tokenizer = self.hidden_tokenizer[0]
        if tokenizer.quantizer.codebook.weight.device != self.device:
            tokenizer.to(self.device)
        return tokenizer

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        return self.hidden_tokenizer[0].fingerprint()

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, tokenizer: str | None = None, **options: Any
    ) -> Self:
        """Builds the module from a checkpoint of `fit`, sharded or not, with its weights and their averages.

        To continue a run that started from `weights`, fit this module with the same checkpoint; it needs no `weights`.

        Args:
            checkpoint_path: the checkpoint.
            map_location: device to which the module is moved.
            tokenizer: folder, published file or name of the tokenizer, if it has moved.
            options: other arguments of the constructor for further training. The checkpoint provides only the network
                and the decays of its averages.

        Raises:
            InputError: if the checkpoint is missing or not from `fit`, its tokenizer is a different one, or an older
                version wrote it without the decay of its average.
        """
        path = resolve_last(Path(checkpoint_path).expanduser())
        record = read_record(path, read_plain_part(path))
        if record.run.ema and record.run.ema_decay is None and "ema_decay" not in options:
            raise InputError(f"{path} does not record the decay of its weight average: pass ema_decay")
        options = {"ema_decay": record.run.ema_decay, "power_ema": record.run.power_ema} | options
        network = NetworkOptions(**vars(record.network))
        module = cls(network=network, tokenizer=tokenizer or record.tokenizer.path, **options)
        require_same("power_ema", record.run.power_ema, module.power_ema)
        module.known_class_names = record.class_names

        def load(prefix: str) -> MVAR:
            return open_part(path, record, prefix, tokenizer).load().network.requires_grad_(False)

        module.network = load(NETWORK_PREFIX).train()
        freeze_parameters(module.network, module.freeze_patterns)
        module.network.blocks.apply(module.configure_block)
        if module.ema_decay is not None:
            module.ema = load(EMA_PREFIX if record.run.ema else NETWORK_PREFIX)
        module.power_averages.extend(load(f"{POWER_PREFIX}{i}.") for i in range(len(module.power_ema)))
        return module.to(map_location) if map_location is not None else module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tokenizer = TokenizerRecord(absolute(self.tokenizer_path), self.tokenizer_fingerprint)
        batch = None if self.token_data is None else self.batch_of_all_ranks
        reference = None if self.reference is None else self.reference.record
        run = RunRecord(
            ema=self.ema_decay is not None,
            skipped_steps=self.skip_counts,
            world_size=self.trainer.world_size,
            batch_of_all_ranks=batch,
            ema_decay=self.ema_decay,
            reference=reference,
            power_ema=self.power_ema,
            muon=self.optimizer_config.muon,
            freeze=[*self.freeze_patterns],
        )
        checkpoint[NETWORK_KEY] = asdict(NetworkRecord(self.network_config, tokenizer, self.class_names, run))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = self.check_checkpoint(checkpoint[NETWORK_KEY])
        if self.token_data is not None:
            self.token_data.check_classes(record.class_names)
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit":
            require_same_reference(record.run.reference, None if self.reference is None else self.reference.record)
            self.skipped_steps, self.skipped_in_a_row = record.run.skipped_steps
            if self.token_data is not None:
                counts = self.trainer.world_size, self.batch_of_all_ranks
                adapt_to_devices(record.run, *counts, checkpoint["loops"]["fit_loop"])

    def check_checkpoint(self, entry: Any) -> NetworkRecord:
        """Reads the `NETWORK_KEY` entry of a checkpoint and checks it against this run.

        Raises:
            InputError: if it is damaged, or the network, tokenizer or run differs; names the first such field.
        """
        record = checked(entry, NetworkRecord, "--ckpt_path")
        self.start.continue_from(record)
        network = self.network_options if attached_trainer(self) is None else self.network_config
        if isinstance(network, NetworkOptions):  # without a trainer, fields from tokenizer and shards are unknown
            network = network.complete(
                self.start.config, **{name: getattr(record.network, name) for name in TOKEN_FIELDS}
            )
        require_same_network(record, network, self.tokenizer_fingerprint)
        require_same("keeping an average of the weights (ema_decay)", record.run.ema, self.ema_decay is not None)
        require_same("power_ema", record.run.power_ema, self.power_ema)
        require_same("--model.optimizer.muon", record.run.muon, self.optimizer_config.muon)
        if record.run.freeze is not None:
            require_same("freeze", record.run.freeze, [*self.freeze_patterns])
        return record


def absolute(place: str) -> str:
    """Returns the absolute path of a tokenizer; a name on the Hub stays as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else place
