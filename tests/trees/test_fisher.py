"""Fisher information against closed forms, loops of single examples and curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from transfer_jax import trees
from transfer_jax.trees import fisher

N, D, K = 37, 5, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = RNG.integers(0, K, N)
DATA = {"inputs": X, "labels": Y}
KEY = jax.random.key(0)


def linear(params, batch):
    return batch["inputs"] @ params["w"] + params["b"]


def network(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["w1"] + params["b1"])
    return hidden @ params["w2"]


def loss_of(logits):
    def loss(params, batch):
        log_probs = jax.nn.log_softmax(logits(params, batch))
        return -jnp.take_along_axis(log_probs, batch["labels"][:, None], 1)[:, 0]

    return loss


linear_loss, network_loss = loss_of(linear), loss_of(network)
LINEAR = {"w": jax.random.normal(KEY, (D, K)), "b": jnp.array([0.5, 0.0, -1.0])}
NETWORK = {
    "w1": jax.random.normal(KEY, (D, 4)),
    "b1": jnp.full(4, 0.1),
    "w2": jax.random.normal(jax.random.key(1), (4, K)),
}


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def rows(data, start, stop):
    return jax.tree.map(lambda x: x[start:stop], data)


def cut(data, size):
    return [rows(data, i, i + size) for i in range(0, len(data["inputs"]), size)]


# --- Closed forms -------------------------------------------------------------------------------


def test_exact_equals_the_closed_form_of_softmax_regression():
    p = np.asarray(jax.nn.softmax(linear(LINEAR, DATA)), np.float64)
    weights = np.einsum("ni,nk->ik", X.astype(np.float64) ** 2, p * (1 - p)) / N
    fisher = trees.fisher_diagonal(linear, LINEAR, DATA)
    close(fisher, {"w": weights, "b": (p * (1 - p)).mean(0)}, atol=1e-6, rtol=1e-6)


def test_exact_at_zero_weights():
    zero = jax.tree.map(jnp.zeros_like, LINEAR)
    fisher = trees.fisher_diagonal(linear, zero, DATA)
    expected = np.tile(((X**2).mean(0) / K * (1 - 1 / K))[:, None], (1, K))
    close(fisher["w"], expected, rtol=1e-6)


def test_exact_equals_the_closed_form_of_binary_logistic_regression():
    logits = lambda w, x: jnp.stack([jnp.zeros(len(x)), x @ w], -1)  # noqa: E731
    w = jnp.arange(D) / D
    p = np.asarray(jax.nn.sigmoid(X @ w))
    expected = (X**2 * (p * (1 - p))[:, None]).mean(0)
    close(trees.fisher_diagonal(logits, w, X), expected, rtol=1e-6)


def test_exact_equals_the_closed_form_of_linear_gaussian_models():
    fisher = trees.fisher_diagonal(linear, LINEAR, DATA, likelihood="gaussian")
    expected = np.tile((X**2).mean(0)[:, None], (1, K))
    close(fisher, {"w": expected, "b": np.ones(K)}, rtol=1e-6)


def test_exact_equals_gauss_newton_and_the_expected_hessian():
    flat, unravel = ravel_pytree(NETWORK)
    log_probs = lambda v: jax.nn.log_softmax(network(unravel(v), DATA))  # noqa: E731
    jacobian = jax.jacobian(lambda v: network(unravel(v), DATA))(flat)  # [N, K, P]
    p = jnp.exp(log_probs(flat))
    middle = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    gauss_newton = jnp.einsum("nkp,nkl,nlp->p", jacobian, middle, jacobian) / N
    hessian = jax.hessian(lambda v: jnp.sum(p * log_probs(v)))(flat)  # The labels' law is fixed.
    fisher, _ = ravel_pytree(trees.fisher_diagonal(network, NETWORK, DATA))
    close(fisher, gauss_newton, rtol=1e-4)
    # Where the model is linear in the parameter, the expected Hessian is minus the same.
    last = slice(flat.size - NETWORK["w2"].size, None)
    close(fisher[last], -jnp.diag(hessian)[last] / N, rtol=1e-4)


def test_monte_carlo_converges_at_the_square_root_rate():
    exact = trees.fisher_diagonal(linear, LINEAR, DATA)["w"]

    def error(num_samples, key):
        estimate = trees.fisher_diagonal(
            linear, LINEAR, DATA, kind="mc", num_samples=num_samples, key=key
        )
        return float(jnp.sqrt(jnp.mean((estimate["w"] - exact) ** 2)))

    keys = jax.random.split(KEY, 6)
    few, many = (np.mean([error(n, k) for k in keys]) for n in (16, 1024))
    assert few / many == pytest.approx(8, rel=0.35)


def test_monte_carlo_gaussian_is_near_exact():
    estimate = trees.fisher_diagonal(
        linear, LINEAR, DATA, kind="mc", likelihood="gaussian", num_samples=2000, key=KEY
    )
    exact = trees.fisher_diagonal(linear, LINEAR, DATA, likelihood="gaussian")
    close(estimate, exact, rtol=0.1)


def test_empirical_equals_a_loop_over_examples():
    total = jax.tree.map(jnp.zeros_like, NETWORK)
    gradient = jax.jit(jax.grad(lambda p, b: network_loss(p, b)[0]))
    for i in range(N):
        g = gradient(NETWORK, rows(DATA, i, i + 1))
        total = jax.tree.map(lambda t, g: t + g**2 / N, total, g)
    close(trees.fisher_diagonal(network_loss, NETWORK, DATA, kind="empirical"), total)


def test_argmax_is_empirical_with_the_predicted_labels():
    predicted = {**DATA, "labels": np.asarray(jnp.argmax(network(NETWORK, DATA), -1))}
    expected = trees.fisher_diagonal(network_loss, NETWORK, predicted, kind="empirical")
    close(trees.fisher_diagonal(network, NETWORK, DATA, kind="argmax"), expected)


def test_label_prob_is_one_term_of_exact():
    p = jax.nn.softmax(network(NETWORK, DATA))
    every = [
        trees.fisher_diagonal(
            network_loss, NETWORK, {"inputs": X, "labels": np.full(N, k)}, kind="label_prob"
        )
        for k in range(K)
    ]
    close(trees.weighted_sum(every, [1.0] * K), trees.fisher_diagonal(network, NETWORK, DATA))
    single = {"inputs": X[:1], "labels": np.array([1])}
    one = trees.fisher_diagonal(network_loss, NETWORK, single, kind="label_prob")
    empirical = trees.fisher_diagonal(network_loss, NETWORK, single, kind="empirical")
    close(one, trees.scale(empirical, float(p[0, 1])))


def test_independent_tokens_add_up():
    def tokens(params, batch):  # [B, T, K]
        return batch["inputs"] @ params["w"]

    params = {"w": LINEAR["w"]}
    sequences = {"inputs": X[:36].reshape(9, 4, D)}
    single = trees.fisher_diagonal(tokens, params, {"inputs": X[:36]})
    estimate = trees.fisher_diagonal(
        tokens, params, sequences, kind="mc", num_samples=3000, key=KEY
    )
    # Scores of independent tokens have mean 0, so their variances add up: 4 tokens each.
    close(estimate["w"], 4 * single["w"], rtol=0.15, atol=0.02)


# --- The bias of the batched shortcut -----------------------------------------------------------


def test_opposite_labels_cancel_in_the_batch_gradient():
    twins = {"inputs": jnp.ones((2, D)), "labels": jnp.array([0, 1])}
    two_classes = {"w": jnp.zeros((D, 2)), "b": jnp.zeros(2)}
    batched = trees.fisher_diagonal(linear_loss, two_classes, twins, kind="batched")
    empirical = trees.fisher_diagonal(linear_loss, two_classes, twins, kind="empirical")
    assert float(trees.norm(batched)) == 0.0
    close(empirical["w"], np.full((D, 2), 0.25))


def test_batched_is_the_square_of_the_mean_gradient_and_about_b_times_too_small():
    # At the optimum the mean gradient is zero, so v / B is left.
    weights = {"w": jnp.zeros((D, K)), "b": jnp.zeros(K)}
    labels = np.asarray(
        jax.random.categorical(KEY, linear(weights, {"inputs": jnp.tile(X, (40, 1))}))
    )
    data = {"inputs": np.tile(X, (40, 1)), "labels": labels}
    size = 8
    batches = cut(data, size)
    batched = trees.fisher_diagonal(linear_loss, weights, batches, kind="batched")
    empirical = trees.fisher_diagonal(linear_loss, weights, data, kind="empirical")
    ratio = float(empirical["w"].sum() / batched["w"].sum())
    assert ratio == pytest.approx(size, rel=0.2)
    g = jax.grad(lambda p: jnp.mean(linear_loss(p, batches[0])))(weights)
    first = trees.fisher_diagonal(linear_loss, weights, batches[0], kind="batched", chunk_size=3)
    close(first, jax.tree.map(jnp.square, g))


def test_batched_with_batches_of_one_is_empirical():
    batched = trees.fisher_diagonal(linear_loss, LINEAR, cut(DATA, 1), kind="batched")
    close(batched, trees.fisher_diagonal(linear_loss, LINEAR, DATA, kind="empirical"))


# --- Invariance ---------------------------------------------------------------------------------

CASES = {"exact": (network, NETWORK), "mc": (linear, LINEAR), "empirical": (network_loss, NETWORK)}


def padded(size, real, fill):
    """Spreads the data over ``size`` rows; the others hold ``fill``."""
    index = np.sort(np.random.default_rng(1).permutation(size)[:real])
    inputs = np.full((size, D), fill, np.float32)
    labels = np.full(size, -99)
    mask = np.zeros(size, np.float32)
    inputs[index], labels[index], mask[index] = X[:real], Y[:real], 1
    return {"inputs": inputs, "labels": labels, "mask": mask}


@pytest.mark.parametrize("kind", CASES)
def test_chunks_batches_padding_and_devices_do_not_matter(kind):
    function, params = CASES[kind]

    def fisher(batches, chunk_size=16):
        return trees.fisher_diagonal(
            function, params, batches, kind=kind, key=KEY, num_samples=2, chunk_size=chunk_size
        )

    reference = fisher(DATA, N)
    close(fisher(DATA, 1), reference)
    close(fisher(iter(cut(DATA, 10))), reference)
    close(fisher(padded(50, N, np.nan), 7), reference)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    close(fisher(jax.device_put(padded(48, N, 0.0), sharding), 8), reference)
    if kind != "mc":  # Its keys follow the order of the examples.
        order = np.random.default_rng(2).permutation(N)
        close(fisher(jax.tree.map(lambda x: x[order], DATA), N), reference)


def test_forms_of_masks_agree_and_everything_runs_under_jit():
    reference = trees.fisher_diagonal(linear, LINEAR, DATA)
    data = padded(50, N, 1e30)
    mask = data.pop("mask")
    close(trees.fisher_diagonal(linear, LINEAR, data, mask=mask), reference)
    named = trees.fisher_diagonal(linear, LINEAR, {**data, "r": mask}, mask=lambda b: b["r"])
    close(named, reference)
    close(jax.jit(lambda p, b: trees.fisher_diagonal(linear, p, b))(LINEAR, DATA), reference)


def test_result_is_sharded_as_the_parameters():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda x, *spec: jax.device_put(  # noqa: E731
        x, jax.sharding.NamedSharding(mesh, jax.P(*spec))
    )
    params = {"w1": place(NETWORK["w1"], None, "model"), "b1": place(NETWORK["b1"], "model"),
              "w2": place(NETWORK["w2"], "model", None)}  # fmt: skip
    batch = jax.tree.map(lambda x: place(x[:32], "data"), DATA)
    fisher = trees.fisher_diagonal(network_loss, params, batch, kind="empirical", chunk_size=8)
    first = jax.tree.map(lambda x: x[:32], DATA)
    close(fisher, trees.fisher_diagonal(network_loss, NETWORK, first, kind="empirical"))
    for name in params:
        assert fisher[name].sharding.is_equivalent_to(params[name].sharding, fisher[name].ndim)


def test_batches_share_one_compilation():
    traced = []

    def logits(params, batch):
        traced.append(1)
        return linear(params, batch)

    batches = cut(DATA, 10)
    trees.fisher_diagonal(logits, LINEAR, batches[:1])
    count = len(traced)
    trees.fisher_diagonal(logits, LINEAR, batches)  # The last batch has 7 rows.
    assert len(traced) == count


def test_bfloat16_parameters_are_summed_in_float32():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), LINEAR)
    many = {"inputs": np.tile(X, (20, 1))}
    fisher = trees.fisher_diagonal(linear, narrow, many)
    assert fisher["w"].dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    close(fisher, trees.fisher_diagonal(linear, wide, many), rtol=0.02, atol=1e-3)


def test_some_parameters_only():
    chosen, rest = trees.partition(NETWORK, "w2")
    logits = lambda p, batch: network(trees.combine(p, rest), batch)  # noqa: E731
    fisher = trees.fisher_diagonal(logits, chosen, DATA)
    whole = trees.fisher_diagonal(network, NETWORK, DATA)
    assert trees.paths(fisher) == ["w2"]
    close(fisher["w2"], whole["w2"])


def test_normalisations():
    plain = trees.fisher_diagonal(network, NETWORK, DATA)
    flat, _ = ravel_pytree(plain)
    for normalize, unit in (("mean", flat.mean()), ("max", flat.max()), ("trace", flat.sum())):
        scaled = trees.fisher_diagonal(network, NETWORK, DATA, normalize=normalize)
        close(scaled, jax.tree.map(lambda x: x / unit, plain))  # noqa: B023


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "exat"}, "'exact'"),
        ({"kind": "mc"}, "key"),
        ({"normalize": "sum"}, "'trace'"),
        ({"kind": "empirical"}, "one loss per row"),
        ({"kind": "argmax", "likelihood": "gaussian"}, "mode"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"mask": np.ones(3)}, "37 rows"),
        ({"mask": np.zeros(N)}, "no examples"),
    ],
)
def test_mistakes_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        trees.fisher_diagonal(linear, LINEAR, DATA, **change)


# --- Elastic weight consolidation ---------------------------------------------------------------

FISHER = trees.fisher_diagonal(network, NETWORK, DATA)
MOVED = jax.tree.map(lambda x: x + 0.3, NETWORK)


def test_penalty_value_and_gradient():
    value, gradient = jax.value_and_grad(trees.ewc_penalty)(MOVED, NETWORK, FISHER)
    expected = sum(0.5 * 0.09 * float(f.sum()) for f in jax.tree.leaves(FISHER))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    close(gradient, jax.tree.map(lambda f: 0.3 * f, FISHER))
    value, gradient = jax.value_and_grad(trees.ewc_penalty)(NETWORK, NETWORK, FISHER)
    assert float(value) == 0 and float(trees.norm(gradient)) == 0


def test_penalty_does_not_depend_on_the_parametrisation():
    halved = lambda tree: jax.tree.map(lambda x: x / 2, tree)  # noqa: E731
    doubled = lambda p, batch: network(jax.tree.map(lambda x: 2 * x, p), batch)  # noqa: E731
    fisher = trees.fisher_diagonal(doubled, halved(NETWORK), DATA)
    close(fisher, jax.tree.map(lambda f: 4 * f, FISHER), atol=1e-5)
    penalty = trees.ewc_penalty(halved(MOVED), halved(NETWORK), fisher)
    np.testing.assert_allclose(penalty, trees.ewc_penalty(MOVED, NETWORK, FISHER), rtol=1e-5)


def test_new_heads_are_free_and_grown_leaves_are_held_in_their_old_part():
    anchor, fisher = {"w": jnp.ones((2, 3))}, {"w": jnp.full((2, 3), 2.0)}
    params = {"w": jnp.full((2, 5), 3.0), "head": jnp.ones(4)}
    assert float(trees.ewc_penalty(params, anchor, fisher)) == 0.5 * 6 * 2 * 4
    moved = trees.ewc_proximal(params, anchor, fisher, 1e9)
    np.testing.assert_allclose(moved["w"][:, :3], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(moved["w"][:, 3:], params["w"][:, 3:])
    with pytest.raises(ValueError, match=r"params has no leaf 'w'.*head"):
        trees.ewc_penalty({"head": jnp.ones(4)}, anchor, fisher)
    with pytest.raises(ValueError, match="shapes at 'w'"):
        trees.ewc_penalty({"w": jnp.ones((2, 2))}, anchor, fisher)


def test_proximal_step_minimises_its_objective():
    strength = 0.7
    moved = trees.ewc_proximal(MOVED, NETWORK, FISHER, strength)

    def objective(theta):
        distance = trees.sub(theta, MOVED)
        return trees.dot(distance, distance) / 2 + strength * trees.ewc_penalty(
            theta, NETWORK, FISHER
        )

    assert float(trees.norm(jax.grad(objective)(moved))) < 1e-5


def test_ewc_of_linear_gaussian_tasks_is_the_joint_solution():
    # Two tasks that see different coordinates: the diagonal is the whole Fisher information.
    a = np.diag([1.0, 2.0, 0.0, 0.0]).astype(np.float32)
    b = np.diag([0.0, 0.0, 3.0, 1.0]).astype(np.float32)
    y_a, y_b = np.ones(4, np.float32), np.arange(4, dtype=np.float32)
    predict = lambda w, x: (x @ w)[:, None]  # noqa: E731
    w_a = jnp.linalg.lstsq(a, y_a)[0]
    mean = trees.fisher_diagonal(predict, w_a, a, likelihood="gaussian")
    precision = trees.scale(mean, len(a))

    def total(w):
        return 0.5 * jnp.sum((b @ w - y_b) ** 2) + trees.ewc_penalty(w, w_a, precision)

    w = w_a - jnp.linalg.solve(jax.hessian(total)(w_a), jax.grad(total)(w_a))
    joint = np.linalg.lstsq(np.vstack([a, b]), np.concatenate([y_a, y_b]), rcond=None)[0]
    np.testing.assert_allclose(w, joint, atol=1e-5)


def test_merged_quadratics_have_the_gradient_of_their_sum():
    f1, f2 = FISHER, jax.tree.map(lambda f: f**0.5, FISHER)
    t1, t2 = NETWORK, jax.tree.map(lambda x: x - 0.2, NETWORK)
    both = jax.grad(lambda p: trees.ewc_penalty(p, t1, f1) + trees.ewc_penalty(p, t2, f2))(MOVED)
    total = trees.merge_fisher(f1, f2)
    centre = jax.tree.map(
        lambda a, b, x, y: jnp.where(a + b > 0, (a * x + b * y) / (a + b), x), f1, f2, t1, t2
    )
    close(jax.grad(trees.ewc_penalty)(MOVED, centre, total), both)


def test_merge_fisher_decays_and_starts_from_nothing():
    assert trees.merge_fisher(None, FISHER) is FISHER
    close(trees.merge_fisher(FISHER, FISHER, decay=0.5), trees.scale(FISHER, 1.5))
    with pytest.raises(ValueError, match="decay"):
        trees.merge_fisher(FISHER, FISHER, decay=1.5)


def test_consolidation_by_mode():
    f, g = FISHER, jax.tree.map(lambda x: x**0.5, FISHER)
    first = trees.consolidate(None, NETWORK, f)
    apart = trees.consolidate(first, MOVED, g, mode="separate")
    assert apart == trees.Consolidated((NETWORK, MOVED), (f, g))
    for mode, decay, (a, b) in (
        ("sum", 0.5, (1.0, 1.0)), ("online", 0.9, (0.9, 1.0)), ("streaming_ema", 0.9, (0.9, 0.1)),
    ):  # fmt: skip
        state = trees.consolidate(first, MOVED, g, mode=mode, decay=decay)
        assert state.anchors == (MOVED,)
        close(state.fishers[0], trees.weighted_sum([f, g], [a, b]))
    with pytest.raises(ValueError, match="continues one diagonal, not 2"):
        trees.consolidate(apart, MOVED, g)
    with pytest.raises(ValueError, match="'streaming_ema'"):
        trees.consolidate(first, MOVED, g, mode="ema")


# --- Kronecker factors --------------------------------------------------------------------------


def with_one(x):
    return jnp.concatenate([x, jnp.ones((len(x), 1))], 1)


def tapped_network(params, taps, batch):
    inputs = {"first": with_one(batch["inputs"])}
    kernel = jnp.concatenate([params["w1"], params["b1"][None]])
    hidden = jnp.tanh(inputs["first"] @ kernel + taps["first"])
    inputs["second"] = hidden
    return hidden @ params["w2"] + taps["second"], inputs


TAPS = {"first": 4, "second": K}


def test_kronecker_factors_are_the_second_moments():
    blocks = trees.kfac_blocks(tapped_network, NETWORK, DATA, TAPS)
    hidden = np.tanh(X @ NETWORK["w1"] + NETWORK["b1"])
    p = np.asarray(jax.nn.softmax(network(NETWORK, DATA)))
    covariance = np.einsum("nk,kl->kl", p, np.eye(K)) - p.T @ p
    np.testing.assert_allclose(blocks["second"].a, hidden.T @ hidden / N, rtol=1e-4)
    np.testing.assert_allclose(blocks["second"].g, covariance / N, rtol=1e-4, atol=1e-6)
    back = np.einsum("nkl,ik,jl,ni,nj->ij", np.einsum("nk,kl->nkl", p, np.eye(K))
                     - p[:, :, None] * p[:, None, :], NETWORK["w2"], NETWORK["w2"],
                     1 - hidden**2, 1 - hidden**2) / N  # fmt: skip
    np.testing.assert_allclose(blocks["first"].g, back, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(blocks["first"].a[-1, -1], 1, rtol=1e-6)


def test_kronecker_blocks_of_one_example_are_its_fisher_information():
    one = jax.tree.map(lambda x: x[:1], DATA)
    blocks = trees.kfac_blocks(tapped_network, NETWORK, one, TAPS)
    fisher = trees.fisher_diagonal(network, NETWORK, one)
    diagonal = lambda b: jnp.outer(jnp.diag(b.a), jnp.diag(b.g))  # noqa: E731
    close(diagonal(blocks["second"]), fisher["w2"])
    close(diagonal(blocks["first"]), jnp.concatenate([fisher["w1"], fisher["b1"][None]]))


def test_kronecker_penalty_is_a_quadratic_form_with_that_diagonal():
    block = trees.kfac_blocks(tapped_network, NETWORK, DATA, TAPS)["second"]
    hessian = jax.hessian(lambda w: trees.kfac_penalty({"second": w}, {"second": block}))(
        NETWORK["w2"]
    )
    np.testing.assert_allclose(
        hessian.reshape(4 * K, 4 * K), np.kron(block.a, block.g), rtol=1e-4, atol=1e-5
    )


def test_merged_kronecker_blocks_are_nearest_to_the_sum():
    def block(seed):
        a, g = RNG.normal(size=(seed + 3, 6, 3)), RNG.normal(size=(seed + 3, 6, 2))
        a, g = (np.einsum("nki,nkj->ij", x, x).astype(np.float32) for x in (a, g))
        return trees.KroneckerBlock(a, g)

    first, second = block(0), block(1)
    total = np.kron(first.a, first.g) + np.kron(second.a, second.g)
    merged = trees.merge_kronecker(first, second)
    error = total - np.kron(merged.a, merged.g)
    # Stationary: the error is orthogonal to every product with one of the two factors.
    blocks = error.reshape(3, 2, 3, 2)
    scale = np.linalg.norm(total) * np.linalg.norm(merged.g)
    assert np.abs(np.einsum("ikjl,kl->ij", blocks, merged.g)).max() < 1e-5 * scale
    assert np.abs(np.einsum("ikjl,ij->kl", blocks, merged.a)).max() < 1e-5 * scale
    assert np.linalg.norm(error) < np.linalg.norm(np.kron(second.a, second.g))
    assert min(np.linalg.eigvalsh(merged.a)[0], np.linalg.eigvalsh(merged.g)[0]) > 0
    alike = trees.KroneckerBlock(3 * first.a, 2 * first.g)
    merged = trees.merge_kronecker(first, alike)
    np.testing.assert_allclose(
        np.kron(merged.a, merged.g), 7 * np.kron(first.a, first.g), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["mc", "argmax", "empirical"])
def test_kronecker_factors_ignore_padding_and_batches(kind):
    loss = lambda p, t, b: (  # noqa: E731
        loss_of(lambda p, b: tapped_network(p, t, b)[0])(p, b),
        tapped_network(p, t, b)[1],
    )
    function = loss if kind == "empirical" else tapped_network
    blocks = [
        trees.kfac_blocks(function, NETWORK, batches, TAPS, kind=kind, key=KEY, num_samples=2)
        for batches in (DATA, padded(50, N, np.nan), cut(DATA, 10))
    ]  # fmt: skip
    close(blocks[1], blocks[0], rtol=1e-4)
    close(blocks[2], blocks[0], rtol=1e-4)


def test_on_a_mesh_the_batches_share_one_program():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = jax.device_put({"w": jnp.ones((3, 2))}, whole)
    traced = []

    def logits(p, batch):
        traced.append(1)
        return batch["x"] @ p["w"]

    def batches(count):
        for i in range(count):
            yield jax.device_put({"x": jnp.full((8, 3), i + 1.0)}, rows)

    trees.fisher_diagonal(logits, params, batches(1))
    assert traced
    traced.clear()
    trees.fisher_diagonal(logits, params, batches(4))
    assert not traced


class TestOuterProducts:
    """What is never formed, and that it changes no number."""

    def test_dense_layers_are_found_and_others_are_not(self):
        params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "v": jnp.ones((4, 5)), "s": jnp.ones(5)}

        def nll(params, batch):
            hidden = jnp.tanh(batch["inputs"] @ params["w"] + params["b"])
            out = (hidden @ params["v"].reshape(4, 5)) * params["s"]
            # Two rows of "w" for each example: a sum of outer products, whose square is no product.
            return -jax.nn.log_softmax(out)[..., 0].sum(-1)

        def program(shape):
            batch = {"inputs": jnp.ones(shape)}
            options = fisher._Options(nll, "empirical", "categorical", 1, 1)
            keys = jax.random.split(jax.random.key(0), shape[0])
            found = fisher._program(options, params, batch, keys)[0]
            names = trees.paths(params)
            return {name for name, outer in zip(names, found.outers) if outer is not None}, found

        once, found = program((6, 1, 3))
        assert once == {"w", "v"} and found.held_bytes() == 4 * (4 + 5)
        assert program((6, 2, 3))[0] == set()

    @pytest.mark.parametrize("kind", ["exact", "mc", "empirical", "label_prob"])
    def test_an_mlp_has_the_squares_of_its_gradients(self, kind):
        keys = jax.random.split(jax.random.key(3), 5)
        params = {"w": jax.random.normal(keys[0], (3, 4)), "v": jax.random.normal(keys[1], (4, 5))}
        batch = {
            "inputs": jax.random.normal(keys[2], (7, 3)),
            "labels": jnp.arange(7) % 5, "mask": jnp.array([1, 1, 0, 1, 1, 1, 1]),
        }  # fmt: skip

        def log_probs(params, batch):
            out = jnp.tanh(batch["inputs"] @ params["w"]) @ params["v"]
            out = jax.nn.log_softmax(out)
            if kind in ("exact", "mc"):
                return out
            return -jnp.take_along_axis(out, batch["labels"][:, None], 1)[:, 0]

        def hidden(params, batch):  # the same function, with the matrices where no one finds them
            w, v = params["w"] * 1.0, params["v"] * 1.0
            return log_probs({"w": w, "v": v}, batch)

        options = {"kind": kind, "key": keys[4], "num_samples": 3}
        expected = trees.fisher_diagonal(hidden, params, batch, chunk_size=1, **options)
        for chunk_size in (1, 3, None):
            found = trees.fisher_diagonal(
                log_probs, params, batch, chunk_size=chunk_size, **options
            )
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7),
                found, expected,
            )  # fmt: skip
