import types

import jax
import jax.numpy as jnp
import pytest

from transfer_jax.training.profiling import (
    ProfileWindow,
    compiled_flops,
    model_flops_utilisation,
    parameter_count,
    peak_flops,
)


def _device(kind, platform="gpu"):
    return types.SimpleNamespace(device_kind=kind, platform=platform)


def test_parameter_count_of_arrays_and_shapes():
    tree = {"a": jnp.zeros((3, 4)), "b": (jnp.zeros(5), jnp.zeros(())), "c": None}
    assert parameter_count(tree) == 3 * 4 + 5 + 1
    assert parameter_count(jax.eval_shape(lambda: tree)) == 18


def test_flops_of_a_matrix_product():
    n, k, m = 64, 32, 16
    compiled = jax.jit(jnp.dot).lower(jnp.zeros((n, k)), jnp.zeros((k, m))).compile()
    assert compiled_flops(compiled) == 2 * n * k * m


@pytest.mark.parametrize(
    "analysis, flops",
    [
        ({"flops": 7.0}, 7.0), ([{"flops": 7.0}], 7.0), ([], None), (None, None), ({}, None),
        ({"flops": -1.0}, None),
    ],
)  # fmt: skip
def test_flops_in_every_form_that_jax_has_given_them(analysis, flops):
    assert compiled_flops(types.SimpleNamespace(cost_analysis=lambda: analysis)) == flops


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA L4", 121), ("Tesla T4", 65), ("NVIDIA B200", 2250),
        ("Tesla V100-SXM2-16GB", 125), ("TPU v2", 23), ("TPU v3", 61.5), ("TPU v4", 275),
        ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5p", 459), ("TPU v5", 459),
        ("TPU v6 lite", 918), ("TPU v6e", 918), ("NVIDIA L40S", None), ("Tesla P100", None),
    ],
)  # fmt: skip
def test_peak_of_known_devices(kind, teraflops):
    assert peak_flops(_device(kind)) == (None if teraflops is None else teraflops * 1e12)


def test_utilisation():
    devices = [_device("Tesla T4")] * 2
    assert model_flops_utilisation(65e12, 1.0, devices) == pytest.approx(0.5)
    assert model_flops_utilisation(65e12, 0.25, devices) == pytest.approx(2.0)
    assert model_flops_utilisation(None, 1.0, devices) is None
    assert model_flops_utilisation(1.0, 1.0, jax.devices()) is None  # a CPU has no known peak
    assert model_flops_utilisation(1.0, 1.0, []) is None


def test_profile_window_traces_exactly_its_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda d: calls.append(("start", d, current)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", current)))
    with ProfileWindow(tmp_path, 3, 5) as profile:
        for current in range(8):
            profile.step(current)
    assert calls == [("start", str(tmp_path), 3), ("stop", 5)]
    calls.clear()
    with ProfileWindow(tmp_path, 3, 50) as profile:  # resumed inside, ends before the stop
        for current in range(4, 8):
            profile.step(current)
    assert calls == [("start", str(tmp_path), 4), ("stop", 7)]
    calls.clear()
    with ProfileWindow(tmp_path) as profile:
        profile.step(0)
    assert calls == []


def test_profile_window_writes_a_trace(tmp_path):
    with ProfileWindow(tmp_path, 0, 1) as profile:
        profile.step(0)
        jnp.ones(3).block_until_ready()
        profile.step(1)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_an_empty_profile_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="start=3, stop=3"):
        ProfileWindow(tmp_path, 3, 3)
