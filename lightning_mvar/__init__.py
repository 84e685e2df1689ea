"""Scale-by-scale image generation: attention inside a scale, a Mamba-2 state across scales, trained with Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_mvar.version import __version__

if TYPE_CHECKING:
    from lightning_mvar.models import MVAR, MVARConfig
    from lightning_mvar.sampling.generate import generate
    from lightning_mvar.scales import ScaleSchedule
    from lightning_mvar.tokenizer import Tokenizer, TokenizerConfig

__all__ = ["MVAR", "MVARConfig", "ScaleSchedule", "Tokenizer", "TokenizerConfig", "__version__", "generate"]

MODULES = {  # imported when a name is first used: torch takes seconds, in which the command line must handle Ctrl-C
    "MVAR": "models",
    "MVARConfig": "models",
    "ScaleSchedule": "scales",
    "Tokenizer": "tokenizer",
    "TokenizerConfig": "tokenizer",
    "generate": "sampling.generate",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
