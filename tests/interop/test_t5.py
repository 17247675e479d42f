"""T5: the same weights give the same numbers and the same words as in ``transformers``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import Module

from tests.interop import peers
from transfer_jax.interop import from_pretrained, resize_vocabulary, save_pretrained
from transfer_jax.models import T5, Decoding, generate_targets, t5_config
from transfer_jax.objectives import Seq2Seq
from transfer_jax.objectives.base import Variables

V, S, T = 40, 9, 6
TOKENS = jax.random.randint(jax.random.key(0), (3, S), 2, V)
TARGET = np.array(jax.random.randint(jax.random.key(1), (3, T), 2, V)) * (np.arange(T) > 0)
LENGTHS = jnp.array([S, 6, 3])
MASK = np.array(jnp.arange(S) < LENGTHS[:, None], np.int64)


@pytest.fixture(scope="module", params=["1.0", "1.1"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("t5")
    config = peers.transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=6, d_ff=24, num_layers=1, num_decoder_layers=2, num_heads=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=6,
        decoder_start_token_id=0, tie_word_embeddings=request.param == "1.0",
        feed_forward_proj="relu" if request.param == "1.0" else "gated-gelu",
    )  # fmt: skip
    peer = peers.make_peer(directory, "T5ForConditionalGeneration", config)
    if request.param == "1.1":
        peer.lm_head.weight = peers.torch.nn.Parameter(peers.torch.randn(V, 16))
        peer.save_pretrained(directory)
    return directory, peer, from_pretrained(directory)


apply = jax.jit(
    Module.apply, static_argnums=0, static_argnames=("method", "hidden_states", "max_length")
)


def theirs(peer):
    mask = peers.to_torch(MASK)
    return peer(
        peers.to_torch(TOKENS) * mask, attention_mask=mask,
        decoder_input_ids=peers.to_torch(TARGET), output_hidden_states=True,
    )  # fmt: skip


def test_all_hidden_states_and_logits(model):
    _, peer, (module, params, _) = model
    expected = theirs(peer)
    given = {"params": params}
    context, states = apply(
        module, given, TOKENS, lengths=LENGTHS, hidden_states=True, method="encode"
    )
    assert len(states) == len(expected.encoder_hidden_states) == 2
    for ours, state in zip(states, expected.encoder_hidden_states):
        valid = MASK == 1
        np.testing.assert_allclose(ours[valid], state.detach().numpy()[valid], atol=2e-5)
    _, states = apply(
        module, given, TARGET, context, context_lengths=LENGTHS, hidden_states=True, method="decode"
    )
    assert len(states) == len(expected.decoder_hidden_states) == 3
    for ours, state in zip(states, expected.decoder_hidden_states):
        np.testing.assert_allclose(ours, state.detach().numpy(), atol=2e-5)
    logits = apply(module, given, TOKENS, TARGET, lengths=LENGTHS)
    np.testing.assert_allclose(logits, expected.logits.detach().numpy(), atol=2e-5, rtol=2e-5)


def test_gradients(model, tmp_path):
    _, peer, (module, params, _) = model
    peer.zero_grad()
    (theirs(peer).logits ** 2).mean().backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.mean(module.apply({"params": params}, TOKENS, TARGET, lengths=LENGTHS) ** 2)

    peers.assert_same_gradients(gradient(params), module, peer, tmp_path / "gradient")


def test_out_and_in_again(model, tmp_path):
    directory, peer, _ = model
    config = peers.assert_round_trip(
        directory, tmp_path / "again", "T5ForConditionalGeneration", peer
    )
    assert (
        peers.transformers.T5Config(**config).scale_decoder_outputs == config["tie_word_embeddings"]
    )


@pytest.mark.parametrize("scan", [False, True])
def test_decoding_token_by_token_is_the_whole_pass(model, scan, tmp_path):
    directory, _, (module, params, _) = model
    expected = apply(module, {"params": params}, TOKENS, TARGET, lengths=LENGTHS)
    if scan:
        module, params, _ = from_pretrained(directory, scan=True)
    given = {"params": params}
    start = jax.jit(
        lambda: module.apply(given, TOKENS, lengths=LENGTHS, max_length=T, method="start")
    )
    step = jax.jit(lambda x, state: module.apply(given, x, state, method="step_logits"))
    state = start()
    for t in range(T):
        logits, state = step(TARGET[:, t], state)
        np.testing.assert_allclose(logits, expected[:, t], atol=2e-5)


def test_t5_small_has_its_size_and_its_initial_scales():
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(T5(t5_config()).init, jax.random.key(0), tokens, tokens)["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 60_506_624
    config = t5_config(
        vocab_size=64, features=96, num_layers=1, num_heads=6, head_dim=32, hidden=200
    )
    params = T5(config).init(jax.random.key(0), tokens, tokens)["params"]
    attention = params["decoder"]["layers_0"]["cross_attention"]
    expected = {"query": (96 * 32) ** -0.5, "key": 96**-0.5, "value": 96**-0.5, "out": 192**-0.5}
    for name, scale in expected.items():
        np.testing.assert_allclose(attention[name]["kernel"].std(), scale, rtol=0.05)
    np.testing.assert_allclose(params["tokens"]["embedding"].std(), 1, rtol=0.05)
    mlp = params["encoder"]["layers_0"]["mlp"]
    np.testing.assert_allclose(mlp["down"]["kernel"].std(), 200**-0.5, rtol=0.05)


@pytest.mark.parametrize("model", ["1.1"], indirect=True)
def test_padding_and_dropout_in_the_objective(model):
    _, peer, (module, params, _) = model
    batch = {"inputs": TOKENS, "lengths": LENGTHS, "targets": TARGET[:, 1:]}
    variables = Variables(params, {})
    loss = jax.jit(Seq2Seq(module).loss)
    still = loss(variables, batch, None)[0]
    changed = {**batch, "inputs": np.where(MASK == 1, TOKENS, 7)}
    np.testing.assert_allclose(loss(variables, changed, None)[0], still, rtol=1e-6)
    labels = peers.to_torch(TARGET[:, 1:].astype(np.int64))
    mask = peers.to_torch(MASK)
    expected = peer(peers.to_torch(TOKENS) * mask, attention_mask=mask, labels=labels).loss
    np.testing.assert_allclose(still, expected.detach().numpy(), rtol=1e-5)
    assert module.config.decoder.attention_dropout == 0.1
    one, two, again = (loss(variables, batch, jax.random.key(k))[0] for k in (0, 1, 0))
    assert one == again and len({float(x) for x in (still, one, two)}) == 3


@pytest.mark.parametrize("model", ["1.1"], indirect=True)
def test_the_vocabulary_grows_and_shrinks(model):
    _, _, (module, params, _) = model
    larger, more = resize_vocabulary(module, params, V + 8)
    logits = larger.apply({"params": more}, TOKENS, TARGET, lengths=LENGTHS)
    assert logits.shape[-1] == V + 8
    before = apply(module, {"params": params}, TOKENS, TARGET, lengths=LENGTHS)
    np.testing.assert_allclose(logits[..., :V], before, atol=1e-5)
    smaller, fewer = resize_vocabulary(larger, more, V)
    assert smaller == module
    jax.tree.map(np.testing.assert_array_equal, fewer, params)


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(ValueError, match="head='lm_head'"):
        t5_config(head="lm_head")
    module = T5(t5_config(vocab_size=8, features=4, num_layers=1, gated=True, activation="gelu"))
    with pytest.raises(ValueError, match="gelu_tanh"):
        save_pretrained(tmp_path / "gelu", module, {})


RULES: dict[str, dict[str, Any]] = {
    "greedy": {"eos_id": 33},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram": 2},
    "early": {"num_beams": 3, "length_penalty": 0.3, "early_stopping": True, "min_tokens": 3},
    "never": {
        "num_beams": 2, "early_stopping": "never", "forced_bos_id": 7, "forced_eos_id": 1,
        "no_repeat_ngram": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("model", ["1.1"], indirect=True)
@pytest.mark.parametrize("rules", RULES)
def test_generates_the_same_tokens(model, rules):
    directory, peer, (module, params, _) = model
    if rules == "early":  # beams of scanned caches
        module, params, _ = from_pretrained(directory, scan=True)
    decoding = Decoding(max_tokens=10, **{"eos_id": 18, **RULES[rules]})
    found = generate_targets(module, {"params": params}, TOKENS, decoding, lengths=LENGTHS)
    peers.assert_generated(found, peer, TOKENS, MASK, decoding)
