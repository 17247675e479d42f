"""TTM: published sizes, granite-tsfm and PatchTSMixer on the same weights, symmetries."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.interop import from_pretrained, save_pretrained
from transfer_jax.interop.huggingface import param_shapes
from transfer_jax.interop.ttm import TTM_FAMILY
from transfer_jax.models.ttm import (
    TTM,
    ExogenousMixer,
    Gate,
    Mixer,
    Mixing,
    TTMConfig,
    forecast,
    normalise,
    patchify,
    ttm_a,
    ttm_b,
    ttm_e,
)
from transfer_jax.objectives import Variables
from transfer_jax.objectives.forecasting import Forecasting
from transfer_jax.trees.files import save_safetensors

MIX = {"channels": 14, "decoder_mode": "mix_channel"}
FCM = {**MIX, "fcm": True, "fcm_use_mixer": True, "exogenous_channels": tuple(range(11))}
# The parameters, in all and outside the backbone, that the authors' notebooks print.
PUBLISHED = [
    (ttm_b(), 805_280, 289_696),
    (ttm_b(rpt=True), 854_972, 302_162),
    (ttm_b(context_length=1024), 946_336, 389_984),
    (ttm_e(), 2_964_960, 955_424),
    (ttm_e(rpt=True), 3_126_076, 980_178),
    (ttm_a(), 3_081_120, 1_054_560),
    (ttm_a(rpt=True), 3_243_996, 1_079_394),
    (ttm_b(**MIX), 807_864, 292_280),
    (ttm_b(**FCM), 817_811, 302_227),
    (ttm_b(rpt=True, prediction_length=720), 1_574_444, None),
    (ttm_e(rpt=True, prediction_length=336), 3_679_276, None),
    (ttm_a(rpt=True, prediction_length=192), 3_563_580, None),
]  # fmt: skip


def test_published_parameter_counts():
    for config, total, outside in PUBLISHED:
        shapes = param_shapes(TTM_FAMILY, TTM(config))
        count = sum(x.size for x in jax.tree.leaves(shapes))
        backbone = sum(x.size for x in jax.tree.leaves(shapes["backbone"]))
        assert count == total, config
        assert outside is None or count - backbone == outside, config


# -- peers ------------------------------------------------------------------------------------

TINY = {
    "context_length": 32, "prediction_length": 8, "patch_length": 8, "patch_stride": 8,
    "num_input_channels": 3, "d_model": 16, "num_layers": 1, "adaptive_patching_levels": 2,
    "decoder_num_layers": 1, "decoder_d_model": 12,
}  # fmt: skip
GRANITE = {
    "plain": {},
    "prefix": {
        "resolution_prefix_tuning": True, "frequency_token_vocab_size": 8,
        "decoder_raw_residual": True, "prediction_filter_length": 5, "mode": "mix_channel",
        "scaling": "mean",
    },
    "exogenous": {
        "decoder_mode": "mix_channel", "enable_forecast_channel_mixing": True,
        "fcm_use_mixer": True, "exogenous_channel_indices": [1], "fcm_context_length": 2,
        "categorical_vocab_size_list": [4, 3], "self_attn": True, "self_attn_heads": 2,
        "gated_attn": False, "adaptive_patching_levels": 0,
    },
    "masked": {
        "enable_forecast_channel_mixing": True, "exogenous_channel_indices": [0],
        "fcm_gated_attn": False, "use_positional_encoding": True, "scaling": None,
        "decoder_adaptive_patching_levels": 2, "decoder_d_model": 16,
    },
}  # fmt: skip


def windows(channels=3):
    rng = np.random.default_rng(0)
    past = 2 + rng.normal(size=(2, 32, channels)).astype(np.float32).cumsum(1)
    future = rng.normal(size=(2, 8, channels)).astype(np.float32)
    observed = (rng.uniform(size=past.shape) < 0.8).astype(np.float32)
    return past * observed, future, observed


def perturb(torch, peer):
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peer.eval()


@pytest.mark.parametrize("name", GRANITE)
def test_parity_with_granite_tsfm(name, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("tsfm_public.models.tinytimemixer.modeling_tinytimemixer")
    torch.manual_seed(0)
    config = theirs.TinyTimeMixerConfig(**{**TINY, **GRANITE[name]})
    kind = "TinyTimeMixerForMaskedPrediction" if name == "masked" else "TinyTimeMixerForPrediction"
    peer = perturb(torch, getattr(theirs, kind)(config))
    peer.save_pretrained(tmp_path / "theirs")
    module, params, fresh = from_pretrained(tmp_path / "theirs")
    assert fresh == ()

    past, future, observed = windows()
    given, expected = {}, {}
    if module.config.rpt:
        given["freq_token"], expected["freq_token"] = jnp.array([7, 3]), torch.tensor([7, 3])
    if module.config.static_vocab:
        given["static"] = jnp.array([[3, 0], [1, 2]])
        expected["static_categorical_values"] = torch.tensor([[3, 0], [1, 2]])
    with torch.no_grad():
        expected = peer(
            past_values=torch.tensor(past), future_values=torch.tensor(future),
            past_observed_mask=torch.tensor(observed), **expected,
        )  # fmt: skip
    predict = jax.jit(lambda p, **k: module.apply({"params": p}, past, **k))
    ours = predict(params, future=future, observed=observed, **given)
    np.testing.assert_allclose(ours, expected.prediction_outputs, atol=2e-5)
    batch = {"inputs": past, "targets": future, "observed": observed, **given}
    task = Forecasting(module=module, channels=module.config.targets)
    loss, _ = jax.jit(task.loss)(Variables(params, {}), batch, None)
    np.testing.assert_allclose(loss, expected.loss, rtol=1e-4)

    save_pretrained(tmp_path / "ours", module, params)
    loaded, info = getattr(theirs, kind).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    constant = {"backbone.encoder.positional_encoder.position_enc"}
    assert not set(info["missing_keys"]) - constant and not info["unexpected_keys"], info
    for key, value in loaded.state_dict().items():
        if key not in constant:
            np.testing.assert_array_equal(value, peer.state_dict()[key], err_msg=key)


@pytest.mark.parametrize("mode", ["common_channel", "mix_channel"])
def test_parity_with_patchtsmixer(mode, tmp_path):
    """The flat relative in ``transformers``: no levels, no decoder, the same blocks."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "context_length": 32, "prediction_length": 8, "patch_length": 8, "patch_stride": 4,
        "num_input_channels": 3, "d_model": 16, "num_layers": 2, "mode": mode, "gated_attn": True,
        "self_attn": mode == "mix_channel", "self_attn_heads": 2, "adaptive_patching_levels": 0,
    }  # fmt: skip
    config = transformers.PatchTSMixerConfig(scaling="std", **sizes)
    peer = perturb(torch, transformers.PatchTSMixerForPrediction(config))
    tensors = {
        key.replace("model.encoder", "backbone.encoder", 1): value.numpy()
        for key, value in peer.state_dict().items()
    }
    save_safetensors(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({**sizes, "use_decoder": False, "model_type": "tinytimemixer"})
    )
    module, params, _ = from_pretrained(tmp_path)
    past, _, observed = windows()
    with torch.no_grad():
        expected = peer(torch.tensor(past), observed_mask=torch.tensor(observed))
    np.testing.assert_allclose(
        jax.jit(module.apply)({"params": params}, past, observed=observed),
        expected.prediction_outputs, atol=1e-5,
    )  # fmt: skip


