"""Models and adapters of other libraries, in and out."""

from transfer_jax.interop.huggingface import (
    Pretrained,
    from_pretrained,
    resize_vocabulary,
    save_pretrained,
)
from transfer_jax.interop.tokenizers import Tokenizer, Tokens, clip_tokenizer, load_tokenizer
from transfer_jax.interop.vit import resize_images

__all__ = [
    "Pretrained",
    "Tokenizer",
    "Tokens",
    "clip_tokenizer",
    "from_pretrained",
    "load_tokenizer",
    "resize_images",
    "resize_vocabulary",
    "save_pretrained",
]
