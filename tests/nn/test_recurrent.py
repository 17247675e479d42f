"""Recurrent layers: their equations, PyTorch on the same weights, padding, gradients over time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.models import LanguageModel
from transfer_jax.models.recurrent import RecurrentLanguageModel
from transfer_jax.nn import (
    GRU,
    LSTM,
    EchoState,
    Elman,
    Jordan,
    Recurrent,
    gradient_flow,
    ridge_readout,
)
from transfer_jax.nn.recurrent import jacobian_products


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_parity_with_torch(name):
    torch = pytest.importorskip("torch")
    peer = getattr(torch.nn, name)(5, 7, batch_first=True)
    module = {"LSTM": LSTM, "GRU": GRU}[name](7)
    weights = {k: v.detach().numpy() for k, v in peer.named_parameters()}
    variables = {
        "params": {
            "input": {"kernel": weights["weight_ih_l0"].T, "bias": weights["bias_ih_l0"]},
            "hidden": {"kernel": weights["weight_hh_l0"].T, "bias": weights["bias_hh_l0"]},
        }
    }
    x = np.random.default_rng(0).normal(size=(3, 11, 5)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), shapes, variables)
    lengths = np.array([11, 4, 8])
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.from_numpy(x), lengths, batch_first=True, enforce_sorted=False
    )
    with torch.no_grad():
        outputs, state = peer(packed)
        outputs = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)[0].numpy()
    y, ours = module.apply(variables, x, lengths=jnp.asarray(lengths), method="prefill")
    valid = np.arange(11) < lengths[:, None]
    np.testing.assert_allclose(np.where(valid[..., None], y, 0), outputs, atol=1e-5)
    theirs = (state[1], state[0]) if name == "LSTM" else (state,)
    for a, b in zip(jax.tree.leaves(ours), theirs):
        np.testing.assert_allclose(a, b[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(module.apply(variables, x, lengths=lengths), y, atol=1e-6)


@pytest.mark.parametrize(
    "module", [LSTM(6), Recurrent(6, 2, "gru", residual_from=2)], ids=["lstm", "gru_stack"]
)
def test_chunks_and_steps_carry_the_state(module):
    x = jax.random.normal(jax.random.key(0), (2, 9, 6))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    y, state = module.apply(variables, x[:, :4], method="prefill")
    z, state = module.apply(variables, x[:, 4:8], None, state, method="prefill")
    w, _ = module.apply(variables, x[:, 8], state, method="step")
    whole = jnp.concatenate([y, z, w[:, None]], axis=1)
    np.testing.assert_allclose(whole, module.apply(variables, x), atol=1e-6)


def draw(module, x, seed=3):
    """Variables of a module, every one of them random."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), x.dtype), shapes)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_stacks_in_both_directions_are_those_of_torch(name):
    torch = pytest.importorskip("torch")
    peer = getattr(torch.nn, name)(5, 7, num_layers=2, bidirectional=True, batch_first=True)
    weights = {k: v.detach().numpy() for k, v in peer.named_parameters()}

    def layer(number, suffix):
        def affine(part):
            kernel, bias = (weights[f"{w}_{part}_l{number}{suffix}"] for w in ("weight", "bias"))
            return {"kernel": kernel.T, "bias": bias}

        return {"input": affine("ih"), "hidden": affine("hh")}

    params = {f"forward_{n}": layer(n, "") for n in range(2)}
    params |= {f"backward_{n}": layer(n, "_reverse") for n in range(2)}
    x = np.random.default_rng(0).normal(size=(3, 50, 5)).astype(np.float32)
    lengths = np.array([50, 3, 21])
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.from_numpy(x), lengths, batch_first=True, enforce_sorted=False
    )
    with torch.no_grad():
        outputs, last = peer(packed)
        outputs = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)[0].numpy()
    cell = {"RNN": "elman"}.get(name, name.lower())
    module = Recurrent(7, 2, cell, bidirectional=True)
    y, state = module.apply({"params": params}, x, lengths=jnp.asarray(lengths), method="run")
    valid = (np.arange(50) < lengths[:, None])[..., None]
    np.testing.assert_allclose(np.where(valid, y, 0), outputs, atol=1e-5)
    theirs = (last[1], last[0]) if name == "LSTM" else (last,)
    for number in range(4):  # layer by layer, forward and backward
        ours = jax.tree.leaves(state[number // 2][number % 2])
        for a, b in zip(ours, theirs):
            np.testing.assert_allclose(a, b[number].numpy(), atol=1e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def by_hand(module, variables, x):
    """The cells as loops over time, from their equations; outputs and the last hidden state."""
    p = variables["params"] if "params" in variables else variables["reservoir"]
    size = module.features

    def affine(name, v):
        return v @ p[name]["kernel"] + p[name]["bias"]

    h, s, ys = np.zeros((len(x), size)), np.zeros((len(x), size)), []
    for t in range(x.shape[1]):
        if isinstance(module, EchoState):
            a = x[:, t] @ p["input_kernel"] + p["input_bias"] + h @ p["hidden_kernel"]
            h = (1 - module.leak) * h + module.leak * np.tanh(a)
        elif isinstance(module, Jordan):
            g = np.tanh(affine("input", x[:, t]) + affine("hidden", s[:, : module.outputs]))
            h = affine("output_layer", g)
            e = np.exp(h - h.max(-1, keepdims=True))
            s = module.alpha * s[:, : module.outputs] + e / e.sum(-1, keepdims=True)
        elif isinstance(module, GRU):
            r, z, n = np.split(affine("input", x[:, t]), 3, -1)
            kernel, bias = p["hidden"]["kernel"], p["hidden"]["bias"]
            r, z = (
                sigmoid(
                    a + h @ kernel[:, i * size : (i + 1) * size] + bias[i * size : (i + 1) * size]
                )
                for i, a in enumerate((r, z))
            )
            n = np.tanh(n + (r * h) @ kernel[:, 2 * size :] + bias[2 * size :])
            h = (1 - z) * n + z * h
        else:
            if module.layer_norm:
                a = norm(x[:, t] @ p["input"]["kernel"]) * p["input_scale"] + p["input"]["bias"]
                b = norm(h @ p["hidden"]["kernel"]) * p["hidden_scale"] + p["hidden"]["bias"]
            else:
                a, b = affine("input", x[:, t]), affine("hidden", h)
            if isinstance(module, Elman):
                h = np.maximum(a + b, 0)
            else:
                i, *f, g, o = np.split(a + b, module.gates, -1)
                if module.peepholes:
                    i = i + p["peephole_input"] * s
                    f = [f[0] + p["peephole_forget"] * s]
                s = sigmoid(i) * np.tanh(g) + (sigmoid(f[0]) if f else 1) * s
                if module.peepholes:  # the state after the step
                    o = o + p["peephole_output"] * s
                h = sigmoid(o) * (s if module.output_squash == "identity" else np.tanh(s))
        ys.append(h)
    return np.stack(ys, 1)


CELLS = {
    "elman_relu": Elman(4, activation="relu", layer_norm=True),
    "lstm_norm": LSTM(4, layer_norm=True),
    "lstm_peepholes": LSTM(4, peepholes=True, unroll=3),
    "lstm_1997": LSTM(4, forget_gate=False, output_squash="identity"),
    "gru_before": GRU(4, reset_after=False),
    "jordan": Jordan(4, outputs=3, output="softmax", alpha=0.5),
    "echo_state": EchoState(4, leak=0.3),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_their_equations_and_gradients_those_of_single_steps(name):
    """Gradients of the scan against a chain of steps, where JAX adds up the kernel's gradient."""
    module = CELLS[name]
    with jax.enable_x64():
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)))
        lengths = jnp.array([6, 4])
        variables = draw(module, x)
        valid = (jnp.arange(6) < lengths[:, None])[..., None]

        def scanned(variables, x):
            y = module.apply(variables, x, lengths=lengths)
            return jnp.sum(jnp.where(valid, y, 0) ** 3), y

        def chained(variables, x):
            state, total = module.initial_state(2), 0
            for t in range(6):
                y, state = module.apply(variables, x[:, t], state, method="step")
                total += jnp.sum(jnp.where(valid[:, t], y, 0) ** 3)
            return total

        (_, y), gradient = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1), has_aux=True))(
            variables, x
        )
        np.testing.assert_allclose(
            y[0], by_hand(module, jax.device_get(variables), np.asarray(x))[0], atol=1e-10
        )
        expected = jax.jit(jax.grad(chained, argnums=(0, 1)))(variables, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), gradient, expected)


