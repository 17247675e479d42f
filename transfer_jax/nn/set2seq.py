"""Reading sets and pointing into them: Order Matters (Vinyals, Bengio and Kudlur 2016).

``Set2Set`` is the process block, the pooling layer of graph libraries, weight for weight.
``SetEncoder`` holds it and what it is compared with, ``PointerDecoder`` writes indices of the set.
Attention weights are float32 throughout.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from transfer_jax.nn.recurrent import LSTM, Recurrent, orthogonal_gates

Array = jax.Array
State = Any

ENCODERS = ("rpw", "ptrnet_lstm", "bilstm", "deepsets_sum", "deepsets_mean", "attention_pool")
SCORES = ("dot", "additive")
INIT_MAPS = ("linear", "split")

_GLOROT = nn.initializers.glorot_uniform()
# The paper says nothing of initial values.
LSTM_OPTIONS: Any = FrozenDict(forget_bias=1.0, kernel_init=_GLOROT, hidden_init=orthogonal_gates)


def _one_of(value: str, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; choose one of {', '.join(allowed)}.")


# -- attention ------------------------------------------------------------------------------------


def masked_softmax(scores: Array, mask: Array) -> Array:
    """Softmax over the last axis, of the positions where ``mask`` holds.

    Args:
      scores: [..., n], any float dtype.
      mask: bool, broadcastable to [..., n].

    Returns:
      [..., n] float32; zero outside the mask, and everywhere in a row without any valid position.
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # exp(-inf) = 0 has gradient 0; only the largest score of an empty row has to be finite.
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def segment_softmax(scores: Array, segments: Array, num_segments: int) -> Array:
    """Softmax within each segment of a flat array.

    Args:
      scores: [total].
      segments: int [total], in [0, num_segments); others (padding) get weight 0.
      num_segments: static.

    Returns:
      [total] float32.
    """
    inside = (segments >= 0) & (segments < num_segments)
    index = jnp.where(inside, segments, num_segments)
    scores = jnp.where(inside, scores.astype(jnp.float32), -jnp.inf)
    top = jax.lax.stop_gradient(jax.ops.segment_max(scores, index, num_segments + 1))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)[index])
    total = jax.ops.segment_sum(weights, index, num_segments + 1)
    return weights / jnp.where(total == 0, 1.0, total)[index]


class DotScore(nn.Module):
    """``f(m, q) = m . q``, of equal widths."""

    def keys(self, memory: Array) -> Array:
        """What of the memory enters the scores, [..., H]; computed once for all queries."""
        return memory

    def __call__(self, keys: Array, query: Array) -> Array:
        """Scores of keys [..., H] for queries [..., H] that broadcast: [...] float32."""
        return jnp.sum(keys.astype(jnp.float32) * query.astype(jnp.float32), axis=-1)


class AdditiveScore(nn.Module):
    """``f(m, q) = v^T tanh(W1 m + W2 q)``.

    Attributes:
      features: width of the hidden layer.
      dtype: of the arithmetic inside the tanh.
    """

    features: int
    dtype: Any = None

    def setup(self):
        self.key = _dense(self.features, self.dtype, use_bias=False)
        self.query = _dense(self.features, self.dtype)
        self.v = self.param("v", nn.initializers.normal(0.1), (self.features,))

    def keys(self, memory: Array) -> Array:
        """``W1 m``, computed once for all queries."""
        return self.key(memory)

    def __call__(self, keys: Array, query: Array) -> Array:
        """Scores of keys [..., H] for queries [..., H'] that broadcast: [...] float32."""
        hidden = jnp.tanh(keys + self.query(query)).astype(jnp.float32)
        return hidden @ self.v


def _dense(features: int, dtype: Any, **options: Any) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=_GLOROT, **options)


# -- reading --------------------------------------------------------------------------------------


