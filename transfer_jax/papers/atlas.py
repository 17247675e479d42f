"""aTLAS: task vectors composed with learned anisotropic scaling (Zhang et al., NeurIPS 2024).

A task vector is what fine-tuning changed, ``tau_i = theta_i - theta_0``. One coefficient for every
task vector and block of parameters is learned,
``theta = theta_0 + sum_i lambda_i^(block) tau_i^(block)``, and nothing else: the same few numbers
serve to add tasks, to remove one, to learn from a few labelled images or from unlabelled ones.

The recipe trains a base, fine-tunes it on every source task, and runs ``config.parts``:

* ``addition``: one model for all source tasks, against a searched single scale, learned scales per
  vector, weight averaging and TIES;
* ``few_shot``: k labelled images per class of a task with no vector of its own, against full
  fine-tuning, Tip-Adapter, LP++, learned scales per vector and random vectors;
* ``test_time``: unlabelled images of that task, against tuning the norms alone;
* ``negation``: one task is forgotten while another is kept.

Every choice (scale, step, learning rate) is made on validation data; test data are read once.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax import trees
from transfer_jax.configuration import ConfigError
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.registry import load
from transfer_jax.data.sources import ArraySource, Example, Source, take
from transfer_jax.data.splits import Subset, few_shot, labels_of
from transfer_jax.models import ResidualMLP, VisionTransformer, ViTConfig
from transfer_jax.nn import TransformerConfig
from transfer_jax.objectives import (
    Aux,
    Mean,
    ModuleObjective,
    Objective,
    PenalizedObjective,
    ReparameterizedObjective,
    Trainable,
    Transformed,
    Variables,
    WarmStart,
    example_mask,
    losses,
)
from transfer_jax.objectives.contrastive import unit
from transfer_jax.training import Experiment, FitConfig
from transfer_jax.training.checkpoint import read_tree
from transfer_jax.training.config import from_dict
from transfer_jax.trees.arithmetic import wide
from transfer_jax.trees.paths import Where, leaf_key, map_with_path

Array = jax.Array
Batch = Any
PyTree = Any

GRANULARITIES = ("vector", "tensor", "row", "column", "random")
STRATEGIES = ("blockwise", "whole", "random")


# -- the frozen head --------------------------------------------------------------------------


class EmbeddingClassification(ModuleObjective):
    """An image encoder under frozen heads: ``logits = scale z / ||z|| W^T`` (CLIP's zero shot).

    The module maps ``inputs`` to embeddings z [B, D]. ``batch["task"]`` ([B] int32; absent = 0)
    says which head scores an example. The loss is ``sum_t weights_t CE_t`` where every task has an
    equal part of the batch, CE_t being the mean over the examples of task t.

    Metrics: ``nll``, ``accuracy``, ``normalised`` (accuracy divided by the task's reference), and,
    with several tasks, ``accuracy_<task>``.

    Attributes:
      heads: [T, C, D] unit rows, zero rows where a task has fewer than C classes. Never trained.
      scale: multiplies the cosines.
      weights: [T], or None for ones; -1 forgets a task.
      references: [T] accuracies of the fine-tuned models, or None for ones.
      tasks: names of the T tasks.
    """

    heads: Array
    scale: Array | float = 100.0
    weights: Array | None = None
    references: Array | None = None
    tasks: tuple[str, ...] = flax.struct.field(pytree_node=False, default=("task",))

    def logits(self, embeddings: Array, batch: Batch) -> Array:
        """Scores embeddings [B, D] with each example's head: [B, C] float32."""
        z = unit(embeddings.astype(jnp.float32))
        task = _task(batch, z.shape[0])
        scores = self.scale * jnp.einsum("bd,tcd->btc", z, self.heads, precision="highest")
        absent = ~jnp.any(self.heads != 0, axis=-1)
        scores = jnp.where(absent, -1e9, scores)
        return jnp.take_along_axis(scores, task[:, None, None], axis=1)[:, 0]

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        embeddings, state = self.apply(variables, batch, rng)
        logits = self.logits(embeddings, batch)
        labels, task = batch["labels"], _task(batch, logits.shape[0])
        mask = example_mask(batch, logits.shape[0])
        nll = losses.cross_entropy(logits, labels)
        count = self.heads.shape[0]
        weights = jnp.ones(count) if self.weights is None else self.weights
        references = jnp.ones(count) if self.references is None else self.references
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        mean = Mean.of(count * weights[task] * nll, mask)
        metrics = {
            "nll": Mean.of(nll, mask),
            "accuracy": Mean.of(correct, mask),
            "normalised": Mean.of(correct / references[task], mask),
        }
        if count > 1:
            for t, name in enumerate(self.tasks):
                metrics[f"accuracy_{name}"] = Mean.of(correct, mask * (task == t))
        return mean.value(), Aux(state, metrics, mean.weight, logits)

    def predict(self, variables: Variables, batch: Batch) -> Array:
        return self.logits(self.apply(variables, batch, None)[0], batch)

    def features(self) -> "EmbeddingClassification":
        """Returns the objective whose predictions are the normalised embeddings, [B, D]."""
        identity = jnp.eye(self.heads.shape[-1])[None]
        return self.replace(heads=identity, scale=1.0, weights=None, references=None)


class LinearizedClassification(EmbeddingClassification):
    """The same with the encoder replaced by its tangent at ``base`` (section 3.2).

    Attributes:
      base: theta_0, at which the encoder is linearised; the head comes after.
    """

    base: PyTree = None

    def apply(
        self, variables: Variables, batch: Batch, rng: Array | None, *extra: Any,
        method: str | None = None,
    ) -> tuple[PyTree, PyTree]:  # fmt: skip
        plain = super().apply

        def embed(params: PyTree) -> PyTree:
            return plain(Variables(params, variables.state), batch, None, *extra, method=method)[0]

        return trees.linearize(embed, self.base)(variables.params), variables.state


def _task(batch: Batch, size: int) -> Array:
    task = batch.get("task")
    return jnp.zeros(size, jnp.int32) if task is None else task


# -- anisotropic scaling ----------------------------------------------------------------------


class AnisotropicScaling(ReparameterizedObjective):
    """``theta = theta_0 + sum_i lambda_i^(block) tau_i^(block)``, learned in lambda alone (eq. 3).

    The parameters are the coefficients, float32 and zero at first, so that training starts at the
    base. Base and task vectors are carried. A step composes one model; its backward pass holds the
    gradient of one model, whatever the number of vectors, because
    ``dL/dlambda_i^(block) = <dL/dtheta^(block), tau_i^(block)>``. Build with
    ``AnisotropicScaling.of``.

    Attributes:
      inner: the objective of the composed model.
      base: theta_0.
      vectors: the task vectors, stacked: [n, ...] leaves of any floating dtype, None at leaves that
        stay as in the base.
      parts: int16 number of each element's part, for granularity "random"; otherwise None.
      names: of the n vectors.
      granularity: what has a coefficient of its own, for every vector: "vector" (isotropic: the
        whole model), "tensor" (aTLAS: a leaf), "row" and "column" (first and last axis of leaves
        with two axes or more; other leaves as a whole), "random" (aTLAS x K: random parts).
      num_parts: K.
      tie: (pattern, replacement) pairs, applied to paths; leaves whose paths become equal share
        their coefficients. They must have one shape, unless the granularity is "tensor".
    """

    base: PyTree
    vectors: PyTree
    parts: PyTree = None
    names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    granularity: str = flax.struct.field(pytree_node=False, default="tensor")
    num_parts: int = flax.struct.field(pytree_node=False, default=1)
    tie: tuple[tuple[str, str], ...] = flax.struct.field(pytree_node=False, default=())

    @classmethod
    def of(
        cls,
        inner: Objective,
        base: PyTree,
        vectors: Mapping[str, PyTree],
        *,
        exclude: Sequence[str] = (),
        where: Where | None = None,
        granularity: str = "tensor",
        num_parts: int = 1,
        key: Array | None = None,
        tie: Sequence[tuple[str, str]] = (),
        dtype: Any = None,
    ) -> "AnisotropicScaling":
        """Stacks task vectors over a base.

        Args:
          inner: the objective of the composed model.
          base: theta_0, its parameters.
          vectors: name -> task vector, a tree like ``base``.
          exclude: names of vectors to leave out, such as the target's own.
          where: leaves that are composed; None = all.
          granularity, tie: see the class.
          num_parts: K, at most 32,767, for "random".
          key: of the random parts.
          dtype: to store the vectors in; None = as they are.

        Raises:
          ValueError: no vector is left, an unknown name or granularity, or trees that differ.
        """
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity={granularity!r}; choose one of {', '.join(GRANULARITIES)}."
            )
        if unknown := sorted(set(exclude) - set(vectors)):
            raise ValueError(f"exclude={unknown}: the task vectors are {sorted(vectors)}.")
        names = tuple(name for name in vectors if name not in exclude)
        if not names:
            raise ValueError("no task vector is left: give at least one that is not excluded.")
        chosen = base if where is None else trees.partition(base, where)[0]
        kept = [_like(chosen, vectors[name]) for name in names]
        trees.check_same(chosen, *kept, names=["base", *names])
        bank = jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x, dtype) for x in xs]), *kept)
        parts = None
        if granularity == "random":
            if not 1 <= num_parts <= np.iinfo(np.int16).max or key is None:
                raise ValueError(
                    f"granularity='random' needs a key and 1 <= num_parts <= 32767; got {num_parts}"
                    f" and {'a' if key is not None else 'no'} key."
                )
            parts = random_parts(chosen, num_parts, key)
        return cls(
            inner=inner, base=base, vectors=bank, parts=parts, names=names,
            granularity=granularity, num_parts=num_parts,
            tie=tuple((pattern, new) for pattern, new in tie),
        )  # fmt: skip

    def initial_params(self, rng: Array, inner_params: PyTree) -> PyTree:
        del rng, inner_params
        return self.zeros()

    def zeros(self) -> PyTree:
        """Coefficients of the base: the tree of the base with [n, ...] where a block has its own.

        For granularity "vector" ``{"coefficients": [n]}``.
        """
        if self.granularity == "vector":
            return {"coefficients": jnp.zeros(jax.tree.leaves(self.vectors)[0].shape[0])}
        owners = set(self._owners().values())

        def leaf(path: str, bank: Array) -> Array | None:
            if path not in owners:
                return None
            num, *shape = bank.shape
            inner: tuple[int, ...] = ()
            if self.granularity == "random":
                inner = (self.num_parts,)
            elif self.granularity == "row" and len(shape) > 1:
                inner = (shape[0],)
            elif self.granularity == "column" and len(shape) > 1:
                inner = (1,) * (len(shape) - 1) + (shape[-1],)
            return jnp.zeros((num, *inner), jnp.float32)

        return map_with_path(leaf, self.vectors)

    def isotropic(self, coefficients: Array | float) -> PyTree:
        """Returns the coefficients where every block has those given, a scalar or [n]."""
        given = jnp.asarray(coefficients, jnp.float32)
        return jax.tree.map(
            lambda c: (
                jnp.broadcast_to(given.reshape(given.shape + (1,) * (c.ndim - 1)), c.shape)
                if given.ndim
                else jnp.full(c.shape, given)
            ),
            self.zeros(),
        )

    def inner_params(self, params: PyTree) -> PyTree:
        chosen = _like(self.vectors, self.base)
        if self.granularity == "vector":
            coefficients = jax.tree.map(lambda _: params["coefficients"], self.vectors)
        else:
            own, owners = _by_path(params), self._owners()
            coefficients = map_with_path(lambda path, _: own[owners[path]], self.vectors)
        if self.granularity == "random":
            composed = jax.tree.map(_compose_parts, chosen, self.vectors, coefficients, self.parts)
        else:
            composed = trees.apply_task_vectors(chosen, self.vectors, coefficients)
        return jax.tree.map(
            lambda new, old: old if new is None else new, composed, self.base,
            is_leaf=lambda x: x is None,
        )  # fmt: skip

    def _owners(self) -> dict[str, str]:
        """Path of every composed leaf -> path of the leaf whose coefficients it uses."""
        first: dict[str, str] = {}
        owners = {}
        for path in trees.paths(self.vectors):
            block = path
            for pattern, replacement in self.tie:
                block = re.sub(pattern, replacement, block)
            owners[path] = first.setdefault(block, path)
        return owners


