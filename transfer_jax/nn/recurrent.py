"""Recurrent layers over padded sequences: one cell interface, one scan, stacks in both directions.

Cells: Elman's simple recurrent network (tanh, logistic, relu, IRNN), Jordan's, LSTM (forget gate,
peepholes), GRU and the echo state network, in the notation of Lipton, Berkowitz and Elkan, "A
Critical Review of Recurrent Neural Networks for Sequence Learning" (2015). Gates are ordered as in
PyTorch. Sequences are [B, L, F]; ``lengths`` [B] counts the valid steps, which come first.

A cell is a pure function of the projected input, of ``fed @ W + b`` (``fed`` is the part of the
state that is fed back) and of the state. Hence the inputs of all steps are projected in one matrix
product before the scan, and the gradient of ``W`` is one product after the backward scan.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.linen.dtypes import promote_dtype
from jax import lax

Array = jax.Array
State = Any
Extra = Mapping[str, Array]
Initializer = Callable[..., Array]
# (extra parameters, projected input, fed @ W + b, state) -> (output, state), elementwise in B.
Update = Callable[[Extra, Array, Array, State], tuple[Array, State]]

FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "relu": nn.relu,
    "identity": lambda x: x,
    "softmax": nn.softmax,
}


def _function(field: str, name: str, allowed: tuple[str, ...]) -> Callable[[Array], Array]:
    if name not in allowed:
        raise ValueError(f"{field}={name!r}; choose one of {', '.join(allowed)}")
    return FUNCTIONS[name]


def orthogonal_gates(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """An orthogonal H x H matrix for every gate, side by side in [H, G H]."""
    width, total = shape
    if total % width:
        raise ValueError(f"a kernel of shape {shape} does not consist of square gates")
    draw = nn.initializers.orthogonal()
    gates = [draw(k, (width, width), dtype) for k in jax.random.split(key, total // width)]
    return jnp.concatenate(gates, axis=1)


def identity_gates(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """The identity for every gate, side by side in [H, G H] (IRNN, Le et al. 2015)."""
    del key
    width, total = shape
    if total % width:
        raise ValueError(f"a kernel of shape {shape} does not consist of square gates")
    return jnp.tile(jnp.eye(width, dtype=dtype), (1, total // width))


def _scan(
    update: Update,
    feed: Callable[[State], Array],
    additive: bool,
    reverse: bool,
    unroll: int,
) -> Callable[..., tuple[Array, State]]:
    """Returns ``run(kernel, bias, extra, projected, state, valid) -> (outputs, state)``.

    Plain differentiation of a scan adds an outer product to the kernel's gradient in every step.
    Here the scan is differentiated with the kernel held fixed; the cotangents of ``fed @ W + b``
    come out for all steps, and the kernel's gradient is one matrix product over batch and time.

    Args:
      update: the cell.
      feed: the part of the state that the kernel multiplies.
      additive: ``update`` uses the sum of its two preactivations only.
      reverse: from the last step to the first.
      unroll: steps per iteration of the loop.
    """

    def recur(kernel, bias, extra, projected, offset, state, valid):
        def body(state, step):
            projected, offset, valid = step
            fed = feed(state).astype(kernel.dtype)
            preactivation = (fed @ kernel + bias).astype(jax.tree.leaves(state)[0].dtype)
            if offset is not None:
                preactivation = preactivation + offset
            output, new = update(extra, projected, preactivation, state)
            if valid is not None:
                new = jax.tree.map(functools.partial(_where, valid), new, state)
            return new, (output, fed)

        steps = (projected, offset, valid)
        state, (outputs, fed) = lax.scan(body, state, steps, reverse=reverse, unroll=unroll)
        return (outputs, state), fed

    @jax.custom_vjp
    def run(kernel, bias, extra, projected, state, valid):
        return recur(kernel, bias, extra, projected, None, state, valid)[0]

    def forward(kernel, bias, extra, projected, state, valid):
        offset = None
        if not additive:  # a handle on the cotangent of fed @ W + b
            shape = (*projected.shape[:2], kernel.shape[1])
            offset = jnp.zeros(shape, jax.tree.leaves(state)[0].dtype)

        def fixed(extra, projected, offset, state):
            return recur(kernel, bias, extra, projected, offset, state, valid)

        out, backward, fed = jax.vjp(fixed, extra, projected, offset, state, has_aux=True)
        return out, (backward, fed, kernel, bias)

    def backward(residuals, cotangents):
        backward, fed, kernel, bias = residuals
        extra, projected, offset, state = backward(cotangents)
        offset = projected if additive else offset
        d_kernel = jnp.einsum("tbh,tbg->hg", fed, offset.astype(fed.dtype))
        d_bias = offset.sum((0, 1))
        return (
            d_kernel.astype(kernel.dtype),
            d_bias.astype(bias.dtype),
            extra,
            projected,
            state,
            None,
        )

    run.defvjp(forward, backward)
    return run


def _where(rows: Array, new: Array, old: Array) -> Array:
    """New values in the ``rows`` (bool [B]) of [B, ...], else old ones."""
    return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)


class _Affine(nn.Module):
    """The parameters of ``nn.Dense``."""

    inputs: int
    features: int
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        kernel = self.param("kernel", self.kernel_init, (self.inputs, self.features))
        return kernel, self.param("bias", self.bias_init, (self.features,))


def _layer_norm(x: Array, scale: Array) -> Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * scale


class RecurrentLayer(nn.Module):
    """What all cells share; a mixer (see ``nn.blocks``).

    Attributes:
      features: H, width of the hidden state and of the output.
      dtype: of the matrix products and the output; the state is float32 at least.
      kernel_init: of the input's kernel.
      hidden_init: of the recurrent kernel, [H, G H]; see ``orthogonal_gates``, ``identity_gates``.
      layer_norm: normalise both preactivations before their biases (Ba et al. 2016).
      reverse: read from the last valid step to the first. Such a layer cannot decode.
      unroll: steps per iteration of the loop.
    """

    features: int
    dtype: Any = None
    kernel_init: Initializer = nn.linear.default_kernel_init
    hidden_init: Initializer = nn.initializers.orthogonal()
    layer_norm: bool = False
    reverse: bool = False
    unroll: int = 1

    @property
    def gates(self) -> int:
        """G, how many preactivations of width H there are."""
        raise NotImplementedError

    # Whether the cell uses the sum of the two preactivations only.
    additive = True

    def initial_state(self, batch: int) -> State:
        """The state before the first step, zeros [B, H]."""
        return jnp.zeros((batch, self.features), jnp.float32)

    def _feed(self) -> Callable[[State], Array]:
        return lambda state: state

    def _update(self) -> Update:
        """The cell; it may not refer to the module's variables."""
        raise NotImplementedError

    def _bias(self) -> Initializer:
        return nn.initializers.zeros_init()

    def _affine(
        self,
        name: str,
        inputs: int,
        features: int,
        kernel_init: Initializer,
        bias_init: Initializer = nn.initializers.zeros,
    ) -> tuple[Array, Array]:
        """Kernel and bias of a linear layer, for whoever multiplies."""
        return _Affine(inputs, features, kernel_init, bias_init, name=name)()

    def _input(self, width: int) -> tuple[Array, Array]:
        """Kernel and bias of the inputs' projection."""
        size = self.gates * self.features
        return self._affine("input", width, size, self.kernel_init, self._bias())

    def _hidden(self) -> tuple[Array, Array, dict[str, Array]]:
        """Kernel and bias of what is fed back, and the cell's other parameters."""
        size = self.gates * self.features
        return *self._affine("hidden", self.features, size, self.hidden_init), {}

    @nn.compact
    def _run(self, inputs: Array, state: State, lengths: Array | None) -> tuple[Array, State]:
        """Time-major [L, B, F] inputs to outputs and the final state."""
        kernel, bias = self._input(inputs.shape[-1])
        hidden, hidden_bias, extra = self._hidden()
        if self.layer_norm:
            ones = nn.initializers.ones_init()
            scale = self.param("input_scale", ones, bias.shape)
            extra["hidden_scale"] = self.param("hidden_scale", ones, hidden_bias.shape)
            extra["hidden_bias"] = hidden_bias
            hidden_bias = jnp.zeros_like(hidden_bias)
        inputs, kernel, bias, hidden, hidden_bias = promote_dtype(
            inputs, kernel, bias, hidden, hidden_bias, dtype=self.dtype
        )
        projected = inputs @ kernel
        additive = self.additive and not self.layer_norm
        if additive:  # one sum less over all steps
            hidden_bias = hidden_bias + bias
        else:
            projected = (_layer_norm(projected, scale) if self.layer_norm else projected) + bias
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        state = jax.tree.map(lambda x: jnp.asarray(x, wide), state)
        valid = None
        if lengths is not None:
            valid = jnp.arange(inputs.shape[0])[:, None] < lengths
        update = self._update()
        if self.layer_norm:
            update = _normalised(update)
        run = _scan(update, self._feed(), additive, self.reverse, self.unroll)
        outputs, state = run(hidden, hidden_bias, extra, projected, state, valid)
        return outputs.astype(inputs.dtype), state

    def run(
        self,
        inputs: Array,
        state: State | None = None,
        *,
        lengths: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, State]:
        """Outputs [B, L, H] of a sequence or chunk, and the state after its valid part.

        Args:
          inputs: [B, L, F].
          state: before the first step; None = ``initial_state``.
          lengths: int [B]; the state stands still beyond. Outputs there mean nothing.
          train: not used, nothing is random here.
        """
        del train
        if state is None:
            state = self.initial_state(inputs.shape[0])
        outputs, state = self._run(jnp.swapaxes(inputs, 0, 1), state, lengths)
        return jnp.swapaxes(outputs, 0, 1), state

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """The outputs of ``run`` from the initial state."""
        return self.run(inputs, lengths=lengths, train=train)[0]

    def _check_causal(self) -> None:
        if self.reverse:
            raise ValueError(
                f"{type(self).__name__}(reverse=True) reads the future first: it cannot decode or "
                "predict the next token; use reverse=False"
            )

    def discretise(self, mode: str | None = None) -> None:
        """No matrices to prepare for decoding; see ``S4Layer.discretise``."""
        self._check_causal()

    def prefill(
        self,
        inputs: Array,
        system: None = None,
        state: State | None = None,
        max_length: int = 0,
        lengths: Array | None = None,
    ) -> tuple[Array, State]:
        """As ``run``, for decoding."""
        del system, max_length
        self._check_causal()
        return self.run(inputs, state, lengths=lengths)

    def step(self, inputs: Array, state: State, system: None = None) -> tuple[Array, State]:
        """One input [B, F] to the output [B, H] and the next state."""
        del system
        self._check_causal()
        outputs, state = self._run(inputs[None], state, None)
        return outputs[0], state


