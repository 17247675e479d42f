"""Low-rank factors and truncated decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees

KEY = jax.random.key(0)
PARAMS = {
    "dense": {"kernel": jax.random.normal(KEY, (6, 4)), "bias": jnp.ones(4)},
    "layers": {"kernel": jax.random.normal(KEY, (3, 6, 5))},
    "query": {"kernel": jax.random.normal(KEY, (6, 2, 3))},
    "out": {"kernel": jax.random.normal(KEY, (2, 3, 6))},
}


def trained(factors):
    """Factors after some training: nothing is zero."""
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), factors)


def test_initial_change_is_zero_and_gradients_are_not():
    factors = trees.lora_init(PARAMS, "dense/kernel|layers", 2, KEY)
    assert trees.paths(factors) == [
        "dense/kernel/a", "dense/kernel/b", "layers/kernel/a", "layers/kernel/b",
    ]  # fmt: skip
    merged = trees.lora_merge(PARAMS, factors)
    for x, y in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(merged)):
        np.testing.assert_array_equal(x, y)
    gradient = jax.grad(lambda f: jnp.sum(trees.lora_merge(PARAMS, f)["layers"]["kernel"]))(factors)
    assert float(jnp.abs(gradient["layers"]["kernel"]["b"]).min()) > 0


def test_delta_is_the_scaled_product_for_each_layout():
    factors = trained(trees.lora_init(PARAMS, "kernel", 2, KEY, in_axes={"query": 1, "^out": 2}))
    delta = trees.lora_delta(factors, 0.5)
    expected = {"dense": "ir,ro->io", "layers": "lir,lro->lio", "query": "ir,rhd->ihd",
                "out": "hdr,ro->hdo"}  # fmt: skip
    for name, subscripts in expected.items():
        pair = factors[name]["kernel"]
        product = 0.5 * np.einsum(subscripts, pair["a"], pair["b"])
        np.testing.assert_allclose(delta[name]["kernel"], product, rtol=1e-4, atol=1e-5)
        merged = trees.lora_merge(PARAMS, factors, 0.5)[name]["kernel"]
        np.testing.assert_allclose(merged, PARAMS[name]["kernel"] + product, rtol=1e-4, atol=1e-5)
    assert delta["dense"]["bias"] is None


def test_leaves_draw_from_keys_of_their_own():
    both = trees.lora_init(PARAMS, "kernel", 2, KEY)
    alone = trees.lora_init({"dense": PARAMS["dense"]}, "kernel", 2, KEY)
    np.testing.assert_array_equal(both["dense"]["kernel"]["a"], alone["dense"]["kernel"]["a"])
    assert not np.array_equal(
        both["dense"]["kernel"]["a"], trees.lora_init(PARAMS, "kernel", 2, jax.random.key(1))
        ["dense"]["kernel"]["a"],
    )  # fmt: skip


def test_mistakes_name_the_leaf():
    with pytest.raises(ValueError, match=r"'dense/bias'.*no matrix"):
        trees.lora_init(PARAMS, "dense", 2, KEY)
    with pytest.raises(ValueError, match="rank 5 for leaf 'dense/kernel', a 6 by 4"):
        trees.lora_init(PARAMS, "dense/kernel", 5, KEY)
    factors = trees.lora_init(PARAMS, "dense/kernel", 2, KEY)
    with pytest.raises(ValueError, match="'dense/kernel'"):
        trees.lora_merge({"other": jnp.ones(2)}, factors)
    with pytest.raises(ValueError, match=r"'dense/kernel'.*\(6, 4\)"):
        trees.lora_merge({"dense": {"kernel": jnp.ones((3, 4))}}, factors)


def test_truncation_is_the_best_of_its_rank():
    truncated = trees.svd_truncate(PARAMS, 2)
    x, y = PARAMS["dense"]["kernel"], truncated["dense"]["kernel"]
    singular = np.linalg.svd(x, compute_uv=False)
    assert np.linalg.matrix_rank(y) == 2
    assert float(jnp.linalg.norm(x - y)) == pytest.approx(np.linalg.norm(singular[2:]), rel=1e-4)
    np.testing.assert_allclose(
        truncated["layers"]["kernel"][1],
        trees.svd_truncate({"w": PARAMS["layers"]["kernel"][1]}, 2)["w"], atol=1e-5,
    )  # fmt: skip
    np.testing.assert_array_equal(truncated["dense"]["bias"], PARAMS["dense"]["bias"])
    full = trees.svd_truncate(PARAMS, 6)
    assert full["dense"]["kernel"] is PARAMS["dense"]["kernel"]


def test_extracted_factors_restore_low_rank_changes():
    factors = trained(trees.lora_init(PARAMS, "dense/kernel|layers", 2, KEY))
    finetuned = trees.lora_merge(PARAMS, factors)
    extracted = trees.extract_lora(finetuned, PARAMS, 2)
    restored = trees.lora_merge(PARAMS, extracted)
    for x, y in zip(jax.tree.leaves(finetuned), jax.tree.leaves(restored)):
        np.testing.assert_allclose(x, y, atol=1e-4)
    one = trees.extract_lora(finetuned, PARAMS, 1, "dense/kernel")
    assert trees.paths(one) == ["dense/kernel/a", "dense/kernel/b"]
    expected = trees.svd_truncate(trees.sub(finetuned, PARAMS), 1)["dense"]["kernel"]
    np.testing.assert_allclose(trees.lora_delta(one)["dense"]["kernel"], expected, atol=1e-4)


def test_bfloat16_leaves_get_bfloat16_factors_and_keep_their_dtype():
    narrow = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    factors = trees.lora_init(narrow, "w", 2, KEY)
    assert factors["w"]["a"].dtype == jnp.bfloat16
    assert trees.lora_merge(narrow, factors)["w"].dtype == jnp.bfloat16
    assert trees.svd_truncate(narrow, 1)["w"].dtype == jnp.bfloat16
