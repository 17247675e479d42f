"""Losses over the entire space against float64, closed forms, and what must not matter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq

from transfer_jax.objectives import Variables
from transfer_jax.objectives.conversion import EntireSpace, chain_nll, event_log_probs

RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def reference(logits, labels):
    """float64, with 1 - pq = (1 - p) + p (1 - q), and its gradient (the closed forms)."""
    a, b = np.asarray(logits, np.float64).T
    p, q = sigmoid(a), sigmoid(b)
    rest = sigmoid(-a) + p * sigmoid(-b)
    t = labels[:, 0] * labels[:, 1]
    log_rest = np.where(p * q < 0.5, np.log1p(-np.minimum(p * q, 0.5)), np.log(rest))
    loss = t * (np.logaddexp(0, -a) + np.logaddexp(0, -b)) - (1 - t) * log_rest
    # (pq - t) / (1 - pq) is -1 where t = 1.
    odds = np.where(t == 1, -1.0, p * q / rest)
    return loss, np.stack([sigmoid(-a) * odds, sigmoid(-b) * odds], 1)


@jax.jit
def value_and_grads(logits, labels):
    """Each event's nll, and the gradient of the last one's."""
    value, pull = jax.vjp(lambda x: chain_nll(x, labels), logits)
    cotangent = jnp.zeros_like(value).at[:, -1].set(1.0)
    return value, pull(cotangent)[0]


EXTREME = [(30, 30), (-40, -40), (40, -40), (-40, 40), (-12, -9), (0, 0), (80, 80)]


@pytest.mark.parametrize("z", [0.0, 1.0])
def test_ctcvr_loss_and_gradient_match_float64_also_at_the_extremes(z):
    logits = np.concatenate([np.array(EXTREME), 3 * RNG.normal(size=(20, 2))]).astype(np.float32)
    labels = np.stack([np.ones(len(logits)), np.full(len(logits), z)], 1).astype(np.float32)
    nll, grads = value_and_grads(logits, labels)
    expected, gradient = reference(logits, labels)
    np.testing.assert_allclose(nll[:, 1], expected, rtol=1e-4)
    np.testing.assert_allclose(nll[:, 0], np.logaddexp(0, -logits[:, 0].astype(float)), rtol=1e-4)
    np.testing.assert_allclose(grads, gradient, rtol=1e-4)
    assert np.isfinite(nll).all() and np.isfinite(grads).all()


def test_conversions_without_a_click_change_nothing():
    logits = jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32)
    clicks = jnp.array([0.0, 1, 0, 1, 0, 0])
    first = jnp.stack([clicks, jnp.array([0.0, 1, 0, 0, 0, 0])], 1)
    dirty = jnp.stack([clicks, jnp.array([1.0, 1, 1, 0, 0, 1])], 1)
    for one, other in zip(value_and_grads(logits, first), value_and_grads(logits, dirty)):
        np.testing.assert_array_equal(one, other)


def test_a_chain_is_products_of_sigmoids():
    logits = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
    p = np.cumprod(sigmoid(logits), 1)
    log_p, log_not = event_log_probs(logits)
    np.testing.assert_allclose(log_p, np.log(p), rtol=1e-5)
    np.testing.assert_allclose(log_not, np.log1p(-p), rtol=1e-4)
    np.testing.assert_allclose(event_log_probs(logits[:, :2])[1], log_not[:, :2], rtol=1e-6)
    # The rule for derivatives agrees with autodiff of the naive form, where that is accurate.
    labels = jnp.asarray([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])

    def naive(x):
        q = jnp.cumprod(jax.nn.sigmoid(x), -1)
        return -(labels * jnp.log(q) + (1 - labels) * jnp.log1p(-q)).sum()

    def ours(x):
        return chain_nll(x, labels).sum()

    gradients = [jax.jit(jax.grad(f))(logits) for f in (ours, naive)]
    np.testing.assert_allclose(*gradients, rtol=1e-4)


class Constant(nn.Module):
    """Logits that depend on nothing."""

    stages: tuple[str, ...] = ("click", "conversion")

    @nn.compact
    def __call__(self, inputs):
        bias = self.param("bias", nn.initializers.zeros, (len(self.stages),))
        return jnp.broadcast_to(bias, (len(inputs["ids"]), len(self.stages)))


def batch_of(labels, **more):
    return {"inputs": {"ids": jnp.zeros((len(labels), 1), jnp.int32)}, "labels": labels, **more}


CLICKS = (RNG.random(2000) < 0.2).astype(np.float32)
BOUGHT = CLICKS * (RNG.random(2000) < 0.3)


def converged(objective, labels):
    """The rates that gradient descent finds."""
    batch = batch_of(jnp.asarray(labels, jnp.float32))
    optimiser = optax.adam(0.05)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: objective.loss(Variables(p, {}), batch, None)[0])(params)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimiser.init(params)), None, length=600)[0][0]

    start = objective.init(jax.random.key(0), batch).params
    return sigmoid(run(start)["bias"])


def test_constant_rates_converge_to_the_shares():
    labels = np.stack([CLICKS, BOUGHT], 1)
    shares = [CLICKS.mean(), BOUGHT.sum() / CLICKS.sum()]
    esmm = converged(EntireSpace(module=Constant()), labels)
    np.testing.assert_allclose(esmm, shares, atol=1e-3)
    alone = EntireSpace(module=Constant(("event",)))
    both, click = (converged(alone, x[:, None])[0] for x in (BOUGHT, CLICKS))
    base = converged(alone, BOUGHT[CLICKS == 1][:, None])[0]
    np.testing.assert_allclose([both / click, base], shares[1], atol=2e-3)
    # Of three stages the third share is conditional, too.
    third = BOUGHT * (RNG.random(2000) < 0.5)
    chain = EntireSpace(module=Constant(("click", "cart", "purchase")))
    found = converged(chain, np.stack([CLICKS, BOUGHT, third], 1))
    np.testing.assert_allclose(found, [*shares, third.sum() / BOUGHT.sum()], atol=2e-3)


def test_dividing_and_ignoring_differ_once_clicks_follow_the_features():
    """Two kinds of impressions and one rate: the best one is another for ESMM than for BASE."""
    p, q = np.array([0.8, 0.1]), np.array([0.9, 0.1])  # equal shares of impressions
    base = (p * q).sum() / p.sum()  # the best on clicked rows
    # Where the expected gradient, sum p (r - q) (1 - r) / (1 - p r), is 0.
    best = brentq(lambda r: (p * (r - q) / (1 - p * r)).sum(), 0.1, 0.9)
    labels = []
    for rate, bought in zip(p, q):
        clicks = np.arange(1000) < 1000 * rate
        labels.append(np.stack([clicks, clicks & (np.arange(1000) < 1000 * rate * bought)], 1))
    labels = np.concatenate(labels).astype(np.float32)
    click_logit = jnp.asarray(np.repeat(np.log(p / (1 - p)), 1000), jnp.float32)

    class KnownClicks(nn.Module):
        stages = ("click", "conversion")

        @nn.compact
        def __call__(self, inputs):
            bias = self.param("bias", nn.initializers.zeros, (1,))
            return jnp.stack([click_logit, jnp.broadcast_to(bias[0], click_logit.shape)], 1)

    esmm = converged(EntireSpace(module=KnownClicks()), labels)[0]
    np.testing.assert_allclose(esmm, best, atol=2e-3)
    assert abs(base - esmm) > 0.03
    np.testing.assert_allclose(
        converged(EntireSpace(module=Constant(("x",))), labels[labels[:, 0] == 1][:, 1:])[0],
        base, atol=2e-3,
    )  # fmt: skip


@jax.jit
def evaluate(objective, batch):
    loss, aux = objective.loss(Variables({}, {}), batch, None)
    return loss, aux._replace(state={})


def test_means_weights_masks_and_terms():
    logits = jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32)
    labels = jnp.asarray([[1, 1], [1, 0], [0, 0], [0, 0], [1, 1]], jnp.float32)

    class Given(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return inputs

    def loss(rows, objective=EntireSpace(module=Given()), **more):  # noqa: B008
        rows = np.asarray(rows)
        batch = {"inputs": logits[rows], "labels": labels[rows], **more}
        return evaluate(objective, batch)

    everything = range(5)
    whole, aux = loss(everything)
    np.testing.assert_allclose(loss([*everything, *everything])[0], whole, rtol=1e-6)
    np.testing.assert_allclose(
        loss(everything, weights=jnp.array([1.0, 1, 0, 1, 1]))[0], loss([0, 1, 3, 4])[0], rtol=1e-6
    )
    masked, masked_aux = loss(everything, mask=jnp.array([1.0, 1, 1, 1, 0]))
    np.testing.assert_allclose(masked, loss(range(4))[0], rtol=1e-6)
    assert masked_aux.weight == 4 and aux.metrics["1_nll"].weight == 5
    nll = chain_nll(logits, labels).mean(0)
    np.testing.assert_allclose(whole, nll.sum(), rtol=1e-6)
    only = EntireSpace(module=Given(), event_weights=(0.0, 2.0))
    np.testing.assert_allclose(loss(everything, only)[0], 2 * nll[1], rtol=1e-6)
    # The conditional term is the logistic loss of clicked rows.
    more = EntireSpace(module=Given(), stage_weights=(0.0, 3.0))
    clicked = np.array([0, 1, 4])
    q = sigmoid(logits[clicked, 1])
    z = np.asarray(labels)[clicked, 1]
    term = -(z * np.log(q) + (1 - z) * np.log(1 - q)).sum() / 5
    np.testing.assert_allclose(loss(everything, more)[0] - whole, 3 * term, rtol=1e-4)
    with pytest.raises(ValueError, match="one number for each"):
        loss(everything, EntireSpace(module=Given(), event_weights=(1.0,)))
    with pytest.raises(ValueError, match="one column per stage"):
        only.loss(Variables({}, {}), {"inputs": logits, "labels": labels[:, :1]}, None)
