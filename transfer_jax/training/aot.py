"""A training step ahead of time: traced, sharded and lowered without data or parameters.

It is the step that ``fit`` runs (``loop.make_step``) on the shapes and placements that ``fit``
gives its arrays, so that a configuration for many devices can be checked on a machine with none of
them, and its memory be known before it is paid for.
"""

from typing import Any

import jax
import jax.numpy as jnp

from transfer_jax.objectives import Objective
from transfer_jax.training.config import FitConfig
from transfer_jax.training.loop import TrainState, check_batch, make_step, metric_names
from transfer_jax.training.optimizers import make_optimizer
from transfer_jax.training.sharding import Layout

PyTree = Any


def lower_step(
    objective: Objective, batch: PyTree, config: FitConfig, layout: Layout
) -> tuple[jax.stages.Lowered, dict[str, PyTree]]:
    """Lowers one optimiser step.

    Args:
      objective: what would be trained; its arrays may be ``jax.ShapeDtypeStruct``.
      batch: a global batch of ``jax.ShapeDtypeStruct`` (or arrays: only shapes matter).
      config: how it would be trained.
      layout: mesh (of real or virtual devices) and partition rules.

    Returns:
      The lowered step, whose ``compile()`` gives ``memory_analysis()`` and ``cost_analysis()``; and
      what stays on the devices between steps, as ``jax.ShapeDtypeStruct`` with shardings under the
      keys ``params``, ``state``, ``optimizer`` and ``carried``, for ``sharding.placement_table``
      and ``sharding.bytes_per_device``.

    Raises:
      ConfigError: the batch does not divide by the devices and microbatches.
      ValueError: a partition rule does not fit a parameter.
    """
    check_batch(batch, config, layout)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda o, k, b: o.init(k, b), objective, key, batch)
    names = metric_names(objective, shapes, batch)
    carried = jax.eval_shape(lambda o: o, objective.release())
    tx, _ = make_optimizer(config.optimizer, config.steps, shapes.params)
    opt_shapes = jax.eval_shape(tx.init, shapes.params)

    variables = _placed(shapes, layout.shardings(shapes))
    state = TrainState(
        variables=variables,
        opt_state=_placed(opt_shapes, layout.optimizer_shardings(opt_shapes, shapes.params)),
        ema=variables.params if config.ema_decay else None,
        **_placed(
            {
                "step": jax.ShapeDtypeStruct((), jnp.int32),
                "lr_scale": jax.ShapeDtypeStruct((), jnp.float32),
                "sums": jax.ShapeDtypeStruct((len(names), 2), jnp.float32),
                "bad_step": jax.ShapeDtypeStruct((), jnp.int32),
                "bad": jax.ShapeDtypeStruct((len(names),), jnp.bool_),
            },
            layout.replicated,
        ),
    )
    carried = _placed(carried, layout.shardings(carried))
    step = jax.jit(
        make_step(tx, config, layout),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), layout.replicated),
    )
    lowered = step.lower(state, carried, _placed(batch, layout.batch), _placed(key, None))
    return lowered, {
        "params": state.variables.params,
        "state": state.variables.state,
        "optimizer": state.opt_state,
        "carried": carried,
    }


def _placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """``ShapeDtypeStruct`` of arrays, with one sharding for all or a tree of them."""

    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: place(x, shardings), tree)
    return jax.tree.map(place, tree, shardings)
