"""Weights as they are published: every dialect is told by what is in the file, and what does not fit is refused."""

from .dialects import Checkpoint, open_adapter, open_checkpoint
from .load import load_text_encoder, load_transformer, load_vae
from .lora import merge_lora
from .token_codecs import load_token_codec
from .tokens import load_token_transformer

__all__ = [
    "Checkpoint",
    "load_text_encoder",
    "load_token_codec",
    "load_token_transformer",
    "load_transformer",
    "load_vae",
    "merge_lora",
    "open_adapter",
    "open_checkpoint",
]
