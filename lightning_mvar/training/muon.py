"""Muon for the matrices and convolutions of the blocks, AdamW for all other parameters, as one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the momentum U S V' of a matrix by approximately U V'. Scaled
as in arXiv 2502.16982, section 2.2, its updates are as large as AdamW's, so both share learning rate and weight decay.

The update rule is that of `torch.optim.Muon`, which can neither skip a step without a synchronization nor share a state
dictionary with AdamW, and which multiplies sharded matrices in parts, whose sums round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration
ITERATIONS = 5


class MuonAdamW(torch.optim.Optimizer):
    """Updates one group of parameters with Muon and Nesterov momentum, the others with AdamW.

    A step whose `found_inf`, () on the device, is not 0 changes neither parameters nor state, see `skip_step_unless`.

    A sharded matrix is gathered for its update; each rank computes the full update and takes its own shard. So all
    strategies take the same steps, up to rounding differences in their gradients, which bfloat16 magnifies. Momentum
    stays sharded.

    Args:
        others: parameter groups trained by AdamW.
        matrices: group of the matrices and convolution kernels trained by Muon.
        lr: learning rate of both.
        betas: decay rates of AdamW's moments.
        momentum: decay rate of Muon's momentum.
        fused: whether AdamW is fused.
    """

    def __init__(
        self,
        others: list[dict[str, Any]],
        matrices: dict[str, Any],
        lr: float,
        betas: tuple[float, float],
        momentum: float,
        fused: bool,
    ) -> None:
        self.adamw = torch.optim.AdamW(others or [{"params": []}], lr=lr, betas=betas, fused=fused)
        groups = self.adamw.param_groups if others else []
        super().__init__([*groups, matrices | {"momentum": momentum}], self.adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Looked up in each step: loading a state replaces all groups, and a discriminator's may follow the matrices.
        (matrices,) = (group for group in self.param_groups if "momentum" in group)
        others = [group for group in self.param_groups if group is not matrices]
        self.adamw.param_groups, self.adamw.state = others, self.state
        skip = self.adamw.found_inf = getattr(self, "found_inf", None)  # type: ignore[attr-defined]
        self.adamw.step()
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                self.update(parameter, matrices, None if skip is None else skip.bool())
        return loss

    def update(self, parameter: Tensor, group: dict[str, Any], skip: Tensor | None) -> None:
        """Takes Muon's step for a matrix, unless `skip`, () bool on the device, is true."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer, lr, decay = state["momentum_buffer"], group["lr"], group["weight_decay"]
        momentum = buffer.lerp(gradient, 1 - group["momentum"])
        direction = orthogonalize(gradient.lerp(momentum, group["momentum"]))
        rows = len(parameter)
        scale = 0.2 * math.sqrt(max(rows, parameter.numel() // rows))  # an update of root mean square 0.2
        updated = parameter.mul(1 - lr * decay).add_(direction, alpha=-lr * scale)
        for old, new in ((buffer, momentum), (parameter, updated)):
            old.copy_(new if skip is None else torch.where(skip, old, new))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Moves all singular values of a matrix (n, m) close to 1, between about 0.7 and 1.2, by Newton-Schulz iterations.

    The kernel (n, in, h, w) of a convolution counts as a matrix (n, in * h * w). Computes and returns float32 on a CPU,
    otherwise bfloat16; a sharded matrix is gathered first, and the result is sharded alike.
    """
    if isinstance(matrix, DTensor):
        mesh, whole = matrix.device_mesh, orthogonalize(matrix.full_tensor())
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(placements=matrix.placements)
    a, b, c = COEFFICIENTS
    # Most CPUs emulate bfloat16, which takes many times as long as float32.
    x = matrix.flatten(1).to(torch.float32 if matrix.is_cpu else torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).reshape(matrix.shape)
