"""Scale-by-scale image generation: attention inside a scale, a Mamba-2 state across scales, trained with Lightning."""

from lightning_mvar.models import MVAR, MVARConfig
from lightning_mvar.sampling.generate import generate
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer import Tokenizer, TokenizerConfig
from lightning_mvar.version import __version__

__all__ = ["MVAR", "MVARConfig", "ScaleSchedule", "Tokenizer", "TokenizerConfig", "__version__", "generate"]
