"""The contract of the token mixers in a block.

Every mixer is a module called as `y, state = mixer(x, shapes, state)`:

- x (b, l, d): the tokens of one or more consecutive scales; y has the same shape;
- shapes: (height, width) of each of these token maps, l tokens in total;
- state: the state returned by the previous call; None before the first scale.

One call over all scales equals one call per scale with the state passed on, so the sampler can process one scale at a
time without recomputing the prefix.

| paper                             | name there             | here                                       |
|-----------------------------------|------------------------|--------------------------------------------|
| M-VAR, arXiv 2411.10433, sec. 3.2 | intra-scale attention  | `models.attention`: ScaleAttention         |
| M-VAR, arXiv 2411.10433, sec. 3.3 | inter-scale Mamba      | `models.recurrences`: Mamba2 and others    |
| VAR, arXiv 2404.02905, sec. 3.2   | block-causal attention | `models.attention`: BlockCausalAttention   |

In a network that predicts single tokens, each token counts as a scale of shape (1, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_mvar.scales import Shape

State = tuple[Tensor, ...] | None


class Mixer(nn.Module, ABC):
    """Token mixer; see the module docstring for its contract."""

    @abstractmethod
    def forward(self, x: Tensor, shapes: tuple[Shape, ...], state: State = None) -> tuple[Tensor, State]: ...

    def reset_own_parameters(self) -> None:
        """Initializes the parameters in place that do not belong to a child layer."""
