"""The multi-scale residual VQ-VAE that turns images into tokens and back."""

from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig

__all__ = ["Tokenizer", "TokenizerConfig"]