def _normalised(update: Update) -> Update:
    def normalised(extra, projected, recurrent, state):
        recurrent = _layer_norm(recurrent, extra["hidden_scale"]) + extra["hidden_bias"]
        return update(extra, projected, recurrent, state)

    return normalised


class Elman(RecurrentLayer):
    """The simple recurrent network: ``h = f(W_hx x + W_hh h + b)``.

    Attributes:
      activation: f: 'tanh', 'sigmoid', 'relu' or 'identity'.
    """

    activation: str = "tanh"

    @property
    def gates(self) -> int:
        return 1

    def _update(self) -> Update:
        allowed = ("tanh", "sigmoid", "relu", "identity")
        activate = _function("activation", self.activation, allowed)

        def update(extra, projected, recurrent, state):
            del extra, state
            hidden = activate(projected + recurrent)
            return hidden, hidden

        return update


class LSTM(RecurrentLayer):
    """Long short-term memory; gates in the order input, forget, cell, output.

    The state is the pair of cell and hidden state.

    Attributes:
      forget_gate: without it the cell adds only (Hochreiter and Schmidhuber 1997); three gates.
      peepholes: input and forget gates see the cell before, the output gate the cell after the
        step, each through a vector (Gers and Schmidhuber 2000).
      output_squash: what the cell goes through on its way out: 'tanh' or 'identity'.
      forget_bias: initial bias of the forget gate.
    """

    forget_gate: bool = True
    peepholes: bool = False
    output_squash: str = "tanh"
    forget_bias: float = 0.0

    @property
    def gates(self) -> int:
        return 4 if self.forget_gate else 3

    def initial_state(self, batch: int) -> tuple[Array, Array]:
        """Cell and hidden state, zeros [B, H] each."""
        zeros = jnp.zeros((batch, self.features), jnp.float32)
        return zeros, zeros

    def _feed(self) -> Callable[[State], Array]:
        return lambda state: state[1]

    def _bias(self) -> Initializer:
        def init(key, shape, dtype=jnp.float32):
            del key
            bias = jnp.zeros(shape, dtype)
            h = self.features
            return bias.at[h : 2 * h].set(self.forget_bias) if self.forget_gate else bias

        return init

    def _hidden(self) -> tuple[Array, Array, dict[str, Array]]:
        kernel, bias, extra = super()._hidden()
        if self.peepholes:
            names = ("input", "forget", "output") if self.forget_gate else ("input", "output")
            zeros = nn.initializers.zeros_init()
            extra = {n: self.param(f"peephole_{n}", zeros, (self.features,)) for n in names}
        return kernel, bias, extra

    def _update(self) -> Update:
        squash = _function("output_squash", self.output_squash, ("tanh", "identity"))
        if self.forget_gate and not self.peepholes and self.output_squash == "tanh":
            return lstm_step

        def update(extra, projected, recurrent, state):
            cell, _ = state
            gates = jnp.split(projected + recurrent, 4 if self.forget_gate else 3, axis=-1)
            i, g, o = gates[0], gates[-2], gates[-1]
            kept = cell
            if self.peepholes:
                i = i + extra["input"] * cell
            if self.forget_gate:
                f = gates[1] + extra["forget"] * cell if self.peepholes else gates[1]
                kept = nn.sigmoid(f) * cell
            cell = kept + nn.sigmoid(i) * jnp.tanh(g)
            if self.peepholes:
                o = o + extra["output"] * cell
            hidden = nn.sigmoid(o) * squash(cell)
            return hidden, (cell, hidden)

        return update


