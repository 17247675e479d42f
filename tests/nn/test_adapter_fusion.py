"""Banks of adapters: scales, folding, attention over sources, averages; against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.nn import adapter_fusion as af

SITES, SOURCES, FEATURES, WIDTH = 3, 4, 6, 2


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def adapter(seed):
    zero = af.init_adapter(jax.random.key(0), SITES, FEATURES, WIDTH)
    return jax.tree.map(lambda x: draw(seed + x.ndim * 10 + x.shape[1], *x.shape), zero)


ADAPTERS = [adapter(100 * s) for s in range(SOURCES)]
BANK = af.stack_adapters(ADAPTERS)
V = draw(7, 2, 5, FEATURES)


def plain(adapter, v, site):
    """Pfeiffer's bottleneck as its definition reads, in NumPy."""
    down, up = adapter["down"], adapter["up"]
    inner = np.asarray(v) @ np.asarray(down["kernel"][site]) + np.asarray(down["bias"][site])
    return np.maximum(inner, 0) @ np.asarray(up["kernel"][site]) + np.asarray(up["bias"][site])


def scales(variant, seed=3):
    return draw(seed, *af.scale_shape(variant, SITES, SOURCES, FEATURES))


def everywhere(scales):
    return jnp.broadcast_to(scales, (SITES, *scales.shape[1:]))


@jax.jit
def combined(bank, scales, v):
    """The scaled sums of all sites, [L, ..., d]."""
    one = jax.vmap(af.scaled_sum, in_axes=(0, 0, None))
    return one(bank, jnp.broadcast_to(scales, (SITES, *scales.shape[1:])), v)


def test_a_bank_is_the_loop_over_its_adapters():
    for site in range(SITES):
        outputs = af.source_outputs(af.at_site(BANK, site), V)
        expected = np.stack([plain(a, V, site) for a in ADAPTERS], axis=-2)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
    other = af.init_adapter(jax.random.key(0), SITES, FEATURES, WIDTH + 1)
    with pytest.raises(ValueError, match="all of one shape"):
        af.stack_adapters([ADAPTERS[0], other])


@pytest.mark.parametrize("variant", af.VARIANTS)
def test_contracted_and_materialised_forms_agree_in_value_and_gradient(variant):
    w, weight = scales(variant), draw(9, SITES, *V.shape)

    def materialised(w):
        every = jax.vmap(af.source_outputs, in_axes=(0, None))(BANK, V)
        return jnp.einsum("l...nd,lnd->l...d", every, everywhere(w) * jnp.ones(FEATURES))

    np.testing.assert_allclose(combined(BANK, w, V), materialised(w), atol=1e-5)
    gradients = [
        jax.grad(lambda w, f=f: jnp.sum(weight * jnp.sin(f(w))))(w)
        for f in (lambda w: combined(BANK, w, V), materialised)
    ]
    np.testing.assert_allclose(*gradients, atol=2e-4)


@pytest.mark.parametrize("variant", af.VARIANTS)
def test_one_source_no_source_and_all_sources(variant):
    w = scales(variant)
    one_hot = jnp.zeros_like(w).at[:, 2].set(1.0)
    expected = np.stack([plain(ADAPTERS[2], V, site) for site in range(SITES)])
    np.testing.assert_allclose(combined(BANK, one_hot, V), expected, atol=1e-5)
    assert not np.any(combined(BANK, jnp.zeros_like(w), V))
    # Linear in the scales; nothing makes them sum to anything.
    np.testing.assert_allclose(
        combined(BANK, 3 * w, V), 3 * combined(BANK, w, V), atol=1e-4, rtol=1e-5
    )
    order = np.array([2, 0, 3, 1])
    moved = jax.tree.map(lambda x: x[:, order], BANK)
    np.testing.assert_allclose(
        combined(moved, w[:, order], V), combined(BANK, w, V), atol=1e-5
    )  # fmt: skip


@pytest.mark.parametrize("variant", af.VARIANTS)
def test_folded_scales_are_one_wide_adapter(variant):
    folded = af.fold(BANK, scales(variant))
    assert folded["down"]["kernel"].shape == (SITES, FEATURES, SOURCES * WIDTH)
    expected = np.stack([plain(folded, V, site) for site in range(SITES)])
    np.testing.assert_allclose(combined(BANK, scales(variant), V), expected, atol=1e-5)


