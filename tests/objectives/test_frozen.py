"""A frozen network: no gradient, no backward pass, no held activations; states can be kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.models import VisionTransformer, ViTConfig
from transfer_jax.nn import TransformerConfig
from transfer_jax.nn.unipt import UniPT, unipt_config
from transfer_jax.objectives import Classification, Variables
from transfer_jax.objectives.frozen import Frozen, cache_features
from transfer_jax.papers.unipt import StatesClassifier, vit_states

BATCH, WIDTH, SIDE = 16, 32, 8
SHAPES = {
    "inputs": jax.ShapeDtypeStruct((BATCH, 8, 8, 1), jnp.float32),
    "labels": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
}


def network(depth, head=None):
    stack = TransformerConfig(features=WIDTH, num_layers=depth, num_heads=2)
    return VisionTransformer(
        ViTConfig(stack=stack, image_size=8, patch_size=2, channels=1, head=head, num_classes=3)
    )


def objective(depth, variables):
    reader = UniPT(unipt_config("vse_text", features=SIDE, outputs=SIDE))
    task = Classification(module=StatesClassifier(3, reader=reader))
    return Frozen(inner=task, variables=variables, module=network(depth), method=vit_states)


def shapes(depth):
    init = lambda k, x: network(depth).init(k, x)["params"]  # noqa: E731
    return Variables(jax.eval_shape(init, jax.random.key(0), SHAPES["inputs"]), {})


def drawn(tree):
    """Arrays in place of shapes; nothing is compiled."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), tree)


@pytest.fixture(scope="module")
def real():
    batch = {
        "inputs": jax.random.normal(jax.random.key(0), (5, 8, 8, 1)),
        "labels": jnp.array([0, 1, 2, 0, 1]),
    }
    frozen = objective(2, drawn(shapes(2)))
    variables = drawn(jax.eval_shape(frozen.init, jax.random.key(0), batch))
    return frozen, variables, batch


def gradient(objective, params, batch):
    """value_and_grad of the loss as the training step takes it."""
    loss = lambda p: objective.loss(Variables(p, {}), batch, None)[0]  # noqa: E731
    return jax.value_and_grad(loss)(params)


def dots(fn, *args):
    """How many matrix products and convolutions a function has, inner functions included."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            total += eqn.primitive.name in ("dot_general", "conv_general_dilated")
            for sub in jax.core.jaxprs_in_params(eqn.params):
                total += count(sub)
        return total

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


@pytest.mark.parametrize("depth", [2, 4])
def test_the_network_is_passed_once_and_never_backwards(depth):
    frozen = objective(depth, shapes(depth))
    params = jax.eval_shape(frozen.init, jax.random.key(0), SHAPES).params
    states = jax.eval_shape(frozen.batch, SHAPES)
    forward = dots(lambda o, b: o.batch(b), frozen, SHAPES)
    side = dots(gradient, frozen.inner, params, states)
    assert forward == 1 + 8 * depth  # patches; four projections, two products, two of the MLP
    assert dots(gradient, frozen, params, SHAPES) == forward + side
    # The same count does see a backward pass where there is one.
    task = Classification(module=network(depth, "classification"))
    whole = jax.eval_shape(task.init, jax.random.key(0), SHAPES).params
    assert dots(gradient, task, whole, SHAPES) > 2.9 * forward


def temporaries(objective, params):
    compiled = jax.jit(gradient).lower(objective, params, SHAPES).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_by_the_states_that_are_read_and_no_activations():
    """Slopes over the depth: the network's own activations would add 20 times its width."""
    unit = BATCH * 17 * 4  # bytes of one float per token
    held = {"unipt": [], "full": []}
    for depth in (2, 4):
        frozen = objective(depth, shapes(depth))
        side = jax.eval_shape(frozen.init, jax.random.key(0), SHAPES).params
        held["unipt"].append(temporaries(frozen, side))
        task = Classification(module=network(depth, "classification"))
        whole = jax.eval_shape(task.init, jax.random.key(0), SHAPES).params
        held["full"].append(temporaries(task, whole))
    slopes = {name: (b - a) / 2 / unit for name, (a, b) in held.items()}
    # A state, about ten vectors of the side, and the products of tokens with tokens.
    assert WIDTH <= slopes["unipt"] < WIDTH + 10 * SIDE + 4 * 17
    assert slopes["unipt"] < 0.25 * slopes["full"]
    assert held["unipt"][1] < 0.4 * held["full"][1]