def lstm_step(
    extra: Extra, projected: Array, recurrent: Array, state: State
) -> tuple[Array, State]:
    """The default ``LSTM``, an ``Update``."""
    del extra
    hidden, cell = _lstm_pointwise(projected + recurrent, state[0])
    return hidden, (cell, hidden)


@jax.custom_vjp
def _lstm_pointwise(gates: Array, cell: Array) -> tuple[Array, Array]:
    """Hidden and cell state from the four preactivations and the cell before."""
    return _lstm_forward(gates, cell)[0]


def _lstm_forward(gates, cell):
    # All gates in one pass, with sigmoid(x) = (1 + tanh(x / 2)) / 2: twice as fast on a CPU.
    scale = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], gates.dtype), cell.shape[-1])
    gates = jnp.tanh(gates * scale) * scale + (1 - scale)
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    new = f * cell + i * g
    return (o * jnp.tanh(new), new), (i, f, g, o, cell)


def _lstm_backward(residuals, cotangents):
    i, f, g, o, cell = residuals
    squashed = jnp.tanh(f * cell + i * g)  # computing it again costs less than keeping it
    d_hidden, d_new = cotangents
    d_new = d_new + d_hidden * o * (1 - squashed * squashed)
    d_gates = (
        d_new * g * i * (1 - i),
        d_new * cell * f * (1 - f),
        d_new * i * (1 - g * g),
        d_hidden * squashed * o * (1 - o),
    )
    return jnp.concatenate(d_gates, axis=-1), d_new * f