def test_back_propagation_through_1000_steps_in_closed_form():
    """delta_h(t) = (W_yh^T delta_y(t) + W_hh^T delta_h(t+1)) (1 - h(t)^2)."""
    rng = np.random.default_rng(0)
    size, length = 8, 1000
    w_hh = 1.02 * np.linalg.qr(rng.normal(size=(size, size)))[0]
    w_hx, w_yh = 0.1 * rng.normal(size=(3, size)), rng.normal(size=(size, 2))
    x, y = rng.normal(size=(length, 3)), np.eye(2)[rng.integers(0, 2, length)]
    hidden, h = [np.zeros(size)], np.zeros(size)
    for t in range(length):
        h = np.tanh(x[t] @ w_hx + h @ w_hh)
        hidden.append(h)
    hidden = np.array(hidden)
    logits = hidden[1:] @ w_yh
    delta_y = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - y
    delta, deltas = np.zeros(size), np.zeros((length, size))
    for t in reversed(range(length)):
        delta = (w_yh @ delta_y[t] + w_hh @ delta) * (1 - hidden[t + 1] ** 2)
        deltas[t] = delta
    expected = [x.T @ deltas, hidden[:-1].T @ deltas, hidden[1:].T @ delta_y]
    module = Elman(size)

    @jax.jit
    def gradient(kernels, x, y):
        def loss(kernels):
            zeros = jnp.zeros(size, x.dtype)
            layers = ({"kernel": k, "bias": zeros} for k in kernels[:2])
            params = dict(zip(("input", "hidden"), layers))
            logits = module.apply({"params": params}, x[None])[0] @ kernels[2]
            return -jnp.sum(y * jax.nn.log_softmax(logits))

        return jax.grad(loss)(kernels)

    with jax.enable_x64():
        found = gradient([w_hx, w_hh, w_yh], x, y)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=1e-10 * np.abs(b).max())
    found = gradient(*jax.tree.map(np.float32, ([w_hx, w_hh, w_yh], x, y)))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_padding_leaves_no_trace_in_gradients_of_both_directions():
    module = Recurrent(4, 1, "lstm", bidirectional=True, merge="sum")
    x = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
    lengths = np.array([8, 3])
    variables = draw(module, x)

    @jax.jit
    @jax.grad
    def gradient(variables, x, lengths):
        y, state = module.apply(variables, x, lengths=lengths, method="run")
        valid = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        return jnp.sum(jnp.where(valid, y, 0) ** 2) + sum(map(jnp.sum, jax.tree.leaves(state)))

    x[1, 3:] = 100.0
    together = gradient(variables, x, lengths)
    alone = gradient(variables, x[:1], lengths[:1]), gradient(variables, x[1:, :3], lengths[1:])
    total = jax.tree.map(jnp.add, *alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), together, total
    )


