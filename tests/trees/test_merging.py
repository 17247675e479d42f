"""Every merging method against a plain NumPy reading of its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees

RNG = np.random.default_rng(0)
KEY = jax.random.key(7)
SHAPES = {"first": {"kernel": (6, 5), "bias": (5,)}, "scale": (), "last": {"kernel": (3, 4, 2)}}


def random_tree():
    return jax.tree.map(
        lambda s: RNG.normal(size=s).astype(np.float32), SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip


BASE = random_tree()
MODELS = [jax.tree.map(lambda b, d: b + 0.1 * d, BASE, random_tree()) for _ in range(3)]
WEIGHT = [0.5, 1.0, -0.25]
FISHERS = [jax.tree.map(np.square, random_tree()) for _ in MODELS]
INPUTS = [RNG.normal(size=(20, 6)).astype(np.float32) for _ in MODELS]
GRAMS = [{"first": {"kernel": x.T @ x, "bias": None}, "scale": None, "last": {"kernel": None}}
         for x in INPUTS]  # fmt: skip


def by_leaf(function):
    """Applies ``function(path, base, models)`` to float64 leaves, one after the other."""

    def leaf(path, base, *models):
        return function(path, np.float64(base), [np.float64(m) for m in models])

    return trees.map_with_path(leaf, BASE, *MODELS)


def close(a, b, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=atol), a, b)


# --- NumPy readings -----------------------------------------------------------------------------


def numpy_elect(base, deltas, weight, lambda_, normalize):
    out = np.zeros_like(base)
    flat = [np.ravel(w * d) for w, d in zip(weight, deltas)]
    for i in range(base.size):  # Coordinate by coordinate.
        values = [(v[i], w) for v, w in zip(flat, weight)]
        sign = 1.0 if sum(v for v, _ in values) >= 0 else -1.0
        agree = [(v, w) for v, w in values if np.sign(v) == sign]
        total, divisor = sum(v for v, _ in agree), sum(w for _, w in agree)
        out.reshape(-1)[i] = total / (divisor or 1.0) if normalize else total
    return base + lambda_ * out


def numpy_trim(delta, density, everything=None):
    values = np.sort(np.abs(delta if everything is None else everything).ravel())[::-1]
    smallest = values[max(1, int(density * values.size)) - 1]
    return np.where(np.abs(delta) >= smallest, delta, 0)


def numpy_ties(scope):
    density, lambda_ = 0.3, 0.9
    vectors = [jax.tree.map(lambda b, m: np.float64(m) - b, BASE, t) for t in MODELS]
    whole = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(v)]) for v in vectors]

    def leaf(path, base, models):
        deltas = [
            numpy_trim(m - base, density, everything=whole[i] if scope == "global" else None)
            for i, m in enumerate(models)
        ]
        return numpy_elect(base, deltas, WEIGHT, lambda_, normalize=True)

    return by_leaf(leaf)


def uniform(path, i, shape):
    """The random numbers of model i at a leaf."""
    return np.asarray(jax.random.uniform(jax.random.fold_in(trees.leaf_key(KEY, path), i), shape))


def numpy_dare(path, base, models, density, elect):
    deltas = [
        np.where(uniform(path, i, base.shape) < density, m - base, 0) / density
        for i, m in enumerate(models)
    ]
    if elect:
        return numpy_elect(base, deltas, WEIGHT, 1.0, normalize=False)
    return base + sum(w * d for w, d in zip(WEIGHT, deltas))


def numpy_breadcrumbs(path, base, models, density=0.6, gamma=0.2):
    total = np.zeros_like(base)
    for w, m in zip(WEIGHT, models):
        delta = (m - base).ravel()
        order = np.argsort(np.abs(delta))
        kept, top = max(1, int(density * delta.size)), int(gamma * delta.size)
        first = max(0, delta.size - kept - top)
        mask = np.zeros(delta.size)
        mask[order[first : first + kept]] = 1
        total += w * (delta * mask).reshape(base.shape)
    return base + total


def numpy_della(path, base, models, density=0.6, epsilon=0.2):
    deltas = []
    for i, m in enumerate(models):
        rows = np.atleast_2d(m - base).reshape(-1, base.shape[-1] if base.ndim else 1)
        stays = np.full(rows.shape, density)
        for r, row in enumerate(rows):
            if row.size > 1:
                rank = np.empty(row.size)
                rank[np.argsort(np.abs(row))] = np.arange(row.size)
                stays[r] = density - epsilon + 2 * epsilon * rank / (row.size - 1)
        stays = stays.reshape(base.shape)
        deltas.append(np.where(uniform(path, i, base.shape) < stays, m - base, 0) / stays)
    return numpy_elect(base, deltas, [1.0] * 3, 1.0, normalize=True)


def numpy_slerp(a, b, t):
    cosine = np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def leaf_at(tree, path):
    return dict(zip(trees.paths(tree), jax.tree.leaves(tree))).get(path)


def numpy_fisher(path, base, models):
    fishers = [np.maximum(leaf_at(f, path), 1e-6) for f in FISHERS]
    return sum(f * m for f, m in zip(fishers, models)) / sum(fishers)


def numpy_regmean(path, base, models, alpha=0.8):
    if path != "first/kernel":
        return sum(models) / 3
    grams = []
    for x in INPUTS:
        gram = np.float64(x.T @ x)
        grams.append(alpha * gram + (1 - alpha) * np.diag(np.diag(gram)))
    return np.linalg.inv(sum(grams)) @ sum(g @ m for g, m in zip(grams, models))


def numpy_delta_guided(path, base, models, granularity="row", p=1.0):
    deltas = [m - base for m in models]
    if granularity == "element":
        sizes = [np.abs(d) for d in deltas]
    elif granularity == "row" and base.ndim:
        sizes = [np.sqrt(np.sum(d**2, -1, keepdims=True)) for d in deltas]
    else:
        sizes = [np.sqrt(np.sum(d**2)) for d in deltas]
    total = sum(s**p for s in sizes)
    return base + sum(s**p / total * d for s, d in zip(sizes, deltas))


def numpy_model_stock(path, base, models):
    deltas = [np.ravel(m - base) for m in models]
    cosines = [
        deltas[i] @ deltas[j] / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j])
        for i in range(3) for j in range(i + 1, 3)
    ]  # fmt: skip
    c = np.mean(cosines)
    t = 3 * c / (1 + 2 * c)
    return t * sum(models) / 3 + (1 - t) * base


CASES = {
    "soup": ({}, lambda: by_leaf(lambda _, b, ms: sum(ms) / 3)),
    "soup weighted": (
        {"weight": WEIGHT},
        lambda: by_leaf(lambda _, b, ms: sum(w * m for w, m in zip(WEIGHT, ms)) / sum(WEIGHT)),
    ),
    "task_arithmetic": (
        {"weight": WEIGHT, "lambda": 0.7},
        lambda: by_leaf(lambda _, b, ms: b + 0.7 * sum(w * (m - b) for w, m in zip(WEIGHT, ms))),
    ),
    "ties global": (
        {"weight": WEIGHT, "density": 0.3, "lambda": 0.9}, lambda: numpy_ties("global")
    ),
    "ties leaf": (
        {"weight": WEIGHT, "density": 0.3, "lambda": 0.9, "scope": "leaf"},
        lambda: numpy_ties("leaf"),
    ),
    "dare_linear": (
        {"weight": WEIGHT, "density": 0.4, "key": KEY},
        lambda: by_leaf(lambda p, b, ms: numpy_dare(p, b, ms, 0.4, elect=False)),
    ),
    "dare_ties": (
        {"weight": WEIGHT, "density": 0.4, "key": KEY},
        lambda: by_leaf(lambda p, b, ms: numpy_dare(p, b, ms, 0.4, elect=True)),
    ),
    "breadcrumbs": (
        {"weight": WEIGHT, "density": 0.6, "gamma": 0.2}, lambda: by_leaf(numpy_breadcrumbs)
    ),
    "della": ({"density": 0.6, "epsilon": 0.2, "key": KEY}, lambda: by_leaf(numpy_della)),
    "fisher": ({"fishers": FISHERS}, lambda: by_leaf(numpy_fisher)),
    "regmean": ({"grams": GRAMS, "alpha": 0.8}, lambda: by_leaf(numpy_regmean)),
    "delta_guided": ({}, lambda: by_leaf(numpy_delta_guided)),
    "delta_guided tensor": (
        {"granularity": "tensor", "p": 2.0},
        lambda: by_leaf(lambda p, b, ms: numpy_delta_guided(p, b, ms, "tensor", 2.0)),
    ),
    "delta_guided inverse element": (
        {"granularity": "element", "p": -1.0},
        lambda: by_leaf(lambda p, b, ms: numpy_delta_guided(p, b, ms, "element", -1.0)),
    ),
    "model_stock": ({}, lambda: by_leaf(numpy_model_stock)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_numpy_reading(case):
    options, reference = CASES[case]
    method, expected = case.split()[0], reference()
    atol = 1e-5 if method == "regmean" else 1e-6  # A float32 solve against a float64 one.
    merged = trees.merge(BASE, MODELS, method, **options)
    close(merged, expected, atol)
    close(
        jax.jit(lambda b, ms: trees.merge(b, ms, method, **options))(BASE, MODELS), expected, atol
    )
    vectors = [trees.task_vector(m, BASE) for m in MODELS]
    close(trees.merge(BASE, vectors, method, vectors=True, **options), expected, atol)


@pytest.mark.parametrize("case", CASES)
def test_one_tensor_at_a_time_gives_the_same_bits(case):
    options, _ = CASES[case]
    method = case.split()[0]
    merged = trees.merge(BASE, MODELS, method, **options)
    if case == "ties global":
        deltas = [trees.task_vector(m, BASE) for m in MODELS]
        flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(d)]) for d in deltas]
        kept = int(0.3 * flat[0].size)
        options = {**options, "threshold": jnp.stack([np.sort(np.abs(f))[-kept] for f in flat])}
    for path, base, *models in zip(
        trees.paths(BASE), *(jax.tree.leaves(t) for t in (BASE, *MODELS))
    ):
        own = {name: [leaf_at(t, path) for t in value] if name in ("fishers", "grams") else value
               for name, value in options.items()}  # fmt: skip
        dotted = path.replace("/", ".")  # As a checkpoint file names it.
        alone = trees.merge_leaf(dotted, base, models, method, **own)
        np.testing.assert_array_equal(alone, leaf_at(merged, path))


def test_slerp_and_lerp():
    expected = by_leaf(lambda _, b, ms: numpy_slerp(b, ms[0], 0.3))
    close(trees.merge(BASE, MODELS[:1], "slerp", t=0.3), expected)
    between = by_leaf(lambda _, b, ms: numpy_slerp(ms[0], ms[1], 0.3))
    close(trees.merge(None, MODELS[:2], "slerp", t=0.3), between)
    close(trees.merge(BASE, MODELS[:1], "lerp", t=0.3), trees.lerp(BASE, MODELS[0], 0.3))
    with pytest.raises(ValueError, match="two models without a base"):
        trees.merge(BASE, MODELS, "slerp", t=0.5)


def test_greedy_soup_adds_what_helps():
    target = trees.weighted_sum([MODELS[0], MODELS[2]], [0.5, 0.5])

    def score(model):
        return -float(trees.norm(trees.sub(model, target)))

    soup = trees.merge(None, MODELS, "greedy_soup", score=score)
    best = max(score(m) for m in MODELS)
    assert score(soup) >= best
    close(soup, target, atol=1e-5)


def test_options_per_path_group():
    merged = trees.merge(
        BASE, MODELS, "task_arithmetic", weight={"first": [1.0, 0.0, 0.0], ".*": 0.0}
    )
    close(merged["first"], MODELS[0]["first"])
    close(merged["last"], BASE["last"])
    sparse = trees.merge(BASE, MODELS[:1], "ties", scope="leaf", density={"kernel": 0.5, ".*": 1.0})
    changed = np.asarray(sparse["first"]["kernel"]) != BASE["first"]["kernel"]
    assert changed.sum() == 15


# --- Properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "row", "element"])
def test_delta_guided_rules(granularity):
    def merge(models, **options):
        return trees.merge(BASE, models, "delta_guided", granularity=granularity, **options)

    close(merge(MODELS[:1]), MODELS[0])
    close(merge([MODELS[0]] * 3), MODELS[0])
    close(merge(MODELS[::-1]), merge(MODELS))
    close(merge(MODELS, p=0.0), trees.merge(None, MODELS, "soup"))
    close(merge([MODELS[0], BASE]), MODELS[0])  # No change, no weight.
    close(merge([MODELS[0], BASE], p=-1.0), BASE)
    opposite = jax.tree.map(lambda b, m: 2 * b - m, BASE, MODELS[0])
    close(merge([MODELS[0], opposite]), BASE)
    close(merge([BASE, BASE]), BASE)


def test_ends_and_fixed_points():
    close(trees.merge(BASE, MODELS, "task_arithmetic", weight=0.0), BASE)
    cases = {
        "soup": {},
        "ties": {"density": 1.0},
        "model_stock": {},
        "fisher": {"fishers": FISHERS},
        "regmean": {"grams": GRAMS},
        "breadcrumbs": {"density": 1.0, "weight": [0.2, 0.3, 0.5]},
        "dare_linear": {"density": 1.0, "key": KEY, "normalize": True},
    }
    for method, options in cases.items():
        close(trees.merge(BASE, [MODELS[0]] * 3, method, **options), MODELS[0], atol=2e-5)


def test_random_dropping_is_unbiased():
    base, model = {"w": jnp.zeros(20000)}, {"w": jnp.ones(20000)}
    for method in ("dare_linear", "della"):
        extra = {"normalize": False} if method == "della" else {}
        merged = trees.merge(base, [model], method, density=0.3, key=KEY, **extra)["w"]
        assert float(merged.mean()) == pytest.approx(1, abs=0.05)
    assert float((merged == 0).mean()) == pytest.approx(0.7, abs=0.02)


def test_regmean_solves_the_regression():
    # The merged kernel minimises the summed squared distance to what the models output.
    merged = trees.merge(None, MODELS, "regmean", grams=GRAMS, alpha=1.0)["first"]["kernel"]
    x = np.concatenate(INPUTS)
    y = np.concatenate([i @ m["first"]["kernel"] for i, m in zip(INPUTS, MODELS)])
    np.testing.assert_allclose(merged, np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-4)


def test_regmean_averages_rows_of_unused_inputs():
    gram = np.diag([1.0, 0.0]).astype(np.float32)
    merged = trees.merge(
        None, [{"w": jnp.ones((2, 3))}, {"w": 3 * jnp.ones((2, 3))}], "regmean",
        grams=[{"w": gram}, {"w": 3 * gram}],
    )["w"]  # fmt: skip
    np.testing.assert_allclose(merged, [[2.5] * 3, [2.0] * 3])


def test_bfloat16_is_merged_in_float32():
    narrow = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), t) for t in (BASE, *MODELS)]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in narrow]
    for method, options in [("soup", {}), ("ties", {}), ("della", {"density": 0.5, "key": KEY})]:
        merged = trees.merge(narrow[0], narrow[1:], method, **options)
        expected = trees.merge(wide[0], wide[1:], method, **options)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(merged))
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), merged, expected
        )


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "slerp", "model_stock"])
def test_shardings_are_kept_and_do_not_matter(method):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "model"))
    kernels = [{"w": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)} for _ in range(3)]
    options = {"dare_ties": {"density": 0.5, "key": KEY}, "slerp": {"t": 0.4}}.get(method, {})
    num = 1 if method == "slerp" else 2
    expected = trees.merge(kernels[0], kernels[1 : 1 + num], method, **options)
    sharded = [jax.device_put(k, sharding) for k in kernels]
    merged = trees.merge(sharded[0], sharded[1 : 1 + num], method, **options)
    close(merged, expected)
    assert merged["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize(
    "args, options, message",
    [
        (("tie",), {}, "ties"),
        (("ties",), {"densty": 0.2}, "density"),
        (("ties",), {"density": 1.2}, "fractions"),
        (("ties",), {"scope": "globl"}, "global"),
        (("ties",), {"density": {"kernel": 0.5, ".*": 1.0}}, "scope='leaf'"),
        (("dare_linear",), {"density": 0.5}, "key"),
        (("della",), {"density": 0.1, "key": KEY}, "epsilon"),
        (("soup",), {"weight": [1.0, 2.0]}, "3 values"),
        (("slerp",), {}, "t=..."),
        (("greedy_soup",), {}, "score"),
        (("regmean",), {"grams": GRAMS[:2]}, "list of 3"),
        (("fisher",), {"fishers": GRAMS}, "last/kernel|first/bias"),
        (("task_arithmetic",), {"weight": {"nothing": 1.0, ".*": 0.0}}, "'nothing'"),
    ],
)
def test_mistakes_are_explained(args, options, message):
    with pytest.raises(ValueError, match=message):
        trees.merge(BASE, MODELS, *args, **options)


def test_trees_must_agree_and_bases_exist():
    with pytest.raises(ValueError, match="'scale'"):
        trees.merge(BASE, [{k: v for k, v in MODELS[0].items() if k != "scale"}], "soup")
    with pytest.raises(ValueError, match="needs a base"):
        trees.merge(None, MODELS, "ties")
    with pytest.raises(ValueError, match="at least one"):
        trees.merge(BASE, [], "soup")
    with pytest.raises(ValueError, match="threshold"):
        trees.merge_leaf("w", jnp.ones(2), [jnp.ones(2)], "ties")
    with pytest.raises(ValueError, match="whole models"):
        trees.merge_leaf("w", jnp.ones(2), [jnp.ones(2)], "greedy_soup")