_lstm_pointwise.defvjp(_lstm_forward, _lstm_backward)


class GRU(RecurrentLayer):
    """Gated recurrent unit; gates in the order reset, update, new.

    Attributes:
      reset_after: the reset gate scales ``W h + b`` (PyTorch, cuDNN); else h itself, before the
        product (Cho et al. 2014), at the cost of a second product in each step.
    """

    reset_after: bool = True
    additive = False

    @property
    def gates(self) -> int:
        return 3

    def _hidden(self) -> tuple[Array, Array, dict[str, Array]]:
        kernel, bias, extra = super()._hidden()
        if self.reset_after:
            return kernel, bias, extra
        gates = 2 * self.features
        extra = {"kernel": kernel[:, gates:], "bias": bias[gates:]}
        return kernel[:, :gates], bias[:gates], extra

    def _update(self) -> Update:
        reset_after, dtype = self.reset_after, self.dtype

        def update(extra, projected, recurrent, state):
            from_input = jnp.split(projected, 3, axis=-1)
            from_hidden = jnp.split(recurrent, 3 if reset_after else 2, axis=-1)
            r, z = (nn.sigmoid(a + b) for a, b in zip(from_input[:2], from_hidden[:2]))
            if reset_after:
                candidate = r * from_hidden[2]
            else:
                fed, kernel = promote_dtype(r * state, extra["kernel"], dtype=dtype)
                candidate = (fed @ kernel).astype(state.dtype) + extra["bias"]
            new = jnp.tanh(from_input[2] + candidate)
            state = (1 - z) * new + z * state
            return state, state

        return update


