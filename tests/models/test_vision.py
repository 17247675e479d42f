"""Image encoders: the shapes of CLIP's tower, and the symmetries of their parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.models import ResidualMLP, VisionTransformer, ViTConfig, clip_vit_b
from transfer_jax.nn import TransformerConfig
from transfer_jax.trees import paths


def tiny(**fields):
    stack = TransformerConfig(features=8, num_layers=2, num_heads=2, init_scale=0.3, **fields)
    return VisionTransformer(ViTConfig(
        stack=stack, image_size=(4, 6), patch_size=2, channels=1, patch_bias=False,
        norm_before=True, head="projection", projection=6,
    ))  # fmt: skip


@pytest.fixture(scope="module")
def vit():
    model = tiny()
    images = jax.random.uniform(jax.random.key(0), (3, 4, 6, 1))
    return model, model.init(jax.random.key(1), images), images


def test_the_tower_of_clip_vit_b32_has_its_number_of_parameters():
    model = VisionTransformer(clip_vit_b(32).image)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    )["params"]
    # Patches, class token, 50 positions, norms before and after, projection; 12 blocks.
    outer = 32 * 32 * 3 * 768 + 768 + 50 * 768 + 2 * 2 * 768 + 768 * 512
    block = 4 * (768 * 768 + 768) + 2 * (768 * 3072) + 3072 + 768 + 2 * 2 * 768
    assert sum(x.size for x in jax.tree.leaves(shapes)) == outer + 12 * block == 87_849_216
    # Query, key and value are one matrix in CLIP: two kernels and two biases fewer per block.
    assert len(paths(shapes)) - 4 * 12 == 152


def test_without_positions_the_order_of_patches_does_not_matter(vit):
    model, variables, images = vit
    params = variables["params"]
    none = {"params": {**params, "positions": jnp.zeros_like(params["positions"])}}
    swapped = jnp.concatenate([images[:, :, 4:], images[:, :, :4]], axis=2)
    assert np.abs(model.apply(variables, swapped) - model.apply(variables, images)).max() > 1e-3
    np.testing.assert_allclose(model.apply(none, swapped), model.apply(none, images), atol=1e-5)


def test_images_of_a_batch_do_not_see_each_other(vit):
    model, variables, images = vit
    alone = jnp.concatenate([model.apply(variables, images[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(model.apply(variables, images), alone, atol=1e-5)


def test_images_and_patches_that_do_not_fit_are_refused(vit):
    model, variables, _ = vit
    with pytest.raises(ValueError, match=r"\(1, 6, 4, 1\) were given; .* takes \[B, 4, 6, 1\]"):
        model.apply(variables, jnp.zeros((1, 6, 4, 1)))
    with pytest.raises(ValueError, match="patches of 16 x 16 pixels do not tile"):
        ViTConfig(stack=model.config.stack, image_size=100)


def test_a_residual_mlp_without_blocks_is_its_stem_norm_and_projection():
    model = ResidualMLP(embedding=4, features=8, depth=1)
    images = jax.random.uniform(jax.random.key(0), (3, 2, 2, 1))
    params = model.init(jax.random.key(1), images)["params"]
    silent = jax.tree.map(jnp.zeros_like, params["blocks_0"]["down"])
    params = {**params, "blocks_0": {**params["blocks_0"], "down": silent}}
    x = images.reshape(3, 4) @ params["stem"]["kernel"] + params["stem"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = x @ params["projection"]["kernel"]
    np.testing.assert_allclose(model.apply({"params": params}, images), expected, atol=1e-5)


def test_computation_in_bfloat16_keeps_float32_parameters():
    model = tiny(dtype=jnp.bfloat16)
    images = jnp.zeros((1, 4, 6, 1))
    variables = model.init(jax.random.key(0), images)
    assert {x.dtype.name for x in jax.tree.leaves(variables)} == {"float32"}
    assert model.apply(variables, images).dtype == jnp.bfloat16
