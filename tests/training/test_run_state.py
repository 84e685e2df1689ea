"""Odd values in a checkpoint are told before anything is restored."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_token_shards
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, Timer
from lit_modules import make_module, make_trainer

from lightning_mvar import Tokenizer
from lightning_mvar.callbacks import Checkpoint
from lightning_mvar.checkpoints.training import read_plain_part
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import Ignored
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.run_state import check_run_state, check_tensors

MISSING = object()
VALUES = (None, "x", -1, 1.5, float("nan"), 2**70, True, [], [1], {}, {"a": 1}, torch.zeros(2, 3), b"x", MISSING)
ROOTS = ("epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks", "optimizer_states", "lr_schedulers")
Keys = tuple[Any, ...]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, tokenizer_folder: Path
) -> tuple[dict[str, Any], LitMVAR, Path]:
    """The content of a checkpoint after two steps, the module that wrote it, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    write_token_shards(folder / "shards", tokenizer.fingerprint(), [8])
    data = TokenDataModule(str(folder / "shards"), str(folder / "shards"), batch_size=4)
    module = make_module(tokenizer_folder)
    callbacks = [Checkpoint(str(folder), every_n_train_steps=2)]
    make_trainer(folder, 2, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0).fit(module, data)
    return read_plain_part(folder / "last.ckpt"), module, folder


def paths(value: Any, path: Keys = ()) -> Iterator[Keys]:
    """Yields the paths of all entries, but only the first one of each list, and of the optimizer's parameters."""
    if path:
        yield path
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in [*keys][: 1 if isinstance(value, list) or path[2:] == ("state",) else None]:
        yield from paths(value[key], (*path, key))


def at(content: Any, path: Keys) -> Any:
    for key in path:
        content = content[key]
    return content


def changed(content: Any, path: Keys, value: Any) -> Any:
    """Returns a copy of nested dictionaries and lists with another value at a path."""
    result, key = copy.copy(content), path[0]
    if len(path) > 1:
        result[key] = changed(content[key], path[1:], value)
    elif value is MISSING:
        del result[key]
    else:
        result[key] = value
    return result


def fits(original: Any, value: Any, path: Keys) -> bool:
    """Whether a value may replace the original: it has its type, or is of an entry that this run does not restore."""
    if path[-1] == "fused" or (path[0] == "loops" and path[1:2] not in ((), ("fit_loop",))):
        return True
    if value is MISSING:  # a callback is new in this run, a parameter has no moments yet, or torch had fewer flags
        flag = "param_groups" in path and isinstance(original, bool | None) and path[-1] != "decays"
        return flag or (path[0], len(path)) in (("callbacks", 2), ("optimizer_states", 4))
    if isinstance(original, dict | list):
        return type(value) is type(original) and (not original or path == ("callbacks",) or path[-1] == "state")
    is_number = not isinstance(value, bool) and isinstance(value, int | float)
    unknown = original is None and "callbacks" in path  # a score that is not known yet
    return type(value) is type(original) or (is_number and (unknown or isinstance(original, float)))


@pytest.mark.parametrize("root", ROOTS)
def test_a_value_of_another_type_is_told(trained: tuple[dict[str, Any], LitMVAR, Path], root: str) -> None:
    """As `fit` checks it: against a trainer that has not begun, then against the optimizer."""
    content, module, folder = trained
    callbacks = [Checkpoint(str(folder), every_n_train_steps=2)]
    trainer = make_trainer(folder, 2, callbacks=callbacks, enable_checkpointing=True)
    optimizer, accepted = module.configure_optimizers(), []

    def message(content: dict[str, Any]) -> str:
        try:
            check_run_state(content, trainer, "fit_loop", False, "it")
            if root == "optimizer_states":
                check_tensors(content, module, [optimizer], "it")
        except InputError as error:
            return str(error)
        return ""

    assert not message(content)
    for path in paths({root: content[root]}):
        for value in VALUES:
            if told := message(changed(content, path, value)):
                assert re.fullmatch("it is damaged: .*", told)
            else:
                accepted.append((path, value))
    assert not [(path, value) for path, value in accepted if not fits(at(content, path), value, path)]


def test_weights_and_moments_must_fit_and_be_finite(trained: tuple[dict[str, Any], LitMVAR, Path]) -> None:
    content, module, _ = trained
    optimizer, weights = module.configure_optimizers(), content["state_dict"]
    name = "network.head.weight"
    nan = weights[name].clone().fill_(float("nan"))
    cases = [
        ("state_dict", value, "it is damaged: state_dict must hold tensors by name")
        for value in (None, [], "x", weights | {name: "x"}, weights | {name: None})
    ]
    cases += [
        ("state_dict", {}, "it does not fit this run: missing"),
        ("state_dict", weights | {"other": nan}, "it does not fit this run: unexpected other"),
        ("state_dict", weights | {name: nan[:1]}, f"it does not fit this run: {name} is"),
        ("state_dict", weights | {name: nan.long()}, f"it has {name} as torch.int64, expected torch.float32"),
        ("state_dict", weights | {name: nan}, f"it holds NaN or infinite values in {name}"),
    ]
    (saved,) = content["optimizer_states"]
    for key, value in (("exp_avg", torch.zeros(3)), ("exp_avg", saved["state"][0]["exp_avg"] * torch.inf)):
        state = saved["state"] | {0: saved["state"][0] | {key: value}}
        cases.append(("optimizer_states", [saved | {"state": state}], "it is damaged: optimizer_states.0..state.0"))
    cases.append(("optimizer_states", [], "it is damaged: optimizer_states has 0 entries, not 1"))
    for entry, value, message in cases:
        with pytest.raises(InputError, match=message):
            check_tensors(content | {entry: value}, module, [optimizer], "it")


def test_objects_beside_the_weights_are_told(trained: tuple[dict[str, Any], LitMVAR, Path]) -> None:
    """Weights alone can be read from such a file, but Lightning would refuse it."""
    content, _, folder = trained
    with pytest.raises(InputError, match="it holds objects other than plain data and tensors"):
        check_run_state(content | {"best": [{"score": Ignored()}]}, make_trainer(folder, 2), "fit_loop", False, "it")


def test_a_run_with_callbacks_of_lightning_resumes(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their states before `setup` are not those that they save: a folder, a score, an average of the weights."""
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [8])
    monkeypatch.chdir(tmp_path)
    for epochs in (2, 3):
        data = TokenDataModule("shards", "shards", batch_size=4)
        callbacks: list[Callback] = [
            ModelCheckpoint(),
            StochasticWeightAveraging(0.01, swa_epoch_start=1),
            EarlyStopping("val/loss", patience=9),
            Timer("00:01:00:00"),
        ]
        trainer = make_trainer(tmp_path, -1, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        path = next(tmp_path.rglob("*.ckpt"), None)
        if path is not None:
            content = read_plain_part(path)
            check_run_state(content, trainer, "fit_loop", False, "it")
            name = ModelCheckpoint().state_key
            with pytest.raises(InputError, match=r"it is damaged: callbacks\.ModelCheckpoint is 'x'"):
                check_run_state(changed(content, ("callbacks", name), "x"), trainer, "fit_loop", False, "it")
        trainer.fit(make_module(tokenizer_folder), data, ckpt_path=path)
    assert path is not None
    assert trainer.global_step == 6
