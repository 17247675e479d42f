"""Attention: multi-head with optional rotary positions and a KV cache, and linear attention."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Initializer = Callable[..., Array]
Implementation = Literal["xla", "cudnn"]


def rotate(x: Array, positions: Array, base: float = 10_000.0) -> Array:
    """Rotary position embedding (Su et al. 2021), the two halves of the head paired.

    Args:
      x: [B, L, heads, D], D even.
      positions: int [L] or [B, L].
      base: the slowest wavelength is about ``2 pi base``.

    Returns:
      as ``x``.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class KVCache(NamedTuple):
    """Keys and values seen so far.

    Attributes:
      key: [B, max_length, heads, D].
      value: [B, max_length, heads, D].
      filled: int32 scalar, how many.
    """

    key: Array
    value: Array
    filled: Array


def attention_backend(query: Array) -> Implementation:
    """Returns the implementation of ``jax.nn.dot_product_attention`` that suits ``query``.

    cuDNN's flash kernel on GPUs for 16-bit heads of a width that it takes, else XLA's fusions.

    Args:
      query: [B, L, heads, D].
    """
    width = query.shape[-1]
    flash = query.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
    return "cudnn" if flash and jax.default_backend() == "gpu" else "xla"


class Attention(nn.Module):
    """Multi-head scaled dot-product attention.

    Attributes:
      features: H, width of the output.
      num_heads: divides H, unless ``head_dim`` is given.
      head_dim: width of a head; None = H / num_heads.
      causal: each position sees itself and what comes before.
      rotary: rotate queries and keys by their position.
      use_bias: in the projections.
      scale: of the products of queries and keys; None = 1 / sqrt(head_dim).
      dropout: rate on the attention weights; needs the [B, heads, L, S] weights in memory.
      kernel_init: of the projections.
      query_init: of the queries' projection; None = ``kernel_init``.
      implementation: of ``jax.nn.dot_product_attention``: 'xla', 'cudnn', or None to choose by
        device and dtype, see ``attention_backend``.
      dtype: of the projections and products; the softmax runs in float32.
    """

    features: int
    num_heads: int = 4
    head_dim: int | None = None
    causal: bool = False
    rotary: bool = False
    use_bias: bool = True
    scale: float | None = None
    dropout: float = 0.0
    kernel_init: Initializer = nn.linear.default_kernel_init
    query_init: Initializer | None = None
    implementation: Implementation | None = None
    dtype: Any = None

    def setup(self):
        if self.head_dim is None and self.features % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide features={self.features}")
        if self.rotary and self._head[1] % 2:
            raise ValueError(f"rotary positions need an even head width, got {self._head[1]}")
        self.query, self.key, self.value = self._projections()
        self.out = self._dense(self.features, axis=(-2, -1))
        self.drop = nn.Dropout(self.dropout)

    @property
    def _head(self) -> tuple[int, int]:
        """How many heads, and their width."""
        return self.num_heads, self.head_dim or self.features // self.num_heads

    @nn.nowrap
    def _dense(self, features: Any, **options: Any) -> nn.DenseGeneral:
        fields = {"use_bias": self.use_bias, "dtype": self.dtype, "kernel_init": self.kernel_init}
        return nn.DenseGeneral(features, **{**fields, **options})

    @nn.nowrap
    def _projections(self) -> tuple[nn.DenseGeneral, nn.DenseGeneral, nn.DenseGeneral]:
        """New layers for queries, keys and values."""
        query = self._dense(self._head, kernel_init=self.query_init or self.kernel_init)
        return query, self._dense(self._head), self._dense(self._head)

    def _project(self, inputs: Array, context: Array, start: Array | int) -> tuple[Array, ...]:
        query, (key, value) = self.query(inputs), self.project(context)
        if self.rotary:
            query = rotate(query, start + jnp.arange(query.shape[1]))
            key = rotate(key, start + jnp.arange(key.shape[1]))
        return query, key, value

    def project(self, context: Array) -> tuple[Array, Array]:
        """Keys and values [B, S, heads, D] of what is attended to, [B, S, H']."""
        return self.key(context), self.value(context)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        bias: Array | None = None,
        mask: Array | None = None,
        lengths: Array | None = None,
        causal: bool = False,
        train: bool = False,
    ) -> Array:
        """Averages of the values under the attention weights, before the output projection.

        A method of its own so that prefixes and the like can be put in with
        ``flax.linen.intercept_methods``.

        Args:
          query: [B, L, heads, D].
          key: [B, S, heads, D].
          value: [B, S, heads, D].
          bias: added to the scaled products, broadcastable to [B, heads, L, S].
          mask: bool, broadcastable to [B, heads, L, S]; False is not seen.
          lengths: int [B], valid positions among the S.
          causal: position i sees the first i + 1 only.
          train: dropout on.

        Returns:
          [B, L, heads, D].
        """
        if train and self.dropout:
            return self._attend_with_dropout(query, key, value, bias, mask, lengths, causal)
        if bias is not None:
            bias = bias.astype(query.dtype)
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, scale=self.scale, is_causal=causal,
            key_value_seq_lengths=lengths,
            implementation=self.implementation or attention_backend(query),
        )  # fmt: skip

    def _attend_with_dropout(self, query, key, value, bias, mask, lengths, causal) -> Array:
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = jnp.einsum("blhd,bshd->bhls", query, key, preferred_element_type=jnp.float32)
        scores = scores * scale if bias is None else scores * scale + bias
        seen = jnp.ones((), bool) if mask is None else mask
        if lengths is not None:
            seen = seen & (jnp.arange(key.shape[1]) < lengths[:, None])[:, None, None]
        if causal:
            seen = seen & jnp.tri(query.shape[1], key.shape[1], dtype=bool)
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bhls,bshd->blhd", self.drop(weights, deterministic=False), value)

    def __call__(
        self,
        inputs: Array,
        context: Array | None = None,
        *,
        lengths: Array | None = None,
        bias: Array | None = None,
        mask: Array | None = None,
        positions: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Attends from ``inputs`` to ``context``.

        Args:
          inputs: [B, L, H].
          context: [B, S, H'] for cross attention; None = ``inputs``.
          lengths: int [B], valid positions of what is attended to.
          bias: added to the scaled products, broadcastable to [B, heads, L, S].
          mask: bool, broadcastable to [B, heads, L, S]; False is not seen.
          positions: int [B, L], where in the context the inputs stand; None = 0, 1, ….
          train: dropout on.

        Returns:
          [B, L, H].
        """
        context, causal = inputs if context is None else context, self.causal
        if positions is not None:
            if self.rotary:
                raise ValueError("rotary attention has no inputs at chosen positions")
            if causal:
                before = jnp.arange(context.shape[1]) <= positions[:, None, :, None]
                mask, causal = before if mask is None else mask & before, False
        query, key, value = self._project(inputs, context, 0)
        y = self.attend(
            query, key, value, bias=bias, mask=mask, lengths=lengths, causal=causal, train=train
        )
        return self.out(y)

    def cross(
        self, inputs: Array, key: Array, value: Array, *, lengths: Array | None = None
    ) -> Array:
        """As the cross attention of ``__call__``, with the context's ``project`` already done.

        Args:
          inputs: [B * K, L, H]; the K rows of an example (beams) share its context.
          key: [B, S, heads, D].
          value: [B, S, heads, D].
          lengths: int [B].

        Returns:
          [B * K, L, H].
        """
        query = self.query(inputs)
        together = query.reshape(key.shape[0], -1, *query.shape[2:])
        y = self.attend(together, key, value, lengths=lengths)
        return self.out(y.reshape(query.shape))

    def discretise(self, mode: str | None = None) -> None:
        """No matrices to prepare for decoding; see ``S4Layer.discretise``."""
        if not self.causal:
            raise ValueError("attention that is not causal cannot decode step by step")

    def prefill(
        self,
        inputs: Array,
        system: None = None,
        state: KVCache | None = None,
        max_length: int = 0,
        bias: Array | None = None,
    ) -> tuple[Array, KVCache]:
        """Outputs for a prefix or chunk [B, L, H], and the cache after it.

        Args:
          inputs: [B, L, H]; L may be 0, for an empty cache.
          system: None.
          state: the cache before; None = an empty one of ``max_length`` (at least L) positions.
          max_length: how long the sequence will become.
          bias: as in ``__call__``; its last axis is L without a state, else the cache's length.
        """
        del system
        batch, length = inputs.shape[:2]
        start = 0 if state is None else state.filled
        query, key, value = self._project(inputs, inputs, start)
        if state is None:
            shape = (batch, max(max_length, length), *key.shape[2:])
            state = KVCache(jnp.zeros(shape, key.dtype), jnp.zeros(shape, key.dtype), jnp.int32(0))
            # Nothing before: what is still empty in the cache need not be scored.
            y = self.attend(query, key, value, bias=bias, causal=True) if length else query
            return self.out(y), self._append(state, key, value)
        state = self._append(state, key, value)
        seen = jnp.arange(state.key.shape[1]) <= start + jnp.arange(length)[:, None]
        y = self.attend(query, state.key, state.value, bias=bias, mask=seen[None, None])
        return self.out(y), state

    @staticmethod
    def _append(state: KVCache, key: Array, value: Array) -> KVCache:
        zero = jnp.zeros_like(state.filled)
        at = (zero, state.filled, zero, zero)
        return KVCache(
            lax.dynamic_update_slice(state.key, key, at),
            lax.dynamic_update_slice(state.value, value, at),
            state.filled + key.shape[1],
        )

    def step(self, inputs: Array, state: KVCache, system: None = None) -> tuple[Array, KVCache]:
        """One token [B, H] against the cache; the cost grows with ``max_length``."""
        y, state = self.prefill(inputs[:, None], system, state)
        return y[:, 0], state


class LinearAttentionState(NamedTuple):
    """Running sums over the past.

    Attributes:
      outer: float32 [B, heads, D, D], sum of key-value outer products.
      key: float32 [B, heads, D], sum of keys.
    """

    outer: Array
    key: Array


class LinearAttention(nn.Module):
    """Causal attention with the feature map elu + 1 in place of the softmax.

    Katharopoulos et al. (2020). Linear in the length, constant state.

    Attributes:
      features: H.
      num_heads: divides H.
      chunk_size: positions that attend to each other directly; older ones through the state.
      dtype: of the projections; the sums run in float32.
    """

    features: int
    num_heads: int = 4
    chunk_size: int = 64
    dtype: Any = None

    def setup(self):
        if self.features % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide features={self.features}")
        head = (self.num_heads, self.features // self.num_heads)
        self.query = nn.DenseGeneral(head, dtype=self.dtype)
        self.key = nn.DenseGeneral(head, dtype=self.dtype)
        self.value = nn.DenseGeneral(head, dtype=self.dtype)
        self.out = nn.DenseGeneral(self.features, axis=(-2, -1), dtype=self.dtype)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps [B, L, H] to [B, L, H]; causal, so padding after ``lengths`` reaches no output."""
        del lengths, train
        return self.prefill(inputs)[0]

    def discretise(self, mode: str | None = None) -> None:
        """No matrices to prepare for decoding; see ``S4Layer.discretise``."""

    def prefill(
        self,
        inputs: Array,
        system: None = None,
        state: LinearAttentionState | None = None,
        max_length: int = 0,
    ) -> tuple[Array, LinearAttentionState]:
        """Outputs for a prefix or chunk [B, L, H], and the sums after it."""
        del system, max_length
        batch, length = inputs.shape[:2]
        query = (nn.elu(self.query(inputs)) + 1).astype(jnp.float32)
        key = (nn.elu(self.key(inputs)) + 1).astype(jnp.float32)
        value = self.value(inputs).astype(jnp.float32)
        if state is None:
            heads, width = query.shape[2:]
            outer = jnp.zeros((batch, heads, width, width), jnp.float32)
            state = LinearAttentionState(outer, jnp.zeros((batch, heads, width), jnp.float32))
        size = min(self.chunk_size, length)
        count = -(-length // size)

        def split(x):  # Padding with zeros: such keys add nothing.
            x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
            return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

        def body(
            state: LinearAttentionState, chunk: tuple[Array, Array, Array]
        ) -> tuple[LinearAttentionState, Array]:
            query, key, value = chunk
            scores = jnp.einsum("blhd,bshd->bhls", query, key)
            scores = jnp.where(jnp.tri(size, dtype=bool), scores, 0)
            top = jnp.einsum("bhls,bshd->blhd", scores, value)
            top += jnp.einsum("blhd,bhde->blhe", query, state.outer)
            bottom = jnp.moveaxis(scores.sum(-1), 1, 2)
            bottom += jnp.einsum("blhd,bhd->blh", query, state.key)
            state = LinearAttentionState(
                state.outer + jnp.einsum("bshd,bshe->bhde", key, value), state.key + key.sum(1)
            )
            return state, top / jnp.maximum(bottom, 1e-6)[..., None]

        final, y = lax.scan(body, state, (split(query), split(key), split(value)))
        y = jnp.moveaxis(y, 0, 1).reshape(batch, count * size, *query.shape[2:])[:, :length]
        return self.out(y.astype(self.dtype or inputs.dtype)), final

    def step(
        self, inputs: Array, state: LinearAttentionState, system: None = None
    ) -> tuple[Array, LinearAttentionState]:
        """One token [B, H] to [B, H] and the next sums, at constant cost."""
        y, state = self.prefill(inputs[:, None], system, state)
        return y[:, 0], state