class Set2Set(nn.Module):
    """The process block: an LSTM that attends to a set and reads nothing else (section 4.1).

    ``q_t = LSTM(q*_{t-1})``, ``a = softmax_i f(m_i, q_t)``, ``r_t = sum_i a_i m_i``,
    ``q*_t = [q_t ; r_t]``. The order of the set does not matter. As in PyTorch Geometric and DGL
    the LSTM takes q*_{t-1} as its input besides its own hidden state q_{t-1}; that is the paper's
    LSTM without input whose recurrent matrix is ``W_ih + [W_hh, 0]``. ``set2set_params`` reads
    their weights.

    Attributes:
      features: H, width of the elements.
      steps: T; with 0 the summary is zero.
      score: one of ``SCORES``.
      num_layers: of the LSTM.
      dtype: of the LSTM.
    """

    features: int
    steps: int = 5
    score: str = "dot"
    num_layers: int = 1
    dtype: Any = None

    def setup(self):
        _one_of(self.score, SCORES, "score")
        self.lstm = Recurrent(
            self.features, self.num_layers, options=LSTM_OPTIONS, dtype=self.dtype
        )
        self.scores = (
            DotScore() if self.score == "dot" else AdditiveScore(self.features, self.dtype)
        )

    def __call__(self, memory: Array, mask: Array | None = None) -> Array:
        """Pools sets of one padded size.

        Args:
          memory: [B, n, H].
          mask: bool [B, n], False = padding, whose values reach nothing; None = all valid.

        Returns:
          q*_T, [B, 2H].
        """
        return self.process(memory, mask)[0]

    def process(self, memory: Array, mask: Array | None = None) -> tuple[Array, Array]:
        """As the call, and the attention weights of every step, float32 [B, T, n]."""
        if mask is None:
            mask = jnp.ones(memory.shape[:2], bool)
        memory = jnp.where(mask[..., None], memory, 0)

        def read(scores: Array) -> tuple[Array, Array]:
            weights = masked_softmax(scores, mask)
            return jnp.einsum("bn,bnh->bh", weights, memory), weights

        summary, weights = self._process(memory, read, lambda q: q[:, None], memory.shape[0])
        return summary, jnp.moveaxis(weights, 0, 1)

    def segments(self, memory: Array, segments: Array, num_segments: int) -> Array:
        """Pools sets that lie one after the other, such as the nodes of a batch of graphs.

        Args:
          memory: [total, H].
          segments: int [total], the set of each element, in any order; outside
            [0, num_segments) = padding.
          num_segments: static number of sets, some of which may be empty.

        Returns:
          [num_segments, 2H].
        """
        inside = (segments >= 0) & (segments < num_segments)
        index = jnp.where(inside, segments, num_segments)
        memory = jnp.where(inside[:, None], memory, 0)

        def read(scores: Array) -> tuple[Array, Array]:
            weights = segment_softmax(scores, segments, num_segments)
            total = jax.ops.segment_sum(weights[:, None] * memory, index, num_segments + 1)
            return total[:num_segments], weights

        def spread(query: Array) -> Array:
            return query[jnp.minimum(index, num_segments - 1)]

        return self._process(memory, read, spread, num_segments)[0]

    def _process(
        self, memory: Array, read: Callable, spread: Callable, batch: int
    ) -> tuple[Array, Array]:
        summary = jnp.zeros((batch, 2 * self.features), memory.dtype)
        if not self.steps:
            return summary, jnp.zeros((0, *memory.shape[:-1]), jnp.float32)
        keys = self.scores.keys(memory)

        def body(module, carry, _):
            summary, state = carry
            query, state = module.lstm.step(summary, state)
            value, weights = read(module.scores(keys, spread(query)))
            after = jnp.concatenate([query.astype(value.dtype), value], axis=-1)
            return (after.astype(summary.dtype), state), weights

        scan = nn.scan(
            body, variable_broadcast="params", split_rngs={"params": False}, length=self.steps
        )
        (summary, _), weights = scan(self, (summary, self.lstm.initial_state(batch)), None)
        return summary, weights


def set2set_params(tensors: Mapping[str, Any], prefix: str = "lstm.") -> dict[str, Any]:
    """Turns the weights of a Set2Set layer of PyTorch Geometric or DGL into ours.

    Args:
      tensors: its state dictionary: ``lstm.weight_ih_l0`` [4H, 2H], ``lstm.weight_hh_l0`` [4H, H],
        ``lstm.bias_ih_l0``, ``lstm.bias_hh_l0`` [4H] and so on for further layers, as arrays.
      prefix: of these names.

    Returns:
      Parameters of ``Set2Set(score="dot")`` with as many layers.

    Raises:
      ValueError: a name is missing.
    """
    count = sum(name.startswith(f"{prefix}weight_ih_l") for name in tensors)
    layers: dict[str, Any] = {}
    for i in range(max(count, 1)):
        layers[f"forward_{i}"] = {}
        for ours, theirs in (("input", "ih"), ("hidden", "hh")):
            names = [f"{prefix}{kind}_{theirs}_l{i}" for kind in ("weight", "bias")]
            if missing := [name for name in names if name not in tensors]:
                raise ValueError(f"{missing} are missing; there are {sorted(tensors)}.")
            weight, bias = (np.asarray(tensors[name]) for name in names)
            layers[f"forward_{i}"][ours] = {"kernel": weight.T, "bias": bias}
    return {"lstm": layers}


