"""Models and adapters of other libraries, in and out."""

from transfer_jax.interop.huggingface import (
    Pretrained,
    from_pretrained,
    resize_vocabulary,
    save_pretrained,
)
from transfer_jax.interop.peft import Adapter, load_peft, save_peft
from transfer_jax.interop.tokenizers import (
    Tokenizer,
    Tokens,
    clip_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from transfer_jax.interop.vit import resize_images

__all__ = [
    "Adapter",
    "Pretrained",
    "Tokenizer",
    "Tokens",
    "clip_tokenizer",
    "from_pretrained",
    "load_peft",
    "load_tokenizer",
    "resize_images",
    "resize_vocabulary",
    "save_peft",
    "save_pretrained",
    "train_tokenizer",
]
