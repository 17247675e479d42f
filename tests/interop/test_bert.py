"""BERT and RoBERTa: the same weights give the same numbers as in ``transformers``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import peers
from transfer_jax.interop import from_pretrained, resize_vocabulary, save_pretrained

V, L = 40, 9
TOKENS = np.array(jax.random.randint(jax.random.key(0), (2, L), 4, V))
LENGTHS = np.array([L, 6])
MASK = (np.arange(L) < LENGTHS[:, None]).astype(np.int64)


def config(kind):
    fields = {
        "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 24, "max_position_embeddings": 20, "num_labels": 3,
    }  # fmt: skip
    return getattr(peers.transformers, f"{kind}Config")(**fields)


@pytest.fixture(scope="module", params=["Bert", "Roberta"])
def masked_lm(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    name = f"{request.param}ForMaskedLM"
    peer = peers.make_peer(directory, name, config(request.param))
    return directory, name, peer, from_pretrained(directory)


def theirs(peer, tokens=TOKENS, **options):
    inputs = np.where(MASK == 1, tokens, peer.config.pad_token_id)
    return peer(
        peers.to_torch(inputs), attention_mask=peers.to_torch(MASK),
        output_hidden_states=True, **options,
    )  # fmt: skip


def test_all_hidden_states_and_logits(masked_lm):
    _, _, peer, (module, params, _) = masked_lm
    expected = theirs(peer)
    logits = module.apply({"params": params}, TOKENS, lengths=LENGTHS)
    _, states = module.apply(
        {"params": params}, TOKENS, lengths=LENGTHS, hidden_states=True, method="features"
    )
    valid = MASK == 1
    assert len(states) == len(expected.hidden_states) == 4
    for ours, state in zip(states, expected.hidden_states):
        np.testing.assert_allclose(ours[valid], state.detach().numpy()[valid], atol=2e-5)
    np.testing.assert_allclose(
        logits[valid], expected.logits.detach().numpy()[valid], atol=2e-5, rtol=2e-5
    )


def test_gradients(masked_lm, tmp_path):
    _, _, peer, (module, params, _) = masked_lm
    peer.zero_grad()
    valid = peers.to_torch(MASK == 1)
    (theirs(peer).logits[valid] ** 2).mean().backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = module.apply({"params": params}, TOKENS, lengths=LENGTHS)
        return jnp.sum(jnp.where(MASK[..., None], logits, 0) ** 2) / (MASK.sum() * V)

    peers.assert_same_gradients(gradient(params), module, peer, tmp_path / "gradient")


def test_out_and_in_again(masked_lm, tmp_path):
    directory, name, peer, _ = masked_lm
    peers.assert_round_trip(directory, tmp_path / "again", name, peer)


def test_scanned_layers_read_the_same_file(masked_lm, tmp_path):
    directory, _, _, (module, params, _) = masked_lm
    scanned, stacked, _ = from_pretrained(directory, scan=True)
    assert stacked["stack"]["layers"]["mlp"]["up"]["kernel"].shape == (3, 16, 24)
    np.testing.assert_allclose(
        scanned.apply({"params": stacked}, TOKENS), module.apply({"params": params}, TOKENS),
        atol=1e-5,
    )  # fmt: skip
    save_pretrained(tmp_path / "scanned", scanned, stacked)
    again = from_pretrained(tmp_path / "scanned").params
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_classification(kind, tmp_path):
    name = f"{kind}ForSequenceClassification"
    peer = peers.make_peer(tmp_path / "model", name, config(kind))
    module, params, _ = from_pretrained(tmp_path / "model")
    logits = module.apply({"params": params}, TOKENS, lengths=LENGTHS)
    np.testing.assert_allclose(logits, theirs(peer).logits.detach().numpy(), atol=2e-5)
    peers.assert_round_trip(tmp_path / "model", tmp_path / "again", name, peer)


def test_a_new_head_is_drawn_only_when_asked_for(masked_lm):
    directory, name, _, (_, body, _) = masked_lm
    architecture = name.replace("MaskedLM", "SequenceClassification")
    with pytest.raises(ValueError, match=r"missing: .*classifier.*fresh="):
        from_pretrained(directory, architecture=architecture)
    options = {"architecture": architecture, "fresh": ("^classifier", "^pooler")}
    module, params, fresh = from_pretrained(directory, **options)
    paths = [f"{layer}/{leaf}" for layer in ("classifier", "pooler") for leaf in ("bias", "kernel")]
    assert fresh == tuple(paths)
    assert module.config.head == "classification" and "output_bias" not in params
    np.testing.assert_array_equal(params["tokens"]["embedding"], body["tokens"]["embedding"])
    again, other = (from_pretrained(directory, seed=s, **options).params for s in (0, 1))
    kernel = params["classifier"]["kernel"]
    np.testing.assert_array_equal(again["classifier"]["kernel"], kernel)
    assert not np.allclose(other["classifier"]["kernel"], kernel)


def test_a_bare_model_takes_a_head(tmp_path):
    peer = peers.make_peer(tmp_path, "RobertaModel", config("Roberta"))
    module, params, _ = from_pretrained(tmp_path)
    pooled = module.apply(
        {"params": params}, module.apply({"params": params}, TOKENS), method="pooled"
    )
    expected = peer(peers.to_torch(TOKENS)).pooler_output.detach().numpy()
    np.testing.assert_allclose(pooled, expected, atol=2e-5)
    options = {"architecture": "RobertaForSequenceClassification"}
    fresh = from_pretrained(tmp_path, fresh=("^classifier", "^pooler"), **options).fresh
    assert "classifier/kernel" in fresh


def test_what_is_wrong_is_said(masked_lm, tmp_path):
    directory, _, _, (module, params, _) = masked_lm
    with pytest.raises(FileNotFoundError, match="hf download"):
        from_pretrained("some-organisation/some-model")
    with pytest.raises(ValueError, match=r"BertForNothing.*ForMaskedLM"):
        from_pretrained(directory, architecture="BertForNothing")
    with pytest.raises(ValueError, match="stack/layers_0/mlp/up/kernel"):
        broken = jax.tree.map(lambda x: x, params)
        broken["stack"]["layers_0"]["mlp"]["up"]["kernel"] = jnp.zeros((2, 2))
        save_pretrained(tmp_path / "broken", module, broken)
    assert not (tmp_path / "broken").exists()


def test_the_vocabulary_grows_and_shrinks(masked_lm):
    _, _, _, (module, params, _) = masked_lm
    larger, more = resize_vocabulary(module, params, V + 8)
    logits = larger.apply({"params": more}, TOKENS)
    before = module.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(logits[..., :V], before, atol=1e-5)
    assert logits.shape[-1] == V + 8
    smaller, fewer = resize_vocabulary(larger, more, V)
    assert smaller == module
    jax.tree.map(np.testing.assert_array_equal, fewer, params)
