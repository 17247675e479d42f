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

__all__ = [
    "DecodeState", "LanguageModel", "SequenceClassifier", "SequenceForecaster", "SequenceModel",
    "SequencePairClassifier", "generate", "partition_rules",
]  # fmt: skip
