"""Linen layers."""

from transfer_jax.nn.adaptive_softmax import AdaptiveSoftmax
from transfer_jax.nn.attention import Attention, KVCache, LinearAttention
from transfer_jax.nn.blocks import MIXERS, FeedForward, SequenceBlock
from transfer_jax.nn.memory import NTM
from transfer_jax.nn.recurrent import (
    CELLS,
    GRU,
    LSTM,
    EchoState,
    Elman,
    Jordan,
    Recurrent,
    gradient_flow,
    ridge_readout,
)
from transfer_jax.nn.s4 import SSM_PARAMETERS, S4Layer, SSMKernel
from transfer_jax.nn.set2seq import PointerDecoder, Set2Set, SetEncoder
from transfer_jax.nn.sliding_attention import SlidingAttention
from transfer_jax.nn.transformer import (
    TransformerConfig,
    TransformerLayer,
    TransformerStack,
    stack_layers,
    transformer_rules,
    unstack_layers,
)

__all__ = [
    "CELLS", "GRU", "LSTM", "MIXERS", "NTM", "SSM_PARAMETERS", "AdaptiveSoftmax", "Attention",
    "EchoState", "Elman", "FeedForward", "Jordan", "KVCache", "LinearAttention", "PointerDecoder",
    "Recurrent", "S4Layer", "SSMKernel", "SequenceBlock", "Set2Set", "SetEncoder",
    "SlidingAttention", "TransformerConfig", "TransformerLayer", "TransformerStack",
    "gradient_flow", "ridge_readout", "stack_layers", "transformer_rules", "unstack_layers",
]  # fmt: skip
