"""Networks with an explicit memory: the Neural Turing Machine and the Hopfield network.

Notation of Lipton, Berkowitz and Elkan (2015). A memory has N slots of width W; a head's weights
over the slots are not negative and sum to one.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from transfer_jax.nn.recurrent import RecurrentLayer, State, Update, lstm_step

Array = jax.Array

# -- addressing (Graves et al. 2014, section 3.3) -------------------------------------------------


def content_weights(memory: Array, key: Array, strength: Array) -> Array:
    """``softmax_i(beta cos(k, M(i)))``.

    Args:
      memory: M, [..., N, W].
      key: k, [..., W].
      strength: beta >= 0, [...].

    Returns:
      [..., N].
    """

    def norm(x: Array) -> Array:  # differentiable at zero
        return jnp.sqrt(jnp.square(x).sum(-1) + 1e-16)

    dots = jnp.einsum("...nw,...w->...n", memory, key)
    cosine = dots / (norm(memory) * norm(key)[..., None])
    return jax.nn.softmax(strength[..., None] * cosine, axis=-1)


def interpolate(content: Array, previous: Array, gate: Array) -> Array:
    """``g wc + (1 - g) w``, weights [..., N] and gate [...]."""
    return gate[..., None] * content + (1 - gate[..., None]) * previous


def shift_weights(weights: Array, shift: Array) -> Array:
    """Circular convolution ``w(i) = sum_j w(j) s(i - j mod N)``.

    Args:
      weights: [..., N].
      shift: s, [..., 2 k + 1], of the steps -k .. k.
    """
    reach = shift.shape[-1] // 2
    moved = [jnp.roll(weights, step, axis=-1) for step in range(-reach, reach + 1)]
    return (jnp.stack(moved, axis=-1) * shift[..., None, :]).sum(-1)


def sharpen(weights: Array, exponent: Array) -> Array:
    """``w(i)^gamma / sum_j w(j)^gamma``, weights [..., N] and exponent [...]."""
    logs = jnp.log(jnp.maximum(weights, 1e-20))  # finite gradients where a weight is zero
    return jax.nn.softmax(exponent[..., None] * logs, axis=-1)


def address(
    memory: Array, previous: Array, key: Array, strength: Array, gate: Array, shift: Array,
    exponent: Array,
) -> Array:  # fmt: skip
    """A head's new weights: by content, interpolated, shifted and sharpened."""
    weights = interpolate(content_weights(memory, key, strength), previous, gate)
    return sharpen(shift_weights(weights, shift), exponent)


def read(memory: Array, weights: Array) -> Array:
    """``r = sum_i w(i) M(i)``: memory [..., N, W] and weights [..., R, N] to [..., R, W]."""
    return weights @ memory


def write(memory: Array, weights: Array, erase: Array, add: Array) -> Array:
    """``M (1 - w e^T) + w a^T``; the erasing of all heads comes first, then their adding.

    Args:
      memory: [..., N, W].
      weights: [..., K, N], of K heads.
      erase: [..., K, W], in [0, 1].
      add: [..., K, W].
    """
    kept = 1 - weights[..., :, :, None] * erase[..., :, None, :]
    return memory * kept.prod(-3) + jnp.einsum("...kn,...kw->...nw", weights, add)


