"""Sequential recommendation: the Cloze task, next-item losses, and ranking as their evaluation.

Training batches have ``inputs``, int [B, N]: windows of items, 0 where there is none. Evaluation
batches (see ``transfer_jax.data.recommend``) have

* ``inputs`` [B, N], the history, for Cloze with [MASK] after it;
* ``labels`` [B], the right item;
* optional ``seen`` [B, S], items that are no candidates, padded with -1;
* optional ``negatives`` [B, C]: the right item is then also ranked among these alone;
* optional ``positions`` [B], where the prediction is read; without it, at the last item.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from transfer_jax.metrics import ranking
from transfer_jax.models.recommender import SequentialRecommender, last_position
from transfer_jax.objectives.base import Array, Aux, Batch, Mean, Variables
from transfer_jax.objectives.tasks import ModuleObjective, example_mask

# The score of rows that are no candidates. Finite: the difference of two of them is a number.
NEVER = -1e30

ROWS = ("items", "all")
REDUCTIONS = ("token", "sequence")
NEXT_ITEM_LOSSES = ("ce", "bce", "gbce", "sampled", "bpr_max")


# -- losses ---------------------------------------------------------------------------------------


def item_scores(queries: Array, table: Array, bias: Array) -> Array:
    """``queries @ table.T + bias`` in float32: [..., d], [R, d] and [R] to [..., R]."""
    return (
        jnp.einsum(
            "...d,nd->...n", queries, table.astype(queries.dtype),
            preferred_element_type=jnp.float32,
        )
        + bias
    )  # fmt: skip


def scores_of(queries: Array, table: Array, bias: Array, items: Array) -> Array:
    """Scores of some items each, float32: [..., d] and int [..., K] to [..., K]."""
    rows = table[items].astype(queries.dtype)
    products = jnp.einsum("...d,...kd->...k", queries, rows, preferred_element_type=jnp.float32)
    return products + bias[items]


def item_cross_entropy(
    queries: Array, table: Array, bias: Array, labels: Array, *, block: int = 0
) -> Array:
    """Softmax cross-entropy over the rows of a table.

    Args:
      queries: [T, d].
      table: [R, d].
      bias: float32 [R]; ``NEVER`` takes a row out of the softmax.
      labels: int [T].
      block: with a positive one, so many rows at a time, recomputed in the backward pass: memory is
        [T, block] instead of [T, R]. For a table that lies whole on its device; one that is split
        over the axis ``model`` is split already, and takes 0.

    Returns:
      float32 [T].
    """
    picked = scores_of(queries, table, bias, labels[:, None])[:, 0]
    if not block:
        return jax.nn.logsumexp(item_scores(queries, table, bias), axis=-1) - picked
    count = len(table)
    blocks = -(-count // block)
    padding = blocks * block - count
    tables = jnp.pad(table, ((0, padding), (0, 0))).reshape(blocks, block, -1)
    biases = jnp.pad(bias, (0, padding), constant_values=NEVER).reshape(blocks, block)

    @jax.checkpoint
    def body(carry: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[Any, None]:
        top, total = carry
        scores = item_scores(queries, *part)
        higher = lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1)))
        total = total * jnp.exp(top - higher) + jnp.exp(scores - higher[:, None]).sum(axis=-1)
        return (higher, total), None

    start = (jnp.full(len(queries), NEVER), jnp.zeros(len(queries)))
    (top, total), _ = lax.scan(body, start, (tables, biases))
    return top + jnp.log(total) - picked


def binary_cross_entropy(positive: Array, negative: Array, beta: Array | float = 1.0) -> Array:
    """``-beta log s(positive) - sum log(1 - s(negative))`` with the logistic function s.

    With beta = 1 and one negative it is SASRec's loss; with more and the power ``gbce_power`` it is
    that of gSASRec (Petrov and Macdonald 2023).

    Args:
      positive: float32 [...].
      negative: float32 [..., K].
      beta: power of the positive probability.

    Returns:
      float32 [...].
    """
    return beta * jax.nn.softplus(-positive) + jax.nn.softplus(negative).sum(axis=-1)


def gbce_power(negatives: int, num_items: int, calibration: float) -> float:
    """gSASRec's beta = alpha (t (1 - 1/alpha) + 1/alpha), alpha = K / (n - 1), t = ``calibration``.

    At t = 0 it is 1, plain binary cross-entropy; at t = 1 it is alpha, and the loss is least where
    the sigmoid of the score is the probability of the item.
    """
    alpha = negatives / (num_items - 1)
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def sampled_softmax(
    positive: Array, negative: Array, log_expected: Array | float = 0.0, hits: Array | None = None
) -> Array:
    """Softmax cross-entropy among the right item and some sampled ones.

    Args:
      positive: float32 [...].
      negative: float32 [..., K].
      log_expected: logarithm of how often each negative is expected among the K, broadcastable to
        it; subtracted from the negative's score (the logQ correction), which makes the sum over
        the negatives an unbiased estimate of the sum over all items. 0 = no correction.
      hits: bool [..., K], negatives that are the right item and do not count; None = none are.

    Returns:
      float32 [...].
    """
    negative = negative - log_expected
    if hits is not None:
        negative = jnp.where(hits, NEVER, negative)
    together = jnp.concatenate([positive[..., None], negative], axis=-1)
    return jax.nn.logsumexp(together, axis=-1) - positive


def bpr_max(
    positive: Array, negative: Array, regularisation: float = 1.0, hits: Array | None = None
) -> Array:
    """GRU4Rec's ranking loss (Hidasi and Karatzoglou 2018): BPR, led by the highest negatives.

    ``-log sum_j s_j sigmoid(positive - negative_j) + regularisation sum_j s_j negative_j ** 2``,
    with s the softmax of the negatives' scores. With one negative the first term is BPR.

    Args:
      positive: float32 [...].
      negative: float32 [..., K].
      regularisation: of the negatives' scores.
      hits: see ``sampled_softmax``.

    Returns:
      float32 [...].
    """
    others = negative if hits is None else jnp.where(hits, NEVER, negative)
    log_share = jax.nn.log_softmax(others, axis=-1)
    better = jax.nn.log_sigmoid(positive[..., None] - others)
    squares = jnp.sum(jnp.exp(log_share) * negative**2, axis=-1)
    return regularisation * squares - jax.nn.logsumexp(log_share + better, axis=-1)


# -- masking --------------------------------------------------------------------------------------


def mask_counts(length: int, share: float, maximum: int) -> np.ndarray:
    """How many of l items are masked, l = 0 … length: ``min(P, max(1, round(l share)))``; 0 of 0.

    ``round`` is Python's, which rounds halves to even numbers.
    """
    counts = [min(maximum, max(1, round(l * share))) for l in range(length + 1)]
    return np.array([0, *counts[1:]], np.int32)


def mask_batch(
    keys: Array,
    inputs: Array,
    *,
    mask_id: int,
    share: float,
    maximum: int,
    last: Array | float,
) -> tuple[Array, Array, Array, Array]:
    """Replaces items by [MASK], uniformly without replacement; or only the last one.

    Args:
      keys: typed keys [B].
      inputs: int [B, N], 0 = padding.
      mask_id: of [MASK].
      share: rho, see ``mask_counts``. 0 masks one item of each row.
      maximum: P, the most items that are masked in a row.
      last: probability, one for all or [B], that the last item is masked instead.

    Returns:
      The masked inputs [B, N]; and for the P places of each row their positions int32 [B, P], the
      items that were there int32 [B, P], and weights float32 [B, P], 0 where fewer are masked.
    """
    rows, length = inputs.shape
    maximum = min(maximum, length)
    valid = inputs > 0
    pairs = jax.vmap(jax.random.split)(keys)
    order = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(pairs[:, 0])
    at_end = jax.vmap(lambda k: jax.random.uniform(k))(pairs[:, 1]) < last
    counts = jnp.asarray(mask_counts(length, share, maximum))[valid.sum(axis=1)]
    counts = jnp.where(at_end, jnp.minimum(counts, 1), counts)
    is_last = jnp.arange(length) == last_position(inputs)[:, None]
    order = jnp.where(at_end[:, None] & is_last, -1.0, order)
    positions = lax.top_k(-jnp.where(valid, order, 2.0), maximum)[1]
    weights = (jnp.arange(maximum) < counts[:, None]).astype(jnp.float32)
    labels = jnp.take_along_axis(inputs, positions, axis=1)
    # A place beyond the count writes where nothing is.
    target = jnp.where(weights > 0, positions, length)
    masked = inputs.at[jnp.arange(rows)[:, None], target].set(mask_id, mode="drop")
    return masked, positions.astype(jnp.int32), labels, weights


# -- objectives -----------------------------------------------------------------------------------


class Recommendation(ModuleObjective):
    """What all objectives of a ``SequentialRecommender`` share: scores, and evaluation by ranking.

    Evaluation metrics: ``hr@k``, ``ndcg@k`` and ``mrr`` of the full ranking of all items that are
    not ``seen``, the same with the prefix ``sampled_`` where the batch has ``negatives``, and
    ``nll``, the cross-entropy of the right item among all items, which is also the loss.

    Attributes:
      ks: lengths of the lists.
      ties: see ``metrics.ranking.metrics``.
      block: items per block of cross-entropies and rankings, see ``item_cross_entropy``; 0 = all.
    """

    module: SequentialRecommender = flax.struct.field(pytree_node=False)
    ks: tuple[int, ...] = flax.struct.field(pytree_node=False, default=(1, 5, 10, 20))
    ties: str = flax.struct.field(pytree_node=False, default="worst")
    block: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def mask_id(self) -> int | None:
        """[MASK] where histories end with it when the next item is asked for, else None."""
        return None

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        return self.rank(variables, batch) if rng is None else self.training(variables, batch, rng)

    def training(self, variables: Variables, batch: Batch, rng: Array) -> tuple[Array, Aux]:
        """The loss of a training batch."""
        raise NotImplementedError

    def queries(
        self, variables: Variables, inputs: Array, where: Array, rng: Array | None
    ) -> Array:
        """Queries [B, P, d] at positions int [B, P]; ``rng`` None: without dropout."""
        return self.module.apply(
            {"params": variables.params}, inputs, where, train=rng is not None,
            method="queries_at", rngs=None if rng is None else {"dropout": rng},
        )  # type: ignore[return-value]  # fmt: skip

    def output(self, variables: Variables, rows: str = "items") -> tuple[Array, Array]:
        """The table [R, d] and its bias float32 [R], ``NEVER`` for rows that are none of ``rows``.

        Args:
          variables: of the module.
          rows: ``items``: 1 … n; ``all``: padding, items and special rows.
        """
        if rows not in ROWS:
            raise ValueError(f"rows={rows!r}; choose one of {', '.join(ROWS)}.")
        m = self.module
        output: Any = m.apply({"params": variables.params}, method="output")
        table, bias = output
        row = jnp.arange(m.rows)
        if rows == "items":
            valid = (row >= 1) & (row <= m.num_items)
        else:
            valid = row < m.num_items + m.special_rows
        offset = jnp.zeros(m.rows) if bias is None else bias.astype(jnp.float32)
        return table, jnp.where(valid, offset, NEVER)

    def query(self, variables: Variables, batch: Batch) -> Array:
        """Queries float32 [B, d] where the batch is to be predicted, without dropout."""
        inputs = batch["inputs"]
        where = batch["positions"] if "positions" in batch else last_position(inputs)
        # Items are ranked in float32, whatever the network computes in: 16 bits tie too many.
        return self.queries(variables, inputs, where[:, None], None)[:, 0].astype(jnp.float32)

    def predict(self, variables: Variables, batch: Batch) -> Array:
        """Scores float32 [B, R] of all rows; ``NEVER`` for those that are no items."""
        return item_scores(self.query(variables, batch), *self.output(variables))

    def rank(self, variables: Variables, batch: Batch) -> tuple[Array, Aux]:
        """Evaluates a batch, see the module's docstring."""
        if "labels" not in batch:
            raise ValueError(
                "evaluation ranks batch['labels'], the right items (data.recommend.evaluation); "
                f"the batch has {sorted(batch)}."
            )
        query, labels, seen = self.query(variables, batch), batch["labels"], batch.get("seen")
        table, bias = self.output(variables)
        mask = example_mask(batch, len(labels))
        nll = Mean.of(item_cross_entropy(query, table, bias, labels, block=self.block), mask)
        outputs = None
        if self.block:
            where = ranking.ranks_by_blocks(
                query, table, labels, block=self.block, bias=bias,
                excluded=seen,
            )  # fmt: skip
        else:
            outputs = item_scores(query, table, bias)
            where = ranking.ranks(outputs, labels, excluded=seen)
        values = ranking.metrics(where, self.ks, ties=self.ties)
        if "negatives" in batch:
            among = jnp.concatenate([labels[:, None], batch["negatives"]], axis=1)
            scores = scores_of(query, table, bias, among)
            sampled = ranking.ranks(scores, jnp.zeros_like(labels))
            found = ranking.metrics(sampled, self.ks, ties=self.ties)
            values |= {f"sampled_{name}": value for name, value in found.items()}
        metrics = {name: Mean.of(value, mask) for name, value in values.items()}
        return nll.value(), Aux(variables.state, {**metrics, "nll": nll}, nll.weight, outputs)


