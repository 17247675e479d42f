"""Contrastive terms for sequential recommenders: SRA-CL (2025), CL4SRec, DuoRec.

``Contrasted`` adds to the loss of any ``Recommendation``

* an inter-user term: a history against a vector made of the histories of other users;
* an intra-user term: two altered copies of a history against each other.

Only training knows them. Who resembles whom is in ``data.semantic.Tables``, which the objective
carries; predictions are those of the recommender inside.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from transfer_jax.data.semantic import Tables
from transfer_jax.models.recommender import SequentialRecommender, last_position
from transfer_jax.objectives.base import (
    Array,
    Aux,
    Batch,
    Mean,
    PyTree,
    Transformed,
    Variables,
)
from transfer_jax.objectives.contrastive import unit
from transfer_jax.objectives.recommend import NEVER, Recommendation
from transfer_jax.objectives.tasks import example_mask

INTER = ("none", "synth", "random_neighbour", "mean_neighbours", "top1", "same_target")
INTRA = ("none", "semantic_sub", "random_sub", "mask", "crop", "reorder", "dropout_twice")
FORMS = ("ntxent", "one_way")
SIMILARITIES = ("dot", "cos")

# Every use of randomness has a stream of its own: switching one off leaves the others.
_STREAMS = (
    "anchor", "neighbours", "view1", "view2", "synthesis", "choice", "change1", "change2",
)  # fmt: skip
_CONTRAST = 0x5C1  # folded into the step's key, which the recommender uses as it is


# -- losses ---------------------------------------------------------------------------------------


def nt_xent(
    first: Array, second: Array, *, temperature: Array | float = 1.0, mask: Array | None = None
) -> Array:
    """Normalised temperature-scaled cross-entropy among the 2B vectors of B pairs.

    Each vector is to choose its partner among the other 2B - 1. Products are taken as they are: for
    cosines give unit vectors.

    Args:
      first, second: [B, d].
      temperature: tau.
      mask: [B], 0 = padding row, nobody's candidate; None = all count.

    Returns:
      float32 [B], the mean of the two losses of each pair.
    """
    count = len(first)
    both = jnp.concatenate([first, second]).astype(jnp.float32)
    scores = both @ both.T / temperature
    excluded = jnp.eye(2 * count, dtype=bool)
    if mask is not None:
        excluded |= jnp.tile(mask == 0, 2)
    partner = (jnp.arange(2 * count) + count) % (2 * count)
    right = jnp.take_along_axis(scores, partner[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(jnp.where(excluded, NEVER, scores), axis=1) - right
    return losses.reshape(2, count).mean(axis=0)


def one_way_nce(
    anchor: Array, positive: Array, *, temperature: Array | float = 1.0, mask: Array | None = None
) -> Array:
    """Each anchor is to choose its positive among the B positives (SRA-CL, equation 9).

    Args:
      anchor, positive: [B, d].
      temperature, mask: see ``nt_xent``.

    Returns:
      float32 [B].
    """
    scores = anchor.astype(jnp.float32) @ positive.astype(jnp.float32).T / temperature
    right = jnp.diagonal(scores)
    if mask is not None:
        scores = jnp.where(mask == 0, NEVER, scores)
    return jax.nn.logsumexp(scores, axis=1) - right


# -- synthesis ------------------------------------------------------------------------------------


def init_synthesiser(key: Array, semantic: int, features: int) -> PyTree:
    """``kernel`` W float32 [D, d], ``attention`` a float32 [2d]: Glorot uniform of gain 1.414."""
    first, second = jax.random.split(key)
    init = nn.initializers.variance_scaling(1.414**2, "fan_avg", "uniform")
    return {
        "kernel": init(first, (semantic, features), jnp.float32),
        "attention": init(second, (2 * features, 1), jnp.float32)[:, 0],
    }


def synthesis_scores(params: PyTree, user: Array, neighbours: Array, slope: float = 0.2) -> Array:
    """``LeakyReLU(a . [W u; W n_j])``, how much each neighbour is worth to a user.

    a is split and multiplied with W first: two products of D numbers for each vector instead of
    D d. The kink of the LeakyReLU makes the weights depend on the user: without it a . [W u; .]
    is one constant for all j, which the softmax does not see.

    Args:
      params: of ``init_synthesiser``.
      user: [B, D].
      neighbours: [B, k, D].
      slope: below zero.

    Returns:
      float32 [B, k].
    """
    kernel, attention = params["kernel"], params["attention"]
    features = kernel.shape[1]
    own, other = kernel @ attention[:features], kernel @ attention[features:]
    scores = (user.astype(jnp.float32) @ own)[:, None] + neighbours.astype(jnp.float32) @ other
    return nn.leaky_relu(scores, slope)


def synthesise(
    params: PyTree,
    user: Array,
    neighbours: Array,
    hidden: Array,
    *,
    dropout: float = 0.0,
    rng: Array | None = None,
) -> Array:
    """Averages the neighbours' representations under the softmax of ``synthesis_scores``.

    Args:
      params: of ``init_synthesiser``.
      user: [B, D].
      neighbours: [B, k, D].
      hidden: [B, k, d].
      dropout: rate on the weights, which are not normalised again (released code).
      rng: a key for it, or None for no dropout.

    Returns:
      float32 [B, d].
    """
    weights = jax.nn.softmax(synthesis_scores(params, user, neighbours), axis=-1)
    if rng is not None and dropout:
        kept = jax.random.bernoulli(rng, 1.0 - dropout, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout), 0.0)
    return jnp.einsum("bk,bkd->bd", weights, hidden.astype(jnp.float32))


# -- altered histories ----------------------------------------------------------------------------


def substitute(key: Array, inputs: Array, neighbours: Array, rate: Array | float) -> Array:
    """Replaces each item, with probability ``rate``, by one of its neighbours.

    Args:
      key: a typed key.
      inputs: int [B, N], 0 = padding, which stays.
      neighbours: int [n + 1, k].
      rate: in [0, 1].
    """
    which, choice = jax.random.split(key)
    chosen = jax.random.randint(choice, inputs.shape, 0, neighbours.shape[1])
    replaced = jax.random.bernoulli(which, rate, inputs.shape) & (inputs > 0)
    return jnp.where(replaced, neighbours[inputs, chosen].astype(inputs.dtype), inputs)


def substitute_anything(key: Array, inputs: Array, num_items: int, rate: Array | float) -> Array:
    """As ``substitute``, by any item."""
    which, choice = jax.random.split(key)
    drawn = jax.random.randint(choice, inputs.shape, 1, num_items + 1, inputs.dtype)
    return jnp.where(jax.random.bernoulli(which, rate, inputs.shape) & (inputs > 0), drawn, inputs)


def mask_items(key: Array, inputs: Array, mask_id: int, rate: Array | float) -> Array:
    """Replaces each item, with probability ``rate``, by [MASK] (CL4SRec)."""
    masked = jax.random.bernoulli(key, rate, inputs.shape) & (inputs > 0)
    return jnp.where(masked, jnp.asarray(mask_id, inputs.dtype), inputs)


def _stretch(key: Array, inputs: Array, share: Array | float) -> tuple[Array, Array]:
    """Begin and length, int [B, 1], of ``max(1, floor(share l))`` consecutive places of l items."""
    count = jnp.sum(inputs > 0, axis=1)
    length = jnp.clip(jnp.floor(share * count + 1e-6).astype(int), 1, jnp.maximum(count, 1))
    first = last_position(inputs) - jnp.maximum(count, 1) + 1
    shift = jax.random.randint(key, count.shape, 0, jnp.maximum(count, 1) - length + 1)
    return (first + shift)[:, None], length[:, None]


def crop(key: Array, inputs: Array, share: Array | float, alignment: str) -> Array:
    """Keeps a random stretch of each history, ``share`` of it, moved to the end that is read.

    Args:
      key: a typed key.
      inputs: int [B, N].
      share: what is kept, at least one item.
      alignment: ``left`` or ``right``, as of the model.
    """
    width = inputs.shape[1]
    begin, length = _stretch(key, inputs, share)
    place = jnp.arange(width) - (0 if alignment == "left" else width - length)
    inside = (place >= 0) & (place < length)
    moved = jnp.take_along_axis(inputs, jnp.clip(begin + place, 0, width - 1), axis=1)
    return jnp.where(inside, moved, 0)


def reorder(key: Array, inputs: Array, share: Array | float) -> Array:
    """Shuffles a random stretch of each history, ``share`` of it."""
    where, shuffle = jax.random.split(key)
    begin, length = _stretch(where, inputs, share)
    place = jnp.arange(inputs.shape[1])
    inside = (place >= begin) & (place < begin + length)
    drawn = begin + length * jax.random.uniform(shuffle, inputs.shape)
    # Numbers within the stretch sort among themselves, all others stay where they are.
    order = jnp.argsort(jnp.where(inside, drawn, place), axis=1, stable=True)
    return jnp.take_along_axis(inputs, order, axis=1)


# -- objective ------------------------------------------------------------------------------------


class Contrasted(Transformed):
    """``L = L_inner + alpha L_inter + beta L_intra`` (SRA-CL, equation 12).

    Parameters: ``recommender``, those of the inner objective; with ``inter="synth"`` also
    ``synthesiser``. The inner loss sees the step's own key, so its dropout is the same with and
    without the terms. All further histories of a step go through the encoder in one call, [copies,
    B, N] with a key for each copy. The contrast is over the global batch, or over a microbatch
    where gradients are accumulated. Evaluation and prediction use the inner objective alone.

    Training batches have ``inputs`` int [B, N] and ``prefix`` int [B], the row of ``tables``.
    Metrics: those of the inner objective, ``inter``, ``intra``.

    Attributes:
      inner: an objective of a ``SequentialRecommender`` that reads histories.
      tables: carried; None for inference. Never trained.
      alpha, beta: strengths.
      temperature: tau of both terms.
      rate: of the altered histories: the share of the items that is replaced or masked; of ``crop``
        what is kept, of ``reorder`` what is shuffled.
      inter: one of ``INTER``. ``synth``: average under learned weights; ``mean_neighbours``: under
        equal ones; ``random_neighbour``: one of the k; ``top1``: the nearest; ``same_target``:
        a history that the same item follows (DuoRec).
      intra: one of ``INTRA``; ``dropout_twice`` alters nothing (DuoRec).
      form: ``ntxent`` (released code) or ``one_way`` (equation 9).
      similarity: ``dot`` or ``cos``.
      synthesis_dropout: on the learned weights (released code).
    """

    inner: Recommendation
    tables: Tables | None = None
    alpha: Array | float = 0.1
    beta: Array | float = 0.1
    temperature: Array | float = 1.0
    rate: Array | float = 0.2
    inter: str = flax.struct.field(pytree_node=False, default="synth")
    intra: str = flax.struct.field(pytree_node=False, default="semantic_sub")
    form: str = flax.struct.field(pytree_node=False, default="ntxent")
    similarity: str = flax.struct.field(pytree_node=False, default="dot")
    synthesis_dropout: float = flax.struct.field(pytree_node=False, default=0.5)

    @property
    def module(self) -> SequentialRecommender:
        return self.inner.module

    @property
    def mask_id(self) -> int | None:
        return self.inner.mask_id

    def init(self, rng: Array, batch: Batch) -> Variables:
        self._check()
        inner = self.inner.init(rng, batch)
        params = {"recommender": inner.params}
        if self.inter == "synth":
            width = self._table("user_vectors").shape[1]
            key = jax.random.fold_in(rng, _CONTRAST)
            params["synthesiser"] = init_synthesiser(key, width, self.module.stack.features)
        return Variables(params, inner.state)

    def recommender(self, variables: Variables) -> Variables:
        """The inner objective's variables: all that inference needs."""
        return variables._replace(params=variables.params["recommender"])

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        return self.inner.predict(self.recommender(variables), batch)

    def proximal(self, params: PyTree, learning_rate: Array) -> PyTree:
        own = self.inner.proximal(params["recommender"], learning_rate)
        return {**params, "recommender": own}

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        loss, aux = self.inner.loss(self.recommender(variables), batch, rng)
        if rng is None:
            return loss, aux
        self._check()
        base = jax.random.fold_in(rng, _CONTRAST)
        keys = {name: jax.random.fold_in(base, i) for i, name in enumerate(_STREAMS)}
        inputs, mask = batch["inputs"], batch.get("mask")
        copies, streams = [], []
        others = None
        if self.inter != "none":
            others = self._others(batch, keys["choice"])  # [B, C]
            chosen = jnp.moveaxis(self._table("histories")[others], 1, 0)
            copies += [inputs[None], chosen.astype(inputs.dtype)]
            streams += [keys["anchor"][None], jax.random.split(keys["neighbours"], len(chosen))]
        if self.intra != "none":
            copies += [self._altered(inputs, keys[name])[None] for name in ("change1", "change2")]
            streams += [keys["view1"][None], keys["view2"][None]]
        if not copies:
            return loss, aux

        params = self.recommender(variables).params

        def encode(inputs: Array, key: Array) -> Array:
            rngs = {"dropout": key}
            return self.module.apply(
                {"params": params}, inputs, train=True, method="represent", rngs=rngs
            )  # type: ignore[return-value]

        hidden = jax.vmap(encode)(jnp.concatenate(copies), jnp.concatenate(streams))
        weights, metrics = example_mask(batch, len(inputs)), dict(aux.metrics)
        if others is not None:
            neighbours = jnp.moveaxis(hidden[1 : 1 + others.shape[1]], 0, 1)
            positive = self._positive(variables, batch, others, neighbours, keys["synthesis"])
            metrics["inter"] = Mean.of(self._contrast(hidden[0], positive, mask), weights)
            loss = loss + self.alpha * metrics["inter"].value()
        if self.intra != "none":
            metrics["intra"] = Mean.of(self._contrast(hidden[-2], hidden[-1], mask), weights)
            loss = loss + self.beta * metrics["intra"].value()
        return loss, aux._replace(metrics=metrics)

    def _check(self) -> None:
        for name, allowed in (
            ("inter", INTER), ("intra", INTRA), ("form", FORMS), ("similarity", SIMILARITIES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; choose one of {', '.join(allowed)}."
                )

    def _table(self, name: str) -> Array:
        table = None if self.tables is None else getattr(self.tables, name)
        if table is None:
            raise ValueError(
                f"inter={self.inter!r}, intra={self.intra!r} needs tables.{name}, which is None: "
                "see data.semantic.Tables."
            )
        return jax.lax.stop_gradient(table)

    def _others(self, batch: Batch, key: Array) -> Array:
        """Whose histories the positive is made of, int [B, C]."""
        prefix = batch["prefix"]
        if self.inter == "same_target":
            # Uniform among those before the same item; itself where there is no other.
            starts, label = self._table("starts"), batch["labels"]
            count = starts[label + 1] - starts[label]
            place = starts[label] + jax.random.randint(key, prefix.shape, 0, jnp.maximum(count, 1))
            return self._table("by_target")[place][:, None]
        neighbours = self._table("user_neighbours")[prefix]
        if self.inter == "top1":
            return neighbours[:, :1]
        if self.inter == "random_neighbour":
            drawn = jax.random.randint(key, (len(prefix), 1), 0, neighbours.shape[1])
            return jnp.take_along_axis(neighbours, drawn, axis=1)
        return neighbours

    def _positive(
        self, variables: Variables, batch: Batch, others: Array, hidden: Array, key: Array
    ) -> Array:
        if self.inter != "synth":
            return hidden.mean(axis=1)  # of one, but for mean_neighbours
        vectors = self._table("user_vectors")
        return synthesise(
            variables.params["synthesiser"], vectors[batch["prefix"]], vectors[others], hidden,
            dropout=self.synthesis_dropout, rng=key,
        )  # fmt: skip

    def _altered(self, inputs: Array, key: Array) -> Array:
        if self.intra == "semantic_sub":
            return substitute(key, inputs, self._table("item_neighbours"), self.rate)
        if self.intra == "random_sub":
            return substitute_anything(key, inputs, self.module.num_items, self.rate)
        if self.intra == "mask":
            return mask_items(key, inputs, self.module.mask_id, self.rate)
        if self.intra == "crop":
            return crop(key, inputs, self.rate, self.module.alignment)
        if self.intra == "reorder":
            return reorder(key, inputs, self.rate)
        return inputs

    def _contrast(self, first: Array, second: Array, mask: Array | None) -> Array:
        if self.similarity == "cos":
            first, second = (unit(x.astype(jnp.float32)) for x in (first, second))
        loss = nt_xent if self.form == "ntxent" else one_way_nce
        return loss(first, second, temperature=self.temperature, mask=mask)
