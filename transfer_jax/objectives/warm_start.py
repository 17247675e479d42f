"""Where training starts: from given parameters, or from uniform ones."""

from typing import Any

import jax
import jax.numpy as jnp

from transfer_jax.objectives.base import Array, Batch, Objective, PyTree, Transformed, Variables
from transfer_jax.trees import path_str, paths


class WarmStart(Transformed):
    """Initialises an objective from given variables; otherwise it is the inner objective.

    Leaves that are None in ``params`` (see ``trees.partition``) are drawn afresh by the inner
    objective: ``WarmStart(task, params=partition(source.params, "^(?!head)")[0])`` keeps a trained
    body and draws a new head.

    Attributes:
      inner: the objective.
      params: the tree of the inner objective's parameters, None where a leaf is to be drawn.
      state: the inner objective's state, or None to draw it.
    """

    params: PyTree
    state: PyTree = None

    def init(self, rng: Array, batch: Batch) -> Variables:
        """Draws what is not given.

        Raises:
          ValueError: nothing is given, a given leaf has no place in the inner objective, or its
            shape differs.
        """
        drawn = self.inner.init(rng, batch)
        params = overlay(drawn.params, self.params, "WarmStart.params")
        state = drawn.state
        if self.state is not None and jax.tree.leaves(self.state):
            state = overlay(drawn.state, self.state, "WarmStart.state")
        return Variables(params, state)

    def release(self) -> Objective:
        return self.inner.release()


def overlay(tree: PyTree, given: PyTree, name: str) -> PyTree:
    """Returns ``tree`` with the leaves that ``given`` has in their place, in the dtype of ``tree``.

    Raises:
      ValueError: ``given`` is empty or does not fit; ``name`` says in the message what it is.
    """
    leaves = {path_str(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(given)}
    if not leaves:
        raise ValueError(f"{name} holds no array: nothing would be loaded.")
    if unknown := sorted(set(leaves) - set(paths(tree))):
        raise ValueError(
            f"{name} holds {unknown[:5]}, which the objective does not have; it has "
            f"{paths(tree)[:8]}."
        )

    def put(kp: tuple[Any, ...], x: Array) -> Array:
        path = path_str(kp)
        if path not in leaves:
            return x
        new = leaves[path]
        if jnp.shape(new) != jnp.shape(x):
            raise ValueError(
                f"{name}: {path!r} has shape {jnp.shape(new)}; the objective needs {jnp.shape(x)}. "
                "Leave it out (None) to draw it afresh."
            )
        return jnp.asarray(new, x.dtype)

    return jax.tree_util.tree_map_with_path(put, tree)


class UniformInit(Transformed):
    """Draws all parameters uniformly from [-scale, scale], biases too (Sutskever et al. 2014).

    Attributes:
      inner: the objective.
      scale: see above.
    """

    scale: float = 0.08

    def init(self, rng: Array, batch: Batch) -> Variables:
        variables = self.inner.init(rng, batch)
        leaves, tree = jax.tree.flatten(variables.params)
        drawn = [
            jax.random.uniform(key, x.shape, x.dtype, -self.scale, self.scale)
            for key, x in zip(jax.random.split(rng, len(leaves)), leaves)
        ]
        return variables._replace(params=jax.tree.unflatten(tree, drawn))
