"""Basic objectives: a Linen module and a loss."""

import inspect
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from transfer_jax.objectives import losses
from transfer_jax.objectives.base import Array, Aux, Batch, Mean, Objective, PyTree, Variables


def example_mask(batch: Batch, size: int) -> Array:
    """Returns ``batch["mask"]`` as [size] float32, or ones where the batch has none."""
    mask = batch.get("mask")
    return jnp.ones((size,), jnp.float32) if mask is None else mask.astype(jnp.float32)


class ModuleObjective(Objective):
    """An objective around one Linen module.

    The module is called as ``module(inputs, lengths=..., train=...)`` with ``batch["inputs"]``;
    ``lengths`` only where the batch has it, ``train`` only where the module takes it. All
    collections except ``params`` are the state; the ``dropout`` stream is fed.

    Attributes:
      module: a Linen module (static, so its fields must be hashable: tuples, not lists).
    """

    module: nn.Module = flax.struct.field(pytree_node=False)

    def init(self, rng: Array, batch: Batch) -> Variables:
        return self._initialise(rng, batch)

    def _initialise(
        self, rng: Array, batch: Batch, *extra: Any, method: str | None = None
    ) -> Variables:
        params_key, dropout_key = jax.random.split(rng)
        args, kwargs = self._arguments(batch, train=False)
        collections = dict(
            self.module.init(
                {"params": params_key, "dropout": dropout_key},
                *args,
                *extra,
                method=method,
                **kwargs,
            )
        )
        return Variables(collections.pop("params", {}), collections)

    def apply(
        self,
        variables: Variables,
        batch: Batch,
        rng: Array | None,
        *extra: Any,
        method: str | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Runs the module (or its ``method``, with ``extra`` arguments after the inputs).

        Returns:
          Its outputs and the updated state; the state as given where ``rng`` is None.
        """
        args, kwargs = self._arguments(batch, train=rng is not None)
        collections = {"params": variables.params, **variables.state}
        if rng is None:
            outputs = self.module.apply(collections, *args, *extra, method=method, **kwargs)
            return outputs, variables.state
        outputs, updated = self.module.apply(
            collections,
            *args,
            *extra,
            method=method,
            rngs={"dropout": rng},
            mutable=list(variables.state),
            **kwargs,
        )
        return outputs, {**variables.state, **updated}

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        return self.apply(variables, batch, None)[0]

    def _arguments(self, batch: Batch, train: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "inputs" not in batch:
            raise ValueError(
                f"{type(self).__name__} reads batch['inputs']; the batch has {sorted(batch)}."
            )
        kwargs: dict[str, Any] = {}
        accepted = inspect.signature(type(self.module).__call__).parameters
        if "lengths" in batch:
            kwargs["lengths"] = batch["lengths"]
        if "train" in accepted:
            kwargs["train"] = train
        return (batch["inputs"],), kwargs


class Classification(ModuleObjective):
    """Softmax cross-entropy on ``batch["labels"]`` ([B] integer); the module gives [B, C] logits.

    Metrics: ``nll`` (without smoothing) and ``accuracy``.

    Attributes:
      label_smoothing: the share of the target that is uniform over the classes; training only.
      classes: the classes among which the softmax and the argmax choose, where a task has only some
        of the module's (task-incremental learning); empty = all. Labels stay as they are.
    """

    label_smoothing: Array | float = 0.0
    classes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        outputs, state = self.apply(variables, batch, rng)
        labels = batch["labels"]
        logits = outputs
        if self.classes:
            known = jnp.asarray(self.classes)
            logits = outputs[..., known]
            labels = jnp.argmax(labels[..., None] == known, axis=-1)
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits of shape {logits.shape} do not fit labels of shape {labels.shape}: a "
                "classifier gives one row of class scores per label."
            )
        mask = example_mask(batch, labels.shape[0])
        nll = losses.cross_entropy(logits, labels)
        smoothing = 0.0 if rng is None else self.label_smoothing
        objective = Mean.of(losses.cross_entropy(logits, labels, label_smoothing=smoothing), mask)
        correct = jnp.argmax(logits, axis=-1) == labels
        metrics = {"nll": Mean.of(nll, mask), "accuracy": Mean.of(correct, mask)}
        return objective.value(), Aux(state, metrics, objective.weight, outputs)


class Regression(ModuleObjective):
    """Mean squared error on ``batch["labels"]``; the module gives predictions of the same shape.

    Metrics: ``mse``.
    """

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        predictions, state = self.apply(variables, batch, rng)
        error = losses.squared_error(predictions, batch["labels"])
        mse = Mean.of(error, example_mask(batch, error.shape[0]))
        return mse.value(), Aux(state, {"mse": mse}, mse.weight, predictions)


class NextToken(ModuleObjective):
    """Next-token prediction: the mean negative log-likelihood of a token given those before it.

    ``batch["inputs"]`` holds windows of L + 1 integer tokens, [B, L + 1]: the module reads the
    first L and is scored on the last L. Where ``batch["lengths"]`` ([B], counted in the window) is
    given, targets at or beyond it do not count. The module gives logits [B, L, V]; if it has a
    method ``nll(tokens, targets, *, lengths, train) -> [B, L]`` (adaptive softmax) and
    ``use_nll`` is set, that is used and the full logits are never formed.

    Metrics: ``nll`` in nats per token and ``bits`` per token; ``accuracy`` where logits exist.
    Perplexity is ``exp`` of the final ``nll``.

    Attributes:
      use_nll: score with the module's ``nll`` method.
    """

    use_nll: bool = flax.struct.field(pytree_node=False, default=False)

    def init(self, rng: Array, batch: Batch) -> Variables:
        inner, targets, _ = self._shift(batch)
        # The output layer has parameters that only the scoring method touches.
        return (
            self._initialise(rng, inner, targets, method="nll")
            if self.use_nll
            else self._initialise(rng, inner)
        )

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        inner, targets, weights = self._shift(batch)
        metrics = {}
        outputs = None
        if self.use_nll:
            nll, state = self.apply(variables, inner, rng, targets, method="nll")
        else:
            outputs, state = self.apply(variables, inner, rng)
            nll = losses.cross_entropy(outputs, targets)
            metrics["accuracy"] = Mean.of(jnp.argmax(outputs, axis=-1) == targets, weights)
        mean = Mean.of(nll, weights)
        metrics |= {"nll": mean, "bits": Mean(mean.total / jnp.log(2.0), mean.weight)}
        return mean.value(), Aux(state, metrics, mean.weight, outputs)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        """Returns logits [B, L, V] for the first L tokens of windows [B, L + 1]."""
        return super().predict(variables, self._shift(batch)[0])

    def _shift(self, batch: Batch) -> tuple[Batch, Array, Array]:
        window = batch["inputs"]
        if window.ndim != 2 or window.shape[1] < 2:
            raise ValueError(
                "next-token prediction needs windows of at least two tokens, [B, L + 1]; got "
                f"inputs of shape {window.shape}."
            )
        tokens, targets = window[:, :-1], window[:, 1:]
        weights = jnp.broadcast_to(example_mask(batch, window.shape[0])[:, None], targets.shape)
        inner = {**batch, "inputs": tokens}
        if "lengths" in batch:
            lengths = batch["lengths"]
            weights = weights * (jnp.arange(1, window.shape[1])[None, :] < lengths[:, None])
            inner["lengths"] = jnp.minimum(lengths, tokens.shape[1])
        return inner, targets, weights
