"""Order Matters: sequence to sequence for sets (Vinyals, Bengio and Kudlur, ICLR 2016).

Encoder-decoders need an order, and many inputs and outputs have none. The recipe's ``config.task``
is one of

* ``sorting``: sets of numbers read in any order (``nn.SetEncoder``), sorted by pointing at them;
* ``ngrams``: n-grams as sets of (word, slot) pairs, written in an order that training finds;
* ``star``: one variable explains all others; a language model reads it first or last;
* ``lm_orders``: a language model of text as it is, reversed, or with every three words reversed;
* ``parsing``: trees written depth first or breadth first.
"""

import collections
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.configuration import ConfigError
from transfer_jax.data.paths import VARIABLE, require, require_file
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource, IndexSource
from transfer_jax.data.text import EOS, PAD, UNKNOWN, Vocabulary, evaluation_windows, stream_windows
from transfer_jax.models.generation import Decoding, generate_targets
from transfer_jax.models.recurrent import RecurrentNetwork
from transfer_jax.models.recurrent_seq2seq import DecoderState, RecurrentSeq2Seq
from transfer_jax.nn import Recurrent
from transfer_jax.nn.set2seq import (
    LSTM_OPTIONS,
    PointerDecoder,
    PointerState,
    SetEncoder,
)
from transfer_jax.objectives import (
    Aux,
    Generated,
    Mean,
    ModuleObjective,
    NextToken,
    Objective,
    Seq2Seq,
    TruncatedBPTT,
    UniformInit,
    Variables,
    example_mask,
)
from transfer_jax.objectives.base import Batch, PyTree
from transfer_jax.training import Experiment, FitConfig
from transfer_jax.training.config import from_dict

Array = jax.Array
Orders = tuple[tuple[int, ...], ...]

INPUT_ORDERS = ("as_is", "sorted", "random")
ORDER_SEARCHES = ("fixed", "uniform", "exact_max", "exact_sample", "ancestral")
WORD_ORDERS = ("natural", "reversed", "threes")
TREE_ORDERS = ("depth_first", "breadth_first")


def recipe(exp: Experiment) -> None:
    tasks: dict[str, Callable[[Experiment], None]] = {
        "sorting": sorting, "ngrams": ngrams, "star": star, "lm_orders": lm_orders,
        "parsing": parsing,
    }  # fmt: skip
    _choose("config.task", exp.config.task, tuple(tasks))
    tasks[exp.config.task](exp)


def plan(config: Any) -> tuple[Objective, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """What the last cell of a config would train, without its data, for ``training.aot``.

    Returns:
      The objective, a batch of shapes, and the settings of its stage.
    """
    size, settings = config.batch_size, from_dict(FitConfig, config.train, "train")

    def shape(*axes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *axes), dtype)

    if config.task == "sorting":
        cell = Cell(*config.cells[-1])
        return _sorting_objective(config, cell, 0), {"index": shape()}, settings
    if config.task == "ngrams":
        last = Search(*config.searches[-1])
        search = _search_objective(config, last, config.text.limit + 1)
        return search, {"inputs": shape(config.n)}, settings
    if config.task == "star":
        return _star_objective(config), {"inputs": shape(config.variables + 1)}, settings
    if config.task == "lm_orders":
        stream = _stream_objective(config, config.text.limit + 3)
        return stream, {"inputs": shape(config.unroll + 1), "reset": shape(dtype=bool)}, settings
    words, targets = Grammar().vocabulary(), tree_vocabulary(config.orders[-1])
    batch = {"inputs": shape(config.max_words), "lengths": shape(), "target_lengths": shape()}
    batch["targets"] = shape(4 * config.max_words + 1)
    return _parsing_objective(config, len(words), len(targets)), batch, settings


def _choose(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}; choose one of {', '.join(allowed)}.")


# -- pointing at the elements of a set (section 4) ------------------------------------------------


class SetToPointers(nn.Module):
    """A set, read by an encoder and answered with indices of its elements.

    Attributes:
      features: H.
      encoder: one of ``nn.set2seq.ENCODERS``.
      steps, score: of the process block.
      num_layers: of the encoder's LSTM.
      glimpses, mask_used: of the pointers.
      init_map: how the summary becomes the writer's first state; None = 'split' after
        ``ptrnet_lstm``, whose summary is a state, else 'linear'.
      dtype: compute dtype.
    """

    features: int = 256
    encoder: str = "rpw"
    steps: int = 5
    score: str = "dot"
    num_layers: int = 1
    glimpses: int = 1
    mask_used: bool = False
    init_map: str | None = None
    dtype: Any = None

    def setup(self):
        self.read = SetEncoder(
            self.encoder, self.features, self.steps, self.score, self.num_layers, dtype=self.dtype
        )
        init_map = self.init_map or ("split" if self.encoder == "ptrnet_lstm" else "linear")
        self.write = PointerDecoder(
            self.features, self.glimpses, self.mask_used, init_map, self.dtype
        )

    def __call__(self, inputs: Array, targets: Array, *, lengths: Array | None = None) -> Array:
        """Logits of each pointer given the true ones before it.

        Args:
          inputs: float [B, n, D].
          targets: int [B, T], indices of elements; -1 = none.
          lengths: int [B], valid elements.

        Returns:
          float32 [B, T, n], -inf where an element cannot be pointed at.
        """
        return self.write(self.start(inputs, lengths=lengths), targets)

    def start(
        self, inputs: Array, *, lengths: Array | None = None, max_length: int = 0
    ) -> PointerState:
        """The state before the first pointer.

        With ``step_logits`` this is what ``models.generate_targets`` needs; its ``Decoding`` has
        ``start_id`` = n, the padded size.
        """
        del max_length
        memory, summary = self.read(inputs, lengths)
        size = inputs.shape[1]
        mask = jnp.ones(inputs.shape[:2], bool)
        if lengths is not None:
            mask = jnp.arange(size) < lengths[:, None]
        return self.write.start(memory, summary, mask)

    def step_logits(self, pointed: Array, state: PointerState) -> tuple[Array, PointerState]:
        """Logits [B, n] after one more pointer [B] (n = none yet), and the next state."""
        return self.write.step(pointed, state)