def test_each_direction_sees_one_side():
    module = Recurrent(3, 1, "gru", bidirectional=True)
    x = jax.random.normal(jax.random.key(0), (1, 6, 2))
    variables = module.init(jax.random.key(1), x)
    jacobian = jax.jit(jax.jacrev(lambda x: module.apply(variables, x)))(x)[0, :, :, 0]
    depends = np.abs(jacobian).max(-1)  # [t, unit, of x at]
    forward, backward = depends[:, :3].max(1) > 0, depends[:, 3:].max(1) > 0
    np.testing.assert_array_equal(forward, np.tril(np.ones((6, 6), bool)))
    np.testing.assert_array_equal(backward, np.triu(np.ones((6, 6), bool)))


def test_how_gradients_vanish():
    size, length = 6, 30
    x = 0.1 * jax.random.normal(jax.random.key(0), (length, size))
    for radius in (0.9, 1.1):
        init = nn.initializers.orthogonal(radius)
        linear = Elman(size, activation="identity", hidden_init=init)
        variables = linear.init(jax.random.key(1), x[None])
        exact = radius ** np.arange(1, length + 1)
        flow = jax.jit(gradient_flow, static_argnums=0)
        np.testing.assert_allclose(flow(linear, variables, x), exact, rtol=1e-4)
        tanh = flow(Elman(size), variables, x)
        assert (tanh <= exact * (1 + 1e-5)).all()
        assert (tanh[5:] < 0.999 * exact[5:]).all()
    # The constant error carousel: forget gates open, input gates shut.
    for module in (LSTM(size), LSTM(size, forget_gate=False)):
        variables = draw(module, x[None])
        bias = variables["params"]["input"]["bias"]
        bias = bias.at[:size].set(-1e9)
        if module.forget_gate:
            bias = bias.at[size : 2 * size].set(1e9)
        variables["params"]["input"]["bias"] = bias

        def step(state, x, module=module, variables=variables):
            return module.apply(variables, x, state, method="step")[1]

        products = jax.jit(jacobian_products, static_argnums=0)(
            step, module.initial_state(1), x[:, None]
        )
        identity = np.broadcast_to(np.eye(size), (length, size, size))
        np.testing.assert_array_equal(products[:, :size, :size], identity)


def test_jordan_with_an_identity_for_a_head_is_elman():
    x = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)
    elman = draw(Elman(4), x)
    head = {"kernel": np.eye(4, dtype=np.float32), "bias": np.zeros(4, np.float32)}
    jordan = {"params": {**elman["params"], "output_layer": head}}
    np.testing.assert_allclose(Jordan(4).apply(jordan, x), Elman(4).apply(elman, x), atol=1e-6)
    # Forced with its own outputs, it goes its own way.
    module = Jordan(4, outputs=3, output="sigmoid", alpha=0.7)
    variables = draw(module, x)
    y = module.apply(variables, x)
    forced = module.apply(variables, x, nn.sigmoid(y), method="forced")
    np.testing.assert_allclose(forced, y, atol=1e-5)