class Cloze(Recommendation):
    """BERT4Rec's objective (section 3.5): predict the items under [MASK] from both sides.

    Masks are drawn inside the step. Metric of training: ``nll``, of the masked items.

    The weights of the released code's token mean are ``sum(w) + 1e-5``; here it is the exact mean.

    Attributes:
      share: rho, the share of the items that is masked; 0 masks one item of each row.
      maximum: P, the most items masked in a row.
      last: share of the rows in which only the last item is masked, as in evaluation. The released
        files have one such row beside ten with random masks.
      reduction: ``token``: the mean over masked items (released code); ``sequence``: the mean over
        rows of each row's mean (equation 8).
      rows: of the softmax: ``all`` (released code) or ``items``.
      copies: with ``batch["draw"]`` [B], the number of a copy of a window, masks depend on that
        number alone, and every ``copies``-th copy has its last item masked, whatever ``last`` says:
        the static masks of the released files. See ``data.recommend.static_copies``.
    """

    share: float = flax.struct.field(pytree_node=False, default=0.2)
    maximum: int = flax.struct.field(pytree_node=False, default=20)
    last: float = flax.struct.field(pytree_node=False, default=1 / 11)
    reduction: str = flax.struct.field(pytree_node=False, default="token")
    rows: str = flax.struct.field(pytree_node=False, default="all")
    copies: int = flax.struct.field(pytree_node=False, default=11)

    @property
    def mask_id(self) -> int:
        return self.module.mask_id

    def training(self, variables: Variables, batch: Batch, rng: Array) -> tuple[Array, Aux]:
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction={self.reduction!r}; choose one of {', '.join(REDUCTIONS)}."
            )
        if self.module.stack.causal or self.module.encoder == "gru":
            raise ValueError("Cloze reads both sides of a mask: it needs a stack with causal=False")
        inputs = batch["inputs"]
        mask_key, dropout = jax.random.split(rng)
        if "draw" in batch:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch["draw"])
            last: Array | float = (batch["draw"] % self.copies == self.copies - 1).astype(float)
        else:
            keys, last = jax.random.split(mask_key, len(inputs)), self.last
        masked, positions, labels, weights = mask_batch(
            keys, inputs, mask_id=self.mask_id, share=self.share, maximum=self.maximum,
            last=last,
        )  # fmt: skip
        weights = weights * example_mask(batch, len(inputs))[:, None]
        queries = self.queries(variables, masked, positions, dropout)
        table, bias = self.output(variables, self.rows)
        nll = item_cross_entropy(
            queries.reshape(-1, queries.shape[-1]), table, bias,
            jnp.maximum(labels, 1).reshape(-1), block=self.block,
        ).reshape(labels.shape)  # fmt: skip
        tokens = Mean.of(nll, weights)
        objective = tokens
        if self.reduction == "sequence":
            counts = weights.sum(axis=1)
            own = (nll * weights).sum(axis=1) / jnp.maximum(counts, 1.0)
            objective = Mean.of(own, counts > 0)
        return objective.value(), Aux(variables.state, {"nll": tokens}, objective.weight)