class Jordan(RecurrentLayer):
    """Jordan's network: the outputs of the network are fed back.

    ``s(t) = alpha s(t-1) + f(a(t-1))``, ``h = g(W_hx x + W_hs s + b)``, ``a = W_yh h + b_y``. The
    layer returns a, what the output function is applied to (logits for the softmax). The state is
    the context s.

    Attributes:
      outputs: O, width of the output; None = H.
      activation: g, of the hidden units: 'tanh', 'sigmoid', 'relu' or 'identity'.
      output: f: 'identity', 'softmax', 'sigmoid' or 'tanh'.
      alpha: self-connection of the context.
    """

    outputs: int | None = None
    activation: str = "tanh"
    output: str = "identity"
    alpha: float = 0.0

    @property
    def gates(self) -> int:
        return 1

    def initial_state(self, batch: int) -> Array:
        """The context, zeros [B, O]."""
        return jnp.zeros((batch, self.outputs or self.features), jnp.float32)

    def _hidden(self) -> tuple[Array, Array, dict[str, Array]]:
        width = self.outputs or self.features
        kernel, bias = self._affine("hidden", width, self.features, self.hidden_init)
        out = self._affine("output_layer", self.features, width, self.kernel_init)
        return kernel, bias, {"kernel": out[0], "bias": out[1]}

    def _update(self) -> Update:
        activate = _function("activation", self.activation, ("tanh", "sigmoid", "relu", "identity"))
        squash = _function("output", self.output, ("identity", "softmax", "sigmoid", "tanh"))
        alpha, dtype = self.alpha, self.dtype

        def update(extra, projected, recurrent, context):
            hidden, kernel = promote_dtype(
                activate(projected + recurrent), extra["kernel"], dtype=dtype
            )
            outputs = (hidden @ kernel).astype(context.dtype) + extra["bias"]
            return outputs, alpha * context + squash(outputs)

        return update

    def forced(self, inputs: Array, targets: Array, *, lengths: Array | None = None) -> Array:
        """Outputs [B, L, O] where the targets are fed back in place of the outputs.

        Without recurrence through the network, all steps are computed at once.

        Args:
          inputs: [B, L, F].
          targets: [B, L, O], what ``f(a)`` should be; step t sees those before t.
          lengths: int [B]; outputs beyond mean nothing.
        """
        del lengths  # nothing flows from one step to an earlier one
        first = self.initial_state(inputs.shape[0])

        def context(s, y):
            return self.alpha * s + y, s

        y = jnp.swapaxes(targets, 0, 1).astype(first.dtype)
        contexts = jnp.swapaxes(lax.scan(context, first, y)[1], 0, 1)
        batch, length = inputs.shape[:2]
        flat = inputs.reshape(1, batch * length, -1)
        outputs, _ = self._run(flat, contexts.reshape(batch * length, -1), None)
        return outputs.reshape(batch, length, -1)


