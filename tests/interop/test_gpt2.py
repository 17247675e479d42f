"""GPT-2: the same weights give the same numbers, and the same texts, as in ``transformers``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import peers
from transfer_jax.interop import from_pretrained, save_pretrained
from transfer_jax.models import GPT2, GPT2Config, generate, gpt2_stack

V, L = 40, 9
TOKENS = np.array(jax.random.randint(jax.random.key(0), (2, L), 0, V))
NAME = "GPT2LMHeadModel"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    config = peers.transformers.GPT2Config(
        vocab_size=V, n_positions=24, n_embd=16, n_layer=3, n_head=4, n_inner=20,
        initializer_range=0.3,  # so that continuations vary
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("gpt2")
    return directory, peers.make_peer(directory, NAME, config), from_pretrained(directory)


def test_all_hidden_states_and_logits(gpt2):
    _, peer, (module, params, _) = gpt2
    expected = peer(peers.to_torch(TOKENS), output_hidden_states=True)
    x, states = module.apply({"params": params}, TOKENS, hidden_states=True, method="features")
    assert len(states) == len(expected.hidden_states) == 4
    for ours, state in zip(states, expected.hidden_states):
        np.testing.assert_allclose(ours, state.detach().numpy(), atol=2e-5)
    logits = module.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, expected.logits.detach().numpy(), atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(logits, module.apply({"params": params}, x, method="logits"))


def test_gradients(gpt2, tmp_path):
    _, peer, (module, params, _) = gpt2
    peer.zero_grad()
    (peer(peers.to_torch(TOKENS)).logits ** 2).mean().backward()
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(module.apply({"params": p}, TOKENS) ** 2)))
    peers.assert_same_gradients(gradient(params), module, peer, tmp_path / "gradient")


def test_the_likeliest_continuation_token_for_token(gpt2):
    directory, peer, (module, params, _) = gpt2
    count = 12
    prompt = peers.to_torch(TOKENS)
    expected = peer.generate(
        prompt, attention_mask=peers.torch.ones_like(prompt), max_new_tokens=count,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )[:, L:].numpy()  # fmt: skip
    assert len(np.unique(expected)) >= 4
    options = {"rng": jax.random.key(0), "temperature": 0.0}
    found = generate(module, {"params": params}, TOKENS, count, **options)
    np.testing.assert_array_equal(found, expected)
    scanned, stacked, _ = from_pretrained(directory, scan=True)
    found = generate(scanned, {"params": stacked}, TOKENS, count, **options)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"25 tokens do not fit: .* 24 rows"):
        generate(module, {"params": params}, TOKENS, 25 - L, **options)


def test_out_and_in_again(gpt2, tmp_path):
    directory, peer, (_, params, _) = gpt2
    written = peers.assert_round_trip(directory, tmp_path / "again", NAME, peer)
    assert written["n_inner"] == 20
    scanned, stacked, _ = from_pretrained(directory, scan=True)
    save_pretrained(tmp_path / "scanned", scanned, stacked)
    again = from_pretrained(tmp_path / "scanned").params
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_bare_model_reads_the_file_of_either(gpt2, tmp_path):
    directory, _, (_, params, _) = gpt2
    module, bare, fresh = from_pretrained(directory, architecture="GPT2Model")
    assert module.config.head is None and fresh == ()
    save_pretrained(tmp_path / "bare", module, bare)
    assert "GPT2Model" in (tmp_path / "bare" / "config.json").read_text()
    again = from_pretrained(tmp_path / "bare", architecture=NAME).params
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_published_small_model_has_its_number_of_parameters():
    module = GPT2(GPT2Config(vocab_size=50_257, stack=gpt2_stack(scan=True)))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 124_439_808
