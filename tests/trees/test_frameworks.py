"""The same functions on the parameter trees of every framework."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transfer_jax import trees

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 3))
Y = jnp.arange(8) % 2


@dataclasses.dataclass
class Case:
    """Parameters of a network 3 -> 4 -> 2 and the function of them that gives logits."""

    params: Any
    logits: Callable[[Any, Any], jax.Array]
    kernels: str


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(jnp.tanh(nn.Dense(4)(x)))


def plain():
    a, b = jax.random.split(KEY)
    params = {"first": {"w": jax.random.normal(a, (3, 4)), "b": jnp.ones(4)},
              "last": {"w": jax.random.normal(b, (4, 2)), "b": jnp.zeros(2)}}  # fmt: skip

    def logits(p, batch):
        hidden = jnp.tanh(batch["x"] @ p["first"]["w"] + p["first"]["b"])
        return hidden @ p["last"]["w"] + p["last"]["b"]

    return Case(params, logits, "w$")


def linen():
    net = LinenNet()
    params = net.init(KEY, X)["params"]
    return Case(params, lambda p, batch: net.apply({"params": p}, batch["x"]), "kernel")


def frozen():
    case = linen()
    return dataclasses.replace(case, params=flax.core.freeze(case.params))


def nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.last = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    return Case(params, lambda p, batch: nnx.merge(graph, p)(batch["x"]), "kernel")


def haiku():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2], activation=jnp.tanh)(x)))
    return Case(net.init(KEY, X), lambda p, batch: net.apply(p, batch["x"]), "w$")


def equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=KEY)
    params, rest = trees.partition(net, trees.is_floating)  # Activations are leaves, too.
    logits = lambda p, batch: jax.vmap(trees.combine(p, rest))(batch["x"])  # noqa: E731
    return Case(params, logits, "weight")


CASES = [plain, linen, frozen, nnx_state, haiku, equinox]


@pytest.fixture(scope="module", params=CASES, ids=lambda f: f.__name__)
def case(request):
    return request.param()


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_arithmetic_and_task_vectors(case):
    other = jax.tree.map(lambda x: 1.5 * x + 0.1, case.params)
    vector = trees.task_vector(other, case.params)
    assert jax.tree.structure(vector) == jax.tree.structure(case.params)
    coefficients = jax.tree.map(lambda _: jnp.array([0.5]), case.params)
    half = jax.jit(trees.apply_task_vectors)(case.params, [vector], coefficients)
    np.testing.assert_allclose(flat(half), flat(trees.lerp(case.params, other, 0.5)), atol=1e-6)
    stacked = trees.apply_task_vectors(case.params, trees.stack([vector, vector]), [0.25, 0.25])
    np.testing.assert_allclose(flat(stacked), flat(half), atol=1e-6)
    values = trees.linearize(case.logits, case.params)(case.params, {"x": X})
    np.testing.assert_allclose(values, case.logits(case.params, {"x": X}), atol=1e-6)


def test_merging(case):
    models = [jax.tree.map(lambda x: x * f + 0.1, case.params) for f in (1.1, 0.9)]  # noqa: B023
    for method, options in [("ties", {}), ("dare_ties", {"density": 0.5, "key": KEY}),
                            ("delta_guided", {}), ("slerp", {"t": 0.5})]:  # fmt: skip
        given = models[:1] if method == "slerp" else models
        merged = trees.merge(case.params, given, method, **options)
        assert jax.tree.structure(merged) == jax.tree.structure(case.params)
        if method == "ties":  # Trims over all leaves together.
            continue
        alone = [
            trees.merge_leaf(path, x, xs, method, **options)
            for path, x, *xs in zip(
                trees.paths(case.params), *map(jax.tree.leaves, (case.params, *given))
            )
        ]
        np.testing.assert_array_equal(flat(merged), flat(alone))


def test_fisher(case):
    fisher = trees.fisher_diagonal(case.logits, case.params, {"x": X})
    assert jax.tree.structure(fisher) == jax.tree.structure(case.params)
    # With two classes the exact sum over labels can be written out.
    total = np.zeros(flat(fisher).size)
    for i in range(len(X)):
        log_probs = lambda p: jax.nn.log_softmax(case.logits(p, {"x": X[i : i + 1]}))[0]  # noqa: B023, E731
        for k in range(2):
            gradient = jax.grad(lambda p: log_probs(p)[k])(case.params)  # noqa: B023
            total += float(jnp.exp(log_probs(case.params)[k])) * flat(gradient) ** 2 / len(X)
    np.testing.assert_allclose(flat(fisher), total, rtol=1e-4, atol=1e-7)
    moved = jax.tree.map(lambda x: x + 0.1, case.params)
    penalty = trees.ewc_penalty(moved, case.params, fisher)
    assert float(penalty) == pytest.approx(0.5 * 0.01 * total.sum(), rel=1e-4)


def test_low_rank_and_masks(case):
    factors = trees.lora_init(case.params, case.kernels, 1, KEY)
    np.testing.assert_array_equal(flat(trees.lora_merge(case.params, factors)), flat(case.params))
    trained = jax.tree.map(lambda x: x + 1.0, factors)
    merged = trees.lora_merge(case.params, trained)
    assert jax.tree.structure(merged) == jax.tree.structure(case.params)
    extracted = trees.extract_lora(merged, case.params, 1)
    np.testing.assert_allclose(
        flat(trees.lora_merge(case.params, extracted)), flat(merged), atol=1e-5
    )
    mask = trees.magnitude_mask(case.params, 0.5, "global")
    assert flat(mask).sum() >= flat(mask).size // 2
    masked = trees.apply_mask(case.params, mask)
    np.testing.assert_array_equal(flat(masked), np.where(flat(mask), flat(case.params), 0))


def test_partition_gives_parts_that_work_alone(case):
    kernels, rest = trees.partition(case.params, case.kernels)
    assert len(trees.paths(kernels)) == 2
    doubled = trees.combine(trees.scale(kernels, 2.0), rest)
    expected = trees.scale(case.params, {case.kernels: 2.0, ".*": 1.0})
    np.testing.assert_allclose(flat(doubled), flat(expected))
