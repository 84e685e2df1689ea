"""The networks: token mixers and the scale-by-scale model built from them."""

from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR, BlockState, MVARState

__all__ = ["MVAR", "BlockState", "MVARConfig", "MVARState"]