# -- symmetries -------------------------------------------------------------------------------

SMALL = TTMConfig(
    context_length=32, prediction_length=8, patch_length=8, patch_stride=8, channels=3, d_model=16,
    num_layers=1, adaptive_patching_levels=2, decoder_layers=1, decoder_d_model=12,
)  # fmt: skip


@functools.cache
def small():
    return drawn(SMALL)


def drawn(config, **given):
    module = TTM(config)
    past = jnp.asarray(windows(config.channels)[0])
    variables = jax.jit(lambda k: module.init(k, past, **given))(jax.random.key(0))
    return jax.jit(lambda x, **k: module.apply(variables, x, **k)), past, module, variables


def test_affine_equivariance_and_channel_independence():
    predict, past, *_ = small()
    y = predict(past)
    np.testing.assert_allclose(predict(3.0 * past + 40.0), 3.0 * y + 40.0, rtol=1e-3)
    # A constant window is its own forecast, up to sqrt(1e-5) times the head.
    np.testing.assert_allclose(predict(jnp.full_like(past, 5.0)), 5.0, atol=0.05)
    permuted = predict(past[..., jnp.array([2, 0, 1])])
    np.testing.assert_allclose(permuted, y[..., jnp.array([2, 0, 1])], atol=1e-5)
    other = past.at[..., 1].multiply(jnp.linspace(0, 3, 32))
    changed = jnp.abs(predict(other) - y).max(axis=(0, 1))
    assert changed[1] > 1e-3 and changed[0] == changed[2] == 0
    mixed, *_ = drawn(dataclasses.replace(SMALL, decoder_mode="mix_channel"))
    assert (jnp.abs(mixed(other) - mixed(past)).max(axis=(0, 1)) > 1e-4).all()


