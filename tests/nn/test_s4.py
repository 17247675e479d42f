"""The S4 layer: every evaluation of it agrees, whatever the variant."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from transfer_jax.models import partition_rules
from transfer_jax.nn import SSM_PARAMETERS, S4Layer, SSMKernel
from transfer_jax.ops import fft_convolve, hippo, ssm
from transfer_jax.training.sharding import Layout, make_mesh
from transfer_jax.trees import path_str

L, H, N = 40, 4, 8

VARIANTS = {
    "legs": {},
    "legt-glu-channels": {"a_init": "legt", "output": "glu", "channels": 2},
    "shared-untied": {"n_ssm": 2, "tie_pq": False, "length_correction": False},
    "random": {"a_init": "random_nplr", "rank": 3, "dt_transform": "softplus"},
    "s4d": {"kernel": "diag", "n_ssm": 1},
    "s4d-inv": {"kernel": "diag", "a_init": "inv", "discretisation": "bilinear"},
    "dense": {"kernel": "dense", "a_init": "random_dense"},
    "free": {"kernel": "free"},
}


@functools.cache
def make(seed=0, **options):
    module = S4Layer(H, N, **{"l_max": L, **options})
    x = jax.random.normal(jax.random.key(seed + 1), (2, L, H))
    return module, jax.jit(module.init)(jax.random.key(seed), x), x


@functools.partial(jax.jit, static_argnames=("module", "method", "mutable"))
def apply(module, *args, method=None, mutable=False, **kwargs):
    return module.apply(*args, method=method, mutable=mutable, **kwargs)


@functools.partial(jax.jit, static_argnames="module")
def init(module):
    return module.init(jax.random.key(0), module.l_max)


@pytest.mark.parametrize("name", VARIANTS)
def test_convolution_prefill_and_steps_agree(name):
    module, variables, x = make(**VARIANTS[name])
    expected = apply(module, variables, x)
    assert expected.shape == x.shape
    system = apply(module, variables, method="discretise")

    @jax.jit
    def run(variables, system, x):
        head, state = module.apply(variables, x[:, :20], system, method="prefill")

        def step(state, u):
            y, state = module.apply(variables, u, state, system, method="step")
            return state, y

        _, tail = jax.lax.scan(step, state, jnp.moveaxis(x[:, 20:], 1, 0))
        return jnp.concatenate([head, jnp.moveaxis(tail, 0, 1)], axis=1)

    np.testing.assert_allclose(run(variables, system, x), expected, atol=1e-4)


def test_512_generated_steps_equal_teacher_forcing():
    module = S4Layer(H, 64, l_max=512)
    x = jax.random.normal(jax.random.key(0), (1, 512, H))
    variables = jax.jit(module.init)(jax.random.key(1), x)

    @jax.jit
    def free_run(variables, first):  # each output is the next input
        system = module.apply(variables, method="discretise")

        def body(carry, _):
            u, state = carry
            y, state = module.apply(variables, u, state, system, method="step")
            return (y, state), u

        carry = (first, ssm.zero_state(system, 1))
        return jnp.moveaxis(jax.lax.scan(body, carry, None, length=512)[1], 0, 1)

    inputs = free_run(variables, x[:, 0])
    assert np.abs(inputs[:, 256:]).max() > 1e-3
    outputs = apply(module, variables, inputs)
    np.testing.assert_allclose(outputs[:, :-1], inputs[:, 1:], atol=1e-4)


def test_state_does_not_grow_with_the_sequence():
    module, variables, x = make()

    def state_after(variables, x):
        system = module.apply(variables, method="discretise")
        return module.apply(variables, x, system, method="prefill")[1]

    for length in (1, 7, 40):
        state = jax.eval_shape(state_after, variables, x[:, :length])
        assert (state.shape, state.dtype) == ((2, H, N // 2), jnp.complex64)


def test_diagonal_mode():
    module, variables, x = make(a_init="fout", dt_min=0.01)
    system = module.apply(variables, "diagonal", method="discretise")
    assert len(system.g) == 0
    y, _ = apply(module, variables, x, system, method="prefill")
    np.testing.assert_allclose(y, apply(module, variables, x), atol=1e-3)


@pytest.mark.parametrize("name", ["legs", "free"])
def test_double_length_keeps_the_first_taps(name):
    module, variables, x = make(**VARIANTS[name])
    expected = apply(module, variables, x)
    _, grown = apply(module, variables, method="double_length", mutable="params")
    longer = module.clone(l_max=2 * L)
    np.testing.assert_allclose(apply(longer, grown, x), expected, atol=1e-5)
    if module.kernel == "dplr":  # what lies beyond is what the recurrence would say
        more = jnp.concatenate([x, x], axis=1)
        system = apply(module, variables, method="discretise")
        y, _ = apply(module, variables, more, system, method="prefill")
        np.testing.assert_allclose(apply(longer, grown, more), y, atol=1e-4)


def test_doubling_twice_is_initialising_at_four_times_the_length():
    short = SSMKernel(H, N, l_max=16)
    variables = init(short)
    _, grown = apply(short, variables, method="double_length", mutable="params")
    longer = short.clone(l_max=32)
    _, grown = apply(longer, grown, method="double_length", mutable="params")
    direct = init(short.clone(l_max=64))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grown, direct)


def test_longer_inputs_than_the_internal_length_are_refused():
    module, variables, x = make()
    with pytest.raises(ValueError, match=r"length 80 exceed .* 40 .*double_length"):
        apply(module, variables, jnp.concatenate([x, x], axis=1))


@pytest.mark.parametrize("kernel", ["dplr", "diag"])
def test_half_the_sampling_rate_gives_the_same_filter(kernel):
    # A smooth input, so that every second sample says all.
    module = SSMKernel(H, 4, kernel=kernel, dt_min=1e-3, dt_max=3e-3, l_max=256)
    variables = init(module)
    t = np.arange(256) / 256
    u = jnp.asarray(np.cos(2 * np.pi * 3 * t) - np.cos(2 * np.pi * t), jnp.float32)

    @functools.partial(jax.jit, static_argnames=("module", "length"))
    def filtered(module, u, length):
        return fft_convolve(u, module.apply(variables, length))

    full = filtered(module, u, 256)
    half = filtered(module.clone(rate=2.0), u[1::2], 128)
    wrong = filtered(module, u[1::2], 128)
    scale = np.abs(full).max()
    error = np.abs(half - full[..., 1::2]).max() / scale
    assert error < 0.05 < 5 * error + 0.2 < np.abs(wrong - full[..., 1::2]).max() / scale


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_as_if_absent(bidirectional):
    module, variables, x = make(bidirectional=bidirectional)
    lengths = jnp.array([L, 23])
    garbage = jnp.where(jnp.arange(L)[:, None] < lengths[:, None, None], x, 1e3)
    padded = apply(module, variables, garbage, lengths=lengths)
    alone = apply(module, variables, x[1:, :23])
    np.testing.assert_allclose(padded[1, :23], alone[0], atol=1e-4)
    np.testing.assert_allclose(padded[0], apply(module, variables, x)[0], atol=1e-4)


def test_unidirectional_is_causal_and_bidirectional_is_not():
    for bidirectional in (False, True):
        module, variables, x = make(bidirectional=bidirectional)
        y = apply(module, variables, x)
        z = apply(module, variables, x.at[:, 25:].add(1.0))
        same = np.allclose(y[:, :25], z[:, :25], atol=1e-5)
        assert same != bidirectional
    with pytest.raises(ValueError, match="no recurrence"):
        module.apply(variables, method="discretise")


@pytest.mark.parametrize("name", ["shared-untied", "s4d"])
def test_all_gradients_finite_with_nan_checks_on(name):
    module, variables, x = make(**VARIANTS[name])
    with jax.debug_nans(True):
        gradients = jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, x) ** 2)))(variables)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


def test_freeze_a():
    _, variables, x = make()
    module = S4Layer(H, N, l_max=L, freeze_a=True)
    loss = jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, x) ** 2)))
    gradients = loss(variables)["params"]["ssm"]
    for name in ("lambda_re", "lambda_im", "p"):
        np.testing.assert_array_equal(gradients[name], 0)
    assert np.abs(gradients["log_dt"]).max() > 0 and np.abs(gradients["b"]).max() > 0


def test_stable_after_large_random_steps():
    module = SSMKernel(H, N, l_max=L)
    variables = init(module)

    def step(variables, key):
        keys = jax.random.split(key, len(jax.tree.leaves(variables)))
        keys = jax.tree.unflatten(jax.tree.structure(variables), list(keys))
        return jax.tree.map(
            lambda x, k: x + 0.2 * jax.random.normal(k, x.shape), variables, keys
        ), 0

    variables, _ = jax.lax.scan(step, variables, jax.random.split(jax.random.key(1), 200))
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), variables)
        system = apply(module, double, method="discretise")
        eigenvalues = np.linalg.eigvals(np.asarray(ssm.dense_form(system).a))
    assert np.abs(eigenvalues).max() < 1


def test_initial_system_is_legs():
    # Traces of powers of the recurrence matrix are those of the bilinear transform of LegS.
    module = SSMKernel(2, N, l_max=L)
    variables = init(module)
    ours = np.asarray(ssm.dense_form(apply(module, variables, method="discretise")).a)
    a, *_ = hippo.legs(N)
    dt = np.exp(np.asarray(variables["params"]["log_dt"]))
    for h in range(2):
        ab = np.linalg.solve(np.eye(N) - dt[h] / 2 * a, np.eye(N) + dt[h] / 2 * a)
        for power in (1, 2, 8):
            theirs = np.trace(np.linalg.matrix_power(ab, power))
            np.testing.assert_allclose(
                np.trace(np.linalg.matrix_power(ours[h], power)), theirs, rtol=1e-4
            )


@pytest.mark.parametrize("transform", ["exp", "none", "relu", "clip"])
def test_real_transforms_start_at_legs_and_all_but_none_stay_negative(transform):
    module = SSMKernel(2, N, l_max=L, real_transform=transform, length_correction=False, b_clip=2.0)
    variables = init(module)
    real = module.apply(variables, method="_diagonal")[0].real
    np.testing.assert_allclose(real, -0.5, rtol=1e-5)
    ssm_params = variables["params"]
    assert np.abs(ssm_params["b"][..., 1]).max() <= 2
    for shift in (-3.0, 3.0):
        shifted = {"params": {**ssm_params, "lambda_re": ssm_params["lambda_re"] + shift}}
        real = module.apply(shifted, method="_diagonal")[0].real
        assert (real < 0).all() or (transform == "none" and shift > 0)


def test_parameters_are_real_and_the_small_learning_rate_group_is_complete():
    module = S4Layer(H, N, l_max=L, tie_pq=False, bidirectional=True, output="glu")
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, L, H)))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    assert all(leaf.dtype == jnp.float32 for _, leaf in leaves)
    shapes = {path_str(path): leaf.shape for path, leaf in leaves}
    slow = {path for path in shapes if re.search(SSM_PARAMETERS, path)}
    assert slow == {f"ssm/{n}" for n in ("log_dt", "lambda_re", "lambda_im", "b", "p", "q")}
    assert shapes["ssm/c"] == (2, H, N // 2, 2)
    assert shapes["out/kernel"] == (H, 2 * H)


def test_tied_dropout_shares_one_mask_over_time():
    _, variables, x = make()
    y = S4Layer(H, N, l_max=L, dropout=0.5).apply(
        variables, x, train=True, rngs={"dropout": jax.random.key(3)},
        capture_intermediates=lambda m, _: isinstance(m, nn.Dropout),
    )[1]["intermediates"]["drop"]["__call__"][0]  # fmt: skip
    dropped = np.asarray(y == 0)
    assert (dropped.all(1) | (~dropped).all(1)).all() and dropped.any() and not dropped.all()


def test_bfloat16_layer_keeps_the_state_space_in_single_precision():
    module, variables, x = make()
    y = apply(module.clone(dtype=jnp.bfloat16), variables, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = apply(module, variables, x)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.1)


def test_features_sharded_over_devices():
    features = 16
    module = S4Layer(features, N, l_max=L)
    x = jax.random.normal(jax.random.key(1), (2, L, features))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    rules = [(pattern.replace("layer/", ""), spec) for pattern, spec in partition_rules()]

    def place(path, leaf):
        specs = [spec for pattern, spec in rules if re.search(pattern, path_str(path))]
        return jax.device_put(leaf, NamedSharding(mesh, (specs or [PartitionSpec()])[0]))

    sharded = jax.tree_util.tree_map_with_path(place, variables)
    assert sharded["params"]["ssm"]["c"].sharding.spec == PartitionSpec(None, "model")
    whole = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    def loss(variables, x):
        y = module.apply(variables, x)
        return jnp.sum(y**2), y

    step = jax.jit(jax.grad(loss, has_aux=True))
    compiled = step.lower(sharded, whole).compile()
    gradients, y = compiled(sharded, whole)
    expected_gradients, expected = step(variables, x)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    # Only the output projection sums over features: nothing is ever gathered.
    assert "all-reduce" in compiled.as_text()
    assert not re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())

    def convolve(variables, u):
        kernel = SSMKernel(features, N, l_max=L).apply(variables, L)
        return fft_convolve(jnp.swapaxes(u, 1, 2), kernel[0])

    def state_spaces_only(variables, u):
        out, pull = jax.vjp(convolve, variables, u)
        return out, pull(out)

    kernel_only = {"params": sharded["params"]["ssm"]}
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, None, "model")))
    text = jax.jit(state_spaces_only).lower(kernel_only, split).compile().as_text()
    assert not re.findall(r"all-\w+|collective-\w+|reduce-scatter", text)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kernel": "dpr"}, "dplr, diag, dense, free"),
        ({"a_init": "lin"}, "choose legs, legt, fout, random_nplr"),
        ({"l_max": None}, "needs l_max"),
        ({"n_ssm": 3}, "does not divide"),
        ({"a_init": "legt", "rank": 1}, "rank 2"),
        ({"kernel": "free", "rate": 2.0}, "no sampling rate"),
        ({"output": "gelu"}, "'linear' or 'glu'"),
        ({"discretisation": "zoh"}, "bilinearly"),
    ],
)
def test_errors_say_what_would_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_parameters_split_as_fsdp_would():
    """Shards with an axis of size 1 once had a layout that the FFT on CPUs refused."""
    module = S4Layer(8, N, l_max=L)
    x = jax.random.normal(jax.random.key(1), (8, L, 8))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    layout = Layout(make_mesh({"data": 4, "fsdp": 2}), min_size=1)
    placed = layout.place(variables)
    assert placed["params"]["ssm"]["c"].sharding.spec == PartitionSpec(None, "fsdp")
    gradient = jax.jit(jax.grad(lambda variables, x: jnp.sum(module.apply(variables, x) ** 2)))
    expected = gradient(variables, x)
    found = gradient(placed, layout.place_batch(x))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
