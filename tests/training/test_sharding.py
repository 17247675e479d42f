"""Placement: rules in order, the FSDP default, errors that name the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from transfer_jax.training.sharding import Layout, bytes_per_device, make_mesh, placement_table


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "model": 1}
    assert dict(make_mesh({"fsdp": 2, "model": 2}).shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert dict(make_mesh({"data": 1, "fsdp": -1}).shape) == {"data": 1, "fsdp": 8, "model": 1}
    assert make_mesh({"data": 2}, jax.devices()[:2]).size == 2
    for sizes in ({"data": 3}, {"data": -1, "fsdp": -1}, {"data": 4, "fsdp": 4}, {"data": 0}):
        with pytest.raises(ValueError, match="does not fit 8"):
            make_mesh(sizes)
    with pytest.raises(ValueError, match=r"unknown mesh axes \['tensor'\]"):
        make_mesh({"tensor": 2})


def test_first_rule_wins_and_the_default_splits_the_largest_axis():
    layout = Layout(
        make_mesh({"data": 2, "fsdp": 2, "model": 2}),
        rules=(("head/kernel", P(None, "model")), ("head", P()), ("norm", P("fsdp"))),
        min_size=100,
    )
    assert layout.spec("head/kernel", (8, 6)) == P(None, "model")
    assert layout.spec("head/other", (800, 600)) == P()
    assert layout.spec("body/kernel", (10, 64)) == P(None, "fsdp")
    assert layout.spec("body/kernel", (64, 10)) == P("fsdp")
    assert layout.spec("body/odd", (101, 33)) == P()
    assert layout.spec("body/small", (9, 2)) == P()
    assert layout.batch_devices == 4


def test_rules_that_do_not_fit_name_the_leaf():
    layout = Layout(
        make_mesh({"model": 8}), rules=(("w", P("model")), ("v", P(None, None, "model")))
    )
    with pytest.raises(ValueError, match=r"'w' of shape \(12,\).*unequal"):
        layout.spec("w", (12,))
    with pytest.raises(ValueError, match="more axes than the array"):
        layout.spec("v", (8, 8))
    with pytest.raises(ValueError, match="uses mesh axes"):
        Layout(make_mesh(), rules=(("w", P("tensor")),)).spec("w", (8,))


def test_placed_arrays_and_their_table():
    layout = Layout(make_mesh({"data": 1, "fsdp": 8}), min_size=1)
    tree = {"w": np.ones((16, 4), np.float32), "b": jnp.ones(3), "scale": 2.0}
    placed = layout.place(tree)
    assert placed["w"].sharding.shard_shape((16, 4)) == (2, 4)
    assert bytes_per_device(placed) == 16 * 4 * 4 // 8 + 12 + 4
    table = placement_table(placed).splitlines()
    assert len(table) == 5 and table[-1].split() == ["total", "48"]
    again = layout.place(placed)
    assert again["w"] is placed["w"]


def test_placing_copies():
    """What is placed may be donated without taking the caller's array with it."""
    layout = Layout(make_mesh({"data": 1}, jax.devices()[:1]))
    mine = jax.device_put(jnp.ones(4), jax.devices()[0])
    placed = layout.place({"w": mine})
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(placed)
    assert float(mine.sum()) == 4.0


def test_batches_that_do_not_divide_are_refused():
    layout = Layout(make_mesh())
    with pytest.raises(ValueError, match=r"batch of 12 .* multiple of 8"):
        layout.place_batch({"inputs": np.ones((12, 2))})
    placed = layout.place_batch({"inputs": np.ones((16, 2), np.float32)})
    assert placed["inputs"].sharding.shard_shape((16, 2)) == (2, 2)
