"""The contract of the token mixers that a block is built from.

Every mixer is a module called as `y, state = mixer(x, shapes, state)`:

- x (b, l, d): the tokens of one or more consecutive scales, y (b, l, d) likewise;
- shapes: (height, width) of each of those scales' token maps, which have l tokens together;
- state: what the mixer carries from earlier scales, as it returned it; None before the first scale.

One call over all scales equals a call for each scale with the state handed on, which is what lets the sampler take one
scale at a time without running a prefix again.

| paper                             | name there             | here                                       |
|-----------------------------------|------------------------|--------------------------------------------|
| M-VAR, arXiv 2411.10433, sec. 3.2 | intra-scale attention  | `models.attention`: ScaleAttention         |
| M-VAR, arXiv 2411.10433, sec. 3.3 | inter-scale Mamba      | `models.recurrences`: Mamba2 and others    |
| VAR, arXiv 2404.02905, sec. 3.2   | block-causal attention | `models.attention`: BlockCausalAttention   |

Where a network predicts token by token, every token counts as a scale of its own here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_mvar.scales import Shape

State = tuple[Tensor, ...] | None


class Mixer(nn.Module, ABC):
    """A token mixer; the module's docstring has the contract."""

    @abstractmethod
    def forward(self, x: Tensor, shapes: tuple[Shape, ...], state: State = None) -> tuple[Tensor, State]: ...

    def reset_own_parameters(self) -> None:
        """Initialises in place the parameters that are not weight or bias of a layer inside."""
