"""Models and adapters of other libraries, in and out."""

from transfer_jax.interop.huggingface import (
    Pretrained,
    from_pretrained,
    resize_vocabulary,
    save_pretrained,
)

__all__ = ["Pretrained", "from_pretrained", "resize_vocabulary", "save_pretrained"]