class SetEncoder(nn.Module):
    """Elements to a memory that is attended to and a summary that starts the writer.

    All kinds read every element with one small network, ``m_i = W2 relu(W1 x_i)``. Then

    * ``rpw``: the elements are the memory, ``Set2Set`` gives the summary;
    * ``ptrnet_lstm``: an LSTM reads them in the given order; its hidden states are the memory, its
      last hidden and cell state the summary (the encoder of Pointer Networks);
    * ``bilstm``: two LSTMs of half the width, one of them from the end;
    * ``deepsets_sum``, ``deepsets_mean``: a network of the sum or mean of the elements;
    * ``attention_pool``: a network of their average under weights that no query changes.

    All but the two LSTMs ignore the order.

    Attributes:
      kind: one of ``ENCODERS``.
      features: H.
      steps, score: of ``Set2Set``.
      num_layers: of the LSTMs.
      dropout: between layers of the LSTMs.
      dtype: compute dtype.
    """

    kind: str = "rpw"
    features: int = 256
    steps: int = 5
    score: str = "dot"
    num_layers: int = 1
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, inputs: Array, lengths: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        """Maps sets [B, n, D] to the memory [B, n, H] and the summary [B, 2H].

        Args:
          inputs: [B, n, D].
          lengths: int [B]; elements from there on are padding and may hold anything.
          train: dropout on.

        Raises:
          ValueError: unknown kind or score, or ``bilstm`` of odd width.
        """
        _one_of(self.kind, ENCODERS, "encoder")
        batch, size = inputs.shape[:2]
        if lengths is None:
            lengths = jnp.full((batch,), size, jnp.int32)
        mask = jnp.arange(size) < lengths[:, None]
        inputs = jnp.where(mask[..., None], inputs, 0)
        hidden = nn.relu(_dense(self.features, self.dtype, name="read_0")(inputs))
        memory = jnp.where(
            mask[..., None], _dense(self.features, self.dtype, name="read_1")(hidden), 0
        )

        if self.kind == "rpw":
            pool = Set2Set(
                self.features, self.steps, self.score, self.num_layers, self.dtype, name="process"
            )
            return memory, pool(memory, mask)
        if self.kind in ("ptrnet_lstm", "bilstm"):
            lstm = Recurrent(
                self._width(), self.num_layers, options=LSTM_OPTIONS, dropout=self.dropout,
                bidirectional=self.kind == "bilstm", dtype=self.dtype, name="lstm",
            )  # fmt: skip
            memory, state = lstm.run(memory, lengths=lengths, train=train)
            last = state[-1] if self.kind == "bilstm" else state[-1:]
            cells, hiddens = zip(*last)
            return jnp.where(mask[..., None], memory, 0), jnp.concatenate([*hiddens, *cells], -1)

        if self.kind == "attention_pool":
            query = self.param("query", nn.initializers.zeros, (self.features,))
            scores = AdditiveScore(self.features, self.dtype, name="attention")
            weights = masked_softmax(scores(scores.keys(memory), query), mask)
            pooled = jnp.einsum("bn,bnh->bh", weights, memory)
        else:
            pooled = memory.sum(axis=1)
            if self.kind == "deepsets_mean":
                pooled = pooled / jnp.maximum(lengths, 1)[:, None].astype(pooled.dtype)
        hidden = nn.relu(_dense(self.features, self.dtype, name="pool_0")(pooled))
        return memory, _dense(2 * self.features, self.dtype, name="pool_1")(hidden)

    def _width(self) -> int:
        """Of the LSTM in each direction."""
        if self.kind == "ptrnet_lstm":
            return self.features
        if self.features % 2:
            raise ValueError(f"bilstm has two halves: features={self.features} must be even.")
        return self.features // 2


# -- writing --------------------------------------------------------------------------------------


class PointerState(NamedTuple):
    """What writing pointers carries from step to step.

    Attributes:
      lstm: cell and hidden state, [B, H] each.
      memory: [B, n, H].
      keys: the parts of the memory that enter the scores: of the pointer, then of each glimpse.
      mask: bool [B, n], valid elements.
      used: bool [B, n], elements pointed at so far.
    """

    lstm: State
    memory: Array
    keys: tuple[Array, ...]
    mask: Array
    used: Array