def test_levels_cut_patches_in_order():
    """K = 2 makes two patches of each, in row-major order; without weights a level does nothing."""
    z = jnp.arange(32.0).reshape(1, 1, 2, 16)
    mixer = Mixer(SMALL, levels=2, layers=1)
    seen = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, Mixing) and context.method_name == "__call__":
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(lambda: mixer.init(jax.random.key(0), z, False))
    assert [x.shape[2:] for x in seen] == [(4, 8), (4, 8), (2, 16), (2, 16)]
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape), variables)
    seen.clear()
    with nn.intercept_methods(note):
        np.testing.assert_array_equal(mixer.apply(zero, z, False), z)
    np.testing.assert_array_equal(seen[0][0, 0], np.arange(32).reshape(4, 8))
    with pytest.warns(UserWarning, match="at most 4"):
        TTMConfig(d_model=16, adaptive_patching_levels=3)
    with pytest.raises(ValueError, match="do not divide"):
        TTMConfig(d_model=30, adaptive_patching_levels=3)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_gate_weights_sum_to_one(axis):
    gate = Gate(axis)
    ones = jnp.ones((2, 3, 4, 5))
    y = gate.init_with_output(jax.random.key(0), ones)[0]
    np.testing.assert_allclose(y.sum(axis=axis), 1.0, rtol=1e-6)