class SetToTokens(RecurrentSeq2Seq, kw_only=True):
    """A set of tokens, answered with a sequence of tokens, under attention to the set.

    Trained by ``objectives.Seq2Seq``, decoded by ``generate_targets``.

    Attributes:
      kind: one of ``nn.set2seq.ENCODERS``.
      steps: of the process block.
    """

    attention: bool = True
    kind: str = "rpw"
    steps: int = 5

    def setup(self):
        super().setup()
        self.reader = SetEncoder(self.kind, self.features, self.steps, dtype=self.dtype)
        self.to_state = [nn.Dense(2 * self.features, dtype=self.dtype) for _ in range(self.layers)]

    def encode(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> DecoderState:
        """The decoder's state before the first token, of sets int [B, n]."""
        x = self.drop(self.embed_source(inputs), deterministic=not train)
        memory, summary = self.reader(x, lengths, train)
        halves = [jnp.split(dense(summary), 2, axis=-1) for dense in self.to_state]
        layers = tuple((cell, hidden) for cell, hidden in halves)
        return DecoderState(layers, None, memory, self.key(memory), lengths)


class Pointing(ModuleObjective):
    """``-sum_t log p(y_t | y_<t, X)`` of ``batch["targets"]`` ([B, T], -1 = none), mean over sets.

    The module is called as ``module(inputs, targets, lengths=...)``. Metrics: ``nll`` in nats per
    set; ``exact``, the share of sets with every pointer right (given the true ones before it, which
    is the same as in greedy decoding, for a first error ends both); ``position``, the share of
    single pointers that are right given the true ones before.
    """

    def init(self, rng: Array, batch: Batch) -> Variables:
        return self._initialise(rng, batch, batch["targets"])

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        targets = batch["targets"]
        logits, state = self.apply(variables, batch, rng, targets)
        counts = targets >= 0
        # Rows that do not count must not bring in -inf, whose gradient would be NaN.
        log_probs = jax.nn.log_softmax(jnp.where(counts[..., None], logits, 0.0))
        picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        right = jnp.argmax(logits, axis=-1) == targets
        mask = example_mask(batch, len(targets))
        nll = Mean.of(-jnp.where(counts, picked, 0.0).sum(axis=1), mask)
        metrics = {
            "nll": nll,
            "exact": Mean.of((right | ~counts).all(axis=1), mask),
            "position": Mean.of(right, mask[:, None] * counts),
        }
        return nll.value(), Aux(state, metrics, nll.weight, logits)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        """Returns logits [B, T, n] given the true pointers before each."""
        return self.apply(variables, batch, None, batch["targets"])[0]


@dataclasses.dataclass(frozen=True)
class SortingExample:
    """A set of numbers, uniform in [0, 1), and the indices that sort it; for ``Generated``.

    Attributes:
      size: numbers, or the padded size.
      min_size: sets have ``min_size`` to ``size`` numbers; 0 = all have ``size``.
    """

    size: int
    min_size: int = 0

    def __call__(self, key: Array, order: Array) -> dict[str, Array]:
        """Draws a set.

        Args:
          key: a typed key.
          order: int scalar, a position in ``INPUT_ORDERS``: how the set is given, ``as_is`` (as
            drawn), ``sorted``, or ``random`` (the same set in another random order).

        Returns:
          ``inputs`` [size, 1], ``targets`` int32 [size], and ``lengths`` where sizes differ.
        """
        draw, count, shuffle = jax.random.split(key, 3)
        length = jax.random.randint(count, (), self.min_size or self.size, self.size + 1)
        valid = jnp.arange(self.size) < length
        numbers = jnp.where(valid, jax.random.uniform(draw, (self.size,)), 2.0)
        place = jnp.where(valid, jax.random.uniform(shuffle, (self.size,)), 2.0)
        numbers = jnp.stack([numbers, jnp.sort(numbers), numbers[jnp.argsort(place)]])[order]
        targets = jnp.where(valid, jnp.argsort(numbers), -1).astype(jnp.int32)
        example = {"inputs": jnp.where(valid, numbers, 0.0)[:, None], "targets": targets}
        return {**example, "lengths": length} if self.min_size else example


class Cell(NamedTuple):
    """What is read and written with: an encoder, the steps of its process block, glimpses."""

    encoder: str
    steps: int
    glimpses: int

    @property
    def name(self) -> str:
        process = f"-P{self.steps}" if self.encoder == "rpw" else ""
        return f"{self.encoder}{process}-g{self.glimpses}"


def _sorting_objective(config: Any, cell: Cell, seed: int, order: str = "as_is") -> Generated:
    module = SetToPointers(**config.model.to_dict(), **cell._asdict())
    return Generated(
        inner=Pointing(module=module), seed=jnp.uint32(seed),
        settings=jnp.int32(INPUT_ORDERS.index(order)),
        generate=SortingExample(config.n, config.min_n),
    )  # fmt: skip


def sorting(exp: Experiment) -> None:
    """Trains every encoder of ``config.cells``; tests it on the same sets in several orders."""
    cfg = exp.config
    numbers = Pipeline(IndexSource(), cfg.batch_size, repeat=True)
    held_out = Pipeline(IndexSource(cfg.test_examples), cfg.eval_batch_size)
    rows, exact = [], {order: [] for order in INPUT_ORDERS}  # type: ignore[var-annotated]
    cells = [Cell(*cell) for cell in cfg.cells]
    for cell in cells:
        name = cell.name
        task = _sorting_objective(cfg, cell, exp.seed("train"))
        fitted = exp.fit(name, task, numbers, cfg.train)

        def test(cell=cell, variables=fitted.variables) -> dict[str, dict[str, float]]:
            seed = exp.seed("test")
            return {
                order: exp.evaluate(_sorting_objective(cfg, cell, seed, order), variables, held_out)
                for order in INPUT_ORDERS
            }

        tested = exp.artifact(f"test-{name}", test)
        for order in INPUT_ORDERS:
            exact[order].append(tested[order]["exact"])
        rows.append([
            name, *(round(tested[order]["exact"], 4) for order in INPUT_ORDERS),
            round(tested["as_is"]["position"], 4), round(tested["as_is"]["nll"], 4),
            fitted.summary["parameters"], round(fitted.summary["seconds"], 1),
        ])  # fmt: skip
    columns = [
        "encoder", *(f"exact, inputs {order}" for order in INPUT_ORDERS), "single pointers",
        "nats per set", "parameters", "seconds",
    ]  # fmt: skip
    exp.table(f"Sorting {cfg.n} numbers: share of sets with all of them right", columns, rows)
    names = [cell.name for cell in cells]
    exp.bars(f"Sorting {cfg.n} numbers", names, exact, ylabel="exact match")


# -- the order of output sets (section 5) ---------------------------------------------------------


@functools.cache
def permutations(n: int) -> np.ndarray:
    """All n! orders of n elements, [n!, n] int32, in lexicographic order.

    Raises:
      ValueError: n > 7.
    """
    if n > 7:
        raise ValueError(f"{n}! orders are too many to list; use order_search='ancestral'.")
    return np.array(list(itertools.permutations(range(n))), np.int32)


class TokenSlotModel(nn.Module):
    """An LSTM that writes a set of (token, slot) pairs, one after the other, in any order.

    At every step ``p(slot | before) p(token | before, slot)``. Since every pair says where its
    token belongs, each order tells the whole sequence.

    Attributes:
      vocab_size: V.
      slots: n.
      features: H.
      embedding: width of the embedded pairs.
      dtype: compute dtype; probabilities are float32.
    """

    vocab_size: int
    slots: int
    features: int = 256
    embedding: int = 128
    dtype: Any = None

    def setup(self):
        options = {"dtype": self.dtype}
        self.tokens = nn.Embed(self.vocab_size, self.embedding, **options)
        self.places = nn.Embed(self.slots, self.embedding, **options)
        self.go = self.param("go", nn.initializers.zeros, (self.embedding,))
        self.lstm = Recurrent(self.features, options=LSTM_OPTIONS, **options)
        self.slot_head = nn.Dense(self.slots, **options)
        self.merge = nn.Dense(self.features, **options)
        self.merge_slot = nn.Embed(self.slots, self.features, **options)
        self.token_head = nn.Dense(self.vocab_size, **options)

    def __call__(self, inputs: Array, orders: Array) -> tuple[Array, Array]:
        """Log-probabilities of sequences, written in given orders.

        Args:
          inputs: int [B, n], the token of each slot.
          orders: int [B, n]: the slots, in the order of writing.

        Returns:
          float32 [B, n] each: of the slots, and of the tokens given their slots.
        """
        tokens = jnp.take_along_axis(inputs, orders, axis=1)
        before = self._embed(tokens[:, :-1], orders[:, :-1])
        inputs = jnp.concatenate([self._go(len(tokens))[:, None], before], axis=1)
        hidden, _ = self.lstm.run(inputs)
        slot, token = self._score(hidden, tokens[..., None], orders[..., None])
        return slot[..., 0], token[..., 0]

    def all_orders(self, inputs: Array) -> Array:
        """``log p(Y_pi)`` of all orders, float32 [B, n!], in the order of ``permutations``.

        Common beginnings are computed once.
        """
        batch, n = inputs.shape
        remaining = np.arange(n)[None]  # of every beginning, [P, n - t]
        total = jnp.zeros((batch, 1), jnp.float32)
        state, written = self.lstm.initial_state(batch), self._go(batch)
        permutations(n)  # refuses too many
        for _ in range(n):
            hidden, state = self.lstm.step(written, state)
            count, left = remaining.shape
            slots = jnp.broadcast_to(remaining, (batch, count, left)).reshape(-1, left)
            tokens = inputs[:, remaining.ravel()].reshape(-1, left)
            slot, token = self._score(hidden, tokens, slots)
            score = (slot + token).reshape(batch, count, left)
            total = (total[..., None] + score).reshape(batch, -1)
            written = self._embed(tokens, slots).reshape(batch * count * left, -1)
            state = jax.tree.map(lambda x, left=left: jnp.repeat(x, left, axis=0), state)
            remaining = np.array([np.delete(row, i) for row in remaining for i in range(left)])
        return total

    def ancestral(self, inputs: Array, rng: Array | None) -> Array:
        """Draws an order, an element at a time, among those that are left.

        The next element is drawn in proportion to its joint probability of slot and token given
        those before. An order has probability ``prod_t p(y_t | y_<t) / Z_t``, where Z_t sums over
        the elements left at step t.

        Args:
          inputs: int [B, n].
          rng: a typed key; None takes the likeliest element each time.

        Returns:
          int32 [B, n].
        """
        batch, n = inputs.shape
        remaining = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
        state, written = self.lstm.initial_state(batch), self._go(batch)
        chosen = []
        for t in range(n - 1):
            hidden, state = self.lstm.step(written, state)
            tokens = jnp.take_along_axis(inputs, remaining, axis=1)
            scores = self._score(hidden, tokens, remaining)
            score = scores[0] + scores[1]
            if rng is None:
                at = jnp.argmax(score, axis=-1)[:, None]
            else:
                at = jax.random.categorical(jax.random.fold_in(rng, t), score)[:, None]
            slot = jnp.take_along_axis(remaining, at, axis=1)
            chosen.append(slot)
            written = self._embed(jnp.take_along_axis(inputs, slot, axis=1), slot)[:, 0]
            kept = jnp.arange(n - t - 1)
            remaining = jnp.take_along_axis(remaining, kept + (kept >= at), axis=1)
        return jnp.concatenate([*chosen, remaining], axis=1)

    def _go(self, batch: int) -> Array:
        go = self.go if self.dtype is None else self.go.astype(self.dtype)
        return jnp.broadcast_to(go, (batch, self.embedding))

    def _embed(self, tokens: Array, slots: Array) -> Array:
        return self.tokens(tokens) + self.places(slots)

    def _score(self, hidden: Array, tokens: Array, slots: Array) -> tuple[Array, Array]:
        """Log-probabilities [..., K] of K pairs each, after states [..., H]."""
        slot = jax.nn.log_softmax(self.slot_head(hidden).astype(jnp.float32))
        query = jnp.tanh(self.merge(hidden)[..., None, :] + self.merge_slot(slots))
        logits = self.token_head(query).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        token = picked - jax.nn.logsumexp(logits, axis=-1)
        return jnp.take_along_axis(slot, slots, axis=-1), token


class OrderSearch(ModuleObjective):
    """``max_theta sum_i log p(Y_pi(i))``, where training finds the orders pi(i) (section 5.2).

    ``batch["inputs"]`` int [B, n] holds the token of each slot; the module is a ``TokenSlotModel``.
    In training one order per example is chosen and held fixed (no gradient flows through the
    choice), and ``-log p(Y_pi)`` is lowered:

    * ``fixed``: the first candidate;
    * ``uniform``: any candidate, drawn uniformly;
    * ``exact_max``: the candidate of the largest probability;
    * ``exact_sample``: drawn in proportion to ``p(Y_pi)`` among the candidates;
    * ``ancestral``: drawn element by element; candidates are all orders, which are not listed.

    The first ``warmup`` steps of the last three draw uniformly: without them whichever order the
    initial parameters like wins.

    Metrics of training: ``nll``, the sum of ``slot`` and ``token``, in nats per sequence. Metrics
    of evaluation, over all candidates: ``set_nll`` = ``-logsumexp_pi log p(Y_pi)``, the negative
    log-likelihood of the set (exact where all orders are candidates, else an upper bound);
    ``max_nll`` = ``-max_pi log p(Y_pi)``, an upper bound of it; ``slot`` and ``token`` terms of the
    best order; ``first``, how often that is the first candidate; ``entropy`` of the orders given
    the set, in nats. Beyond 7 elements orders are not listed: then both are those of the greedy
    order, and the last two are left out.

    Attributes:
      order_search: one of ``ORDER_SEARCHES``.
      candidates: orders, as tuples of slots; empty = all of them (the first is the natural one).
      warmup: steps.
      searching: whether the warm-up is over; set by ``at``.
    """

    order_search: str = flax.struct.field(pytree_node=False, default="ancestral")
    candidates: Orders = flax.struct.field(pytree_node=False, default=())
    warmup: Array | int = 0
    searching: Array | bool = True

    def at(self, step: Array) -> "OrderSearch":
        return self.replace(searching=step >= self.warmup)

    def init(self, rng: Array, batch: Batch) -> Variables:
        return self._initialise(rng, batch, self._given(batch["inputs"], 0))

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        inputs = batch["inputs"]
        mask = example_mask(batch, len(inputs))
        if rng is None:
            orders, extra = self._best(variables, batch, mask)
        else:
            orders, extra = self.choose(variables, batch, rng), {}
        (slot, token), state = self.apply(variables, batch, None, orders)
        slot, token = slot.sum(axis=1), token.sum(axis=1)
        nll = Mean.of(-(slot + token), mask)
        metrics = {"slot": Mean.of(-slot, mask), "token": Mean.of(-token, mask), **extra}
        metrics["nll" if rng is not None else "max_nll"] = nll
        if rng is None:
            nll = metrics.setdefault("set_nll", nll)
        return nll.value(), Aux(state, metrics, nll.weight, orders)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        """Returns ``log p(Y_pi)`` of all candidates, [B, K]."""
        inputs = batch["inputs"]
        if not self.candidates:
            return self.apply(variables, batch, None, method="all_orders")[0]
        count = len(self.candidates)
        orders = jnp.tile(jnp.asarray(self.candidates, jnp.int32), (len(inputs), 1))
        rows = {"inputs": jnp.repeat(inputs, count, axis=0)}
        slot, token = self.apply(variables, rows, None, orders)[0]
        return (slot + token).sum(axis=1).reshape(-1, count)

    def choose(self, variables: Variables, batch: Batch, rng: Array) -> Array:
        """The orders int32 [B, n] that a training step lowers the likelihood's negative of.

        Raises:
          ValueError: an unknown search, or candidates that are no orders of the slots or that the
            search does not take.
        """
        inputs = batch["inputs"]
        self._check(inputs.shape[1])
        fixed = jax.lax.stop_gradient(variables)
        if self.order_search == "fixed":
            return self._given(inputs, 0)

        def uniform(rng: Array) -> Array:
            if not self.candidates:
                rows = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
                return jax.random.permutation(rng, rows, axis=1, independent=True)
            drawn = jax.random.randint(rng, (len(inputs),), 0, len(self.candidates))
            return self._given(inputs, drawn)

        def search(rng: Array) -> Array:
            if self.order_search == "ancestral":
                return self.apply(fixed, batch, None, rng, method="ancestral")[0]
            log_probs = self.predict(fixed, batch)
            if self.order_search == "exact_max":
                return self._given(inputs, jnp.argmax(log_probs, axis=-1))
            return self._given(inputs, jax.random.categorical(rng, log_probs))

        if self.order_search == "uniform":
            return uniform(rng)
        return jax.lax.cond(self.searching, search, uniform, rng)

    def _best(
        self, variables: Variables, batch: Batch, mask: Array
    ) -> tuple[Array, dict[str, Mean]]:
        inputs = batch["inputs"]
        if not self.candidates and inputs.shape[1] > 7:
            return self.apply(variables, batch, None, None, method="ancestral")[0], {}
        log_probs = self.predict(variables, batch)
        best = jnp.argmax(log_probs, axis=-1)
        given_set = jax.nn.log_softmax(log_probs)
        return self._given(inputs, best), {
            "set_nll": Mean.of(-jax.nn.logsumexp(log_probs, axis=-1), mask),
            "first": Mean.of(best == 0, mask),
            "entropy": Mean.of(-(jnp.exp(given_set) * given_set).sum(axis=-1), mask),
        }

    def _given(self, inputs: Array, which: Array | int) -> Array:
        """The candidates of some numbers (a scalar or [B]) as [B, n]."""
        batch, n = inputs.shape
        if not self.candidates and isinstance(which, int) and which == 0:
            return jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
        orders = np.asarray(self.candidates, np.int32) if self.candidates else permutations(n)
        return jnp.broadcast_to(jnp.asarray(orders)[which], (batch, n))

    def _check(self, n: int) -> None:
        _choose("order_search", self.order_search, ORDER_SEARCHES)
        wrong = [order for order in self.candidates if sorted(order) != list(range(n))]
        if wrong:
            raise ValueError(f"candidates {wrong} are no orders of the slots 0 to {n - 1}.")
        if self.candidates and self.order_search == "ancestral":
            raise ValueError(
                "order_search='ancestral' goes through all orders; with candidates use "
                "'exact_sample'."
            )


class Search(NamedTuple):
    """A line of the table of orders; see ``OrderSearch``."""

    name: str
    order_search: str
    candidates: Orders


def _search_objective(config: Any, search: Search, vocab_size: int) -> OrderSearch:
    module = TokenSlotModel(vocab_size=vocab_size, slots=config.n, **config.model.to_dict())
    return OrderSearch(
        module=module, order_search=search.order_search, warmup=config.warmup,
        candidates=tuple(tuple(order) for order in search.candidates),
    )  # fmt: skip


def ngrams(exp: Experiment) -> None:
    """Trains the same model with every search of ``config.searches``; perplexity per word."""
    cfg = exp.config
    words, text = _words(cfg.text)
    train, validation = _ngram_sources(cfg, words)
    vocab_size = 1 + int(max(train.arrays["inputs"].max(), validation.arrays["inputs"].max()))
    held_out = Pipeline(validation, cfg.eval_batch_size)
    rows, histograms = [], {}
    for search in (Search(*search) for search in cfg.searches):
        name = search.name
        task = _search_objective(cfg, search, vocab_size)
        batches = Pipeline(
            train, cfg.batch_size, shuffle=True, seed=exp.seed("batches"), repeat=True
        )
        fitted = exp.fit(name, task, batches, cfg.train, evaluate={"validation": held_out})
        metrics = {k.removeprefix("validation/"): v for k, v in fitted.metrics.items()}
        histograms[name] = exp.artifact(
            f"orders-{name}", functools.partial(_histogram, exp, task, fitted.variables, held_out)
        )
        commonest = max(histograms[name], key=histograms[name].__getitem__)
        perplexity = [math.exp(metrics[key] / cfg.n) for key in ("set_nll", "max_nll")]
        rows.append([
            name, *(round(value, 2) for value in perplexity), round(metrics["slot"], 4),
            round(metrics["first"], 4), commonest, round(histograms[name][commonest], 4),
            round(metrics["entropy"], 4), round(fitted.summary["seconds"], 1),
        ])  # fmt: skip
        exp.record(f"set perplexity of {name}", perplexity[0])
    columns = [
        "order", "perplexity of the set", "of its best order", "slot terms, nats",
        "best order is the first", "commonest best order", "its share", "entropy of orders",
        "seconds",
    ]  # fmt: skip
    exp.record("text", text)
    exp.table(f"{cfg.n}-grams as sets, validation", columns, rows)
    exp.bars(
        "Perplexity of the set", list(histograms), {"": [row[1] for row in rows]}, ylabel="per word"
    )
    for name, shares in histograms.items():
        shown = sorted(shares, key=shares.__getitem__, reverse=True)[:8]
        exp.bars(f"Best orders, {name}", shown, {"": [shares[k] for k in shown]}, ylabel="share")


def _histogram(
    exp: Experiment, task: OrderSearch, variables: Variables, data: Pipeline
) -> dict[str, float]:
    """How often each order (slots counted from 1) has the largest probability."""
    predict = jax.jit(lambda t, v, b: t.predict(v, b))
    counts: collections.Counter[str] = collections.Counter()
    for batch in exp.batches(data):
        best = np.asarray(jnp.argmax(predict(task, variables, batch), axis=-1))
        orders = task.candidates or permutations(batch["inputs"].shape[1])
        for i in best[np.asarray(batch["mask"]) > 0]:
            counts["".join(str(slot + 1) for slot in orders[int(i)])] += 1
    total = sum(counts.values())
    return {order: count / total for order, count in counts.most_common()}


def _ngram_sources(config: Any, words: list[str]) -> tuple[ArraySource, ArraySource]:
    """n-grams without context: anywhere in the first nine tenths; one after the other in the rest.

    Words are counted in the first part; all but the ``limit`` commonest are one.
    """
    cut = len(words) * 9 // 10
    vocabulary = Vocabulary.build(words[:cut], specials=(UNKNOWN,))
    vocabulary = Vocabulary(vocabulary.tokens[: config.text.limit + 1])
    n = config.n

    def windows(words: list[str], starts: np.ndarray) -> ArraySource:
        return ArraySource({"inputs": vocabulary.encode(words)[starts[:, None] + np.arange(n)]})

    starts = np.random.default_rng(config.seed).permutation(cut - n)[: config.train_examples]
    held_out = np.arange(0, len(words) - cut - n, n)[: config.validation_examples]
    return windows(words[:cut], starts), windows(words[cut:], held_out)


# -- star models (section 5.1) --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Star:
    """A head variable, and leaves that depend on it alone.

    Attributes:
      head: [K], p of the head.
      leaves: [T - 1, K, K], ``p_t(leaf | head)``, rows by head.
    """

    head: np.ndarray
    leaves: np.ndarray

    @classmethod
    def draw(cls, seed: int, *, symbols: int, variables: int, peakiness: float) -> "Star":
        """Tables with logits ``peakiness * N(0, 1)``; T = ``variables`` counts the head."""
        rng = np.random.default_rng((seed, 0))

        def table(*shape: int) -> np.ndarray:
            weights = np.exp(peakiness * rng.normal(size=shape))
            return weights / weights.sum(-1, keepdims=True)

        return cls(table(symbols), table(variables - 1, symbols, symbols))

    def entropy(self) -> float:
        """``-sum_k p_k log p_k + sum_t sum_k p_k H(p_t(. | k))`` in nats: no model does better."""
        leaves = -(self.leaves * np.log(self.leaves)).sum(-1).sum(0)
        return float(-(self.head * np.log(self.head)).sum() + self.head @ leaves)

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws [count, T] int32, the head first."""
        variables = 1 + len(self.leaves)
        uniform = rng.random((count, variables))
        x = np.empty((count, variables), np.int32)
        last = len(self.head) - 1  # sums may end a little below 1
        x[:, 0] = np.minimum(np.searchsorted(np.cumsum(self.head), uniform[:, 0]), last)
        for t, table in enumerate(self.leaves, start=1):
            below = np.cumsum(table, axis=-1)[x[:, 0]] < uniform[:, t, None]
            x[:, t] = np.minimum(below.sum(axis=-1), last)
        return x


def _language_model(
    config: Any, vocab_size: int, outputs: int, streams: int | None = None
) -> RecurrentNetwork:
    m = config.model
    body = Recurrent(
        m.features, m.num_layers, options=LSTM_OPTIONS, dropout=m.dropout, streams=streams,
        dtype=m.dtype,
    )  # fmt: skip
    return RecurrentNetwork(
        body=body, outputs=outputs, vocab_size=vocab_size, embedding=m.features,
        dropout=m.dropout, dtype=m.dtype,
    )  # fmt: skip


def _star_objective(config: Any) -> NextToken:
    # One more input than outputs: what stands before the first variable.
    return NextToken(module=_language_model(config, config.symbols + 1, config.symbols))


def star(exp: Experiment) -> None:
    """Trains head first and head last on samples of several sizes; test NLL above the entropy."""
    cfg = exp.config
    model = Star.draw(
        cfg.table_seed, symbols=cfg.symbols, variables=cfg.variables, peakiness=cfg.peakiness
    )
    entropy = model.entropy()
    rng = np.random.default_rng((exp.config.seed, 1))
    held_out = {name: model.sample(rng, cfg.held_out_examples) for name in ("validation", "test")}
    pool = model.sample(rng, max(cfg.train_examples))
    evaluated = {"batch_size": cfg.eval_batch_size}
    rows = []
    curves: dict[str, list[float]] = {"head first": [], "head last": []}
    for size in cfg.train_examples:
        for order, curve in curves.items():

            def data(x: np.ndarray, order=order, **options: Any) -> Pipeline:
                x = np.roll(x, -1, axis=1) if order == "head last" else x
                inputs = np.pad(x, ((0, 0), (1, 0)), constant_values=cfg.symbols)
                return Pipeline(ArraySource({"inputs": inputs}), **options)

            task, name = _star_objective(cfg), f"{order.replace(' ', '-')}-{size}"
            fitted = exp.fit(
                name, task,
                data(pool[:size], batch_size=cfg.batch_size, shuffle=True, seed=exp.seed(name),
                     repeat=True),
                cfg.train,
                evaluate={"validation": data(held_out["validation"], **evaluated)},
            )  # fmt: skip

            def test(task=task, variables=fitted.variables, data=data) -> float:
                batches = data(held_out["test"], **evaluated)
                return exp.evaluate(task, variables, batches)["nll"] * cfg.variables

            nll = exp.artifact(f"test-{name}", test)
            curve.append(nll)
            rows.append([size, order, round(nll, 4), round(nll - entropy, 4)])
    exp.record("entropy", entropy)
    columns = ["training examples", "order", "test nats per example", "above the entropy"]
    exp.table(f"Star model of {cfg.variables} variables, entropy {entropy:.4f}", columns, rows)
    exp.curve(
        "Test negative log-likelihood", list(cfg.train_examples),
        {**curves, "entropy": [entropy] * len(cfg.train_examples)},
        xlabel="training examples", ylabel="nats",
    )  # fmt: skip


# -- language models of text in several orders (section 5.1) --------------------------------------


def reorder(words: Sequence[str], order: str) -> list[str]:
    """A sentence in another order.

    Args:
      words: of the sentence.
      order: ``natural``, ``reversed``, or ``threes``: filled up with ``<pad>`` to a multiple of
        three, and each three words reversed ("a is This <pad> . sentence").

    Raises:
      ConfigError: another order.
    """
    _choose("order", order, WORD_ORDERS)
    if order == "natural":
        return list(words)
    if order == "reversed":
        return list(reversed(words))
    padded = [*words, *[PAD] * (-len(words) % 3)]
    return [word for i in range(0, len(padded), 3) for word in reversed(padded[i : i + 3])]


class PaddedNextToken(NextToken):
    """``NextToken`` whose targets equal to ``pad_id`` do not count.

    Attributes:
      pad_id: see above.
    """

    pad_id: int = flax.struct.field(pytree_node=False, default=0)

    def _shift(self, batch: Batch) -> tuple[Batch, Array, Array]:
        inner, targets, weights = super()._shift(batch)
        return inner, targets, weights * (targets != self.pad_id)


def _stream_objective(config: Any, vocab_size: int) -> Objective:
    module = _language_model(config, vocab_size, vocab_size, config.batch_size)
    task = TruncatedBPTT(inner=PaddedNextToken(module=module))
    return UniformInit(inner=task, scale=config.init_scale) if config.init_scale else task


def lm_orders(exp: Experiment) -> None:
    """Trains one language model per order of the words; perplexity without padding."""
    cfg = exp.config
    sentences, text = _sentences(cfg.text)
    cut = len(sentences) * 9 // 10
    specials = (PAD, UNKNOWN, EOS)
    vocabulary = Vocabulary.build((w for s in sentences[:cut] for w in s), specials=specials)
    vocabulary = Vocabulary(vocabulary.tokens[: cfg.text.limit + len(specials)])
    task = _stream_objective(cfg, len(vocabulary))
    rows = []
    for order in cfg.orders:
        streams = [
            vocabulary.encode(w for s in part for w in (*reorder(s, order), EOS))
            for part in (sentences[:cut], sentences[cut:])
        ]
        windows = stream_windows(streams[0], cfg.unroll, cfg.batch_size)
        parts = {
            name: Pipeline(evaluation_windows(tokens, cfg.eval_length), cfg.eval_batch_size)
            for name, tokens in zip(("training", "validation"), streams)
        }
        train = Pipeline(windows, cfg.batch_size, repeat=True)
        watched = {"validation": parts["validation"]}
        fitted = exp.fit(order, task, train, cfg.train, evaluate=watched)

        def nats(parts=parts, variables=fitted.variables) -> dict[str, float]:
            return {k: exp.evaluate(task, variables, part)["nll"] for k, part in parts.items()}

        nll = exp.artifact(f"nll-{order}", nats)
        rows.append([order, *(round(math.exp(nll[part]), 2) for part in parts),
                     round(fitted.summary["seconds"], 1)])  # fmt: skip
    exp.record("text", text)
    exp.record("vocabulary", len(vocabulary))
    columns = ["order", "training perplexity", "validation perplexity", "seconds"]
    exp.table("Language models of words in several orders", columns, rows)
    exp.bars(
        "Perplexity by order", [row[0] for row in rows],
        {"training": [row[1] for row in rows], "validation": [row[2] for row in rows]},
        ylabel="per word",
    )  # fmt: skip


# -- text -----------------------------------------------------------------------------------------


def _sentences(config: Any) -> tuple[list[list[str]], str]:
    """Sentences of lower-case words and punctuation, and what text they are from.

    ``config.path`` names a file; without one it is tinyshakespeare where ``TRANSFER_JAX_DATA`` is
    set, else ``config.generated`` sentences of ``Grammar``.
    """
    if not config.path and not os.environ.get(VARIABLE):
        trees = Grammar().sample(np.random.default_rng(0), config.generated, 20)
        return [[*leaves(tree), "."] for tree in trees], "generated by a small grammar"
    if config.path:
        path = require_file(Path(config.path), "config.text.path names a plain text file.")
    else:
        path = require("tinyshakespeare", "input.txt")
    words = re.findall(r"[a-z']+|[.,;:!?]", path.read_text(encoding="utf-8").lower())
    sentences: list[list[str]] = [[]]
    for word in words:
        sentences[-1].append(word)
        if word in (".", "!", "?"):
            sentences.append([])
    return [s for s in sentences if s], path.name if config.path else "tinyshakespeare"


def _words(config: Any) -> tuple[list[str], str]:
    sentences, text = _sentences(config)
    return [word for sentence in sentences for word in sentence], text


# -- trees (section 5.1.2) ------------------------------------------------------------------------

# A tree is (label, child, ...), a leaf (tag, word).
Tree = Sequence[Any]

_RULES: dict[str, list[tuple[float, tuple[str, ...]]]] = {
    "S": [(1.0, ("NP", "VP"))],
    "NP": [(0.4, ("DT", "NN")), (0.15, ("DT", "JJ", "NN")), (0.15, ("PRP",)),
           (0.2, ("NP", "PP")), (0.1, ("NP", "SBAR"))],
    "VP": [(0.3, ("VB",)), (0.4, ("VB", "NP")), (0.2, ("VB", "NP", "ADVP")),
           (0.1, ("VB", "SBAR"))],
    "PP": [(1.0, ("IN", "NP"))],
    "ADVP": [(0.6, ("RB",)), (0.4, ("WITH", "NP"))],
    "SBAR": [(1.0, ("WH", "VP"))],
}  # fmt: skip
_LEXICON = {
    "DT": "the a this every some no",
    "NN": "cat dog king queen house river boat tree letter song garden sword stone crown road "
          "child friend horse bird book",
    "JJ": "old young red small great quiet dark kind strange happy",
    "PRP": "he she it they we you",
    "VB": "sees likes finds holds knows hears follows leaves takes brings sleeps waits sings runs",
    "IN": "of about from under",
    "WITH": "with near before after",
    "RB": "now often never soon",
    "WH": "who that",
}  # fmt: skip


class Grammar:
    """A small probabilistic grammar of English-like sentences; preposition decides attachment."""

    def vocabulary(self) -> Vocabulary:
        """All words, after ``<pad>``."""
        return Vocabulary((PAD, *(w for words in _LEXICON.values() for w in words.split())))

    def sample(self, rng: np.random.Generator, count: int, max_words: int) -> list[Tree]:
        """Draws trees of at most ``max_words`` words."""
        trees: list[Tree] = []
        while len(trees) < count:
            tree = self._expand(rng, "S", max_words)
            if tree is not None and len(leaves(tree)) <= max_words:
                trees.append(tree)
        return trees

    def _expand(self, rng: np.random.Generator, label: str, depth: int) -> Tree | None:
        if label in _LEXICON:
            words = _LEXICON[label].split()
            # Frequencies fall as in natural text.
            weights = 1.0 / np.arange(2, len(words) + 2)
            return label, words[rng.choice(len(words), p=weights / weights.sum())]
        if depth == 0:
            return None
        chances, right = zip(*_RULES[label])
        children = []
        for child in right[rng.choice(len(right), p=chances)]:
            children.append(self._expand(rng, child, depth - 1))
            if children[-1] is None:
                return None
        return label, *children


def leaves(tree: Tree) -> list[str]:
    """The words of a tree."""
    if isinstance(tree[1], str):
        return [tree[1]]
    return [word for child in tree[1:] for word in leaves(child)]


def linearise(tree: Tree, order: str) -> list[str]:
    """A tree as tokens, without its words: ``XX`` stands for each.

    ``depth_first`` is the bracket notation, ``(S (NP XX XX ) (VP XX ) )``. ``breadth_first`` gives
    the root, then the children of every node, level by level, each list ended by ``/``:
    ``S NP VP / XX XX / XX /``.

    Raises:
      ConfigError: another order.
    """
    _choose("order", order, TREE_ORDERS)
    if order == "depth_first":
        if isinstance(tree[1], str):
            return ["XX"]
        return [f"({tree[0]}", *(t for c in tree[1:] for t in linearise(c, order)), ")"]
    tokens, queue = [tree[0]], collections.deque([tree])
    while queue:
        for child in queue.popleft()[1:]:
            leaf = isinstance(child[1], str)
            tokens.append("XX" if leaf else child[0])
            if not leaf:
                queue.append(child)
        tokens.append("/")
    return tokens


def spans_of(tree: Tree) -> collections.Counter:
    """How often a tree has each labelled span (label, first word, word after the last)."""
    spans: collections.Counter = collections.Counter()

    def visit(tree: Tree, start: int) -> int:
        if isinstance(tree[1], str):
            return start + 1
        end = start
        for child in tree[1:]:
            end = visit(child, end)
        spans[tree[0], start, end] += 1
        return end

    visit(tree, 0)
    return spans


def brackets(tokens: Sequence[str], order: str) -> "collections.Counter | None":
    """As ``spans_of``, of a linearised tree.

    Returns:
      The counts; None where the tokens are no tree.
    """
    _choose("order", order, TREE_ORDERS)
    tokens = list(tokens)
    read = _read_depth_first if order == "depth_first" else _read_breadth_first
    root = read(tokens)
    return None if root is None else spans_of(root)


def _read_depth_first(tokens: list[str]) -> list | None:
    root: list[Any] = [None]
    stack = [root]
    for i, token in enumerate(tokens):
        if token.startswith("("):
            stack[-1].append([token[1:]])
            stack.append(stack[-1][-1])
        elif token == ")" and len(stack) > 1:
            if len(stack.pop()) == 1:
                return None
            if len(stack) == 1:
                return root[1] if i == len(tokens) - 1 else None
        elif token == "XX" and len(stack) > 1:
            stack[-1].append((token, token))
        else:
            return None
    return None


def _read_breadth_first(tokens: list[str]) -> list | None:
    if not tokens or tokens[0] not in _RULES:
        return None
    root = [tokens[0]]
    queue: collections.deque[list] = collections.deque([root])
    for token in tokens[1:]:
        if not queue:
            return None
        if token == "/":
            if len(queue.popleft()) == 1:
                return None
        elif token == "XX":
            queue[0].append((token, token))
        elif token in _RULES:
            queue[0].append([token])
            queue.append(queue[0][-1])
        else:
            return None
    return None if queue else root


def bracket_f1(
    predicted: Sequence["collections.Counter | None"], true: Sequence["collections.Counter"]
) -> float:
    """F1 of all labelled spans together; what is no tree has none."""
    right = sum((p & t).total() for p, t in zip(predicted, true) if p is not None)
    given = sum(p.total() for p in predicted if p is not None)
    return 2 * right / (given + sum(t.total() for t in true))


def tree_vocabulary(order: str) -> Vocabulary:
    """The tokens of linearised trees, after ``<pad>`` (which starts a target) and ``<eos>``."""
    _choose("order", order, TREE_ORDERS)
    labels = tuple(f"({label}" for label in _RULES) + (")",)
    if order == "breadth_first":
        labels = (*_RULES, "/")
    return Vocabulary((PAD, EOS, *labels, "XX"))


def _parsing_objective(config: Any, words: int, targets: int) -> Seq2Seq:
    module = RecurrentSeq2Seq(
        source_vocab_size=words, vocab_size=targets, attention=True, **config.model.to_dict()
    )
    return Seq2Seq(module=module)


def _tree_source(trees: Sequence[Tree], order: str, max_words: int) -> ArraySource:
    """Words and linearised trees, padded."""
    words, tokens = Grammar().vocabulary(), tree_vocabulary(order)
    sources = [words.encode(leaves(tree)) for tree in trees]
    targets = [tokens.encode([*linearise(tree, order), EOS]) for tree in trees]
    length = max(map(len, targets))

    def padded(rows: list[np.ndarray], width: int) -> np.ndarray:
        return np.stack([np.pad(row, (0, width - len(row))) for row in rows])

    return ArraySource(
        {
            "inputs": padded(sources, max_words),
            "lengths": np.array([len(row) for row in sources], np.int32),
            "targets": padded(targets, length),
            "target_lengths": np.array([len(row) for row in targets], np.int32),
        }
    )


def parsing(exp: Experiment) -> None:
    """Trains one parser per linearisation; F1 of the labelled spans of its greedy output."""
    cfg = exp.config
    rng = np.random.default_rng((cfg.seed, 2))
    total = cfg.train_examples + cfg.test_examples
    trees = Grammar().sample(rng, total, cfg.max_words)
    train, test = trees[: cfg.train_examples], trees[cfg.train_examples :]
    rows = []
    for order in cfg.orders:
        vocabulary = tree_vocabulary(order)
        task = _parsing_objective(cfg, len(Grammar().vocabulary()), len(vocabulary))
        source = _tree_source(train, order, cfg.max_words)
        held_out = _tree_source(test, order, cfg.max_words)
        fitted = exp.fit(
            order, task,
            Pipeline(source, cfg.batch_size, shuffle=True, seed=exp.seed("batches"), repeat=True),
            cfg.train, evaluate={"test": Pipeline(held_out, cfg.batch_size)},
        )  # fmt: skip

        def score(
            order=order, vocabulary=vocabulary, task=task, held_out=held_out, fitted=fitted
        ) -> dict[str, float]:
            decoding = Decoding(
                max_tokens=held_out.arrays["targets"].shape[1], start_id=0, eos_id=1, pad_id=0
            )
            predicted = []
            for batch in exp.batches(Pipeline(held_out, cfg.batch_size)):
                written = generate_targets(
                    task.module, {"params": fitted.params}, batch["inputs"], decoding,
                    lengths=batch["lengths"],
                )  # fmt: skip
                kept = int(np.asarray(batch["mask"]).sum())
                for row, length in zip(
                    np.asarray(written.tokens)[:kept], np.asarray(written.lengths)[:kept]
                ):
                    tokens = [t for t in vocabulary.decode(row[:length]) if t != EOS]
                    predicted.append(brackets(tokens, order))
            true = [spans_of(tree) for tree in test]
            return {
                "f1": bracket_f1(predicted, true),
                "exact": float(np.mean([p == t for p, t in zip(predicted, true)])),
                "malformed": float(np.mean([p is None for p in predicted])),
            }

        scores = exp.artifact(f"test-{order}", score)
        rows.append([order, *(round(scores[k], 4) for k in ("f1", "exact", "malformed")),
                     round(fitted.metrics["test/nll"], 4),
                     round(fitted.summary["seconds"], 1)])  # fmt: skip
    columns = ["order", "F1", "exact", "no tree", "nats per token", "seconds"]
    exp.table("Parsing generated sentences", columns, rows)
    exp.bars(
        "Parsing", [row[0] for row in rows],
        {"F1": [row[1] for row in rows], "exact": [row[2] for row in rows]}, ylabel="share",
    )  # fmt: skip
