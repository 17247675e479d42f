"""The adaptive softmax is a distribution, and that of PyTorch where the configurations meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.nn import AdaptiveSoftmax


@functools.partial(jax.jit, static_argnames=("module", "method"))
def apply(module, *args, method):
    return module.apply(*args, method=method)


def make(**options):
    module = AdaptiveSoftmax(
        30, 16, **{"cutoffs": (8, 18), "div_val": 2, "chunk_tokens": 5, **options}
    )
    tokens = jax.random.randint(jax.random.key(0), (3, 7), 0, 30)
    variables = module.init(jax.random.key(1), tokens)
    noise = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), variables
    )
    return module, noise, tokens


@pytest.mark.parametrize("tie", [True, False])
def test_log_probabilities_normalise_and_hold_the_nll(tie):
    module, variables, tokens = make(tie_weights=tie, tie_projections=tie)
    hidden = jax.random.normal(jax.random.key(3), (3, 7, 16))
    log_probs = apply(module, variables, hidden, method="log_probs")
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, rtol=1e-5)
    nll = apply(module, variables, hidden, tokens, method="nll")
    picked = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, -picked, atol=1e-5)
    names = set(variables["params"])
    assert ("output_0" in names) == (not tie) and ("output_projection_1" in names) == (not tie)


def test_gradients_of_the_chunked_nll_are_those_of_the_whole():
    module, variables, tokens = make()
    hidden = jax.random.normal(jax.random.key(3), (3, 7, 16))

    def chunked(variables, hidden):
        return module.apply(variables, hidden, tokens, method="nll").mean()

    def whole(variables, hidden):
        log_probs = module.apply(variables, hidden, method="log_probs")
        return -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1).mean()

    ours, theirs = (jax.jit(jax.grad(f, (0, 1)))(variables, hidden) for f in (chunked, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def test_parity_with_torch():
    torch = pytest.importorskip("torch")
    peer = torch.nn.AdaptiveLogSoftmaxWithLoss(16, 30, cutoffs=[8, 18], div_value=2.0)
    module, variables, _ = make(tie_weights=False, tie_projections=False, use_bias=False)
    params = dict(variables["params"])
    head = peer.head.weight.detach().numpy()
    params["output_0"], params["cluster"] = head[:8], head[8:]
    for i, tail in enumerate(peer.tail, start=1):
        params[f"output_projection_{i}"] = tail[0].weight.detach().numpy()
        params[f"output_{i}"] = tail[1].weight.detach().numpy()
    hidden = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    ours = module.apply({"params": params}, hidden, method="log_probs")
    with torch.no_grad():
        theirs = peer.log_prob(torch.from_numpy(hidden)).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_embedding_is_the_scaled_projected_row():
    module, variables, _ = make()
    vectors = module.apply(variables, jnp.array([3, 12, 29]))
    p = variables["params"]
    rows = [
        p["embedding_0"][3],
        p["embedding_1"][12 - 8] @ p["projection_1"],
        p["embedding_2"][29 - 18] @ p["projection_2"],
    ]
    np.testing.assert_allclose(vectors, 4 * jnp.stack(rows), rtol=1e-5)


def test_no_array_of_tokens_times_vocabulary():
    module = AdaptiveSoftmax(50_000, 64, cutoffs=(2000, 10_000), chunk_tokens=64)
    tokens = jax.ShapeDtypeStruct((2048,), jnp.int32)
    hidden = jax.ShapeDtypeStruct((2048, 64), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)

    def loss(variables, hidden, tokens):
        return module.apply(variables, hidden, tokens, method="nll").mean()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(variables, hidden, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 50_000 * 4 / 4


def test_cutoffs_are_checked():
    with pytest.raises(ValueError, match="increase strictly"):
        make(cutoffs=(18, 8))
    with pytest.raises(ValueError, match="no dimension"):
        make(cutoffs=(2, 4, 8), div_val=4)