def test_dropout_is_between_layers_only():
    x = jax.random.normal(jax.random.key(0), (2, 9, 5))
    module = Recurrent(5, 2, "gru", dropout=0.5, tie_dropout=True)
    variables = module.init(jax.random.key(1), x)
    rngs = {"dropout": jax.random.key(2)}
    y, state = module.apply(variables, x, method="run")
    z, after = module.apply(variables, x, train=True, rngs=rngs, method="run")
    np.testing.assert_array_equal(state[0], after[0])  # the first layer knows of no mask
    assert np.abs(y - z).max() > 0.01
    # The second layer is itself, after one mask on what it reads.
    seen = GRU(5).apply({"params": variables["params"]["forward_0"]}, x)
    second = {"params": variables["params"]["forward_1"]}
    _, recorded = module.apply(
        variables, x, train=True, rngs=rngs, capture_intermediates=True, mutable="intermediates"
    )
    masked = recorded["intermediates"]["drop"]["__call__"][0]
    np.testing.assert_allclose(GRU(5).apply(second, masked), z, atol=1e-6)
    ratio = np.asarray(masked / seen)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), atol=1e-4)
    np.testing.assert_allclose(np.unique(ratio.round(3)), [0, 2])


def test_one_program_for_every_length_with_one_product_in_the_loop():
    module = LSTM(8, dtype=jnp.bfloat16)
    x = jnp.ones((2, 16, 5))
    variables = module.init(jax.random.key(0), x)

    def gradient(variables, x):
        return jax.grad(lambda v: module.apply(v, x).astype(jnp.float32).sum())(variables)

    texts = []
    for length in (16, 512):
        x = jnp.ones((2, length, 5))
        texts.append(jax.jit(gradient).lower(variables, x).as_text())
        assert str(jax.make_jaxpr(module.apply)(variables, x)).count("dot_general[") == 2
    # Forward: projection, feedback. Backward: feedback, and one product for each kernel.
    assert [text.count("stablehlo.dot_general") for text in texts] == [5, 5]
    assert len(texts[0].splitlines()) == len(texts[1].splitlines())
    y, state = module.apply(variables, x, method="run")
    assert y.dtype == jnp.bfloat16
    assert {s.dtype for s in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    exact = LSTM(8).apply(variables, x)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.02)


def test_echo_state_has_its_radius_and_a_readout_in_closed_form():
    linear_model = pytest.importorskip("sklearn.linear_model")
    module = EchoState(30, radius=0.8, density=0.3)
    x = jax.random.uniform(jax.random.key(0), (1, 300, 1))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    assert set(variables) == {"reservoir"}  # nothing to train
    kernel = np.asarray(variables["reservoir"]["hidden_kernel"], float)
    np.testing.assert_allclose(np.abs(np.linalg.eigvals(kernel)).max(), 0.8, rtol=1e-4)
    assert (kernel == 0).mean() > 0.6
    states = np.asarray(module.apply(variables, x)[0])[10:]
    targets = np.asarray(x[0])[5:-5]  # what came five steps before
    kernel, bias = ridge_readout(states, targets, 1e-3)
    peer = linear_model.Ridge(1e-3).fit(states.astype(float), targets)
    np.testing.assert_allclose((states @ kernel + bias)[:, 0], peer.predict(states), atol=1e-6)
    assert np.mean((states @ kernel + bias - targets) ** 2) < 0.1 * targets.var()


def test_mistakes():
    x = jnp.ones((2, 4, 3), jnp.float32)

    def init(module):
        jax.eval_shape(module.init, jax.random.key(0), x)

    with pytest.raises(ValueError, match="choose one of elman, irnn"):
        init(Recurrent(3, cell="lsmt"))
    with pytest.raises(ValueError, match="choose 'concat' or 'sum'"):
        init(Recurrent(3, merge="mean"))
    with pytest.raises(ValueError, match="layer 1 maps width 3 to 5"):
        init(Recurrent(5, residual_from=1))
    with pytest.raises(ValueError, match="activation='gelu'"):
        init(Elman(3, activation="gelu"))
    for module in (LSTM(3, reverse=True), Recurrent(3, bidirectional=True)):
        variables = module.init(jax.random.key(0), x)
        with pytest.raises(ValueError, match="cannot decode or predict the next"):
            module.apply(variables, x, method="prefill")
    body = Recurrent(3, bidirectional=True)
    with pytest.raises(ValueError, match="reads the future"):
        model = RecurrentLanguageModel(body=body, outputs=5, vocab_size=5)
        model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="reads the future"):
        options = {"bidirectional": True}
        model = LanguageModel(features=4, vocab_size=5, mixer="recurrent", mixer_options=options)
        model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