def test_the_network_has_no_gradient_and_is_not_trained(real):
    frozen, variables, batch = real

    def loss(carried):
        return frozen.replace(variables=carried).loss(variables, batch, None)[0]

    grads = jax.jit(jax.grad(loss))(frozen.variables)
    assert not any(g.any() for g in jax.tree.leaves(grads))
    inner = jax.eval_shape(frozen.inner.init, jax.random.key(0), frozen.batch(batch))
    assert jax.tree.structure(inner.params) == jax.tree.structure(variables.params)


def test_the_loss_from_kept_states_is_the_same(real, tmp_path):
    frozen, variables, batch = real
    masks = [jnp.ones(3), jnp.array([1.0, 1.0, 0.0])]
    parts = [
        {**{k: v[rows] for k, v in batch.items()}, "mask": mask}
        for rows, mask in zip((slice(0, 3), jnp.array([3, 4, 4])), masks)
    ]
    kept = cache_features(frozen, parts)
    assert kept["inputs"].shape == (5, 3, 17, WIDTH) and "mask" not in kept
    expected = jax.jit(gradient)(frozen, variables.params, batch)
    result = jax.jit(gradient)(frozen.inner, variables.params, kept)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(result)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert abs(float(expected[0] - result[0])) < 1e-6

    small = cache_features(frozen, parts, dtype=jnp.bfloat16, file=str(tmp_path / "states"))
    assert isinstance(small["inputs"], np.memmap) and small["inputs"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(small["inputs"], kept["inputs"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(small["labels"], batch["labels"])
    with pytest.raises(ValueError, match="no examples"):
        cache_features(frozen, [])


class Stages(nn.Module):
    """A convolutional network with a batch norm: two maps of different shapes."""

    @nn.compact
    def __call__(self, inputs, *, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(inputs)
        return x, nn.Conv(3, (2, 2), (2, 2), name="conv")(x)


class Reader(nn.Module):
    """Reads maps at ``inputs``, drops features in training."""

    @nn.compact
    def __call__(self, inputs, *, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(inputs[1].mean((1, 2)))
        return nn.Dense(3)(x)


def test_statistics_of_the_network_stay_while_the_reader_trains():
    batch = {"inputs": 5 + jax.random.normal(jax.random.key(0), (4, 4, 4, 1)),
             "labels": jnp.array([0, 1, 2, 0])}  # fmt: skip
    collections = jax.jit(Stages().init)(jax.random.key(1), batch["inputs"])
    state = {"batch_stats": collections["batch_stats"]}
    frozen = Frozen(
        inner=Classification(module=Reader()), variables=Variables(collections["params"], state),
        module=Stages(),
    )  # fmt: skip
    variables = jax.jit(frozen.init)(jax.random.key(2), batch)
    loss = jax.jit(lambda o, v, b, key: o.loss(v, b, key))
    _, aux = loss(frozen, variables, batch, jax.random.key(3))
    assert not jax.tree.leaves(aux.state) and not jax.tree.leaves(variables.state)
    expected = Stages().apply({**collections}, batch["inputs"])
    for a, b in zip(frozen.batch(batch)["inputs"], expected):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    # The reader's dropout is on in training.
    again = loss(frozen, variables, batch, jax.random.key(4))[1].outputs
    assert np.abs(again - aux.outputs).max() > 1e-3
    with pytest.raises(ValueError, match="only states of one shape"):
        cache_features(frozen, [batch])
    with pytest.raises(ValueError, match=r"reads batch..inputs.."):
        frozen.batch({"labels": batch["labels"]})
