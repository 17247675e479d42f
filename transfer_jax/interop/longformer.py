"""Longformer in the layout of Hugging Face."""

import dataclasses
from typing import Any

from transfer_jax.interop.bert import ROBERTA
from transfer_jax.interop.family import Family, unsupported
from transfer_jax.interop.layouts import Tensor, heads_bias, heads_in
from transfer_jax.models.bert import Bert, BertConfig
from transfer_jax.models.longformer import Longformer

# Longformer is RoBERTa with more projections: what differs is said here.


def _windows(config: dict[str, Any]) -> int | tuple[int, ...]:
    """Positions on one side; files count both sides."""
    total = config["attention_window"]
    sides = [total] if isinstance(total, int) else total
    if any(side % 2 for side in sides):
        raise ValueError(f"attention_window={total}: it counts both sides and must be even.")
    one = tuple(side // 2 for side in sides)
    return one[0] if len(set(one)) == 1 else one


def _build(config: dict[str, Any], head: str | None, options: dict[str, Any]) -> Longformer:
    unsupported(config, model_type="longformer")
    config = {**config, "model_type": "roberta"}
    inner = ROBERTA.build(config, head, {"window": _windows(config), **options}).config
    return Longformer(dataclasses.replace(inner, classifier_dropout=inner.stack.dropout))


def _config(module: Longformer) -> dict[str, Any]:
    if not isinstance(module, Longformer):
        raise TypeError("no Longformer")
    s = module.config.stack
    windows = (s.window,) * s.num_layers if isinstance(s.window, int) else s.window or ()
    config = ROBERTA.config(_roberta(module))
    del config["classifier_dropout"]
    return {
        **config, "model_type": "longformer", "attention_window": [2 * w for w in windows],
        "sep_token_id": 2,
    }  # fmt: skip


def _roberta(module: Longformer) -> Bert:
    config: BertConfig = module.config
    return Bert(dataclasses.replace(config, stack=dataclasses.replace(config.stack, window=None)))


def _tensors(module: Longformer) -> list[Tensor]:
    s = module.config.stack
    tensors = [
        t._replace(theirs=t.theirs.replace("roberta.", "longformer.", 1))
        for t in ROBERTA.tensors(_roberta(module))
    ]
    for i in range(s.num_layers):
        for part in ("query_global", "key_global", "value_global"):
            theirs = f"longformer.encoder.layer.{i}.attention.self.{part}"
            ours = f"stack/layers_{i}/attention/{part}"
            tensors += [
                Tensor(f"{theirs}.weight", (f"{ours}/kernel",), heads_in(s.num_heads)),
                Tensor(f"{theirs}.bias", (f"{ours}/bias",), heads_bias(s.num_heads)),
            ]
    return tensors


LONGFORMER = Family(
    name="longformer",
    architectures={
        "LongformerModel": None,
        "LongformerForMaskedLM": "masked_lm",
        "LongformerForSequenceClassification": "classification",
    },
    base="longformer.",
    build=_build,
    config=_config,
    tensors=_tensors,
    ignored=ROBERTA.ignored,
    heads=(r"^(lm_head|classifier)\.", r"^(longformer\.)?pooler\."),
    vocabulary=ROBERTA.vocabulary,
)
