"""Truncated back-propagation: carried states, and gradients that end where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.data import Pipeline
from transfer_jax.data.text import stream_windows
from transfer_jax.models.recurrent import RecurrentNetwork
from transfer_jax.nn import Recurrent
from transfer_jax.objectives import NextToken, Regression
from transfer_jax.objectives.carried import TruncatedBPTT

B, L, F = 3, 12, 4
X = np.random.default_rng(0).normal(size=(B, L, F)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(B, L, 2)).astype(np.float32)
NO_ONE = np.zeros(B, bool)


def network(streams=B):
    body = Recurrent(5, 2, "gru", streams=streams)
    return RecurrentNetwork(body=body, outputs=2)


def objective(history=0, **fields):
    return TruncatedBPTT(inner=Regression(module=network(**fields)), history=history)


def chunks(length):
    return [
        {"inputs": X[:, i : i + length], "labels": Y[:, i : i + length], "reset": NO_ONE | (i == 0)}
        for i in range(0, L, length)
    ]


@pytest.fixture(scope="module")
def run():
    """Losses, gradients and final state over the chunks of a stream, at fixed parameters."""

    @jax.jit
    def step(task, variables, batch):
        def loss(params):
            return task.loss(variables._replace(params=params), batch, jax.random.key(0))

        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(variables.params)
        return value, aux.outputs, gradient, aux.state

    def run(task, batches):
        first = jax.tree.map(lambda x: x[:1], batches[0])  # as in training: one row is enough
        variables = jax.jit(type(task).init)(task, jax.random.key(1), first)
        out = []
        for batch in batches:
            *now, state = step(task, variables, batch)
            variables = variables._replace(state=state)
            out.append(now)
        return *zip(*out), variables

    return run


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_any_length_of_the_chunks_gives_the_same_outputs(run):
    module = network(streams=None)
    for length in (12, 3):
        _, outputs, _, variables = run(objective(), chunks(length))
        whole = module.apply({"params": variables.params}, X)
        np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, atol=1e-6)
    # The negative control: states that start anew in every chunk give something else.
    forgetful = [{**chunk, "reset": ~NO_ONE} for chunk in chunks(3)]
    outputs = np.concatenate(run(objective(), forgetful)[1], axis=1)
    np.testing.assert_allclose(outputs[:, :3], whole[:, :3], atol=1e-6)
    assert np.abs(outputs - whole)[:, 3:].max() > 0.01


@pytest.mark.parametrize("history", [0, 1])
def test_gradients_end_at_the_borders(run, history):
    """Of the last chunk's loss in the whole graph, cut at one border by ``stop_gradient``."""
    length = 3
    values, _, gradients, variables = run(objective(history), chunks(length))
    body = network(streams=None).body
    params = variables.params

    def last(params, history):
        state = body.initial_state(B)
        for number in range(L // length):
            if number == L // length - 1 - history:
                state = jax.lax.stop_gradient(state)
            x = X[:, number * length : (number + 1) * length]
            y, state = body.apply({"params": params["body"]}, x, state, method="run")
        y = y @ params["output"]["kernel"] + params["output"]["bias"]
        return jnp.mean((y - Y[:, -length:]) ** 2)

    gradient = jax.jit(jax.value_and_grad(last), static_argnums=1)
    value, expected = gradient(params, history)
    np.testing.assert_allclose(values[-1], value, rtol=1e-5)
    close(gradients[-1], expected, atol=1e-6)
    uncut = gradient(params, 3)[1]["body"]["forward_0"]["hidden"]["kernel"]
    found = gradients[-1]["body"]["forward_0"]["hidden"]["kernel"]
    assert np.abs(found - uncut).max() > 1e-5  # full back-propagation is something else


def test_a_window_over_the_whole_sequence_is_full_back_propagation(run):
    task, (whole,) = objective(), chunks(L)
    values, _, gradients, variables = run(task, [whole])
    plain = Regression(module=network(streams=None))
    value, expected = jax.jit(
        jax.value_and_grad(
            lambda p: plain.loss(variables._replace(params=p, state={}), whole, None)[0]
        )
    )(variables.params)
    np.testing.assert_allclose(values[0], value, rtol=1e-6)
    close(gradients[0], expected, atol=1e-6)
    # So is a window of two chunks whose history is the first one: of the second half's loss.
    half = chunks(L // 2)
    value, expected = jax.jit(
        jax.value_and_grad(
            lambda p: jnp.mean(
                (network(streams=None).apply({"params": p}, X) - Y)[:, L // 2 :] ** 2
            )
        )
    )(variables.params)
    values, _, gradients, _ = run(objective(history=1), half)
    np.testing.assert_allclose(values[1], value, rtol=1e-5)
    close(gradients[1], expected, atol=1e-6)


def test_rows_are_reset_one_by_one_and_evaluation_leaves_no_trace(run):
    first, second = chunks(6)
    second = {**second, "reset": np.array([False, True, False])}
    _, outputs, _, variables = run(objective(), [first, second])
    module = network(streams=None)
    params = {"params": variables.params}
    np.testing.assert_allclose(outputs[1][1], module.apply(params, X[1:2, 6:])[0], atol=1e-6)
    np.testing.assert_allclose(outputs[1][0], module.apply(params, X[:1])[0, 6:], atol=1e-6)
    task = objective()
    batch = {"inputs": X[:2, :6], "labels": Y[:2, :6]}  # of another size
    _, aux = task.loss(variables, batch, None)
    np.testing.assert_allclose(aux.outputs, module.apply(params, X[:2, :6]), atol=1e-6)
    close(aux.state, variables.state)


def test_mistakes():
    batch = chunks(6)[0]
    with pytest.raises(ValueError, match="streams=<rows of a batch>"):
        objective(streams=None).init(jax.random.key(0), batch)
    task = objective()
    variables = task.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="3 rows carry their state"):
        task.loss(variables, jax.tree.map(lambda x: x[:2], batch), jax.random.key(0))
    with pytest.raises(ValueError, match="bidirectional stack cannot carry"):
        Recurrent(4, bidirectional=True, streams=3).init(jax.random.key(0), X)


def test_streams_of_a_text_are_read_in_order():
    """Carried over a text, the state is that of each stream read from its beginning."""
    tokens = np.random.default_rng(2).integers(0, 6, 80)
    pipeline = Pipeline(stream_windows(tokens, 5, 2), 2, repeat=True)
    iterator = pipeline.iterator()
    batches = [next(iterator) for _ in range(len(pipeline) + 1)]
    module = RecurrentNetwork(body=Recurrent(4, streams=2), outputs=6, vocab_size=6)
    task = TruncatedBPTT(inner=NextToken(module=module))
    variables = task.init(jax.random.key(0), batches[0])
    step = jax.jit(lambda v, b: task.loss(v, b, jax.random.key(0))[1])
    outputs = []
    for batch in batches:
        aux = step(variables, batch)
        variables = variables._replace(state=aux.state)
        outputs.append(aux.outputs)
    streams = tokens.reshape(2, 40)
    plain = module.clone(body=Recurrent(4))
    whole = plain.apply({"params": variables.params}, streams[:, : 5 * len(pipeline)])
    np.testing.assert_allclose(np.concatenate(outputs[:-1], axis=1), whole, atol=1e-6)
    np.testing.assert_allclose(outputs[-1], outputs[0], atol=1e-6)  # the next epoch