def test_normalisation_and_patches():
    past, _, observed = windows()
    x, loc, scale = normalise(jnp.asarray(past), jnp.asarray(observed), "std")
    values = past[0, :, 1][observed[0, :, 1] > 0]
    np.testing.assert_allclose(loc[0, 0, 1], values.mean(), rtol=1e-5)
    np.testing.assert_allclose(scale[0, 0, 1], np.sqrt(values.var() + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(x * scale + loc, past, atol=1e-5)
    steps = jnp.arange(11.0)[None, :, None]
    np.testing.assert_array_equal(patchify(steps, 3, 3)[0, 0], np.arange(2, 11).reshape(3, 3))
    rows = patchify(steps, 4, 2)[0, 0]
    np.testing.assert_array_equal(rows, np.arange(1, 8, 2)[:, None] + np.arange(4))


# -- prefix, exogenous channels, horizons -----------------------------------------------------


def test_the_prefix_tells_resolutions_apart():
    config = dataclasses.replace(SMALL, rpt=True)
    assert config.num_patches == SMALL.num_patches + 1
    predict, past, module, variables = drawn(config, freq_token=jnp.array([7, 7]))
    hour, five = (predict(past, freq_token=jnp.array([t, 7])) for t in (7, 3))
    assert jnp.abs(hour[0] - five[0]).max() > 1e-3
    np.testing.assert_array_equal(hour[1], five[1])
    with pytest.raises(ValueError, match="freq_token"):
        module.apply(variables, past)


def test_exogenous_values_act_locally():
    lag = 2
    config = dataclasses.replace(
        SMALL, exogenous_channels=(2,), fcm=True, fcm_context=lag, fcm_use_mixer=True
    )
    future = jnp.asarray(windows()[1])
    predict, past, module, variables = drawn(config, future=future)
    y = predict(past, future=future)
    assert y.shape == (2, 8, 2)
    moved = predict(past, future=future.at[:, 4, 2].add(3.0))
    steps = jnp.nonzero(jnp.abs(moved - y).max(axis=(0, 2)) > 1e-6)[0].tolist()
    assert steps == list(range(4 - lag, 4 + lag + 1))
    targets = future.at[..., :2].set(99.0)
    np.testing.assert_array_equal(predict(past, future=targets), y)
    with pytest.raises(ValueError, match="exogenous channels"):
        module.apply(variables, past)


def test_without_lags_the_mixer_is_a_gated_linear_map():
    config = dataclasses.replace(SMALL, fcm=True, fcm_context=0, exogenous_channels=(2,))
    mixer = ExogenousMixer(config)
    base, exogenous = jnp.ones((2, 8, 2)), 2 * jnp.ones((2, 8, 1))
    variables = mixer.init(jax.random.key(0), base, base[:, :0], exogenous, False)
    p = variables["params"]
    x = jnp.array([1.0, 1.0, 2.0])
    weights = jax.nn.softmax(x @ p["gate"]["logits"]["kernel"] + p["gate"]["logits"]["bias"])
    expected = 1.0 + (x * weights) @ p["out"]["kernel"] + p["out"]["bias"]
    found = mixer.apply(variables, base, base[:, :0], exogenous, False)
    np.testing.assert_allclose(found[1, 5], expected, rtol=1e-5)


def test_horizons():
    """Pruning is the beginning of the whole; recursion is calling again on what was forecast."""
    predict, past, module, variables = small()
    y = predict(past)
    short = TTM(dataclasses.replace(SMALL, prediction_filter_length=3))
    np.testing.assert_allclose(jax.jit(short.apply)(variables, past), y[:, :3], rtol=1e-6)
    targets = jnp.asarray(windows()[1])
    batch = {"inputs": past, "targets": targets}
    loss, aux = jax.jit(Forecasting(module=short).loss)(
        Variables(variables["params"], {}), batch, None
    )
    np.testing.assert_allclose(loss, jnp.square(y - targets)[:, :3].mean(), rtol=1e-5)
    assert aux.outputs.shape == (2, 3, 3)
    again = predict(jnp.concatenate([past[:, 8:], y], axis=1))
    expected = jnp.concatenate([y, again[:, :3]], axis=1)
    found = jax.jit(lambda v, x: forecast(module, v, x, 11))(variables, past)
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Last(nn.Module):
    """The last value, times a parameter."""

    @nn.compact
    def __call__(self, inputs):
        return self.param("scale", nn.initializers.ones, ()) * jnp.repeat(inputs[:, -1:], 8, axis=1)


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "pinball"])
def test_losses(name):
    """Against NumPy, with missing targets and a padding row."""
    past, targets, _ = windows()
    known = np.random.default_rng(1).uniform(size=targets.shape) < 0.7
    task = Forecasting(module=Last(), loss_name=name, quantile=0.9)
    batch = {"inputs": past, "targets": np.where(known, targets, np.nan), "known": known}
    variables = task.init(jax.random.key(0), batch)
    loss, aux = task.loss(variables, batch, None)
    e = targets - np.asarray(aux.outputs)
    per = {
        "mse": e**2, "mae": abs(e), "pinball": np.maximum(0.9 * e, -0.1 * e),
        "huber": np.where(abs(e) < 1, e**2 / 2, abs(e) - 0.5),
    }[name]  # fmt: skip
    np.testing.assert_allclose(loss, per[known].mean(), rtol=1e-5)
    masked, _ = task.loss(variables, {**batch, "mask": np.array([1.0, 0.0])}, None)
    np.testing.assert_allclose(masked, per[0][known[0]].mean(), rtol=1e-5)
