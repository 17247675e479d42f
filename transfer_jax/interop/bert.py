"""BERT and RoBERTa in the layout of Hugging Face."""

from typing import Any

from transfer_jax.interop.family import (
    Family,
    activation,
    activation_name,
    labels,
    num_labels,
    unsupported,
)
from transfer_jax.interop.layouts import SAME, Tensor, attention, dense, embedding, norm
from transfer_jax.models.bert import Bert, BertConfig, bert_stack


def _build(config: dict[str, Any], head: str | None, options: dict[str, Any]) -> Bert:
    roberta = config["model_type"] == "roberta"
    unsupported(config, position_embedding_type="absolute", is_decoder=False)
    stack = bert_stack(
        features=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], hidden=config["intermediate_size"],
        activation=activation(config["hidden_act"]), norm_eps=config["layer_norm_eps"],
        dropout=config["hidden_dropout_prob"],
        attention_dropout=config["attention_probs_dropout_prob"],
        init_scale=config["initializer_range"], **options,
    )  # fmt: skip
    dropout = config.get("classifier_dropout")
    return Bert(BertConfig(
        vocab_size=config["vocab_size"], stack=stack,
        max_positions=config["max_position_embeddings"],
        position_offset=config["pad_token_id"] + 1 if roberta else 0,
        token_types=config["type_vocab_size"], roberta=roberta, head=head,
        pooler=head is None, num_classes=num_labels(config),
        classifier_dropout=stack.dropout if dropout is None else dropout,
    ))  # fmt: skip


def _config(module: Bert) -> dict[str, Any]:
    c, s = module.config, module.config.stack
    if s.window is not None:
        raise TypeError("a Longformer")
    return {
        "model_type": "roberta" if c.roberta else "bert",
        "vocab_size": c.vocab_size,
        "hidden_size": s.features,
        "num_hidden_layers": s.num_layers,
        "num_attention_heads": s.num_heads,
        "intermediate_size": s.hidden or 4 * s.features,
        "hidden_act": activation_name(s.activation),
        "layer_norm_eps": s.norm_eps,
        "hidden_dropout_prob": s.dropout,
        "attention_probs_dropout_prob": s.attention_dropout,
        "initializer_range": s.init_scale,
        "max_position_embeddings": c.max_positions,
        "type_vocab_size": c.token_types,
        "pad_token_id": c.position_offset - 1 if c.roberta else 0,
        "classifier_dropout": c.classifier_dropout,
        "tie_word_embeddings": True,
        **labels(c.num_classes),
        **({"bos_token_id": 0, "eos_token_id": 2} if c.roberta else {}),
    }


def _tensors(module: Bert) -> list[Tensor]:
    c, s = module.config, module.config.stack
    base = "roberta." if c.roberta else "bert."
    tensors = [
        *embedding(f"{base}embeddings.word_embeddings", "tokens"),
        *embedding(f"{base}embeddings.position_embeddings", "positions"),
        *embedding(f"{base}embeddings.token_type_embeddings", "token_types"),
        *norm(f"{base}embeddings.LayerNorm", "embedding_norm"),
    ]
    for i in range(s.num_layers):
        theirs, ours = f"{base}encoder.layer.{i}", f"stack/layers_{i}"
        parts = {p: f"{theirs}.attention.self.{p}" for p in ("query", "key", "value")}
        parts["out"] = f"{theirs}.attention.output.dense"
        tensors += [
            *attention(parts, f"{ours}/attention", s.num_heads),
            *norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention_norm"),
            *dense(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
            *dense(f"{theirs}.output.dense", f"{ours}/mlp/down"),
            *norm(f"{theirs}.output.LayerNorm", f"{ours}/mlp_norm"),
        ]
    if c.head == "masked_lm" and c.roberta:
        tensors += [
            *dense("lm_head.dense", "transform"),
            *norm("lm_head.layer_norm", "transform_norm"),
            Tensor("lm_head.bias", ("output_bias",), SAME),
        ]
    elif c.head == "masked_lm":
        tensors += [
            *dense("cls.predictions.transform.dense", "transform"),
            *norm("cls.predictions.transform.LayerNorm", "transform_norm"),
            Tensor("cls.predictions.bias", ("output_bias",), SAME),
        ]
    elif c.head == "classification" and c.roberta:
        tensors += dense("classifier.dense", "pooler") + dense("classifier.out_proj", "classifier")
    elif c.head == "classification":
        tensors += dense("bert.pooler.dense", "pooler") + dense("classifier", "classifier")
    elif c.pooler:
        tensors += dense(f"{base}pooler.dense", "pooler")
    return tensors


def _family(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        architectures={
            f"{prefix}Model": None,
            f"{prefix}ForMaskedLM": "masked_lm",
            f"{prefix}ForSequenceClassification": "classification",
        },
        base=f"{name}.",
        build=_build,
        config=_config,
        tensors=_tensors,
        # Copies of tied weights and buffers in older files.
        ignored=(
            r"embeddings\.position_ids$", r"lm_head\.decoder\.(weight|bias)$",
            r"cls\.predictions\.decoder\.(weight|bias)$",
        ),
        heads=(r"^(cls|lm_head|classifier)\.", r"^(bert\.|roberta\.)?pooler\."),
        vocabulary=("tokens/embedding", "output_bias"),
    )  # fmt: skip


BERT = _family("bert", "Bert")
ROBERTA = _family("roberta", "Roberta")
