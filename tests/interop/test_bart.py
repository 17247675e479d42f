"""BART and mBART: the same weights give the same numbers and words as in ``transformers``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import Module

from tests.interop import peers
from transfer_jax.interop import from_pretrained, resize_vocabulary, save_pretrained
from transfer_jax.models import Decoding, generate_targets

V, S, T = 40, 9, 6
TOKENS = jax.random.randint(jax.random.key(0), (3, S), 3, V)
TARGET = jax.random.randint(jax.random.key(1), (3, T), 3, V)
LENGTHS = jnp.array([S, 6, 3])
MASK = np.array(jnp.arange(S) < LENGTHS[:, None], np.int64)


@pytest.fixture(scope="module", params=["Bart", "MBart"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    mbart = request.param == "MBart"
    config = getattr(peers.transformers, f"{request.param}Config")(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=20, dropout=0.2,
        attention_dropout=0.3, activation_dropout=0.4, max_position_embeddings=20, init_std=0.25,
        scale_embedding=mbart, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    name = f"{request.param}ForConditionalGeneration"
    peer = peers.make_peer(directory, name, config)
    peer.final_logits_bias.copy_(peers.torch.randn(1, V))
    peer.save_pretrained(directory)
    return directory, name, peer, from_pretrained(directory)


apply = jax.jit(
    Module.apply, static_argnums=0, static_argnames=("method", "hidden_states", "max_length")
)


def theirs(peer):
    mask = peers.to_torch(MASK)
    return peer(
        peers.to_torch(TOKENS) * mask + 1 - mask, attention_mask=mask,
        decoder_input_ids=peers.to_torch(TARGET), output_hidden_states=True,
    )  # fmt: skip


def test_all_hidden_states_and_logits(model):
    _, _, peer, (module, params, _) = model
    expected = theirs(peer)
    given = {"params": params}
    context, states = apply(
        module, given, TOKENS, lengths=LENGTHS, hidden_states=True, method="encode"
    )
    valid = MASK == 1
    assert len(states) == len(expected.encoder_hidden_states) == 2
    for ours, state in zip(states, expected.encoder_hidden_states):
        np.testing.assert_allclose(ours[valid], state.detach().numpy()[valid], atol=2e-5)
    _, states = apply(
        module, given, TARGET, context, context_lengths=LENGTHS, hidden_states=True,
        method="decode",
    )  # fmt: skip
    assert len(states) == len(expected.decoder_hidden_states) == 3
    for ours, state in zip(states, expected.decoder_hidden_states):
        np.testing.assert_allclose(ours, state.detach().numpy(), atol=2e-5)
    logits = apply(module, given, TOKENS, TARGET, lengths=LENGTHS)
    np.testing.assert_allclose(logits, expected.logits.detach().numpy(), atol=2e-5, rtol=2e-5)


def test_gradients(model, tmp_path):
    _, _, peer, (module, params, _) = model
    peer.zero_grad()
    (theirs(peer).logits ** 2).mean().backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.mean(module.apply({"params": params}, TOKENS, TARGET, lengths=LENGTHS) ** 2)

    found = gradient(params)
    assert not found["output_bias"].any()  # a buffer there
    peers.assert_same_gradients(found, module, peer, tmp_path / "gradient")


def test_out_and_in_again(model, tmp_path):
    directory, name, peer, (module, _, _) = model
    peers.assert_round_trip(directory, tmp_path / "again", name, peer)
    s = module.config.decoder
    assert (s.dropout, s.attention_dropout, s.activation_dropout) == (0.2, 0.3, 0.4)


@pytest.mark.parametrize("scan", [False, True])
def test_decoding_token_by_token_is_the_whole_pass(model, scan):
    directory, _, _, (module, params, _) = model
    expected = apply(module, {"params": params}, TOKENS, TARGET, lengths=LENGTHS)
    if scan:
        module, params, _ = from_pretrained(directory, scan=True)
    given = {"params": params}
    state = apply(module, given, TOKENS, lengths=LENGTHS, max_length=T, method="start")
    for t in range(T):
        logits, state = apply(module, given, TARGET[:, t], state, method="step_logits")
        np.testing.assert_allclose(logits, expected[:, t], atol=2e-5, rtol=1e-5)


RULES: dict[str, dict[str, Any]] = {
    "Bart": {
        "eos_id": 33, "num_beams": 3, "length_penalty": 1.5, "no_repeat_ngram": 2, "min_tokens": 3
    },
    "MBart": {"eos_id": 31, "start_id": 5},
}  # fmt: skip


def test_generates_the_same_tokens(model):
    _, name, peer, (module, params, _) = model
    rules = RULES[name.removesuffix("ForConditionalGeneration")]
    decoding = Decoding(max_tokens=10, pad_id=1, **{"start_id": 2, **rules})
    peer.generation_config.decoder_start_token_id = decoding.start_id
    found = generate_targets(module, {"params": params}, TOKENS, decoding, lengths=LENGTHS)
    peers.assert_generated(found, peer, TOKENS, MASK, decoding)


@pytest.mark.parametrize("model", ["Bart"], indirect=True)
def test_bare_files_heads_and_the_vocabulary(model, tmp_path):
    directory, _, _, (module, params, _) = model
    larger, more = resize_vocabulary(module, params, V + 8)
    logits = apply(larger, {"params": more}, TOKENS, TARGET, lengths=LENGTHS)
    before = apply(module, {"params": params}, TOKENS, TARGET, lengths=LENGTHS)
    np.testing.assert_allclose(logits[..., :V], before, atol=1e-5)
    bare, body, _ = from_pretrained(directory, architecture="BartModel")
    assert "output_bias" not in body
    save_pretrained(tmp_path / "bare", bare, body)
    assert from_pretrained(tmp_path / "bare").module == bare
    again = from_pretrained(
        tmp_path / "bare", architecture="BartForConditionalGeneration", fresh=("output_bias",)
    )
    assert again.module == module and not again.params["output_bias"].any()
    with pytest.raises(ValueError, match="bart has BartForConditionalGeneration, BartModel"):
        from_pretrained(directory, architecture="BartForSequenceClassification")
    long = jnp.zeros((1, 21), jnp.int32)
    with pytest.raises(ValueError, match="21 tokens do not fit: the position table has 22 rows"):
        module.apply({"params": params}, long, TARGET)
    with pytest.raises(ValueError, match="21 tokens do not fit"):
        generate_targets(module, {"params": params}, TOKENS, Decoding(max_tokens=21))