def test_no_tensor_of_all_outputs_and_two_products_whatever_the_number_of_sources():
    def shapes(sources):
        bank = jax.tree.map(lambda x: jnp.repeat(x[0, :1], sources, axis=0), BANK)
        jaxpr = jax.make_jaxpr(af.scaled_sum)(bank, jnp.ones((sources, FEATURES)), V)
        products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        return len(products), {v.aval.shape for e in jaxpr.eqns for v in e.outvars}

    for sources in (3, 11):
        products, seen = shapes(sources)
        assert products == 2 and (2, 5, sources, WIDTH) in seen
        assert (2, 5, sources, FEATURES) not in seen


def test_scales_start_with_a_sum_of_two_and_only_the_ablations_keep_one():
    for variant in af.VARIANTS:
        w = af.init_scales(jax.random.key(1), variant, 12, 8, 16)
        assert w.shape == af.scale_shape(variant, 12, 8, 16)
        w = np.asarray(w)
        np.testing.assert_allclose(w, 2 / 8, atol=6e-3)
        assert w.std() > 2e-4
        np.testing.assert_allclose(w.sum(axis=1), 2.0, atol=2e-2)
    w = scales("scalearn")
    for name in ("mean", "softmax"):
        normal = np.asarray(af.normalise_scales(w, name))
        np.testing.assert_allclose(normal.sum(axis=1), 1.0, atol=1e-4)
        assert np.all(normal > 0) == (name == "softmax")
    assert af.normalise_scales(w, "none") is w
    with pytest.raises(ValueError, match="choose one of none, mean, softmax"):
        af.normalise_scales(w, "simplex")
    with pytest.raises(ValueError, match="uniform"):
        af.scale_shape("unifrom", 1, 1, 1)


@pytest.mark.parametrize("shared, own", [("scalearn++", "scalearn"), ("uniform++", "uniform")])
def test_the_gradient_of_shared_scales_is_the_sum_over_sites(shared, own):
    w = scales(shared)

    def loss(w):
        return jnp.sum(jnp.sin(combined(BANK, w, V)))

    each = jax.grad(loss)(everywhere(w))
    assert each.shape == af.scale_shape(own, SITES, SOURCES, FEATURES)
    np.testing.assert_allclose(jax.grad(loss)(w)[0], each.sum(axis=0), rtol=1e-4, atol=1e-4)


def test_gradient_descent_reaches_least_squares_and_the_simplex_cannot():
    """One site, no norm, a linear head: the uniform scales are a linear regression."""
    bank, head, v = af.at_site(BANK, 0), draw(1, FEATURES, 3), draw(2, 40, FEATURES)
    truth = jnp.array([1.5, 0.7, -0.5, 0.0])[:, None]
    target = af.scaled_sum(bank, truth, v) @ head
    noisy = target + 0.3 * draw(4, *target.shape)

    def loss(w, target, normalisation):
        w = af.normalise_scales(w, normalisation)
        return jnp.mean(jnp.square(af.scaled_sum(bank, w, v) @ head - target))

    def descend(target, normalisation, rate, steps=4000):
        gradient = jax.grad(loss)
        start = af.init_scales(jax.random.key(0), "uniform", 1, SOURCES, FEATURES)[0]
        return jax.lax.fori_loop(
            0, steps, lambda _, w: w - rate * gradient(w, target, normalisation), start
        )

    design = np.einsum("bnd,dc->bcn", af.source_outputs(bank, v), head).reshape(-1, SOURCES)
    best = np.linalg.lstsq(design, np.asarray(noisy).ravel(), rcond=None)[0]
    largest = np.linalg.eigvalsh(2 * design.T @ design / len(design))[-1]
    learned = descend(noisy, "none", 1 / largest)
    np.testing.assert_allclose(learned[:, 0], best, atol=1e-3)
    exact = descend(target, "none", 1 / largest)[:, 0]
    np.testing.assert_allclose(exact[1:3] / exact[0], [0.7 / 1.5, -0.5 / 1.5], rtol=0.1)
    simplex = descend(target, "softmax", 1 / largest)
    assert loss(simplex, target, "softmax") > 0.1 * jnp.mean(jnp.square(target))
    assert loss(descend(target, "none", 1 / largest), target, "none") < 1e-6


