"""LSTM and GRU layers over whole padded sequences, gate for gate those of PyTorch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
State = Any


class _Recurrent(nn.Module):
    """What LSTM and GRU share: projection of all inputs at once, then a masked scan.

    Attributes:
      features: H, width of the hidden state and of the output.
      dtype: of the arithmetic.
    """

    features: int
    dtype: Any = None

    gates = 0

    def setup(self):
        width = self.gates * self.features
        self.input = nn.Dense(width, dtype=self.dtype)
        self.hidden = nn.Dense(width, kernel_init=nn.initializers.orthogonal(), dtype=self.dtype)

    def initial_state(self, batch: int) -> State:
        """The state before the first input."""
        raise NotImplementedError

    def _cell(self, projected: Array, state: State) -> tuple[Array, State]:
        raise NotImplementedError

    def _scan(self, inputs: Array, state: State, lengths: Array | None) -> tuple[Array, State]:
        batch, length = inputs.shape[:2]
        valid = jnp.ones((batch, length), bool)
        if lengths is not None:
            valid = jnp.arange(length) < lengths[:, None]

        def body(module, state, step):
            projected, valid = step
            y, new = module._cell(projected, state)
            new = jax.tree.map(lambda new, old: jnp.where(valid[:, None], new, old), new, state)
            return new, y

        scan = nn.scan(
            body,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=(1,),
            out_axes=1,
        )
        state, y = scan(self, state, (self.input(inputs), valid))
        return y, state

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps [B, L, F] to the hidden states [B, L, H].

        Args:
          inputs: [B, L, F].
          lengths: int [B]; the state stands still beyond. Outputs there mean nothing.
          train: not used, nothing is random here.
        """
        del train
        return self._scan(inputs, self.initial_state(inputs.shape[0]), lengths)[0]

    def discretise(self, mode: str | None = None) -> None:
        """No matrices to prepare for decoding; see ``S4Layer.discretise``."""

    def prefill(
        self,
        inputs: Array,
        system: None = None,
        state: State | None = None,
        max_length: int = 0,
        lengths: Array | None = None,
    ) -> tuple[Array, State]:
        """Hidden states for a prefix or chunk [B, L, F], and the state after its valid part."""
        del system, max_length
        if state is None:
            state = self.initial_state(inputs.shape[0])
        return self._scan(inputs, state, lengths)

    def step(self, inputs: Array, state: State, system: None = None) -> tuple[Array, State]:
        """One input [B, F] to the hidden state [B, H] and the next state."""
        del system
        return self._cell(self.input(inputs), state)


class LSTM(_Recurrent):
    """Long short-term memory; gates in the order input, forget, cell, output."""

    gates = 4

    def initial_state(self, batch: int) -> tuple[Array, Array]:
        """Cell and hidden state, zeros [B, H] each."""
        zeros = jnp.zeros((batch, self.features), self.dtype or jnp.float32)
        return zeros, zeros

    def _cell(self, projected, state):
        cell, hidden = state
        gates = projected + self.hidden(hidden)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
        hidden = nn.sigmoid(o) * jnp.tanh(cell)
        return hidden, (cell, hidden)


class GRU(_Recurrent):
    """Gated recurrent unit; gates in the order reset, update, new."""

    gates = 3

    def initial_state(self, batch: int) -> Array:
        """Hidden state, zeros [B, H]."""
        return jnp.zeros((batch, self.features), self.dtype or jnp.float32)

    def _cell(self, projected, state):
        from_input = jnp.split(projected, 3, axis=-1)
        from_hidden = jnp.split(self.hidden(state), 3, axis=-1)
        r, z = (nn.sigmoid(a + b) for a, b in zip(from_input[:2], from_hidden[:2]))
        new = jnp.tanh(from_input[2] + r * from_hidden[2])
        state = (1 - z) * new + z * state
        return state, state