class NTM(RecurrentLayer):
    """The Neural Turing Machine (Graves et al. 2014): a controller that reads and writes a memory.

    The controller reads the input and what the heads read before. In each step the heads find
    their weights in the memory as it was, then write, then read. The output is linear in the
    controller's state and what was read. The state is (controller's cell and hidden state, memory
    [B, N, W], weights of the read and the write heads [B, R + K, N], what was read [B, R W]).

    Attributes:
      features: width of the controller.
      outputs: width of the output; None = ``features``.
      slots: N.
      width: W.
      read_heads: R.
      write_heads: K.
      controller: 'lstm' or 'mlp' (one hidden layer of tanh units without a state of its own).
      reach: heads move by up to so many slots.
      read_first: read before writing.
    """

    outputs: int | None = None
    slots: int = 128
    width: int = 20
    read_heads: int = 1
    write_heads: int = 1
    controller: str = "lstm"
    reach: int = 1
    read_first: bool = False

    def setup(self):
        if self.controller not in ("lstm", "mlp"):
            raise ValueError(f"controller={self.controller!r}; choose 'lstm' or 'mlp'")
        heads = self.read_heads + self.write_heads
        normal = nn.initializers.normal(1.0)
        self.first_weights = self.param("first_weights", normal, (heads, self.slots))
        self.first_reads = self.param("first_reads", normal, (self.read_heads * self.width,))

    @property
    def gates(self) -> int:
        return 4 if self.controller == "lstm" else 1

    def initial_state(self, batch: int) -> State:
        """An even memory, learned weights and reads. The module must be bound."""
        zeros = jnp.zeros((batch, self.features), jnp.float32)
        memory = jnp.full((batch, self.slots, self.width), 1e-6, jnp.float32)
        weights = jax.nn.softmax(self.first_weights)
        reads = jnp.tanh(self.first_reads)
        own = (zeros, zeros) if self.controller == "lstm" else ()
        return (
            own,
            memory,
            jnp.broadcast_to(weights, (batch, *weights.shape)),
            jnp.broadcast_to(reads, (batch, *reads.shape)),
        )

    def _feed(self) -> Callable[[State], Array]:
        if self.controller == "mlp":
            return lambda state: state[3]
        return lambda state: jnp.concatenate([state[0][1], state[3]], axis=-1)

    def _hidden(self) -> tuple[Array, Array, dict[str, Array]]:
        fed = self.read_heads * self.width + (self.features if self.controller == "lstm" else 0)
        hidden = self._affine("hidden", fed, self.gates * self.features, self.hidden_init)
        # Of each head: key, strength, gate, exponent, shift; erase and add of those that write.
        moves = 2 * self.reach + 1
        size = (self.read_heads + self.write_heads) * (self.width + 3 + moves)
        size += self.write_heads * 2 * self.width
        kernel, bias = self._affine("heads", self.features, size, self.kernel_init)
        return *hidden, {"kernel": kernel, "bias": bias}

    def _update(self) -> Update:
        reads, writes, width = self.read_heads, self.write_heads, self.width
        moves, lstm, read_first = 2 * self.reach + 1, self.controller == "lstm", self.read_first

        def update(extra, projected, recurrent, state):
            own, memory, weights, _ = state
            if lstm:
                hidden, own = lstm_step({}, projected, recurrent, own)
            else:
                hidden = jnp.tanh(projected + recurrent)
            emitted = hidden @ extra["kernel"] + extra["bias"]
            heads, erased = jnp.split(emitted, [(reads + writes) * (width + 3 + moves)], axis=-1)
            heads = heads.reshape(-1, reads + writes, width + 3 + moves)
            erase, add = jnp.split(erased.reshape(-1, writes, 2 * width), 2, axis=-1)
            key, strength, gate, exponent, shift = jnp.split(
                heads, [width, width + 1, width + 2, width + 3], axis=-1
            )
            weights = address(
                memory[:, None], weights, key, jax.nn.softplus(strength[..., 0]),
                nn.sigmoid(gate[..., 0]), jax.nn.softmax(shift),
                1 + jax.nn.softplus(exponent[..., 0]),
            )  # fmt: skip
            written = write(memory, weights[:, reads:], nn.sigmoid(erase), jnp.tanh(add))
            seen = read(memory if read_first else written, weights[:, :reads])
            seen = seen.reshape(len(seen), -1)
            output = jnp.concatenate([hidden, seen], axis=-1)
            return output, (own, written, weights, seen)

        return update

    @nn.compact
    def _run(self, inputs: Array, state: State, lengths: Array | None) -> tuple[Array, State]:
        outputs, state = super()._run(inputs, state, lengths)
        size = self.outputs or self.features
        return nn.Dense(size, dtype=self.dtype, name="output")(outputs), state


# -- Hopfield (1982) ------------------------------------------------------------------------------


def hopfield_store(patterns: Array) -> Array:
    """Hebb's rule ``W = (1/n) sum_p xi_p xi_p^T``, with a zero diagonal.

    Args:
      patterns: [P, n], of -1 and 1.

    Returns:
      float32 [n, n]. About 0.138 n random patterns can be recalled.
    """
    patterns = jnp.asarray(patterns, jnp.float32)
    size = patterns.shape[1]
    return patterns.T @ patterns / size * (1 - jnp.eye(size))


def hopfield_energy(weights: Array, state: Array) -> Array:
    """``E = -v^T W v / 2`` of states [..., n]."""
    return -0.5 * jnp.einsum("...i,ij,...j->...", state, weights, state)


@functools.partial(jax.jit, static_argnames="updates")
def hopfield_recall(weights: Array, state: Array, key: Array, updates: int) -> tuple[Array, Array]:
    """Asynchronous updates ``v_i = sign(sum_j W_ij v_j)`` of randomly chosen units.

    Args:
      weights: [n, n], symmetric, with a zero diagonal.
      state: v, [n], of -1 and 1.
      key: draws the units.
      updates: how many; where the sum is zero, a unit stays as it is.

    Returns:
      The last state, and the energy after each update, float32 [updates]. It never rises.
    """

    def update(carry: tuple[Array, Array], i: Array) -> tuple[Any, Array]:
        v, energy = carry
        field = weights[i] @ v
        new = jnp.where(field == 0, v[i], jnp.sign(field))
        energy = energy - (new - v[i]) * field  # exact: the diagonal is zero
        return (v.at[i].set(new), energy), energy

    state = jnp.asarray(state, weights.dtype)
    units = jax.random.randint(key, (updates,), 0, len(state))
    start = state, hopfield_energy(weights, state)
    (state, _), energies = lax.scan(update, start, units)
    return state, energies
