"""Longformer: the same weights give the same numbers as in ``transformers``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import peers
from transfer_jax.interop import from_pretrained, save_pretrained
from transfer_jax.models import Longformer, longformer_config, longformer_stack

V, L = 40, 19
TOKENS = np.array(jax.random.randint(jax.random.key(0), (2, L), 4, V))
LENGTHS = np.array([L, 13])
MASK = (np.arange(L) < LENGTHS[:, None]).astype(np.int64)
GLOBAL = np.zeros((2, L), np.int64)
GLOBAL[0, [0, 8, 15]] = GLOBAL[1, 3] = 1


def config(window, **fields):
    return peers.transformers.LongformerConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=40, attention_window=window, **fields
    )  # fmt: skip


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("longformer")
    peer = peers.make_peer(directory, "LongformerForMaskedLM", config([4, 8]))
    return directory, peer, from_pretrained(directory)


def theirs(peer, **options):
    inputs = np.where(MASK == 1, TOKENS, peer.config.pad_token_id)
    return peer(
        peers.to_torch(inputs), attention_mask=peers.to_torch(MASK), **options
    )  # fmt: skip


def test_all_hidden_states_and_logits(masked_lm):
    _, peer, (module, params, _) = masked_lm
    assert module.config.stack.window == (2, 4)
    expected = theirs(peer, global_attention_mask=peers.to_torch(GLOBAL), output_hidden_states=True)

    @jax.jit
    def run(params):
        x, states = module.apply(
            {"params": params}, TOKENS, lengths=LENGTHS, global_mask=GLOBAL, hidden_states=True,
            method="features",
        )  # fmt: skip
        return states, module.apply({"params": params}, x, method="head")

    states, logits = run(params)
    valid = MASK == 1
    assert len(states) == len(expected.hidden_states) == 3
    for ours, state in zip(states, expected.hidden_states):
        np.testing.assert_allclose(ours[valid], state.detach().numpy()[valid], atol=2e-5)
    np.testing.assert_allclose(
        logits[valid], expected.logits.detach().numpy()[valid], atol=2e-5, rtol=2e-5
    )
    local = module.apply({"params": params}, TOKENS, lengths=LENGTHS)
    expected = theirs(peer).logits.detach().numpy()
    np.testing.assert_allclose(local[valid], expected[valid], atol=2e-5, rtol=2e-5)


def test_gradients(masked_lm, tmp_path):
    _, peer, (module, params, _) = masked_lm
    peer.zero_grad()
    logits = theirs(peer, global_attention_mask=peers.to_torch(GLOBAL)).logits
    (logits[peers.to_torch(MASK == 1)] ** 2).mean().backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = module.apply({"params": params}, TOKENS, lengths=LENGTHS, global_mask=GLOBAL)
        return jnp.sum(jnp.where(MASK[..., None], logits, 0) ** 2) / (MASK.sum() * V)

    peers.assert_same_gradients(gradient(params), module, peer, tmp_path / "gradient")


def test_out_and_in_again(masked_lm, tmp_path):
    directory, peer, _ = masked_lm
    written = peers.assert_round_trip(directory, tmp_path / "again", "LongformerForMaskedLM", peer)
    assert written["attention_window"] == [4, 8]
    with pytest.raises(ValueError, match="layers that are alike"):
        from_pretrained(directory, scan=True)


def test_classification_reads_the_first_token_which_is_global(tmp_path):
    name = "LongformerForSequenceClassification"
    peer = peers.make_peer(tmp_path / "model", name, config([8, 8], num_labels=3))
    expected = theirs(peer).logits.detach().numpy()
    module, params, _ = from_pretrained(tmp_path / "model")
    found = module.apply({"params": params}, TOKENS, lengths=LENGTHS)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    peers.assert_round_trip(tmp_path / "model", tmp_path / "again", name, peer)
    scanned, stacked, _ = from_pretrained(tmp_path / "model", scan=True)
    found = scanned.apply({"params": stacked}, TOKENS, lengths=LENGTHS)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    save_pretrained(tmp_path / "scanned", scanned, stacked)
    again = from_pretrained(tmp_path / "scanned").params
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_published_base_model_has_its_number_of_parameters():
    module = Longformer(longformer_config(stack=longformer_stack(scan=True), pooler=True))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 148_659_456
