"""Whole networks."""

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
    "DecodeState", "LanguageModel", "ResidualMLP", "SequenceClassifier", "SequenceForecaster",
    "SequenceModel", "SequencePairClassifier", "VisionBlock", "VisionTransformer", "generate",
    "partition_rules",
]  # fmt: skip
