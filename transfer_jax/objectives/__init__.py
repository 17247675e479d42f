"""The objective protocol, the basic objectives, and the transformations that make methods."""

from transfer_jax.objectives.base import Aux, Mean, Objective, Transformed, Variables
from transfer_jax.objectives.carried import TruncatedBPTT
from transfer_jax.objectives.contrastive import (
    ImageTextClassification,
    ZeroShotClassification,
)
from transfer_jax.objectives.distil import Distilled, DistilledObjective
from transfer_jax.objectives.frozen import Frozen, cache_features
from transfer_jax.objectives.matching import PairMatching
from transfer_jax.objectives.penalize import LinearFloor, Penalized, PenalizedObjective
from transfer_jax.objectives.petl import Adapted
from transfer_jax.objectives.prepared import Generated, Prepared
from transfer_jax.objectives.reparameterize import LowRank, ReparameterizedObjective, Trainable
from transfer_jax.objectives.seq2seq import Seq2Seq
from transfer_jax.objectives.tasks import (
    Classification,
    ModuleObjective,
    NextToken,
    Regression,
    example_mask,
)
from transfer_jax.objectives.warm_start import WarmStart

__all__ = [
    "Adapted",
    "Aux",
    "Classification",
    "Distilled",
    "DistilledObjective",
    "Frozen",
    "Generated",
    "ImageTextClassification",
    "LinearFloor",
    "LowRank",
    "Mean",
    "ModuleObjective",
    "NextToken",
    "Objective",
    "PairMatching",
    "Penalized",
    "PenalizedObjective",
    "Prepared",
    "Regression",
    "ReparameterizedObjective",
    "Seq2Seq",
    "Trainable",
    "Transformed",
    "TruncatedBPTT",
    "Variables",
    "WarmStart",
    "ZeroShotClassification",
    "cache_features",
    "example_mask",
]
