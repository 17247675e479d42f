"""Whole networks."""

from transfer_jax.models.bart import Bart, BartConfig, bart_stack
from transfer_jax.models.bert import Bert, BertConfig, bert_stack
from transfer_jax.models.clip import Clip, ClipConfig, ClipText, ClipTextConfig, clip_vit_b
from transfer_jax.models.conversion import ConversionNetwork
from transfer_jax.models.generation import (
    Decoding,
    Generated,
    generate_continuations,
    generate_targets,
)
from transfer_jax.models.gpt2 import GPT2, GPT2Config, gpt2_stack
from transfer_jax.models.longformer import Longformer, longformer_config, longformer_stack
from transfer_jax.models.recommender import SequentialRecommender
from transfer_jax.models.recurrent import RecurrentLanguageModel, RecurrentNetwork
from transfer_jax.models.recurrent_seq2seq import Captioner, RecurrentSeq2Seq
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
from transfer_jax.models.t5 import T5, T5Config, t5_config
from transfer_jax.models.ttm import TTM, TTMConfig
from transfer_jax.models.vision import ResidualMLP
from transfer_jax.models.vit import VisionTransformer, ViTConfig, vit_stack

__all__ = [
    "GPT2",
    "T5",
    "TTM",
    "Bart",
    "BartConfig",
    "Bert",
    "BertConfig",
    "Captioner",
    "Clip",
    "ClipConfig",
    "ClipText",
    "ClipTextConfig",
    "ConversionNetwork",
    "DecodeState",
    "Decoding",
    "GPT2Config",
    "Generated",
    "LanguageModel",
    "Longformer",
    "RecurrentLanguageModel",
    "RecurrentNetwork",
    "RecurrentSeq2Seq",
    "ResidualMLP",
    "SequenceClassifier",
    "SequenceForecaster",
    "SequenceModel",
    "SequencePairClassifier",
    "SequentialRecommender",
    "T5Config",
    "TTMConfig",
    "ViTConfig",
    "VisionTransformer",
    "bart_stack",
    "bert_stack",
    "clip_vit_b",
    "generate",
    "generate_continuations",
    "generate_targets",
    "gpt2_stack",
    "longformer_config",
    "longformer_stack",
    "partition_rules",
    "t5_config",
    "vit_stack",
]
