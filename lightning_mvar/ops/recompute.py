"""Intermediate results that the backward pass computes again instead of keeping them in memory.

Autograd keeps the operands of each operation until its backward pass. Operands that a cheap function makes from others,
which are kept anyway, waste memory: within `recomputation`, results of `cheap` are replaced by their function and its
arguments. The autograd graph is the same. With PyTorch operations, so is each
bit of the gradients; a Triton kernel may sum in another order than the one whose result it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Function = Callable[..., Tensor]


class Recipe(NamedTuple):
    """A tensor as a function of others; tensors among the arguments are saved like operands."""

    function: Function
    arguments: tuple[Any, ...]

    def compute(self) -> Tensor:
        with torch.no_grad():
            return self.function(*(restore(argument) for argument in self.arguments))


class View(NamedTuple):
    """A view of a tensor that is computed again."""

    recipe: Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Recipes:
    """Recipes of the results of `cheap`, by their storage; the reference keeps its address from being used again."""

    def __init__(self) -> None:
        self.by_storage: dict[int, tuple[StorageWeakRef, Recipe]] = {}

    def add(self, result: Tensor, function: Function, arguments: tuple[Any, ...]) -> None:
        storage = result.untyped_storage()
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if all(storage._cdata != tensor.untyped_storage()._cdata for tensor in tensors):  # else nothing is saved
            recipe = Recipe(function, tuple(self.save(argument) for argument in arguments))
            self.by_storage[storage._cdata] = (StorageWeakRef(storage), recipe)

    def save(self, operand: Any) -> Any:
        if not isinstance(operand, Tensor):
            return operand
        found = self.by_storage.get(operand.untyped_storage()._cdata)
        if found is None:
            return operand.detach()  # the operand itself would refer to the graph that refers to it
        return View(found[1], tuple(operand.shape), operand.stride(), int(operand.storage_offset()))


def restore(saved: Any) -> Any:
    if not isinstance(saved, View):
        return saved
    return saved.recipe.compute().as_strided(saved.size, saved.stride, saved.offset)


active: Recipes | None = None


@contextmanager
def recomputation(recipes: Recipes | None) -> Iterator[None]:
    """Within, operands of the backward pass that `cheap` makes are computed again; None keeps them, as outside."""
    global active
    before, active = active, recipes
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.save, restore) if recipes else nullcontext():
            yield
    finally:
        active = before


def cheap(function: Function, *arguments: Any) -> Tensor:
    """Returns function(*arguments), and marks it as cheaper to compute again than to keep; see `recomputation`.

    Args:
        function: deterministic; draws no random numbers and does not depend on autocast. Its result must not be changed
            in place.
        arguments: tensors and other values; tensors are kept unless they are cheap themselves.
    """
    result = function(*arguments)
    mark_cheap(result, function, *arguments)
    return result


def mark_cheap(result: Tensor, function: Function, *arguments: Any) -> None:
    """Marks the result of another operation as `cheap`, because function(*arguments) computes it too, bit for bit."""
    if not torch.compiler.is_compiling() and active is not None:  # compilers make this choice by themselves
        active.add(result, function, arguments)