class EchoState(RecurrentLayer):
    """A fixed random reservoir: ``h = (1 - a) h + a tanh(W_in x + W h + b)`` (Jaeger 2001).

    Nothing in it is trained: its weights are in the collection ``reservoir``. Only a readout is,
    by ``ridge_readout`` or as a layer of its own.

    Attributes:
      radius: spectral radius of W; below 1 the reservoir forgets.
      leak: a.
      density: share of the recurrent weights that are not zero.
      input_scale: W_in and b are uniform in [-input_scale, input_scale].
    """

    radius: float = 0.9
    leak: float = 1.0
    density: float = 1.0
    input_scale: float = 1.0

    @property
    def gates(self) -> int:
        return 1

    def _fixed(self, name: str, draw: Callable[[Array], Array]) -> Array:
        # The key is asked for only where there is nothing yet.
        return self.variable("reservoir", name, lambda: draw(self.make_rng("params"))).value

    def _input(self, width: int) -> tuple[Array, Array]:
        def draw(*shape):
            scale = self.input_scale
            return lambda key: jax.random.uniform(key, shape, minval=-scale, maxval=scale)

        kernel = self._fixed("input_kernel", draw(width, self.features))
        return kernel, self._fixed("input_bias", draw(self.features))

    def _hidden(self) -> tuple[Array, Array, dict[str, Array]]:
        def draw(key):
            weights, kept = jax.random.split(key)
            shape = (self.features, self.features)
            kernel = jax.random.normal(weights, shape)
            kernel = kernel * jax.random.bernoulli(kept, self.density, shape)
            return kernel * (self.radius / spectral_radius(kernel))

        return self._fixed("hidden_kernel", draw), jnp.zeros(self.features), {}

    def _update(self) -> Update:
        leak = self.leak

        def update(extra, projected, recurrent, state):
            del extra
            state = (1 - leak) * state + leak * jnp.tanh(projected + recurrent)
            return state, state

        return update


def spectral_radius(matrix: Array, squarings: int = 24) -> Array:
    """The largest modulus of an eigenvalue of [N, N], by Gelfand's formula ``|A^k|^(1/k)``.

    Matrix products only, so that it runs on every device; ``k = 2 ** squarings``.
    """

    def square(carry, _):
        matrix, log, power = carry
        norm = jnp.linalg.norm(matrix)
        norm = jnp.where(norm == 0, 1.0, norm)
        matrix = matrix / norm
        return (matrix @ matrix, log + jnp.log(norm) / power, 2 * power), None

    start = (matrix, jnp.zeros((), matrix.dtype), jnp.ones((), matrix.dtype))
    (matrix, log, power), _ = lax.scan(square, start, None, length=squarings)
    norm = jnp.linalg.norm(matrix)
    return jnp.where(norm == 0, 0.0, jnp.exp(log + jnp.log(jnp.maximum(norm, 1e-30)) / power))


def ridge_readout(
    states: np.ndarray, targets: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """The linear readout that minimises ``|X W + b - Y|^2 + penalty |W|^2``, on the host.

    Args:
      states: X, [N, H].
      targets: Y, [N, O].
      penalty: positive.

    Returns:
      Kernel [H, O] and bias [O], float64.

    Raises:
      ValueError: the penalty is not positive, or shapes that do not fit.
    """
    import scipy.linalg

    x, y = np.asarray(states, np.float64), np.asarray(targets, np.float64)
    if penalty <= 0:
        raise ValueError(f"penalty={penalty}: the solution is unique only for a positive penalty")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"states [N, H] and targets [N, O] are needed; got {x.shape}, {y.shape}")
    centred = x - x.mean(0)
    gram = centred.T @ centred + penalty * np.eye(x.shape[1])
    kernel = scipy.linalg.solve(gram, centred.T @ (y - y.mean(0)), assume_a="pos")
    return kernel, y.mean(0) - x.mean(0) @ kernel


CELLS: dict[str, Callable[..., RecurrentLayer]] = {
    "elman": Elman,
    "irnn": lambda *args, **fields: Elman(
        *args, **{"activation": "relu", "hidden_init": identity_gates, **fields}
    ),
    "jordan": Jordan,
    "lstm": LSTM,
    "gru": GRU,
    "echo_state": EchoState,
}


