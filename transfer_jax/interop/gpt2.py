"""GPT-2 in the layout of Hugging Face."""

from typing import Any

import numpy as np

from transfer_jax.interop.family import Family, activation, activation_name, unsupported
from transfer_jax.interop.layouts import SAME, Layout, Tensor, embedding, norm
from transfer_jax.models.gpt2 import GPT2, GPT2Config, gpt2_stack


def _build(config: dict[str, Any], head: str | None, options: dict[str, Any]) -> GPT2:
    unsupported(
        config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False, tie_word_embeddings=True,
    )  # fmt: skip
    stack = gpt2_stack(**{
        "features": config["n_embd"], "num_layers": config["n_layer"],
        "num_heads": config["n_head"], "hidden": config.get("n_inner"),
        "activation": activation(config.get("activation_function", "gelu_new")),
        "norm_eps": config["layer_norm_epsilon"], "dropout": config["resid_pdrop"],
        "attention_dropout": config["attn_pdrop"], "init_scale": config["initializer_range"],
        **options,
    })  # fmt: skip
    return GPT2(GPT2Config(
        vocab_size=config["vocab_size"], stack=stack, max_positions=config["n_positions"],
        embedding_dropout=config["embd_pdrop"], head=head,
    ))  # fmt: skip


def _config(module: GPT2) -> dict[str, Any]:
    c, s = module.config, module.config.stack
    return {
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.max_positions,
        "n_embd": s.features,
        "n_layer": s.num_layers,
        "n_head": s.num_heads,
        "n_inner": s.hidden,
        "activation_function": activation_name(s.activation),
        "layer_norm_epsilon": s.norm_eps,
        "resid_pdrop": s.dropout,
        "embd_pdrop": c.embedding_dropout,
        "attn_pdrop": s.attention_dropout,
        "initializer_range": s.init_scale,
        "tie_word_embeddings": True,
    }


def _fused(heads: int) -> Layout:
    """Query, key and value in one: [H, 3 heads * D] <-> three [H, heads, D]; biases alike."""
    return Layout(
        lambda x: tuple(y.reshape(*x.shape[:-1], heads, -1) for y in np.split(x, 3, axis=-1)),
        lambda *y: np.concatenate([z.reshape(*z.shape[:-2], -1) for z in y], axis=-1),
    )


def _out(heads: int) -> Layout:
    """[heads * D, H] <-> [heads, D, H]."""
    return Layout(
        lambda x: (x.reshape(heads, -1, x.shape[-1]),), lambda x: x.reshape(-1, x.shape[-1])
    )


def _dense(theirs: str, ours: str) -> list[Tensor]:
    """A linear layer that is stored as [in, out], as ours."""
    return [
        Tensor(f"{theirs}.weight", (f"{ours}/kernel",), SAME),
        Tensor(f"{theirs}.bias", (f"{ours}/bias",), SAME),
    ]


def _tensors(module: GPT2) -> list[Tensor]:
    s = module.config.stack
    tensors = [
        *embedding("transformer.wte", "tokens"),
        *embedding("transformer.wpe", "positions"),
    ]
    for i in range(s.num_layers):
        theirs, ours = f"transformer.h.{i}", f"stack/layers_{i}"
        inputs = [f"{ours}/attention/{part}" for part in ("query", "key", "value")]
        fused, attention = _fused(s.num_heads), f"{theirs}.attn"
        out = f"{ours}/attention/out"
        tensors += [
            *norm(f"{theirs}.ln_1", f"{ours}/attention_norm"),
            Tensor(f"{attention}.c_attn.weight", tuple(f"{x}/kernel" for x in inputs), fused),
            Tensor(f"{attention}.c_attn.bias", tuple(f"{x}/bias" for x in inputs), fused),
            Tensor(f"{attention}.c_proj.weight", (f"{out}/kernel",), _out(s.num_heads)),
            Tensor(f"{attention}.c_proj.bias", (f"{out}/bias",), SAME),
            *norm(f"{theirs}.ln_2", f"{ours}/mlp_norm"),
            *_dense(f"{theirs}.mlp.c_fc", f"{ours}/mlp/up"),
            *_dense(f"{theirs}.mlp.c_proj", f"{ours}/mlp/down"),
        ]
    return tensors + norm("transformer.ln_f", "stack/norm")


# Not called GPT2, which is the module.
GPT2_FAMILY = Family(
    name="gpt2",
    architectures={"GPT2Model": None, "GPT2LMHeadModel": "lm"},
    base="transformer.",
    build=_build,
    config=_config,
    tensors=_tensors,
    # Causal masks of older files, and a copy of the embeddings.
    ignored=(r"\.attn\.(masked_)?bias$", r"^lm_head\.weight$"),
    vocabulary=("tokens/embedding",),
)