# -- AdapterFusion ------------------------------------------------------------------------------


def test_fusion_is_its_definition():
    fusion = jax.tree.map(
        lambda x: draw(x.ndim, *x.shape), af.init_fusion(jax.random.key(0), SITES, FEATURES)
    )
    site = 1
    got = af.fused(af.at_site(BANK, site), af.at_site(fusion, site), V)
    e = np.stack([plain(a, V, site) for a in ADAPTERS], axis=2).astype(np.float64)
    w = jax.tree.map(lambda x: np.asarray(x[site], np.float64), fusion)
    query = np.asarray(V) @ w["query"]["kernel"] + w["query"]["bias"]
    key = e @ w["key"]["kernel"] + w["key"]["bias"]
    scores = np.squeeze(query[:, :, None, :] @ np.swapaxes(key, -1, -2), axis=2)  # not scaled
    a = np.exp(scores - scores.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    expected = np.squeeze(a[:, :, None, :] @ (e @ w["value"]["kernel"]), axis=2)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    static = {name: w[name] for name in ("query", "key")}
    expected = np.squeeze(a[:, :, None, :] @ e, axis=2)
    got = af.fused(af.at_site(BANK, site), static, V)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_fusion_starts_near_the_mean_and_its_penalty_at_zero():
    fusion = af.init_fusion(jax.random.key(0), SITES, FEATURES)
    bank, at = af.at_site(BANK, 0), af.at_site(fusion, 0)
    outputs = af.source_outputs(bank, V)
    assert np.abs(af.fusion_weights(outputs, at, V) - 1 / SOURCES).max() < 0.05
    np.testing.assert_allclose(af.fused(bank, at, V), outputs.mean(axis=-2), atol=0.25)
    assert float(af.fusion_penalty(fusion)) < 1e-9
    identity = {**fusion, "value": {"kernel": jnp.broadcast_to(jnp.eye(6), (SITES, 6, 6))}}
    assert not np.any(jax.grad(af.fusion_penalty)(identity)["value"]["kernel"])
    doubled = jax.tree.map(lambda x: 2 * x, identity)
    assert float(af.fusion_penalty(doubled)) == SITES * FEATURES
    assert float(af.fusion_penalty(af.init_fusion(jax.random.key(0), 3, 6, value=False))) == 0
    zeros = af.fusion_weights(outputs, at, V, dropout=lambda scores: 0 * scores)
    np.testing.assert_allclose(zeros, 1 / SOURCES)  # dropout is before the softmax


# -- averages and counts ------------------------------------------------------------------------


def test_soup_averages_weights_of_the_most_similar():
    weights = af.soup_weights(jnp.array([0.6, -0.5, 0.1, 0.2]), top=2)
    np.testing.assert_allclose(weights, [0.75, 0, 0, 0.25], rtol=1e-6)
    np.testing.assert_allclose(
        af.soup_weights(jnp.array([0.5, -0.5, -0.1, 0.0]), top=3), [1, 0, 0, 0]
    )
    with pytest.raises(ValueError, match="no source resembles"):
        af.soup_weights(jnp.array([-0.1, 0.0]))
    soup = af.average_adapters(BANK, weights)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, ADAPTERS[0], ADAPTERS[3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), soup, expected)
    # An average of weights is no average of outputs: between them is a ReLU.
    outputs = 0.75 * plain(ADAPTERS[0], V, 0) + 0.25 * plain(ADAPTERS[3], V, 0)
    assert np.abs(plain(soup, V, 0) - outputs).max() > 0.1


def test_published_parameter_counts():
    counts = af.transfer_parameters(12, 8, 768)
    assert {name: counts[name] for name in af.VARIANTS} == {
        "scalearn": 73_728, "uniform": 96, "scalearn++": 6_144, "uniform++": 8,
    }  # fmt: skip
    assert counts["fusion"] == 3 * 768**2 * 12 + 2 * 768 * 12
    assert counts["fusion"] - counts["static fusion"] == 768**2 * 12
    assert round(100 * counts["scalearn"] / (3 * 768**2 * 12), 2) == 0.35
