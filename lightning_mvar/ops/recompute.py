"""Intermediate results that the backward pass recomputes instead of keeping them in memory.

Autograd keeps the operands of each operation until its backward pass. Keeping an operand is a waste if a cheap function
can compute it from tensors that are kept anyway: within `recomputation`, autograd saves the function and arguments of
`cheap` instead of its result. The autograd graph is the same. With PyTorch operations, the gradients are the same bit
for bit; a Triton kernel may sum in another order than the operation whose result it recomputes.
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
    """A view of a tensor that is recomputed."""

    recipe: Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Recipes:
    """Recipes of the results of `cheap` by storage; a weak reference keeps the storage's address from being reused."""

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
    """Recomputes results of `cheap` in the backward pass of what runs within; `recipes` None keeps them instead."""
    global active
    before, active = active, recipes
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.save, restore) if recipes else nullcontext():
            yield
    finally:
        active = before


def cheap(function: Function, *arguments: Any) -> Tensor:
    """Returns function(*arguments), marked as cheaper to recompute than to keep; see `recomputation`.

    Args:
        function: deterministic; draws no random numbers and does not depend on autocast. Its result must not be changed
            in place.
        arguments: tensors and other values; tensors are kept unless they are cheap themselves.
    """
    result = function(*arguments)
    mark_cheap(result, function, *arguments)
    return result


def mark_cheap(result: Tensor, function: Function, *arguments: Any) -> None:
    """Marks the result of another operation as `cheap`, to be recomputed as function(*arguments)."""
    if not torch.compiler.is_compiling() and active is not None:  # torch.compile makes this choice by itself
        active.add(result, function, arguments)
