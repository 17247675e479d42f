"""T5 in the layout of Hugging Face, with the output layer tied (1.0) or not (1.1)."""

from typing import Any

import jax
import jax.numpy as jnp

from transfer_jax.interop.family import Family, activation, activation_name, unsupported
from transfer_jax.interop.layouts import SAME, Tensor, attention, dense, embedding, norm
from transfer_jax.models.t5 import T5, t5_config
from transfer_jax.nn.transformer import TransformerConfig


def _build(config: dict[str, Any], head: str | None, options: dict[str, Any]) -> T5:
    unsupported(config, is_encoder_decoder=True)
    *gate, name = config.get("feed_forward_proj", "relu").split("-")
    if gate == ["gated"] and name == "gelu":
        name = "gelu_new"  # what the released models were trained with
    rate = config["dropout_rate"]
    # Newer files always say that they are tied; the scale then tells version 1.0 from 1.1.
    tied = config.get("tie_word_embeddings", True) and config.get("scale_decoder_outputs", True)
    fields = {
        "features": config["d_model"], "num_layers": config["num_layers"],
        "num_heads": config["num_heads"], "head_dim": config["d_kv"], "hidden": config["d_ff"],
        "activation": activation(name), "gated": gate == ["gated"],
        "norm_eps": config["layer_norm_epsilon"],
        "relative_buckets": config["relative_attention_num_buckets"],
        "relative_distance": config.get("relative_attention_max_distance", 128),
        "dropout": rate, "attention_dropout": rate, "activation_dropout": rate,
    }  # fmt: skip
    return T5(t5_config(
        vocab_size=config["vocab_size"], decoder_layers=config.get("num_decoder_layers"),
        tie_embeddings=tied, head=head, **{**fields, **options},
    ))  # fmt: skip


def _config(module: T5) -> dict[str, Any]:
    if not isinstance(module, T5):
        raise TypeError(f"{type(module).__name__} is no T5")
    c, e = module.config, module.config.encoder
    if e.gated and e.activation == "gelu":
        raise ValueError("the layout has no exact gated GELU; activation='gelu_tanh' has one.")
    name = "gelu" if e.gated and e.activation == "gelu_tanh" else activation_name(e.activation)
    return {
        "model_type": "t5",
        "vocab_size": c.vocab_size,
        "d_model": e.features,
        "d_kv": e.head_dim or e.features // e.num_heads,
        "d_ff": e.hidden or 4 * e.features,
        "num_layers": e.num_layers,
        "num_decoder_layers": c.decoder.num_layers,
        "num_heads": e.num_heads,
        "relative_attention_num_buckets": e.relative_buckets,
        "relative_attention_max_distance": e.relative_distance,
        "dropout_rate": e.dropout,
        "layer_norm_epsilon": e.norm_eps,
        "feed_forward_proj": f"gated-{name}" if e.gated else name,
        "is_encoder_decoder": True,
        "tie_word_embeddings": c.tie_embeddings,
        "scale_decoder_outputs": c.tie_embeddings,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def _stack(name: str, config: TransformerConfig) -> list[Tensor]:
    bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors = [Tensor(bias, (f"{name}/relative_bias/embedding",), SAME)]
    parts = {"attention": "SelfAttention"}
    if config.cross_attention:
        parts["cross_attention"] = "EncDecAttention"
    for i in range(config.num_layers):
        theirs, ours = f"{name}.block.{i}.layer", f"{name}/layers_{i}"
        for j, (path, part) in enumerate(parts.items()):
            names = {"query": "q", "key": "k", "value": "v", "out": "o"}
            names = {p: f"{theirs}.{j}.{part}.{n}" for p, n in names.items()}
            tensors += [
                *attention(names, f"{ours}/{path}", config.num_heads, bias=False),
                *norm(f"{theirs}.{j}.layer_norm", f"{ours}/{path}_norm", bias=False),
            ]
        last = f"{theirs}.{len(parts)}"
        mlp = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
        for theirs, path in {**mlp, "wo": "down"}.items():
            tensors += dense(f"{last}.DenseReluDense.{theirs}", f"{ours}/mlp/{path}", bias=False)
        tensors += norm(f"{last}.layer_norm", f"{ours}/mlp_norm", bias=False)
    return tensors + norm(f"{name}.final_layer_norm", f"{name}/norm", bias=False)


def _tensors(module: T5) -> list[Tensor]:
    c = module.config
    tensors = [
        *embedding("shared", "tokens"), *_stack("encoder", c.encoder), *_stack("decoder", c.decoder)
    ]  # fmt: skip
    if c.head == "lm" and not c.tie_embeddings:
        tensors += embedding("lm_head", "lm_head")
    return tensors


def _inputs(module: T5) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return (tokens, tokens), {}


T5_FAMILY = Family(
    name="t5",
    architectures={"T5ForConditionalGeneration": "lm", "T5Model": None},
    base="",
    build=_build,
    config=_config,
    tensors=_tensors,
    inputs=_inputs,
    # Copies of tied weights, and a bias that old files have and nobody uses.
    ignored=(
        r"^(encoder|decoder)\.embed_tokens\.weight$", r"^lm_head\.weight$",
        r"EncDecAttention\.relative_attention_bias\.weight$",
    ),
    vocabulary=("tokens/embedding", "lm_head/embedding"),
)  # fmt: skip
