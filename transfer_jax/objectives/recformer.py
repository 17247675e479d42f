"""Recformer's two losses: pairs of histories and next items with masked words; ranking by cosine.

Sequences are dictionaries of ``inputs``, ``token_types``, ``item_positions`` (int [B, L]) and
``lengths`` (int [B]), see ``transfer_jax.data.recformer``.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from transfer_jax.models.recformer import Recformer
from transfer_jax.objectives import losses
from transfer_jax.objectives.base import Array, Aux, Batch, Mean, PyTree, Variables
from transfer_jax.objectives.contrastive import unit
from transfer_jax.objectives.recommend import (
    NEVER,
    Recommendation,
    item_cross_entropy,
    sampled_softmax,
    scores_of,
)
from transfer_jax.objectives.tasks import ModuleObjective, example_mask

NEGATIVES = ("all", "sampled", "batch")

# Encode the items at the first step, and never again.
ONCE = 2**30


# -- losses ---------------------------------------------------------------------------------------


def matching_scores(
    sequences: Array, items: Array, temperature: Array | float, mask: Array | None = None
) -> Array:
    """Cosines of all sequences with all items over the temperature, float32 [B, B].

    Args:
      sequences, items: [B, d].
      temperature: tau.
      mask: [B], 0 = padding row, whose item is no candidate; None = all count.
    """
    scores = unit(sequences.astype(jnp.float32)) @ unit(items.astype(jnp.float32)).T / temperature
    return scores if mask is None else jnp.where(mask > 0, scores, NEVER)


def mask_words(
    key: Array,
    tokens: Array,
    starts: Array,
    lengths: Array,
    *,
    share: float,
    mask_id: int,
    vocab_size: int,
) -> tuple[Array, Array]:
    """Chooses whole words and replaces their tokens.

    Every word is chosen with probability ``share``. Of the chosen tokens 80 % become the mask, 10 %
    any token of the vocabulary, 10 % stay.

    Args:
      key: a typed key.
      tokens: int [B, L]; the first token of a row is <s> and is never chosen.
      starts: bool [B, L], tokens that begin a word.
      lengths: int [B], valid tokens.
      share: of the words.
      mask_id: of <mask>.
      vocab_size: V.

    Returns:
      The tokens to be read, int [B, L], and which are to be predicted, bool [B, L].
    """
    choose, change, draw = jax.random.split(key, 3)
    word = jnp.cumsum(starts, axis=1)  # the tokens of one word share a number
    chance = jax.random.uniform(choose, (tokens.shape[0], tokens.shape[1] + 1))
    places = jnp.arange(tokens.shape[1])
    chosen = jnp.take_along_axis(chance, word, axis=1) < share
    chosen &= (places > 0) & (places < lengths[:, None])
    fate = jax.random.uniform(change, tokens.shape)
    anything = jax.random.randint(draw, tokens.shape, 0, vocab_size, tokens.dtype)
    changed = jnp.where(fate < 0.8, mask_id, jnp.where(fate < 0.9, anything, tokens))
    return jnp.where(chosen, changed, tokens).astype(tokens.dtype), chosen


# -- objectives -----------------------------------------------------------------------------------


def _encode(module: Recformer, params: PyTree, sequence: Batch, rng: Array | None = None) -> Array:
    """Vectors float32 [B, d]; ``rng`` None: without dropout."""
    return module.apply(
        {"params": params}, sequence["inputs"], lengths=sequence["lengths"],
        token_types=sequence["token_types"], item_positions=sequence["item_positions"],
        train=rng is not None, method="encode", rngs=None if rng is None else {"dropout": rng},
    )  # type: ignore[return-value]  # fmt: skip


def _initial(module: Recformer, rng: Array, batch: Batch) -> PyTree:
    names = ("lengths", "token_types", "item_positions")
    sequence = {name: batch[name] for name in names}
    return module.init(rng, batch["inputs"], method="encode", **sequence)["params"]


class PreTraining(ModuleObjective):
    """``L_IIC + lambda (L_MLM of the histories + L_MLM of the items)`` (equation 8).

    ``L_IIC`` (equation 7) is the cross-entropy of each history's next item among the next items of
    the (micro)batch, by cosine over the temperature: one direction, false negatives accepted.
    Masked copies of both go through the encoder again. The pairs are of the global batch on any
    number of devices, and gradients flow into all of them.

    Batches are sequences, and the next items beside them as ``item_inputs``, ``item_token_types``
    and ``item_lengths``.

    Metrics: ``iic``, ``accuracy`` (within the batch); in training ``mlm`` and ``item_mlm``.
    Evaluation has the first term only.

    Attributes:
      module: a ``Recformer``.
      starts: bool [V], tokens that begin a word, carried.
      mask_id: of <mask>.
      temperature: tau.
      mlm_weight: lambda; 0 leaves out the two passes.
      share: of words masked. There is room for twice as many tokens on average; what goes beyond
        is masked and not predicted.
      block: rows of the token table at a time, see ``item_cross_entropy``; 0 = all.
    """

    module: Recformer = flax.struct.field(pytree_node=False)
    starts: Array = flax.struct.field(kw_only=True)
    mask_id: int = flax.struct.field(pytree_node=False, kw_only=True)
    temperature: Array | float = 0.05
    mlm_weight: float = flax.struct.field(pytree_node=False, default=0.1)
    share: float = flax.struct.field(pytree_node=False, default=0.15)
    block: int = flax.struct.field(pytree_node=False, default=0)

    def init(self, rng: Array, batch: Batch) -> Variables:
        return Variables(_initial(self.module, rng, batch), {})

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        params = variables.params
        history, item = _history(batch), _item(batch)
        key, *keys = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        mask = example_mask(batch, len(batch["inputs"]))
        scores = matching_scores(
            _encode(self.module, params, history, keys[0]),
            _encode(self.module, params, item, keys[1]), self.temperature, mask,
        )  # fmt: skip
        right = jnp.arange(len(scores))
        iic = Mean.of(losses.cross_entropy(scores, right), mask)
        metrics = {"iic": iic, "accuracy": Mean.of(jnp.argmax(scores, axis=-1) == right, mask)}
        total = iic.value()
        if key is not None and self.mlm_weight:
            for name, sequence in (("mlm", history), ("item_mlm", item)):
                own = jax.random.fold_in(key, len(metrics))
                metrics[name] = self.masked(params, sequence, own, mask)
                total += self.mlm_weight * metrics[name].value()
        return total, Aux(variables.state, metrics, iic.weight)

    def masked(self, params: PyTree, sequence: Batch, key: Array, mask: Array) -> Mean:
        """The mean over masked tokens of a sequence's masked copy (equation 6)."""
        tokens, types = sequence["inputs"], sequence["token_types"]
        changes = types != jnp.pad(types, ((0, 0), (1, 0)))[:, :-1]
        mask_key, dropout = jax.random.split(key)
        inputs, chosen = mask_words(
            mask_key, tokens, self.starts[tokens] | changes, sequence["lengths"], share=self.share,
            mask_id=self.mask_id, vocab_size=self.module.config.vocab_size,
        )  # fmt: skip
        room = min(tokens.shape[1], int(2 * self.share * tokens.shape[1]) + 1)
        where = jnp.argsort(~chosen, axis=1, stable=True)[:, :room]
        weights = jnp.take_along_axis(chosen, where, axis=1) * mask[:, None]
        queries: Any = self.module.apply(
            {"params": params}, inputs, where, lengths=sequence["lengths"], token_types=types,
            item_positions=sequence["item_positions"], train=True, method="masked_queries",
            rngs={"dropout": dropout},
        )  # fmt: skip
        output: Any = self.module.apply({"params": params}, method="output")
        table, bias = output
        nll = item_cross_entropy(
            queries.reshape(-1, queries.shape[-1]), table, bias,
            jnp.take_along_axis(tokens, where, axis=1).reshape(-1), block=self.block,
        )  # fmt: skip
        return Mean.of(nll.reshape(where.shape), weights)

    def predict(self, variables: Variables, batch: Batch) -> Array:
        """Vectors float32 [B, d] of the histories."""
        return _encode(self.module, variables.params, _history(batch))


