"""BART and mBART in the layout of Hugging Face."""

from typing import Any

import jax
import jax.numpy as jnp

from transfer_jax.interop.family import Family, activation, activation_name, unsupported
from transfer_jax.interop.layouts import Layout, Tensor, attention, dense, embedding, norm
from transfer_jax.models.bart import Bart, BartConfig, bart_stack
from transfer_jax.nn.transformer import TransformerConfig

_ROW = Layout(lambda x: (x[0],), lambda x: x[None])  # [1, V] <-> [V]


def _build(config: dict[str, Any], head: str | None, options: dict[str, Any]) -> Bart:
    mbart = config["model_type"] == "mbart"
    unsupported(
        config, is_encoder_decoder=True, tie_word_embeddings=True, normalize_embedding=True,
        normalize_before=mbart, add_final_layer_norm=mbart, static_position_embeddings=False,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    )  # fmt: skip

    def stack(side: str, **fields: Any) -> TransformerConfig:
        given = {
            "features": config["d_model"], "num_layers": config[f"{side}_layers"],
            "num_heads": config[f"{side}_attention_heads"], "hidden": config[f"{side}_ffn_dim"],
            "activation": activation(config["activation_function"]),
            "norm_first": mbart, "final_norm": mbart, "dropout": config["dropout"],
            "attention_dropout": config["attention_dropout"],
            "activation_dropout": config["activation_dropout"], "init_scale": config["init_std"],
        }  # fmt: skip
        return bart_stack(**{**given, **fields, **options})

    return Bart(BartConfig(
        vocab_size=config["vocab_size"], encoder=stack("encoder"),
        decoder=stack("decoder", causal=True, cross_attention=True),
        max_positions=config["max_position_embeddings"] + 2, position_offset=2,
        scale_embeddings=config.get("scale_embedding", False), head=head,
    ))  # fmt: skip


def _config(module: Bart) -> dict[str, Any]:
    if not isinstance(module, Bart):
        raise TypeError(f"{type(module).__name__} is no BART")
    c, e = module.config, module.config.encoder
    if c.position_offset != 2:
        raise ValueError(f"position_offset={c.position_offset}; the layout has 2 only.")
    sides = {"encoder": e, "decoder": c.decoder}
    return {
        "model_type": "mbart" if e.norm_first else "bart",
        "vocab_size": c.vocab_size,
        "d_model": e.features,
        **{f"{side}_layers": s.num_layers for side, s in sides.items()},
        **{f"{side}_attention_heads": s.num_heads for side, s in sides.items()},
        **{f"{side}_ffn_dim": s.hidden or 4 * s.features for side, s in sides.items()},
        "activation_function": activation_name(e.activation),
        "dropout": e.dropout,
        "attention_dropout": e.attention_dropout,
        "activation_dropout": e.activation_dropout,
        "init_std": e.init_scale,
        "max_position_embeddings": c.max_positions - 2,
        "scale_embedding": c.scale_embeddings,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        **({} if e.norm_first else {"decoder_start_token_id": 2}),
    }


def _stack(name: str, config: TransformerConfig) -> list[Tensor]:
    base = f"model.{name}"
    tensors = [
        *embedding(f"{base}.embed_positions", f"{name}_positions"),
        *norm(f"{base}.layernorm_embedding", f"{name}_embedding_norm"),
    ]
    parts = {"attention": "self_attn"}
    if config.cross_attention:
        parts["cross_attention"] = "encoder_attn"
    for i in range(config.num_layers):
        theirs, ours = f"{base}.layers.{i}", f"{name}/layers_{i}"
        for path, part in parts.items():
            names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
            names = {p: f"{theirs}.{part}.{n}" for p, n in names.items()}
            tensors += attention(names, f"{ours}/{path}", config.num_heads)
            tensors += norm(f"{theirs}.{part}_layer_norm", f"{ours}/{path}_norm")
        tensors += [
            *dense(f"{theirs}.fc1", f"{ours}/mlp/up"),
            *dense(f"{theirs}.fc2", f"{ours}/mlp/down"),
            *norm(f"{theirs}.final_layer_norm", f"{ours}/mlp_norm"),
        ]
    return tensors + (norm(f"{base}.layer_norm", f"{name}/norm") if config.final_norm else [])


def _tensors(module: Bart) -> list[Tensor]:
    c = module.config
    tensors = [
        *embedding("model.shared", "tokens"), *_stack("encoder", c.encoder),
        *_stack("decoder", c.decoder),
    ]  # fmt: skip
    if c.head == "lm":
        tensors.append(Tensor("final_logits_bias", ("output_bias",), _ROW))
    return tensors


def _inputs(module: Bart) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return (tokens, tokens), {}


def _family(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        architectures={f"{prefix}ForConditionalGeneration": "lm", f"{prefix}Model": None},
        base="model.",
        build=_build,
        config=_config,
        tensors=_tensors,
        inputs=_inputs,
        # Copies of tied weights, and a format's number in older files.
        ignored=(
            r"(encoder|decoder)\.embed_tokens\.weight$", r"^lm_head\.weight$",
            r"(encoder|decoder)\.version$",
        ),
        heads=(r"^final_logits_bias$", r"^(classification_head|qa_outputs)\."),
        vocabulary=("tokens/embedding", "output_bias"),
    )  # fmt: skip


BART = _family("bart", "Bart")
MBART = _family("mbart", "MBart")