class NextOfPrefix(Recommendation):
    """Predict the one item that follows a history, by a softmax over all items.

    Batches have ``inputs`` int [B, N] and ``labels`` int [B], see ``data.recommend.prefixes``. The
    prediction is read at the history's last item, so that any encoder will do, also one that sees
    both sides. Metric of training: ``nll``.
    """

    def training(self, variables: Variables, batch: Batch, rng: Array) -> tuple[Array, Aux]:
        inputs, labels = batch["inputs"], batch["labels"]
        where = last_position(inputs)[:, None]
        queries = self.queries(variables, inputs, where, rng)[:, 0]
        values = item_cross_entropy(queries, *self.output(variables), labels, block=self.block)
        nll = Mean.of(values, example_mask(batch, len(labels)))
        return nll.value(), Aux(variables.state, {"nll": nll}, nll.weight)


class NextItem(Recommendation):
    """Predict every item of a window from those before it; the module must be causal.

    Training windows are [B, N + 1]: the first N are read, the last N predicted. Negatives are drawn
    inside the step. Metric of training: ``nll``, the loss per predicted item.

    Attributes:
      kind: one of ``NEXT_ITEM_LOSSES``. ``ce``: softmax over all items. ``bce``: SASRec's, with
        ``negatives`` drawn uniformly from the other items for each position. ``gbce``: the same
        with gSASRec's power. ``sampled``: softmax among ``negatives`` shared by the whole batch.
        ``bpr_max``: GRU4Rec's ranking loss among the same.
      negatives: K.
      calibration: t of gBCE.
      correct: the logQ correction of ``sampled``.
      regularisation: of ``bpr_max``.
      weights: float32 [R], carried; shared negatives are drawn in proportion to it, so that of
        rows that are no items must be 0. None = uniformly among the items.
    """

    kind: str = flax.struct.field(pytree_node=False, default="ce")
    negatives: int = flax.struct.field(pytree_node=False, default=1)
    calibration: float = flax.struct.field(pytree_node=False, default=0.75)
    correct: bool = flax.struct.field(pytree_node=False, default=True)
    regularisation: float = flax.struct.field(pytree_node=False, default=1.0)
    weights: Array | None = None

    def init(self, rng: Array, batch: Batch) -> Variables:
        return super().init(rng, {**batch, "inputs": batch["inputs"][:, :-1]})

    def training(self, variables: Variables, batch: Batch, rng: Array) -> tuple[Array, Aux]:
        if self.kind not in NEXT_ITEM_LOSSES:
            raise ValueError(f"kind={self.kind!r}; choose one of {', '.join(NEXT_ITEM_LOSSES)}.")
        if self.module.encoder == "transformer" and not self.module.stack.causal:
            raise ValueError("NextItem would see what it predicts: the stack needs causal=True")
        window = batch["inputs"]
        inputs, labels = window[:, :-1], window[:, 1:]
        weights = ((inputs > 0) & (labels > 0)) * example_mask(batch, len(window))[:, None]
        negative_key, dropout = jax.random.split(rng)
        where = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        queries = self.queries(variables, inputs, where, dropout)
        queries = queries.reshape(-1, queries.shape[-1])
        nll = self._nll(variables, queries, jnp.maximum(labels, 1).reshape(-1), negative_key)
        mean = Mean.of(nll, weights.reshape(-1))
        return mean.value(), Aux(variables.state, {"nll": mean}, mean.weight)

    def _nll(self, variables: Variables, queries: Array, labels: Array, key: Array) -> Array:
        table, bias = self.output(variables)
        if self.kind == "ce":
            return item_cross_entropy(queries, table, bias, labels, block=self.block)
        n = self.module.num_items
        positive = scores_of(queries, table, bias, labels[:, None])[:, 0]
        if self.kind in ("sampled", "bpr_max"):
            if self.weights is None:
                drawn = jax.random.randint(key, (self.negatives,), 1, n + 1)
                expected = jnp.full(self.negatives, self.negatives / n)
            else:
                share = self.weights / self.weights.sum()
                drawn = jax.random.choice(key, len(share), (self.negatives,), p=share)
                expected = self.negatives * share[drawn]
            negative = item_scores(queries, table[drawn], bias[drawn])
            hits = labels[:, None] == drawn
            if self.kind == "bpr_max":
                return bpr_max(positive, negative, self.regularisation, hits)
            return sampled_softmax(
                positive, negative, jnp.log(expected) if self.correct else 0.0, hits
            )
        drawn = jax.random.randint(key, (len(labels), self.negatives), 1, n)
        drawn = drawn + (drawn >= labels[:, None])  # uniform among the others
        negative = scores_of(queries, table, bias, drawn)
        beta = gbce_power(self.negatives, n, self.calibration) if self.kind == "gbce" else 1.0
        return binary_cross_entropy(positive, negative, beta)
