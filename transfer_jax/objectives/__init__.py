"""The objective protocol, the basic objectives, and the transformations that make methods."""

from transfer_jax.objectives.base import Aux, Mean, Objective, Transformed, Variables
from transfer_jax.objectives.carried import TruncatedBPTT
from transfer_jax.objectives.contrastive import (
    ImageTextClassification,
    ZeroShotClassification,
)
from transfer_jax.objectives.conversion import EntireSpace
from transfer_jax.objectives.ctc import CTC
from transfer_jax.objectives.distil import Distilled, DistilledObjective
from transfer_jax.objectives.forecasting import Forecasting
from transfer_jax.objectives.frozen import Frozen, cache_features
from transfer_jax.objectives.labelling import BitLabelling, SequenceLabelling
from transfer_jax.objectives.matching import PairMatching
from transfer_jax.objectives.penalize import LinearFloor, Penalized, PenalizedObjective
from transfer_jax.objectives.petl import Adapted
from transfer_jax.objectives.prepared import Generated, Prepared
from transfer_jax.objectives.recommend import Cloze, NextItem, NextOfPrefix
from transfer_jax.objectives.recommend_contrastive import Contrasted
from transfer_jax.objectives.reparameterize import LowRank, ReparameterizedObjective, Trainable
from transfer_jax.objectives.seq2seq import Seq2Seq
from transfer_jax.objectives.tasks import (
    Classification,
    ModuleObjective,
    NextToken,
    Regression,
    example_mask,
)
from transfer_jax.objectives.warm_start import UniformInit, WarmStart

__all__ = [
    "CTC",
    "Adapted",
    "Aux",
    "BitLabelling",
    "Classification",
    "Cloze",
    "Contrasted",
    "Distilled",
    "DistilledObjective",
    "EntireSpace",
    "Forecasting",
    "Frozen",
    "Generated",
    "ImageTextClassification",
    "LinearFloor",
    "LowRank",
    "Mean",
    "ModuleObjective",
    "NextItem",
    "NextOfPrefix",
    "NextToken",
    "Objective",
    "PairMatching",
    "Penalized",
    "PenalizedObjective",
    "Prepared",
    "Regression",
    "ReparameterizedObjective",
    "Seq2Seq",
    "SequenceLabelling",
    "Trainable",
    "Transformed",
    "TruncatedBPTT",
    "UniformInit",
    "Variables",
    "WarmStart",
    "ZeroShotClassification",
    "cache_features",
    "example_mask",
]
