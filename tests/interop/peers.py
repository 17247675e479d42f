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


def assert_generated(found, peer, tokens, mask, decoding):
    """Compares what we generated under ``decoding`` with what ``transformers`` does."""
    mask, pad = to_torch(mask), peer.config.pad_token_id
    beams = decoding.num_beams > 1
    given = {"length_penalty": decoding.length_penalty, "early_stopping": decoding.early_stopping}
    output = peer.generate(
        to_torch(tokens) * mask + pad * (1 - mask), attention_mask=mask, do_sample=False,
        max_new_tokens=decoding.max_tokens, min_new_tokens=decoding.min_tokens or None,
        eos_token_id=decoding.eos_id, pad_token_id=pad, num_beams=decoding.num_beams,
        forced_bos_token_id=decoding.forced_bos_id, forced_eos_token_id=decoding.forced_eos_id,
        no_repeat_ngram_size=decoding.no_repeat_ngram, return_dict_in_generate=True,
        output_scores=True, use_cache=False, **(given if beams else {}),
    )  # fmt: skip
    start = 1 if peer.config.is_encoder_decoder else tokens.shape[1]
    expected = output.sequences.numpy()[:, start:]
    assert found.lengths.max() == expected.shape[1]
    for row, length in enumerate(found.lengths):
        np.testing.assert_array_equal(found.tokens[row, :length], expected[row, :length])
        ended = found.tokens[row, length - 1] == decoding.eos_id
        assert ended or length == decoding.max_tokens
    if beams:
        np.testing.assert_allclose(found.scores, output.sequences_scores.numpy(), rtol=1e-4)