def _history(batch: Batch) -> Batch:
    return {k: batch[k] for k in ("inputs", "token_types", "item_positions", "lengths")}


def _item(batch: Batch) -> Batch:
    inputs = batch["item_inputs"]
    return {
        "inputs": inputs,
        "token_types": batch["item_token_types"],
        "item_positions": jnp.broadcast_to(jnp.arange(inputs.shape[1]) > 0, inputs.shape) * 1,
        "lengths": batch["item_lengths"],
    }


class FineTuning(Recommendation):
    """Softmax over the cosines of a history with the vectors of all items (section 3.4).

    The matrix of the items' vectors is no parameter: it lies in the state, where no gradient
    reaches it, is kept in every checkpoint, and is a part of the best variables. It is computed
    without dropout before the first step of every epoch of ``every`` steps, so that an evaluation
    after the epoch, and whatever it selects, is of the pair of Algorithm 1: the parameters after
    the epoch and the matrix before it.

    Batches are sequences with ``labels`` [B]; for evaluation see ``Recommendation``, whose metrics
    it has. Metric of training: ``nll``.

    Attributes:
      module: a ``Recformer``.
      catalogue: the items' tokens, carried: int32 ``inputs`` and ``token_types`` [R, L] and
        ``lengths`` [R]; rows 1 … n are the items, the others none.
      num_items: n.
      temperature: tau.
      every: steps of an epoch; ``ONCE``: the matrix stays as it is or as it is first computed.
      chunk: so many items are encoded at a time; divides R.
      negatives: ``all``: softmax over all items. ``sampled``: over the right one and ``count``
        others drawn uniformly for each row. ``batch``: over the right items of the batch.
      count: see ``negatives``.
      trainable: the matrix is a parameter ``table`` beside those of the ``encoder``.
      step: steps taken, set by ``at``.
    """

    module: Recformer = flax.struct.field(pytree_node=False)  # type: ignore[assignment]
    catalogue: PyTree = flax.struct.field(kw_only=True)
    num_items: int = flax.struct.field(pytree_node=False, kw_only=True)
    temperature: Array | float = 0.05
    every: Array | int = ONCE
    chunk: int = flax.struct.field(pytree_node=False, default=64)
    negatives: str = flax.struct.field(pytree_node=False, default="all")
    count: int = flax.struct.field(pytree_node=False, default=100)
    trainable: bool = flax.struct.field(pytree_node=False, default=False)
    step: Array | int = 0

    @property
    def rows(self) -> int:
        """R."""
        return self.catalogue["inputs"].shape[0]

    def init(self, rng: Array, batch: Batch) -> Variables:
        if self.negatives not in NEGATIVES:
            raise ValueError(f"negatives={self.negatives!r}; choose one of {', '.join(NEGATIVES)}.")
        if self.rows % self.chunk or self.rows <= self.num_items:
            raise ValueError(
                f"a catalogue of {self.rows} rows: more than the {self.num_items} items and a "
                f"multiple of chunk={self.chunk} are needed."
            )
        params = _initial(self.module, rng, batch)
        table = jnp.zeros((self.rows, self.module.config.stack.features))
        if self.trainable:
            return Variables({"encoder": params, "table": table}, {})
        return Variables(params, {"table": table, "epoch": jnp.int32(-1)})

    def at(self, step: Array) -> "FineTuning":
        return self.replace(step=step)

    def encoder(self, variables: Variables) -> PyTree:
        """The parameters of the module."""
        return variables.params["encoder"] if self.trainable else variables.params

    def encode_items(self, params: PyTree) -> Array:
        """The matrix I, float32 [R, d], of parameters of the module; no gradient flows into them.

        Rows of one chunk lie apart, so that every device encodes its own rows.
        """
        params = lax.stop_gradient(params)
        count = self.rows // self.chunk

        def split(x: Array) -> Array:
            return jnp.swapaxes(x.reshape(self.chunk, count, *x.shape[1:]), 0, 1)

        def encode(part: Batch) -> Array:
            places = jnp.broadcast_to(jnp.arange(part["inputs"].shape[1]) > 0, part["inputs"].shape)
            return _encode(self.module, params, {**part, "item_positions": places * 1})

        vectors = lax.map(encode, jax.tree.map(split, self.catalogue))
        return jnp.swapaxes(vectors, 0, 1).reshape(self.rows, -1)

    def refreshed(self, variables: Variables) -> PyTree:
        """The state at the present step: with a new matrix if an epoch begins."""
        if self.trainable:
            return variables.state
        state = variables.state
        epoch = jnp.asarray(self.step, jnp.int32) // self.every
        table = lax.cond(
            state["epoch"] != epoch, self.encode_items, lambda _: state["table"], variables.params
        )
        return {"table": table, "epoch": epoch}

    def query(self, variables: Variables, batch: Batch, rng: Array | None = None) -> Array:
        """Unit vectors of the histories over the temperature, float32 [B, d]."""
        return unit(_encode(self.module, self.encoder(variables), batch, rng)) / self.temperature

    def output(self, variables: Variables, rows: str = "items") -> tuple[Array, Array]:
        """Unit vectors of the items [R, d], and ``NEVER`` for rows that are none, [R]."""
        del rows
        row = jnp.arange(self.rows)
        table = variables.params["table"] if self.trainable else variables.state["table"]
        return unit(table), jnp.where((row >= 1) & (row <= self.num_items), 0.0, NEVER)

    def training(self, variables: Variables, batch: Batch, rng: Array) -> tuple[Array, Aux]:
        variables = variables._replace(state=self.refreshed(variables))
        draw, dropout = jax.random.split(rng)
        query, labels = self.query(variables, batch, dropout), batch["labels"]
        mask = example_mask(batch, len(labels))
        table, bias = self.output(variables)
        if self.negatives == "all":
            nll = item_cross_entropy(query, table, bias, labels, block=self.block)
        elif self.negatives == "batch":
            scores = query @ table[labels].T
            same = (labels[:, None] == labels) & ~jnp.eye(len(labels), dtype=bool)
            scores = jnp.where(same | (mask == 0), NEVER, scores)
            nll = losses.cross_entropy(scores, jnp.arange(len(labels)))
        else:
            shape = (len(labels), self.count)
            drawn = jax.random.randint(draw, shape, 1, self.num_items + 1)
            positive = scores_of(query, table, bias, labels[:, None])[:, 0]
            negative = scores_of(query, table, bias, drawn)
            nll = sampled_softmax(positive, negative, hits=drawn == labels[:, None])
        mean = Mean.of(nll, mask)
        return mean.value(), Aux(variables.state, {"nll": mean}, mean.weight)
