"""Models and adapters of other libraries, in and out."""

from transfer_jax.interop.huggingface import (
    Pretrained,
    from_pretrained,
    resize_vocabulary,
    save_pretrained,
)
from transfer_jax.interop.vit import resize_images

__all__ = ["Pretrained", "from_pretrained", "resize_images", "resize_vocabulary", "save_pretrained"]