class Recurrent(nn.Module):
    """Layers of recurrent cells, in one direction or both; a mixer (see ``nn.blocks``).

    The state is a tuple with one entry per layer: the cell's state, or the pair of those of both
    directions.

    Attributes:
      features: H, width of each layer and direction.
      layers: how many.
      cell: one of ``CELLS``.
      options: fields of the cell; a mapping, stored frozen.
      bidirectional: every layer reads both ways, each sequence within its own length (Schuster and
        Paliwal 1997). Such a stack cannot decode.
      merge: of the directions: 'concat' (2 H) or 'sum' (H).
      dropout: rate between layers; never on what is fed back.
      tie_dropout: one mask per (example, feature), shared over time (variational dropout).
      residual_from: number, from 1, of the first layer that adds its input to its output.
      streams: carry the state of so many rows from one training batch to the next, in the
        collection ``carry``; see ``objectives.TruncatedBPTT``. None = start from zeros.
      dtype: see ``RecurrentLayer``.
    """

    features: int
    layers: int = 1
    cell: str = "lstm"
    options: Mapping[str, Any] = FrozenDict()
    bidirectional: bool = False
    merge: str = "concat"
    dropout: float = 0.0
    tie_dropout: bool = False
    residual_from: int | None = None
    streams: int | None = None
    dtype: Any = None

    def __post_init__(self):
        object.__setattr__(self, "options", FrozenDict(self.options))  # hashable
        super().__post_init__()

    def setup(self):
        if self.cell not in CELLS:
            raise ValueError(f"cell={self.cell!r}; choose one of {', '.join(CELLS)}")
        if self.merge not in ("concat", "sum"):
            raise ValueError(f"merge={self.merge!r}; choose 'concat' or 'sum'")
        if self.bidirectional and self.streams is not None:
            raise ValueError(
                "a bidirectional stack cannot carry its state: the backward direction would start "
                "from what comes later; use streams=None or bidirectional=False"
            )
        fields = {"dtype": self.dtype, **self.options}
        layer = functools.partial(CELLS[self.cell], self.features, **fields)
        self.forward = [layer(reverse=False) for _ in range(self.layers)]
        if self.bidirectional:
            self.backward = [layer(reverse=True) for _ in range(self.layers)]
        self.drop = nn.Dropout(self.dropout, broadcast_dims=(1,) if self.tie_dropout else ())
        self.carry: Any = None
        if self.streams is not None and (
            self.is_initializing() or self.has_variable("carry", "state")
        ):
            self.carry = self.variable("carry", "state", self.initial_state, self.streams)

    def initial_state(self, batch: int) -> tuple[State, ...]:
        """The state of every layer before the first step."""
        one = CELLS[self.cell](self.features, parent=None, **self.options).initial_state(batch)
        return ((one, one) if self.bidirectional else one,) * self.layers

    def run(
        self,
        inputs: Array,
        state: tuple[State, ...] | None = None,
        *,
        lengths: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, tuple[State, ...]]:
        """Outputs of the last layer and the final state of every layer.

        Args:
          inputs: [B, L, F].
          state: of every layer before the first step; None = ``initial_state``. Both directions
            start from it, the backward one at the last valid step.
          lengths: int [B], valid steps; outputs beyond mean nothing.
          train: dropout on.

        Returns:
          [B, L, H], or [B, L, 2 H] for two directions that are concatenated, and the final states.
        """
        if state is None:
            state = self.initial_state(inputs.shape[0])
        x, final = inputs, []
        for number in range(self.layers):
            if number and train:
                x = self.drop(x, deterministic=False)
            if self.bidirectional:
                y, ahead = self.forward[number].run(x, state[number][0], lengths=lengths)
                z, back = self.backward[number].run(x, state[number][1], lengths=lengths)
                y = jnp.concatenate([y, z], axis=-1) if self.merge == "concat" else y + z
                final.append((ahead, back))
            else:
                y, after = self.forward[number].run(x, state[number], lengths=lengths)
                final.append(after)
            if self.residual_from is not None and number + 1 >= self.residual_from:
                if x.shape != y.shape:
                    raise ValueError(
                        f"layer {number + 1} maps width {x.shape[-1]} to {y.shape[-1]}: it cannot "
                        f"add its input; raise residual_from={self.residual_from}"
                    )
                y = x + y
            x = y
        return x, tuple(final)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """The outputs of ``run``; with ``streams``, in training, from the carried state on."""
        if self.streams is None or not train or self.is_initializing():
            return self.run(inputs, lengths=lengths, train=train)[0]
        if self.carry is None or inputs.shape[0] != self.streams:
            raise ValueError(
                f"streams={self.streams} rows carry their state in the collection 'carry': a batch "
                f"of training (each microbatch) must have as many rows, got {inputs.shape[0]}, and "
                "come with that collection"
            )
        outputs, state = self.run(inputs, self.carry.value, lengths=lengths, train=train)
        if self.is_mutable_collection("carry"):
            self.carry.value = state
        return outputs

    def _check_causal(self) -> None:
        if self.bidirectional:
            raise ValueError(
                "a bidirectional stack reads the future: it cannot decode or predict the next "
                "token; use bidirectional=False"
            )

    def discretise(self, mode: str | None = None) -> None:
        """No matrices to prepare for decoding; see ``S4Layer.discretise``."""
        self._check_causal()

    def prefill(
        self,
        inputs: Array,
        system: None = None,
        state: tuple[State, ...] | None = None,
        max_length: int = 0,
        lengths: Array | None = None,
    ) -> tuple[Array, tuple[State, ...]]:
        """As ``run``, for decoding."""
        del system, max_length
        self._check_causal()
        return self.run(inputs, state, lengths=lengths)

    def step(
        self, inputs: Array, state: tuple[State, ...], system: None = None
    ) -> tuple[Array, tuple[State, ...]]:
        """One input [B, F] to the output [B, H] and the next state."""
        del system
        self._check_causal()
        outputs, state = self.run(inputs[:, None], state)
        return outputs[:, 0], state


