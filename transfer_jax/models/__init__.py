"""Whole networks."""

from transfer_jax.models.bert import Bert, BertConfig, bert_stack
from transfer_jax.models.sequence import (
    DecodeState,
    LanguageModel,
    SequenceClassifier,
    SequenceForecaster,
    SequenceModel,
    SequencePairClassifier,
    generate,
    partition_rules,
)
from transfer_jax.models.vision import ResidualMLP, VisionBlock, VisionTransformer

__all__ = [
    "Bert",
    "BertConfig",
    "DecodeState",
    "LanguageModel",
    "ResidualMLP",
    "SequenceClassifier",
    "SequenceForecaster",
    "SequenceModel",
    "SequencePairClassifier",
    "VisionBlock",
    "VisionTransformer",
    "bert_stack",
    "generate",
    "partition_rules",
]
