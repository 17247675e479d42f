"""Prompts of function classes: recursions in NumPy, closed forms, what may and may not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.data import function_classes as fc
from transfer_jax.data.function_classes import Curriculum, FunctionClass, draw_prompt, settings


@functools.cache
def drawer(task, count, shared):
    def draw(seed, now):
        functions, rest = jax.random.split(jax.random.key(seed))

        def one(i):
            function = jax.random.fold_in(functions, 0 if shared else i)
            found = draw_prompt(task, jnp.stack([function, jax.random.fold_in(rest, i)]), now)
            return {**found, "function": fc.draw_function(task, function)}

        return jax.vmap(one)(jnp.arange(count))

    return draw


def prompts(task, count=32, seed=0, shared=False, **changes):
    """``count`` prompts as NumPy arrays, with their functions; ``shared``: all of one function."""
    found = drawer(task, count, shared)(seed, settings(task, **changes))
    function = {name: np.asarray(x, np.float64) for name, x in found.pop("function").items()}
    return {**{name: np.asarray(value) for name, value in found.items()}, "function": function}


def member(task, function, i, x):
    """f_i(x) of one prompt."""
    if task.name == "seq_relu_2nn":
        hidden = np.maximum(x @ function["w1"][i], 0.0)
        return np.sqrt(2 / task.hidden) * (hidden @ function["w2"][i])
    return x @ function["w"][i]


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "seq_relu_2nn", "window": 2, "hidden": 16},
        {"name": "seq_rec_linear", "window": 4},
        {"name": "seq_rec_linear", "window": 1, "linear_init": "authors"},
        {"name": "seq_rec_linear", "window": 3, "linear_init": "orthogonal", "tie_window": True},
        {"name": "seq_linear", "linear_init": "authors"},
    ],
    ids=lambda fields: f"{fields['name']}-{fields.get('linear_init', '')}",
)
def test_sequences_are_their_recursion(fields):
    task = FunctionClass(dims=4, points=7, **fields)
    found = prompts(task, dims=3)
    functions = found["function"]
    xs, ys = found["xs"], found["ys"]
    np.testing.assert_array_equal(xs[:, 1:], ys[:, :-1])
    np.testing.assert_array_equal(found["labels"], ys)
    np.testing.assert_array_equal(found["inputs"][:, 0::2], xs)
    np.testing.assert_array_equal(found["inputs"][:, 1::2], ys)
    assert (xs[:, 0, 3] == 0).all() and (xs[:, 0, :3] != 0).all()
    for row in np.flatnonzero(found["dead"] == 0):
        function = {k: v[row] for k, v in functions.items()}
        for t in range(task.points):  # y_t from x_t, x_{t-1}, ... as far as they exist
            seen = xs[row, max(0, t + 1 - task.window) : t + 1][::-1].astype(np.float64)
            total = sum(member(task, function, i, x) for i, x in enumerate(seen))
            if task.normalised:
                total /= np.linalg.norm(total)
            np.testing.assert_allclose(ys[row, t], total, atol=2e-6 * max(1, abs(total).max()))
    if task.normalised:
        np.testing.assert_allclose(np.linalg.norm(ys, axis=-1), 1.0, atol=1e-6)
    if task.tie_window:
        np.testing.assert_array_equal(functions["w"][:, 0], functions["w"][:, 2])
    w = functions.get("w")
    if task.linear_init == "orthogonal":
        np.testing.assert_allclose(w[0, 0] @ w[0, 0].T, np.eye(4), atol=1e-6)
    if task.linear_init == "authors":
        np.testing.assert_allclose(w, np.swapaxes(w, -1, -2), atol=1e-5)  # E diag(l) E'
        assert task.name == "seq_linear" or abs(w).max() == 0.5


def test_each_place_of_the_window_has_its_own_function():
    task = FunctionClass(name="seq_relu_2nn", dims=4, points=5, window=2, hidden=16)
    functions = fc.draw_function(task, jax.random.key(0))
    first = jax.random.normal(jax.random.key(1), (4,))
    without = {**functions, "w2": functions["w2"].at[1].set(0.0)}
    _, ys, _ = fc.trajectory(task, functions, first)
    _, changed, _ = fc.trajectory(task, without, first)
    np.testing.assert_array_equal(ys[0], changed[0])  # x_2 has f_0 alone
    assert np.abs(ys[1] - changed[1]).max() > 1e-2


def test_dead_relus_are_found_and_left_out():
    """x_2 comes from h ReLUs of x_1 alone: all are dead with probability 2^-h, and 0/0 is NaN."""
    task = FunctionClass(name="seq_relu_2nn", dims=4, points=6, window=2, hidden=4)
    count = 2048
    found = prompts(task, count)
    functions = found.pop("function")
    hidden = np.einsum("nd,ndh->nh", found["xs"][:, 0].astype(np.float64), functions["w1"][:, 0])
    at_once = (hidden <= 0).all(-1)
    assert at_once.mean() == pytest.approx(1 / 16, rel=0.34)  # 4 deviations
    with np.errstate(invalid="ignore"):
        s = np.einsum("nh,nhd->nd", np.maximum(hidden, 0), functions["w2"][:, 0])
        unguarded = s / np.linalg.norm(s, axis=-1, keepdims=True)
    np.testing.assert_array_equal(np.isnan(unguarded).any(-1), at_once)

    dead = found["dead"] == 1
    assert dead[at_once].all() and all(np.isfinite(value).all() for value in found.values())
    assert (found["weights"][dead] == 0).all() and (found["weights"][~dead] == 1).all()
    np.testing.assert_allclose(np.linalg.norm(found["ys"][~dead], axis=-1), 1.0, atol=1e-5)
    # Wider networks die as much more rarely: with h = 16 in about one of 65,536 prompts.
    assert prompts(dataclasses.replace(task, hidden=16), 512)["dead"].sum() == 0


def test_independent_classes():
    def draw(name, **fields):
        task = FunctionClass(name=name, dims=5, points=8, **fields)
        found = prompts(task, 2000)
        np.testing.assert_array_equal(found["inputs"][:, 1::2, 0], found["ys"])
        assert (found["inputs"][:, 1::2, 1:] == 0).all()
        np.testing.assert_array_equal(found["labels"], found["ys"])
        return task, found, found["function"]

    variance = {"linear": 5, "sparse_linear": 3, "noisy_linear": 5, "quadratic": 5, "relu_2nn": 5}
    for name, expected in variance.items():
        _, found, function = draw(name)
        assert found["ys"].var() == pytest.approx(expected, rel=0.15), name
        x = found["xs"].astype(np.float64)
        if name in ("linear", "sparse_linear"):
            y = np.einsum("nid,nd->ni", x, function["w"])
            np.testing.assert_allclose(found["ys"], y, atol=1e-5)
        if name == "sparse_linear":
            assert ((function["w"] != 0).sum(-1) == 3).all()
        if name == "noisy_linear":
            y = np.einsum("nid,nd->ni", x, function["w"])
            noise = found["ys"] - np.sqrt(5 / 6) * y
            assert noise.var() == pytest.approx(5 / 6, rel=0.1)
    _, found, function = draw("classification")
    y = np.sign(np.einsum("nid,nd->ni", found["xs"], function["w"]))
    assert (found["ys"] == y).mean() > 0.999

    task, found, function = draw("tree", depth=3)
    assert found["ys"].var() == pytest.approx(1, rel=0.1)
    for row in range(20):
        for x, y in zip(found["xs"][row], found["ys"][row]):
            low, high, node = 0, 2**task.depth, 0
            while high - low > 1:  # halves the leaves
                right = x[int(function["coordinate"][row, node])] > 0
                low, high = ((low + high) // 2, high) if right else (low, (low + high) // 2)
                node = 2 * node + (2 if right else 1)
            assert y == pytest.approx(function["leaf"][row, low])


def test_a_pool_has_so_many_functions_and_none_of_them_is_new():
    task = FunctionClass(name="linear", dims=3, points=2, pool=4)
    pool = {tuple(w) for seed in (0, 1) for w in prompts(task, 64, seed)["function"]["w"]}
    assert len(pool) == 4
    new = dataclasses.replace(task, pool=0)
    fresh = [tuple(w) for seed in (0, 1) for w in prompts(new, 64, seed)["function"]["w"]]
    assert len(set(fresh)) == 128 and not pool & set(fresh)
    found = prompts(dataclasses.replace(new, points=4), shared=True)
    w = np.linalg.lstsq(found["xs"].reshape(-1, 3), found["ys"].ravel())[0]
    np.testing.assert_allclose(found["xs"] @ w, found["ys"], atol=1e-5)  # one function for all


@pytest.mark.parametrize("name", ["seq_rec_linear", "linear"])
def test_only_the_first_labels_are_randomised_and_no_target(name):
    task = FunctionClass(name=name, dims=3, points=6)
    clean = prompts(task)
    shown = {m: prompts(task, random_y=m) for m in (0, 2, 4)}
    for m, found in shown.items():
        for kept in ("labels", "xs", "ys", "weights", "queries"):
            np.testing.assert_array_equal(found[kept], clean[kept])
        same = found["inputs"] == clean["inputs"]
        assert same[:, 0::2].all() and same[:, 2 * m + 1 :: 2].all()
        width = 1 if name == "linear" else 3
        noise = found["inputs"][:, 1 : 2 * m : 2, :width]
        assert not same[:, 1 : 2 * m : 2, :width].any()
        assert ((noise >= 0) & (noise < 1)).all()
    # Paired: more of the same noise.
    np.testing.assert_array_equal(shown[4]["inputs"][:, :4], shown[2]["inputs"][:, :4])
    found = prompts(task, random_x=2)
    same = found["inputs"] == clean["inputs"]
    assert not same[:, 0:4:2].any() and same[:, 1::2].all() and same[:, 4:].all()
    assert prompts(task, random_x=6)["inputs"][:, 0::2].mean() == pytest.approx(0.5, abs=0.1)


NEAR = {"rtol": 1e-5, "atol": 1e-6}  # a normal number may be rounded anew where it is read


def test_queries():
    task = FunctionClass(name="linear", dims=4, points=6)

    def ask(query, task=task):
        found = prompts(dataclasses.replace(task, query=query))
        context = np.asarray(fc.interleave(jnp.asarray(found["xs"]), jnp.asarray(found["ys"])))
        for i in range(6):  # prompt i is the context with another x_i
            np.testing.assert_allclose(found["inputs"][:, i, 2 * i], found["queries"][:, i], **NEAR)
            others = np.arange(12) != 2 * i
            np.testing.assert_allclose(found["inputs"][:, i, others], context[:, others], **NEAR)
        return found["xs"], found["queries"], found

    x, q, found = ask("orthogonal")
    w = found["function"]["w"]
    np.testing.assert_allclose(found["labels"], np.einsum("nid,nd->ni", q, w), atol=1e-4)
    products = np.einsum("nid,njd->nij", q, x)
    assert abs(products[:, np.tri(6, k=-1, dtype=bool)[:, :]]).max() < 1e-4
    np.testing.assert_allclose(
        np.linalg.norm(q[:, :4], axis=-1), np.linalg.norm(x[:, :4], axis=-1), rtol=1e-4
    )
    assert (np.einsum("nid,nid->ni", q[:, :4], x[:, :4]) > 0).all()
    assert (found["weights"] == np.array([1, 1, 1, 1, 0, 0])).all()

    x, q, _ = ask("overlapping")
    for i in range(1, 6):
        assert np.isclose(q[:, i, None], x[:, :i], **NEAR).all(-1).any(-1).all()
    x, q, _ = ask("quadrants")
    assert (np.sign(x) == np.sign(x[:, :1])).all() and (np.sign(q) != np.sign(q[:, :1])).any()
    np.testing.assert_allclose(abs(x), abs(q), **NEAR)

    sequence = FunctionClass(name="seq_rec_linear", dims=4, points=6, window=2)
    x, q, found = ask("fresh", sequence)
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(x, prompts(sequence)["xs"])
    w = found["function"]["w"]
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    s = np.einsum("nid,nde->nie", q, w[:, 0]) + np.einsum("nid,nde->nie", before, w[:, 1])
    s /= np.linalg.norm(s, axis=-1, keepdims=True)
    np.testing.assert_allclose(found["labels"], s, atol=1e-5)


def test_inputs():
    task = FunctionClass(name="linear", dims=4, points=1000)
    for inputs, expected in (
        ("half_subspace", [0, 0, 2, 2]),
        ("skewed", 4 / (1 + 1 / 4 + 1 / 9 + 1 / 16) / np.array([16, 9, 4, 1])),
    ):
        x = jax.jit(fc._independent_inputs, static_argnums=0)(
            dataclasses.replace(task, inputs=inputs), jax.random.key(0), jnp.ones(4)
        )
        spectrum = np.linalg.eigvalsh(np.cov(np.asarray(x).T))
        np.testing.assert_allclose(spectrum, expected, rtol=0.2, atol=1e-5)
    plain = FunctionClass(name="linear", dims=4, points=6)
    scaled = prompts(dataclasses.replace(plain, scale_x=3.0, scale_y=0.5))
    np.testing.assert_allclose(scaled["xs"], 3 * prompts(plain)["xs"], rtol=1e-6)
    np.testing.assert_allclose(scaled["ys"], 1.5 * prompts(plain)["ys"], rtol=1e-4, atol=1e-5)


def test_the_curriculum_widens_and_lengthens():
    task = FunctionClass(name="linear", dims=20, points=41)
    schedule, end = Curriculum((5, 1), (11, 2), 2000), settings(task)
    for step, dims, points in ((0, 5, 11), (1999, 5, 11), (2000, 6, 13), (30_000, 20, 41)):
        now = schedule(end, jnp.int32(step))
        assert (int(now["dims"]), int(now["points"])) == (dims, points)
    now = schedule(end, jnp.int32(4000))
    found = draw_prompt(task, jax.random.split(jax.random.key(0)), now)
    assert (found["xs"][:, :7] != 0).all() and (found["xs"][:, 7:] == 0).all()
    np.testing.assert_array_equal(found["weights"], np.arange(41) < 15)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "seq_relu_2n"}, "did you mean 'seq_relu_2nn'"),
        ({"name": "seq_relu_2nn", "window": 5}, "takes 1 to 4"),
        ({"name": "linear", "window": 2}, "no other than 1"),
        ({"name": "linear", "query": "fresh"}, "fresh already"),
        ({"name": "seq_linear", "scale_x": 2.0}, "its own inputs"),
        ({"name": "sparse_linear", "sparsity": 4}, "sparsity=4 of dims=3"),
    ],
)
def test_classes_that_do_not_exist_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FunctionClass(**{"dims": 3, "points": 4, **fields})
