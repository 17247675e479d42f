"""Comparison with ``transformers`` on the same random weights, shared by the families' tests."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees
from transfer_jax.interop import from_pretrained, save_pretrained
from transfer_jax.trees.files import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def make_peer(directory, name, config, **changes):
    """A random model of theirs, saved; weights that start at 0 or 1 are perturbed as well."""
    torch.manual_seed(0)
    peer = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(directory, **changes)
    return peer


def to_torch(x):
    return torch.tensor(np.array(x))


def assert_round_trip(directory, target, name, peer, **options):
    """Reads, writes, and lets both libraries read what was written: bit for bit."""
    module, params, fresh = from_pretrained(directory, **options)
    assert fresh == ()
    save_pretrained(target, module, params, max_shard_size=20_000)
    again = from_pretrained(target, **options)
    assert again.module == module
    assert trees.paths(again.params) == trees.paths(params)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    theirs, ours = Checkpoint(directory), Checkpoint(target)
    for tensor in ours.specs:
        np.testing.assert_array_equal(ours.read(tensor), theirs.read(tensor), err_msg=tensor)
    loaded, info = getattr(transformers, name).from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    expected = peer.state_dict()
    for key, value in loaded.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[key].numpy(), err_msg=key)
    return json.loads((target / "config.json").read_text())


def gradient_names(peer):
    return {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}


def assert_same_gradients(gradient, module, peer, target, atol=1e-4):
    """Compares our gradient with that in ``peer.parameters()``, through our own writer.

    Args:
      gradient: ours, of the parameters' structure.
      module: ours.
      peer: theirs, after ``backward``.
      target: a new directory to write to.
      atol: relative to each tensor's largest entry (at least 1).
    """
    save_pretrained(target, module, gradient)
    written = Checkpoint(target)
    found = gradient_names(peer)
    compared = 0
    for name in written.specs:
        if name not in found:
            continue
        expected = found[name].numpy()
        np.testing.assert_allclose(
            written.read(name), expected, atol=atol * max(1.0, np.abs(expected).max()),
            err_msg=name,
        )  # fmt: skip
        compared += 1
    assert compared >= len(found)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree) if isinstance(x, jnp.ndarray))
