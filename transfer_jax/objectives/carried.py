"""Truncated back-propagation through time: states that go on from batch to batch."""

import operator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from transfer_jax.objectives.base import Array, Aux, Batch, PyTree, Transformed, Variables

_CARRY, _HISTORY = "carry", "history"


class TruncatedBPTT(Transformed):
    """Row b of each training batch goes on where row b of the batch before it stopped.

    The module keeps its recurrent state in the collection ``carry`` (``nn.Recurrent`` with
    ``streams``), so the state lies in ``Variables.state`` and in the checkpoints. Rows with
    ``batch["reset"]`` (bool [B]) start from zeros. ``data.text.stream_windows`` makes such batches.

    In the notation of Lipton et al. (2015, TBPTT(k1, k2)): k1 is the length of a batch's sequences
    and ``k2 = (history + 1) k1``. Gradients cross ``history`` borders of batches: the state before
    the oldest of these batches is kept, and they are run again. The default, 0, cuts at every
    border.

    Evaluation starts every row from zeros.

    Attributes:
      inner: an objective around a module that carries a state.
      history: how many batches before the present one gradients reach.
    """

    history: int = flax.struct.field(pytree_node=False, default=0)

    def init(self, rng: Array, batch: Batch) -> Variables:
        variables = self.inner.init(rng, batch)
        if _CARRY not in variables.state:
            raise ValueError(
                "TruncatedBPTT needs a module that carries a state from batch to batch, such as "
                f"nn.Recurrent(streams=<rows of a batch>); its state has only "
                f"{sorted(variables.state)}"
            )
        if not self.history:
            return variables
        if "reset" not in batch:
            raise ValueError(
                f"history={self.history} needs batch['reset'], true in the first batch of a stream"
            )
        rows = jax.tree.leaves(variables.state[_CARRY])[0].shape[0]

        def empty(x: Any) -> Array:
            return jnp.zeros((self.history, rows, *jnp.shape(x)[1:]), jnp.asarray(x).dtype)

        # Nothing comes before the first batch: what is run in its place is cut off by its reset.
        return variables._replace(state={**variables.state, _HISTORY: jax.tree.map(empty, batch)})

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        state = _without_history(variables.state)
        if rng is None:
            value, aux = self.inner.loss(variables._replace(state=state), batch, None)
            return value, aux._replace(state=variables.state)
        batches = [batch]
        if self.history:
            past = variables.state[_HISTORY]
            older = [jax.tree.map(operator.itemgetter(i), past) for i in range(self.history)]
            batches = older + batches
        carry = jax.lax.stop_gradient(state[_CARRY])
        carried = []
        for number, chunk in enumerate(batches):
            carry = _reset(carry, chunk.get("reset"))
            last = number == self.history
            key = rng if last else jax.random.fold_in(rng, number)
            value, aux = self.inner.loss(
                variables._replace(state={**state, _CARRY: carry}), chunk, key
            )
            carry = aux.state[_CARRY]
            carried.append(carry)
        # The state that the oldest batch of the next step starts from.
        new = {**aux.state, _CARRY: jax.lax.stop_gradient(carried[0])}
        if self.history:
            new[_HISTORY] = jax.tree.map(
                lambda old, now: jnp.concatenate([old[1:], now[None]]), past, batch
            )
        return value, aux._replace(state=new)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        return self.inner.predict(
            variables._replace(state=_without_history(variables.state)), batch
        )


def _without_history(state: PyTree) -> PyTree:
    return {name: value for name, value in state.items() if name != _HISTORY}


def _reset(carry: PyTree, rows: Array | None) -> PyTree:
    """Zeros in the ``rows`` (bool [B])."""
    if rows is None:
        return carry
    streams = jax.tree.leaves(carry)[0].shape[0]
    if rows.shape != (streams,):
        raise ValueError(
            f"{streams} rows carry their state, but batch['reset'] has the shape {rows.shape}: a "
            "batch (each microbatch) has as many rows as the module's streams"
        )
    return jax.tree.map(
        lambda x: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(x), x), carry
    )