def jacobian_products(step: Callable[[State, Array], State], state: State, inputs: Array) -> Array:
    """The Jacobians ``ds(t)/ds(0)`` of a recurrence along one sequence.

    Args:
      step: ``(state, x) -> state``, pure, for one example.
      state: s(0), a pytree of vectors, S numbers together.
      inputs: x, [L, F].

    Returns:
      [L, S, S], in the order of ``jax.flatten_util.ravel_pytree``: row i of entry t is the gradient
      of number i of s(t + 1).
    """
    start, unravel = jax.flatten_util.ravel_pytree(state)

    def flat_step(s, x):
        return jax.flatten_util.ravel_pytree(step(unravel(s), x))[0]

    def body(carry, x):
        s, product = carry
        product = jax.jacrev(flat_step)(s, x) @ product
        return (flat_step(s, x), product), product

    return lax.scan(body, (start, jnp.eye(start.size, dtype=start.dtype)), inputs)[1]


def gradient_flow(
    module: RecurrentLayer, variables: Any, inputs: Array, part: int | None = None
) -> Array:
    """How much of a change of the first state is left: spectral norms of ``ds(t)/ds(0)``.

    Args:
      module: a layer.
      variables: its variables.
      inputs: one sequence, [L, F].
      part: which leaf of the state, such as 0 for the cell of an LSTM; None = all of it.

    Returns:
      [L], after 1 .. L steps.
    """

    def step(state, x):
        state = jax.tree.map(lambda s: s[None], state)
        new = module.apply(variables, x[None], state, method="step")[1]
        return jax.tree.map(lambda s: s[0], new)

    start = jax.tree.map(lambda s: s[0].astype(inputs.dtype), module.initial_state(1))
    products = jacobian_products(step, start, inputs)
    if part is not None:
        sizes = [leaf.size for leaf in jax.tree.leaves(start)]
        first = sum(sizes[:part])
        here = slice(first, first + sizes[part])
        products = products[:, here, here]
    return jnp.linalg.norm(products, ord=2, axis=(-2, -1))