class PointerDecoder(nn.Module):
    """An LSTM that points at elements of a memory (Vinyals et al. 2015), with glimpses.

    ``d = LSTM(m of the element pointed at before)``; each glimpse reads the memory once,
    ``d <- W [d ; sum_i a_i m_i]``; the pointer is ``softmax_i v^T tanh(W1 m_i + W2 d)``.

    Attributes:
      features: H.
      glimpses: how often the memory is read before each pointer.
      mask_used: an element is pointed at once only. The published results do not use it.
      init_map: of the summary to the first state: 'linear', or 'split', whose halves [H] are hidden
        and cell state.
      dtype: compute dtype; scores are float32.
    """

    features: int
    glimpses: int = 1
    mask_used: bool = False
    init_map: str = "linear"
    dtype: Any = None

    def setup(self):
        _one_of(self.init_map, INIT_MAPS, "init_map")
        self.lstm = LSTM(self.features, dtype=self.dtype, **LSTM_OPTIONS)
        self.go = self.param("go", nn.initializers.zeros, (self.features,))
        self.pointer = AdditiveScore(self.features, self.dtype)
        self.looks = [AdditiveScore(self.features, self.dtype) for _ in range(self.glimpses)]
        self.merges = [_dense(self.features, self.dtype) for _ in range(self.glimpses)]
        if self.init_map == "linear":
            self.to_hidden = _dense(self.features, self.dtype)
            self.to_cell = _dense(self.features, self.dtype)

    def start(self, memory: Array, summary: Array, mask: Array) -> PointerState:
        """The state before the first pointer.

        Args:
          memory: [B, n, H], zero where ``mask`` is False.
          summary: [B, S]; S = 2H where ``init_map`` is 'split'.
          mask: bool [B, n].
        """
        if self.init_map == "linear":
            hidden, cell = self.to_hidden(summary), self.to_cell(summary)
        else:
            hidden, cell = jnp.split(summary, 2, axis=-1)
        keys = tuple(score.keys(memory) for score in (self.pointer, *self.looks))
        return PointerState((cell, hidden), memory, keys, mask, jnp.zeros_like(mask))

    def __call__(self, state: PointerState, targets: Array) -> Array:
        """Logits of every pointer, given the true ones before it.

        Args:
          state: from ``start``.
          targets: int [B, T]; -1 = nothing to point at, at the end of a row.

        Returns:
          float32 [B, T, n], -inf where an element cannot be pointed at.
        """
        size = state.mask.shape[1]
        known = jnp.maximum(targets[:, :-1], 0)
        pointed = jnp.take_along_axis(state.memory, known[..., None], axis=1)
        go = jnp.broadcast_to(self.go.astype(pointed.dtype), (len(targets), 1, self.features))
        hidden, _ = self.lstm.prefill(jnp.concatenate([go, pointed], axis=1), None, state.lstm)
        chosen = jax.nn.one_hot(targets, size, dtype=jnp.int32)
        used = jnp.cumsum(chosen, axis=1) - chosen > 0
        return self._point(hidden, state, used)

    def step(self, pointed: Array, state: PointerState) -> tuple[Array, PointerState]:
        """Logits [B, n] of the next pointer after one more [B], where n stands for 'none yet'."""
        size = state.mask.shape[1]
        before = jnp.take_along_axis(
            state.memory, jnp.minimum(pointed, size - 1)[:, None, None], axis=1
        )[:, 0]
        inputs = jnp.where((pointed < size)[:, None], before, self.go.astype(before.dtype))
        hidden, lstm = self.lstm.step(inputs, state.lstm)
        used = state.used | (jnp.arange(size) == pointed[:, None])
        logits = self._point(hidden[:, None], state, used[:, None])[:, 0]
        return logits, state._replace(lstm=lstm, used=used)

    def _point(self, hidden: Array, state: PointerState, used: Array) -> Array:
        """Logits [B, T, n] for states [B, T, H] of the LSTM and used elements [B, T, n]."""
        pointer_keys, *look_keys = state.keys
        mask = state.mask[:, None]
        for look, merge, keys in zip(self.looks, self.merges, look_keys):
            weights = masked_softmax(look(keys[:, None], hidden[:, :, None]), mask)
            read = jnp.einsum("btn,bnh->bth", weights, state.memory).astype(hidden.dtype)
            hidden = merge(jnp.concatenate([hidden, read], axis=-1))
        scores = self.pointer(pointer_keys[:, None], hidden[:, :, None])
        allowed = mask & ~used if self.mask_used else jnp.broadcast_to(mask, used.shape)
        # Beyond the end of a row nothing is left: any number will do, but NaN.
        impossible = jnp.where(allowed.any(axis=-1, keepdims=True), -jnp.inf, 0.0)
        return jnp.where(allowed, scores, impossible)