class CoefficientPenalty(PenalizedObjective):
    """``1/2`` times the mean over blocks of the L_p norm over the task vectors (section 5.1).

    Attributes:
      p: 1 for sparse, interpretable coefficients.
    """

    p: float = flax.struct.field(pytree_node=False, default=1.0)

    def penalty(self, params: PyTree) -> Array:
        norms = [
            jnp.linalg.norm(c.reshape(c.shape[0], -1), ord=self.p, axis=0).ravel()
            for c in jax.tree.leaves(params)
        ]
        return 0.5 * jnp.concatenate(norms).mean()


def random_parts(tree: PyTree, num_parts: int, key: Array) -> PyTree:
    """Assigns every element of every leaf to one of K parts, uniformly and independently.

    Returns:
      int16 trees like ``tree``; leaves of equal shape differ.
    """
    return map_with_path(
        lambda path, x: jax.random.randint(leaf_key(key, path), x.shape, 0, num_parts).astype(
            jnp.int16
        ),
        tree,
    )


def _compose_parts(base: Array, vectors: Array, coefficients: Array, parts: Array) -> Array:
    """One leaf of aTLAS x K: vector after vector, so that no [n, ...] temporary is formed."""

    @jax.checkpoint
    def body(total: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        vector, coefficient = one
        return total + coefficient[parts] * wide(vector), None

    total, _ = jax.lax.scan(body, wide(base), (vectors, coefficients))
    return total.astype(base.dtype)


def random_vectors(vectors: Mapping[str, PyTree], key: Array) -> dict[str, PyTree]:
    """Returns Gaussian directions, each leaf with the norm of that leaf of the task vector."""

    def noise(path: str, x: Array, key: Array) -> Array:
        draw = jax.random.normal(leaf_key(key, path), x.shape)
        return draw * jnp.linalg.norm(x) / jnp.linalg.norm(draw)

    keys = jax.random.split(key, len(vectors))
    return {
        name: map_with_path(lambda path, x, k=k: noise(path, x, k), vector)
        for k, (name, vector) in zip(keys, vectors.items())
    }


def _by_path(tree: PyTree) -> dict[str, Array]:
    return dict(zip(trees.paths(tree), jax.tree.leaves(tree)))


def _like(chosen: PyTree, tree: PyTree) -> PyTree:
    """Returns ``tree`` with None at the leaves that ``chosen`` does not have."""
    held = set(trees.paths(chosen))
    return map_with_path(lambda path, x: x if path in held else None, tree)


# -- selection under a budget -----------------------------------------------------------------


def block_gradients(
    inner: Objective, base: Variables, vectors: Mapping[str, PyTree], batches: Iterable[Batch]
) -> dict[str, PyTree]:
    """Returns ``dL/dlambda_i^(block)`` at lambda = 0 for every vector and leaf (section 5.2).

    All coefficients being 0, one gradient in theta_0 serves every vector: memory is that gradient
    and one task vector.

    Args:
      inner: the objective of the composed model.
      base: its variables at theta_0.
      vectors: name -> task vector.
      batches: labelled data; gradients are weighted by ``Aux.weight``.

    Returns:
      name -> tree like theta_0 of scalars.
    """

    @jax.jit
    def weighted(inner: Objective, base: Variables, batch: Batch) -> tuple[PyTree, Array]:
        def loss(params: PyTree) -> tuple[Array, Array]:
            value, aux = inner.loss(Variables(params, base.state), batch, None)
            return value * aux.weight, jnp.asarray(aux.weight, jnp.float32)

        return jax.grad(loss, has_aux=True)(base.params)

    total, weight = None, 0.0
    for batch in batches:
        gradient, w = weighted(inner, base, batch)
        total = gradient if total is None else trees.add(total, gradient)
        weight = weight + w
    if total is None:
        raise ValueError("batches is empty: there is nothing to take gradients on.")

    @jax.jit
    def products(gradient: PyTree, vector: PyTree) -> PyTree:
        return jax.tree.map(
            lambda g, v: jnp.vdot(wide(g), wide(v), precision="highest"), gradient, vector
        )

    gradient = trees.scale(total, 1.0 / weight)
    return {name: products(gradient, vector) for name, vector in vectors.items()}


def select_vectors(
    gradients: Mapping[str, PyTree],
    vectors: Mapping[str, PyTree],
    budget: int,
    strategy: str = "blockwise",
    key: Array | None = None,
) -> dict[str, PyTree]:
    """Keeps ``budget`` task vectors (section 5.2).

    Args:
      gradients: from ``block_gradients``.
      vectors: name -> task vector.
      budget: b, how many are kept.
      strategy: "blockwise" (for each leaf the b vectors with the largest gradients, so that what
        is returned mixes vectors), "whole" (largest L1 norm over leaves) or "random".
      key: for "random".

    Returns:
      b task vectors, named ``choice_<j>`` where mixed.

    Raises:
      ValueError: an unknown strategy, or a budget that is not in 1..n.
    """
    names = list(vectors)
    if not 1 <= budget <= len(names):
        raise ValueError(f"budget={budget}; choose from 1 to the {len(names)} task vectors.")
    if strategy == "random":
        if key is None:
            raise ValueError("strategy='random' needs a key.")
        kept = jax.random.permutation(key, len(names))[:budget]
        return {names[int(i)]: vectors[names[int(i)]] for i in sorted(kept)}
    sizes = np.abs([[float(g) for g in jax.tree.leaves(gradients[name])] for name in names])
    if strategy == "whole":
        order = np.argsort(-sizes.sum(axis=1), kind="stable")
        return {names[i]: vectors[names[i]] for i in order[:budget]}
    if strategy != "blockwise":
        raise ValueError(f"strategy={strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    order = np.argsort(-sizes, axis=0, kind="stable")  # [n, leaves]
    leaves = [jax.tree.leaves(vectors[name]) for name in names]
    structure = jax.tree.structure(vectors[names[0]])
    return {
        f"choice_{j}": jax.tree.unflatten(
            structure, [leaves[i][block] for block, i in enumerate(order[j])]
        )
        for j in range(budget)
    }


# -- adapters on the features -----------------------------------------------------------------


class TipAdapter(Transformed):
    """Tip-Adapter-F: ``scale z W^T + a exp(-b (1 - z F^T)) Y`` (Zhang et al. 2022, equation 6).

    Keys F start as the normalised features of the support images and are trained, as are a and b;
    with an ``AnisotropicScaling`` inside, jointly with its coefficients (the paper's table 2).

    The parameters are ``{"inner", "keys", "alpha", "beta"}``; "inner" is absent if ``frozen``.

    Attributes:
      inner: an objective whose predictions are unit features z [B, D]; see
        ``EmbeddingClassification.features``.
      keys: initial F, [S, D].
      values: Y, [S, C] one-hot labels of the support images.
      head: W, [C, D].
      scale: multiplies the cosines with W.
      frozen: variables of ``inner`` if it is not trained.
    """

    keys: Array
    values: Array
    head: Array
    scale: Array | float = 100.0
    frozen: Variables | None = None

    def init(self, rng: Array, batch: Batch) -> Variables:
        # Copies: what is trained must not share memory with what is carried.
        params = {"keys": jnp.copy(self.keys), "alpha": jnp.float32(2), "beta": jnp.float32(1)}
        if self.frozen is not None:
            return Variables(params, {})
        inner = self.inner.init(rng, batch)
        return Variables({"inner": inner.params, **params}, inner.state)

    def predict(self, variables: Variables, batch: Batch) -> Array:
        params = variables.params
        inner = self.frozen
        if inner is None:
            inner = Variables(params["inner"], variables.state)
        z = self.inner.predict(inner, batch)
        affinity = jnp.exp(-params["beta"] * (1 - z @ params["keys"].T))
        return self.scale * z @ self.head.T + params["alpha"] * affinity @ self.values

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits = self.predict(variables, batch)
        return _labelled(logits, batch, variables.state)


class FeatureHead(Transformed):
    """``logits = z V^T + alpha_c z w_c``: a fixed linear probe, blended with the text head (LP++).

    Attributes:
      inner: as in ``TipAdapter``.
      probe: V, [C, D].
      alpha: [C].
      head: W, [C, D].
    """

    probe: Array
    alpha: Array
    head: Array

    def predict(self, variables: Variables, batch: Batch) -> Array:
        z = self.inner.predict(variables, batch)
        return z @ self.probe.T + self.alpha * (z @ self.head.T)

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        return _labelled(self.predict(variables, batch), batch, variables.state)


def lp_plus_plus(
    features: Array, labels: Array, head: Array, *, passes: int = 300
) -> tuple[Array, Array]:
    """Fits LP++ on frozen features (Huang et al. 2024): full-batch descent, steps in closed form.

    Steps are ``4 N / lambda_max(F^T F)`` for V and ``N / (4 max_c sum_i (f_i w_c)^2)`` for alpha.

    Args:
      features: F, [N, D] unit rows.
      labels: [N] in [0, C).
      head: W, [C, D] unit rows.
      passes: over the data.

    Returns:
      V [C, D] and alpha [C], for ``FeatureHead``.
    """
    count, classes = features.shape[0], head.shape[0]
    one_hot = jax.nn.one_hot(labels, classes)
    cosines = features @ head.T
    per_class = one_hot.sum(axis=0)
    mean = (one_hot.T @ cosines) / jnp.maximum(per_class, 1)[:, None]
    probe = one_hot.T @ features
    alpha = jnp.full(classes, 250.0 * jnp.diagonal(mean).mean())
    largest = jnp.linalg.eigvalsh(features.T @ features)[-1]
    rate_probe = 4 * count / largest
    rate_alpha = count / (4 * jnp.max(jnp.sum(cosines**2, axis=0)))

    def loss(values: tuple[Array, Array]) -> Array:
        probe, alpha = values
        return losses.cross_entropy(features @ probe.T + alpha * cosines, labels).mean()

    def step(_: int, values: tuple[Array, Array]) -> tuple[Array, Array]:
        by_probe, by_alpha = jax.grad(loss)(values)
        return values[0] - rate_probe * by_probe, values[1] - rate_alpha * by_alpha

    return jax.lax.fori_loop(0, passes, step, (probe, alpha))


def _labelled(logits: Array, batch: Batch, state: PyTree) -> tuple[Array, Aux]:
    labels = batch["labels"]
    mask = example_mask(batch, labels.shape[0])
    nll = Mean.of(losses.cross_entropy(logits, labels), mask)
    correct = Mean.of(jnp.argmax(logits, axis=-1) == labels, mask)
    return nll.value(), Aux(state, {"nll": nll, "accuracy": correct}, nll.weight, logits)


# -- without labels ---------------------------------------------------------------------------


class UnsupervisedFixMatch(Transformed):
    """Learns from unlabelled images by agreement of a weak and a strong view (section 5.3).

    For a trusted example (``batch["trusted"]`` [B], with the pseudo-label ``batch["labels"]``) the
    loss is the cross-entropy of the strong view (``batch["strong"]``). For another it is that with
    the sharpened probabilities ``sigma = p^power / sum p^power`` of the weak view (``inputs``),
    which carry no gradient, if ``max sigma`` exceeds a threshold that rises linearly from
    ``threshold`` to ``final_threshold`` in ``steps``. The mean is over the accepted examples.
    Evaluation (``rng=None``) is that of the inner objective.

    Metrics: ``accepted``, the share of examples that count.

    Attributes:
      inner: an objective that predicts logits.
      power: of the sharpening.
      threshold: omega at the first step.
      final_threshold: omega at the last one.
      steps: of the stage.
    """

    power: Array | float = 0.5
    threshold: Array | float = 0.9
    final_threshold: Array | float = 1.0
    steps: Array | float = 1.0

    def init(self, rng: Array, batch: Batch) -> Variables:
        inner = self.inner.init(rng, batch)
        return Variables(inner.params, {"inner": inner.state, "step": jnp.float32(0)})

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        return self.inner.predict(_inner(variables), batch)

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if rng is None:
            value, aux = self.inner.loss(_inner(variables), batch, None)
            return value, aux._replace(state=variables.state)
        step = variables.state["step"]
        omega = self.threshold + (self.final_threshold - self.threshold) * step / self.steps
        weak = jax.lax.stop_gradient(self.predict(variables, batch))
        sigma = jax.nn.softmax(self.power * jax.nn.log_softmax(weak))
        strong = self.predict(variables, {**batch, "inputs": batch["strong"]})
        trusted = batch["trusted"] > 0
        target = jnp.where(
            trusted[:, None], jax.nn.one_hot(batch["labels"], sigma.shape[-1]), sigma
        )
        accepted = (trusted | (jnp.max(sigma, axis=-1) > omega)).astype(jnp.float32)
        accepted = accepted * example_mask(batch, accepted.shape[0])
        nll = -jnp.sum(target * jax.nn.log_softmax(strong.astype(jnp.float32)), axis=-1)
        mean = Mean.of(nll, accepted)
        state = {**variables.state, "step": step + 1}
        return mean.value(), Aux(state, {"accepted": Mean.of(accepted)}, mean.weight, strong)


class EntropyMinimisation(Transformed):
    """Mean entropy of the predictions below ``share * log C`` (the filter of SAR, without labels).

    Metrics: ``accepted``. Evaluation is that of the inner objective.

    Attributes:
      share: of the largest possible entropy, above which an example is left out.
    """

    share: Array | float = 0.4

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if rng is None:
            return self.inner.loss(variables, batch, None)
        logits = self.inner.predict(variables, batch)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        kept = (entropy < self.share * jnp.log(logits.shape[-1])).astype(jnp.float32)
        kept = jax.lax.stop_gradient(kept) * example_mask(batch, kept.shape[0])
        mean = Mean.of(entropy, kept)
        aux = Aux(variables.state, {"accepted": Mean.of(kept)}, mean.weight, logits)
        return mean.value(), aux


def _inner(variables: Variables) -> Variables:
    return Variables(variables.params, variables.state["inner"])


def trusted_set(
    probabilities: np.ndarray, *, limit: int = 100, share: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses for every class the images that it scores highest.

    Args:
      probabilities: [N, C].
      limit: at most so many per class.
      share: of N / C, at most, per class.

    Returns:
      Positions [K C] and pseudo-labels [K C] with ``K = min(share N / C, limit)``, at least 1;
      classes take turns, so that every run of C entries holds each once.
    """
    size, classes = probabilities.shape
    count = max(1, min(int(share * size / classes), limit))
    top = np.argsort(-probabilities, axis=0, kind="stable")[:count]  # [K, C]
    return top.reshape(-1), np.tile(np.arange(classes, dtype=np.int32), count)


def unlabelled_source(
    inputs: np.ndarray, probabilities: np.ndarray, *, limit: int = 100, share: float = 1.0,
    seed: int = 0,
) -> "Interleaved":  # fmt: skip
    """Returns images of which every fourth is of the trusted set, its classes taking turns.

    Args:
      inputs: images [N, ...].
      probabilities: [N, C] by the present model.
      limit, share: see ``trusted_set``.
      seed: of the order of the others.
    """
    indices, labels = trusted_set(probabilities, limit=limit, share=share)
    rest = np.setdiff1d(np.arange(len(inputs)), indices)
    rest = np.random.default_rng(seed).permutation(rest if len(rest) >= 3 else len(inputs))
    length = max(len(rest) // 3, len(indices))
    chosen = np.arange(length) % len(indices)
    others = np.resize(rest, 3 * length).reshape(3, length)
    parts = [
        (indices[chosen], labels[chosen], np.ones(length, np.float32)),
        *((rows, np.zeros(length, np.int32), np.zeros(length, np.float32)) for rows in others),
    ]
    return Interleaved(
        [ArraySource({"inputs": inputs[i], "labels": y, "trusted": t}) for i, y, t in parts]
    )


class StrongView(grain.transforms.RandomMap):
    """Adds ``strong``: ``inputs`` [H, W, c] shifted by up to ``shift`` pixels, with noise.

    Args:
      shift: largest shift along each axis; the border is repeated.
      noise: standard deviation of Gaussian noise on every pixel.
    """

    def __init__(self, shift: int = 1, noise: float = 0.1):
        self.shift, self.noise = shift, noise

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        x = element["inputs"]
        s = self.shift
        padded = np.pad(x, ((s, s), (s, s), (0, 0)), mode="edge")
        row, column = rng.integers(0, 2 * s + 1, size=2)
        moved = padded[row : row + x.shape[0], column : column + x.shape[1]]
        noise = rng.normal(scale=self.noise, size=x.shape)
        return {**element, "strong": (moved + noise).astype(np.float32)}


# -- disentanglement --------------------------------------------------------------------------


def disentanglement_error(
    objective: AnisotropicScaling, variables: Variables, data: Mapping[str, Iterable[Batch]]
) -> float:
    """How often another task's vector changes a prediction (Ortiz-Jimenez et al. 2023, section 4).

    ``xi(i, j) = mean over D_i of 1[argmax f(theta_0 + L_i tau_i) != argmax f(theta_0 + L_i tau_i +
    L_j tau_j)]``, averaged over i != j.

    Args:
      objective: with the coefficients of ``variables``.
      variables: learned on all tasks.
      data: task -> its batches, for every name in ``objective.names`` that is to be averaged over.
    """

    @jax.jit
    def classes(objective: AnisotropicScaling, params: PyTree, batch: Batch) -> Array:
        return jnp.argmax(objective.predict(Variables(params, variables.state), batch), axis=-1)

    def only(*kept: int) -> PyTree:
        mask = jnp.isin(jnp.arange(len(objective.names)), jnp.asarray(kept))
        return jax.tree.map(
            lambda c: c * mask.reshape(mask.shape + (1,) * (c.ndim - 1)), variables.params
        )

    errors = []
    for name, batches in data.items():
        i = objective.names.index(name)
        batches = list(batches)
        alone = [classes(objective, only(i), batch) for batch in batches]
        for j in range(len(objective.names)):
            if j == i:
                continue
            means = [
                Mean.of(classes(objective, only(i, j), b) != a, example_mask(b, a.shape[0]))
                for a, b in zip(alone, batches)
            ]
            errors.append(float(sum(m.total for m in means) / sum(m.weight for m in means)))
    return float(np.mean(errors)) if errors else 0.0


# -- data -------------------------------------------------------------------------------------


class Interleaved:
    """Examples of several sources in turn: example ``i`` is of source ``i % T``.

    A batch whose size T divides has an equal part of each. It ends with the smallest source. All
    sources have the same keys.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)

    def __len__(self) -> int:
        return len(self.sources) * min(len(source) for source in self.sources)

    def __getitem__(self, index: int, /) -> Example:
        at, which = divmod(int(index), len(self.sources))
        return dict(self.sources[which][at])

    def take(self, indices: np.ndarray) -> Example:
        at, which = np.divmod(indices, len(self.sources))
        parts = [take(s, at[which == t]) for t, s in enumerate(self.sources) if t in which]
        back = np.argsort(np.argsort(which, kind="stable"), kind="stable")
        return {key: np.concatenate([p[key] for p in parts])[back] for key in parts[0]}


def _blocks(x: np.ndarray) -> np.ndarray:
    """Cuts images into 4 x 4 blocks and puts these in another, fixed order."""
    n, height, width, channels = x.shape
    h, w = height // 4, width // 4
    tiles = x.reshape(n, 4, h, 4, w, channels).swapaxes(2, 3).reshape(n, 16, h, w, channels)
    tiles = tiles[:, np.random.default_rng(0).permutation(16)]
    return tiles.reshape(n, 4, 4, h, w, channels).swapaxes(2, 3).reshape(x.shape)


def _checkered(x: np.ndarray) -> np.ndarray:
    """Inverts every second pixel."""
    board = np.indices(x.shape[1:3]).sum(axis=0)[..., None] % 2
    return np.abs(x - board.astype(x.dtype))


# What is done to images [N, H, W, c] in [0, 1] to make another task of them.
DOMAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda x: x,
    "inverted_rotated": lambda x: 1 - np.rot90(x, axes=(1, 2)),
    "blocks": _blocks,
    "flipped": lambda x: x[:, :, ::-1],
    "checkered": _checkered,
    "rotated": lambda x: np.rot90(x, axes=(1, 2)),
    "faded": lambda x: 0.25 + 0.5 * x,
    "sheared": lambda x: np.stack(
        [np.roll(x[:, r], r * 3 // x.shape[1] - 1, axis=1) for r in range(x.shape[1])], axis=1
    ),
}


class Tasks(NamedTuple):
    """Tasks by name, and their frozen heads.

    Attributes:
      splits: task -> split -> source of ``inputs`` and ``labels``.
      heads: task -> [C, D] unit rows.
    """

    splits: dict[str, dict[str, Source]]
    heads: dict[str, np.ndarray]


def make_tasks(config: Any) -> Tasks:
    """Makes the tasks of ``config.data``: one dataset, in several domains.

    Every source has training images of its own, and the targets share another part of them;
    validation and test images are the same ones in every domain. Class c has the same random unit
    prototype in all domains, as a class name has the same text embedding.

    Raises:
      ConfigError: an unknown domain.
    """
    sources = tuple(config.data.sources)
    names = tuple(dict.fromkeys((*sources, *config.few_shot.targets, config.test_time.target)))
    for name in names:
        if name not in DOMAINS:
            raise ConfigError(f"config.data: no domain {name!r}; there are {sorted(DOMAINS)}.")
    bundle = load(config.data.name, seed=config.seed, **config.data.options)
    whole = {name: take(s, np.arange(len(s))) for name, s in bundle.splits.items()}
    splits: dict[str, dict[str, Source]] = {}
    for i, name in enumerate(names):
        splits[name] = {}
        for split, arrays in whole.items():
            own = slice(min(i, len(sources)), None, len(sources) + 1)
            step = own if split == "train" else slice(None)
            inputs = DOMAINS[name](arrays["inputs"][step]).astype(np.float32)
            splits[name][split] = ArraySource({"inputs": inputs, "labels": arrays["labels"][step]})
    classes = bundle.info.num_classes
    if classes is None:
        raise ConfigError(f"config.data.name={config.data.name!r} has no classes.")
    rng = np.random.default_rng(config.seed)
    prototypes = rng.normal(size=(classes, config.model.embedding))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    return Tasks(splits, {name: prototypes.astype(np.float32) for name in names})


def _tagged(source: Source, task: int) -> ArraySource:
    """The examples with ``task``."""
    arrays = take(source, np.arange(len(source)))
    return ArraySource({**arrays, "task": np.full(len(source), task, np.int32)})


# -- the recipe -------------------------------------------------------------------------------


def _vit(
    *,
    embedding: int,
    features: int,
    depth: int,
    num_heads: int,
    expand: int,
    dtype: str,
    **options: Any,
) -> VisionTransformer:
    """A Vision Transformer like CLIP's image tower."""
    stack = TransformerConfig(
        features=features, num_layers=depth, num_heads=num_heads, hidden=expand * features,
        init_scale=features**-0.5, dtype=dtype,
    )  # fmt: skip
    return VisionTransformer(ViTConfig(
        stack=stack, patch_bias=False, norm_before=True, head="projection", projection=embedding,
        **options,
    ))  # fmt: skip


def encoder(config: Any) -> Any:
    """Builds the image encoder of ``config.model``.

    Raises:
      ConfigError: an unknown kind.
    """
    kinds: dict[str, Callable[..., Any]] = {"residual_mlp": ResidualMLP, "vit": _vit}
    options = config.model.to_dict()
    kind = options.pop("kind")
    if kind not in kinds:
        raise ConfigError(f"config.model.kind={kind!r}; choose one of {', '.join(kinds)}.")
    return kinds[kind](**options)


class Context(NamedTuple):
    """What the parts of the recipe share."""

    exp: Experiment
    tasks: Tasks
    task: Callable[..., EmbeddingClassification]

    def train(self, name: str, source: Source, *, shuffle: bool = True) -> Pipeline:
        size, seed = self.exp.config.batch_size, self.exp.seed(name)
        return Pipeline(source, size, shuffle=shuffle, seed=seed, repeat=True, num_threads=0)

    def whole(self, source: Source) -> Pipeline:
        return Pipeline(source, self.exp.config.eval_batch_size, num_threads=0)

    def split(self, name: str, split: str) -> Pipeline:
        return self.whole(self.tasks.splits[name][split])

    def joint(self, names: Sequence[str], split: str) -> Interleaved:
        return Interleaved(
            [_tagged(self.tasks.splits[name][split], t) for t, name in enumerate(names)]
        )


def recipe(exp: Experiment) -> None:
    cfg = exp.config
    if not cfg.data.name:
        raise ConfigError(
            "this config describes the published experiment, whose CLIP weights and 22 data sets "
            "cannot be read here; run a variant with data, such as atlas:digits."
        )
    parts: dict[str, Callable] = {
        "addition": addition, "few_shot": few_shot_adaptation, "test_time": test_time_adaptation,
        "negation": negation,
    }  # fmt: skip
    if unknown := sorted(set(cfg.parts) - set(parts)):
        raise ConfigError(f"config.parts has {unknown}; there are {', '.join(parts)}.")
    tasks = make_tasks(cfg)
    module = encoder(cfg)

    def task(*names: str, **fields: Any) -> EmbeddingClassification:
        return EmbeddingClassification(
            module=module, heads=jnp.stack([tasks.heads[n] for n in names]),
            scale=float(cfg.logit_scale), tasks=names, **fields,
        )  # fmt: skip

    context = Context(exp, tasks, task)
    sources = tuple(cfg.data.sources)
    if {"addition", "few_shot", "test_time"} & set(cfg.parts):
        base, vectors = acquire(context, "base", sources, cfg.base)
    for part in cfg.parts:
        if part == "negation":
            # A base that already knows the tasks: what is to be kept must be worth keeping.
            target = cfg.negation.target
            negation(context, *acquire(context, "strong-base", sources, cfg.negation.base, target))
        else:
            parts[part](context, base, vectors)


def acquire(
    context: Context, stage: str, sources: tuple[str, ...], config: Any, only: str = ""
) -> tuple[PyTree, dict[str, PyTree]]:
    """Trains a base on the mixture of the sources, and fine-tunes it on each (or on ``only``)."""
    exp, cfg = context.exp, context.exp.config
    mixture = context.joint(sources, "train")
    base = exp.fit(
        stage, context.task(*sources), context.train(stage, mixture, shuffle=False), config
    ).params
    vectors = {}
    for name in (only,) if only else sources:
        label = f"{stage}-{name}"
        start = WarmStart(inner=context.task(name), params=base)
        data = context.train(label, context.tasks.splits[name]["train"])
        vectors[name] = trees.task_vector(exp.fit(label, start, data, cfg.finetune).params, base)
    return base, vectors


def addition(context: Context, base: PyTree, vectors: dict[str, PyTree]) -> None:
    """One model for all source tasks (section 4.3)."""
    exp, cfg = context.exp, context.exp.config
    names = tuple(vectors)
    plain = context.task(*names)

    def accuracies(name: str, objective: Objective, variables: Variables) -> list[float]:
        """Test accuracy on each task, and of the single models for "fine-tuned"."""

        def compute() -> list[float]:
            metrics = exp.evaluate(objective, variables, test)
            return [metrics[f"accuracy_{n}"] for n in names]

        return exp.artifact(f"addition-test-{name}", compute)

    validation = context.whole(context.joint(names, "validation"))
    test = context.whole(context.joint(names, "test"))

    def single(split: str) -> list[float]:
        return [
            exp.evaluate(
                context.task(name), Variables(trees.add(base, vectors[name]), {}),
                context.split(name, split),
            )["accuracy"]
            for name in names
        ]  # fmt: skip

    tuned = exp.artifact("fine-tuned", lambda: {s: single(s) for s in ("validation", "test")})
    objective = plain.replace(references=jnp.asarray(tuned["validation"]))
    # Fine-tuned models, and what is composed of them, without any training.
    rows: dict[str, list[float]] = {
        "pre-trained": accuracies("pre-trained", plain, Variables(base, {}))
    }
    rows["fine-tuned, one model per task"] = tuned["test"]
    every = list(vectors.values())

    def arithmetic(alpha: float) -> PyTree:
        return trees.apply_task_vectors(base, every, alpha)

    def ties(lambda_: float) -> PyTree:
        return trees.merge(base, every, "ties", vectors=True, density=0.2, lambda_=lambda_)

    average = Variables(arithmetic(1 / len(names)), {})
    rows["weight average"] = accuracies("average", plain, average)

    def search() -> dict[str, list[float]]:
        """Validation score of every candidate, of task arithmetic and of TIES."""
        merged = {
            "alpha": map(arithmetic, cfg.addition.alphas),
            "lambda": map(ties, cfg.addition.ties),
        }
        return {
            kind: [
                exp.evaluate(objective, Variables(params, {}), validation)["normalised"]
                for params in candidates
            ]
            for kind, candidates in merged.items()
        }

    scores = exp.artifact("addition-search", search)
    alpha = float(cfg.addition.alphas[int(np.argmax(scores["alpha"]))])
    lambda_ = float(cfg.addition.ties[int(np.argmax(scores["lambda"]))])
    rows[f"task arithmetic, alpha = {alpha:g}"] = accuracies(
        "arithmetic", plain, Variables(arithmetic(alpha), {})
    )
    rows[f"TIES, lambda = {lambda_:g}"] = accuracies("ties", plain, Variables(ties(lambda_), {}))

    learned = {}
    data = context.train("addition", context.joint(names, "validation"), shuffle=False)
    for label, granularity in (("isotropic, learned", "vector"), ("aTLAS", "tensor")):
        stage = f"addition-{granularity}"
        scaled = AnisotropicScaling.of(objective, base, vectors, granularity=granularity)
        fitted = exp.fit(stage, scaled, data, cfg.addition.fit, evaluate={"validation": validation})
        learned[label] = scaled, fitted.variables
        rows[label] = accuracies(granularity, *learned[label])

    columns = ["model", *names, "mean", "relative to fine-tuned"]
    table = [
        [name, *row, np.mean(row), np.mean(np.asarray(row) / tuned["test"])]
        for name, row in rows.items()
    ]
    exp.table("Task addition, test accuracy", columns, [_rounded(row) for row in table])
    relative = {row[0].split(",")[0]: float(row[-1]) for row in table}
    for name in ("task arithmetic", "isotropic", "aTLAS"):
        exp.record(f"addition, {name}", relative[name])
    exp.curve(
        "Task arithmetic (validation)", list(cfg.addition.alphas), {"mean": scores["alpha"]},
        xlabel="alpha", ylabel="accuracy relative to fine-tuned",
    )  # fmt: skip

    scaled, variables = learned["aTLAS"]
    single_scale = Variables(scaled.isotropic(alpha), variables.state)
    batches = {
        name: list(exp.batches(context.whole(_tagged(context.tasks.splits[name]["test"], t))))
        for t, name in enumerate(names)
    }
    errors = exp.artifact(
        "disentanglement",
        lambda: {
            "task arithmetic": disentanglement_error(scaled, single_scale, batches),
            "aTLAS": disentanglement_error(scaled, variables, batches),
        },
    )
    exp.table("Disentanglement error", ["coefficients", "error"],
              [_rounded(row) for row in errors.items()])  # fmt: skip


def few_shot_adaptation(context: Context, base: PyTree, vectors: dict[str, PyTree]) -> None:
    """A task without a vector of its own, k labelled images per class (sections 5.1 and 5.4)."""
    for target in context.exp.config.few_shot.targets:
        _adapt(context, base, vectors, target)


def _adapt(context: Context, base: PyTree, vectors: dict[str, PyTree], target: str) -> None:
    exp, cfg = context.exp, context.exp.config
    task, head = context.task(target), jnp.asarray(context.tasks.heads[target])
    sources = {name: v for name, v in vectors.items() if name != target}
    start = WarmStart(inner=task, params=base)
    frozen = Variables(base, {})
    validation, test = context.split(target, "validation"), context.split(target, "test")

    def score(name: str, objective: Objective, variables: Variables) -> dict[str, float]:
        return exp.artifact(
            f"{name}-accuracy",
            lambda: {
                "validation": exp.evaluate(objective, variables, validation)["accuracy"],
                "test": exp.evaluate(objective, variables, test)["accuracy"],
            },
        )

    zero = score(f"{target}-zero-shot", task, frozen)
    rows: dict[str, list[float]] = {"zero-shot": [zero["test"]] * len(cfg.few_shot.shots)}

    def keep(name: str, scores: Mapping[str, float]) -> None:
        """Whoever is not better than zero-shot on validation reports zero-shot."""
        better = scores["validation"] > zero["validation"]
        rows.setdefault(name, []).append(scores["test"] if better else zero["test"])

    for k in cfg.few_shot.shots:
        support = few_shot(context.tasks.splits[target]["train"], int(k), exp.seed(f"{target}-{k}"))
        labels = jnp.asarray(labels_of(support))
        images = {"inputs": jnp.asarray(take(support, np.arange(len(support)))["inputs"])}
        data = context.train(f"{target}-{k}", support)

        def run(
            method: str, objective: Objective, config: Any, k: int = k, data: Pipeline = data
        ) -> tuple[Variables, dict[str, float]]:
            stage = f"{target}-{k}-{method}"
            fitted = exp.fit(stage, objective, data, config, evaluate={"validation": validation})
            return fitted.variables, score(stage, objective, fitted.variables)

        scaled = AnisotropicScaling.of(task, base, sources)
        learned, scores = run("atlas", scaled, cfg.few_shot.coefficients)
        keep("aTLAS", scores)
        if scores["validation"] <= zero["validation"]:
            learned = Variables(scaled.zeros(), {})
        others: dict[str, Objective] = {
            "per-vector isotropic": AnisotropicScaling.of(
                task, base, sources, granularity="vector"
            ),
            f"aTLAS x {cfg.few_shot.num_parts}": AnisotropicScaling.of(
                task, base, sources, granularity="random",
                num_parts=cfg.few_shot.num_parts, key=exp.key("parts"),
            ),
            "random vectors": AnisotropicScaling.of(
                task, base, random_vectors(sources, exp.key("random vectors"))
            ),
        }  # fmt: skip
        for name, objective in others.items():
            stage = re.sub(r"\W+", "-", name.lower())
            keep(name, run(stage, objective, cfg.few_shot.coefficients)[1])

        tried = []
        for rate in cfg.few_shot.rates:
            config = from_dict(FitConfig, cfg.few_shot.weights)
            optimizer = dataclasses.replace(config.optimizer, learning_rate=float(rate))
            config = dataclasses.replace(config, optimizer=optimizer)
            tried.append(run(f"full-{rate:g}", start, config)[1])
        keep("full fine-tuning", max(tried, key=lambda s: s["validation"]))

        # Heads on features: those of the base, and those that aTLAS has learned.
        features = task.features()
        composed = Variables(scaled.inner_params(learned.params), {})
        one_hot = jax.nn.one_hot(labels, head.shape[0])
        tip = TipAdapter(
            inner=features, keys=features.predict(frozen, images), values=one_hot, head=head,
            scale=task.scale, frozen=frozen,
        )  # fmt: skip
        keep("Tip-Adapter", run("tip", tip, cfg.few_shot.adapter)[1])
        joint = tip.replace(inner=AnisotropicScaling.of(features, base, sources), frozen=None)
        keep("aTLAS + Tip-Adapter", run("atlas-tip", joint, cfg.few_shot.joint)[1])
        for name, variables in (("LP++", frozen), ("aTLAS + LP++", composed)):
            probe, alpha = jax.jit(lp_plus_plus)(features.predict(variables, images), labels, head)
            linear = FeatureHead(inner=features, probe=probe, alpha=alpha, head=head)
            stage = "base" if variables is frozen else "atlas"
            keep(name, score(f"{target}-{k}-lp-{stage}", linear, variables))

        if k == max(cfg.few_shot.shots):
            _budgets(context, target, base, sources, support, run, zero)

    columns = ["method", *(f"k = {k}" for k in cfg.few_shot.shots)]
    exp.table(f"Few-shot test accuracy on {target!r}", columns,
              [_rounded([name, *row]) for name, row in rows.items()])  # fmt: skip
    smallest = int(np.argmin(cfg.few_shot.shots))
    for name, row in rows.items():
        exp.record(f"{target}, k = {cfg.few_shot.shots[smallest]}, {name}", row[smallest])
    exp.bars(f"Few-shot on {target!r}", list(rows),
             {f"k = {k}": [row[i] for row in rows.values()]
              for i, k in enumerate(cfg.few_shot.shots)}, ylabel="test accuracy")  # fmt: skip


def _budgets(
    context: Context, target: str, base: PyTree, vectors: dict[str, PyTree], support: Subset,
    run: Callable, zero: Mapping[str, float],
) -> None:  # fmt: skip
    """Few task vectors, chosen by gradient or at random (section 5.2)."""
    exp, cfg = context.exp, context.exp.config
    if not cfg.few_shot.budgets:
        return
    task = context.task(target)
    gradients = block_gradients(
        task, Variables(base, {}), vectors, exp.batches(context.whole(support))
    )
    rows = []
    for budget in cfg.few_shot.budgets:
        row: list[Any] = [int(budget)]
        for strategy in STRATEGIES:
            kept = select_vectors(
                gradients, vectors, int(budget), strategy, exp.key(f"budget-{budget}")
            )
            objective = AnisotropicScaling.of(task, base, kept)
            stage = f"budget-{budget}-{strategy}"
            scores = run(stage, objective, cfg.few_shot.coefficients)[1]
            better = scores["validation"] > zero["validation"]
            row.append(scores["test"] if better else zero["test"])
        rows.append(_rounded(row))
    exp.table(f"Task vectors chosen for {target!r}, k = {max(cfg.few_shot.shots)}, test accuracy",
              ["vectors", *STRATEGIES], rows)  # fmt: skip


def test_time_adaptation(context: Context, base: PyTree, vectors: dict[str, PyTree]) -> None:
    """Unlabelled test images of the target (section 5.3), trusted set anew in every epoch.

    An epoch is a stage; the moments of the optimiser start anew with it. The last epoch is
    reported: without labels there is nothing to choose by.
    """
    exp, cfg = context.exp, context.exp.config
    target = cfg.test_time.target
    task = context.task(target)
    sources = {name: v for name, v in vectors.items() if name != target}
    source = context.tasks.splits[target]["test"]
    images = take(source, np.arange(len(source)))["inputs"]
    epochs = int(cfg.test_time.epochs)
    start = WarmStart(inner=task, params=base)
    zero = exp.evaluate(task, Variables(base, {}), context.whole(source))
    accuracy = {"zero-shot": zero["accuracy"]}
    for name, objective in (
        ("norms only", Trainable.of(start, base, cfg.test_time.norms)),
        ("aTLAS", AnisotropicScaling.of(task, base, sources)),
    ):
        label = name.split()[0].lower()
        steps = cfg.test_time.fit.steps
        variables = objective.init(exp.key("start"), {"inputs": jnp.asarray(images[:1])})
        for epoch in range(epochs):
            stage = f"test-time-{label}-{epoch}"
            logits = jax.jit(_predict)(objective, variables, {"inputs": images})
            data = unlabelled_source(
                images, np.asarray(jax.nn.softmax(logits)), limit=cfg.test_time.limit,
                share=cfg.test_time.share, seed=exp.seed(stage),
            )  # fmt: skip
            rise = (cfg.test_time.final_threshold - cfg.test_time.threshold) / epochs
            first = cfg.test_time.threshold + epoch * rise
            match = UnsupervisedFixMatch(
                inner=WarmStart(inner=objective, params=variables.params),
                power=float(cfg.test_time.power), threshold=first, final_threshold=first + rise,
                steps=float(steps),
            )  # fmt: skip
            pipeline = Pipeline(
                data, cfg.batch_size, repeat=True, seed=exp.seed(stage), num_threads=0,
                transforms=(StrongView(),),
            )  # fmt: skip
            fitted = exp.fit(stage, match, pipeline, cfg.test_time.fit)
            variables = Variables(fitted.params, fitted.variables.state["inner"])
        accuracy[name] = exp.evaluate(objective, variables, context.whole(source))["accuracy"]
    exp.table(f"Test-time adaptation to {target!r}, accuracy", ["method", "accuracy"],
              [_rounded(row) for row in accuracy.items()])  # fmt: skip
    for name, value in accuracy.items():
        exp.record(f"test-time, {name}", value)


def _predict(objective: Objective, variables: Variables, batch: Batch) -> Array:
    return objective.predict(variables, batch)


def negation(context: Context, base: PyTree, vectors: dict[str, PyTree]) -> None:
    """Forgets a task while another keeps its accuracy (section 4.2)."""
    exp, cfg = context.exp, context.exp.config.negation
    names = (cfg.target, cfg.control)
    objective = context.task(*names, weights=jnp.asarray([-1.0, 1.0]))
    both = context.joint(names, "validation")

    def scores(objective: Objective, variables: Variables, split: str) -> list[float]:
        metrics = exp.evaluate(objective, variables, context.whole(context.joint(names, split)))
        return [metrics[f"accuracy_{name}"] for name in names]

    scaled = AnisotropicScaling.of(objective, base, {cfg.target: vectors[cfg.target]})
    exp.fit("negation", scaled, context.train("negation", both, shuffle=False), cfg.fit)
    # Checkpoints of the coefficients are small: all of them are kept, and one is chosen under the
    # constraint, which no single metric expresses.
    folder = exp.workdir / "stages" / "negation" / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())

    def choose() -> dict[str, list[float]]:
        zero = Variables(scaled.zeros(), {})
        learned = [_coefficients(folder / str(s) / "variables", zero.params) for s in steps]
        searched = [scaled.isotropic(-float(a)) for a in cfg.alphas]
        results = {"pre-trained": scores(scaled, zero, "test")}
        floor = cfg.keep * scores(scaled, zero, "validation")[1]
        for name, candidates, stop in (
            ("task arithmetic", searched, False),
            ("aTLAS", learned, True),
        ):
            tried = [scores(scaled, Variables(c, {}), "validation") for c in candidates]
            at = best_under_constraint(tried, floor, stop=stop)
            params = zero.params if at is None else candidates[at]
            results[name] = scores(scaled, Variables(params, {}), "test")
        return results

    results = exp.artifact("negation-test", choose)
    exp.table(
        f"Negation of {cfg.target!r}, control {cfg.control!r}, test accuracy",
        ["model", "target (lower is better)", "control"],
        [_rounded([name, *row]) for name, row in results.items()],
    )
    for name, (target, control) in results.items():
        exp.record(f"negation, {name}, target", target)
        exp.record(f"negation, {name}, control", control)


def best_under_constraint(
    scores: Sequence[Sequence[float]], floor: float, *, stop: bool = False
) -> int | None:
    """Returns which of some (target, control) pairs has the lowest target and control >= floor.

    Args:
      scores: pairs of accuracies, in the order of training.
      floor: smallest control accuracy that is accepted.
      stop: look no further than the first pair that violates it.

    Returns:
      A position (the first of equals), or None if no pair is accepted.
    """
    best = None
    for i, (target, control) in enumerate(scores):
        if control < floor:
            if stop:
                break
        elif best is None or target < scores[best][0]:
            best = i
    return best


def _coefficients(path: Any, like: PyTree) -> PyTree:
    """Reads the parameters of one checkpoint."""
    tree = read_tree(path)
    params = tree["params"] if isinstance(tree, dict) else tree[0]
    known = _by_path(params)
    return map_with_path(lambda name, _: known[name], like)


def _rounded(row: Iterable[Any]) -> list[Any]:
    return [round(float(x), 4) if isinstance(x, (float, np.floating)) else x for x in row]
