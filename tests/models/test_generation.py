"""Decoding: beams find the best sequences, draws follow the distribution, rules are kept."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.models import Decoding, LanguageModel, generate_continuations
from transfer_jax.models.generation import beam_search, greedy, sample

V, EOS, STATES = 5, 4, 7
TABLE = 2.0 * jax.random.normal(jax.random.key(0), (STATES, V, V))
LOG_P = np.array(jax.nn.log_softmax(TABLE))
PROMPT = jnp.array([[0], [1], [3]])


def step(tokens, state):
    """A model whose state remembers all tokens: what beams must take with them."""
    count, past = state
    return TABLE[past, tokens], (count + 1, (3 * past + tokens) % STATES)


def start(prompt=PROMPT):
    return jnp.int32(0), jnp.zeros(prompt.shape[0], jnp.int32)


def log_probability(first, tokens):
    past, last, total = 0, first, 0.0
    for token in tokens:
        total += LOG_P[past, last, token]
        past, last = (3 * past + last) % STATES, token
    return total


def all_sequences(length):
    for tokens in itertools.product(range(V), repeat=length):
        ends = [i for i, token in enumerate(tokens) if token == EOS]
        if not ends or ends == [length - 1]:
            yield tokens
    if length > 1:
        yield from (t for t in all_sequences(length - 1) if t[-1] == EOS)


@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_enough_beams_find_the_best_of_all_sequences(penalty):
    decoding = Decoding(
        max_tokens=4, eos_id=EOS, pad_id=2, num_beams=64, early_stopping="never",
        length_penalty=penalty,
    )  # fmt: skip
    found = jax.jit(lambda: beam_search(step, start(), PROMPT, decoding))()
    for row, first in enumerate(PROMPT[:, 0]):
        scored = [(log_probability(int(first), s) / len(s) ** penalty, s) for s in all_sequences(4)]
        for k, (score, tokens) in enumerate(sorted(scored, reverse=True)[:5]):
            assert found.lengths[row, k] == len(tokens)
            padded = (*tokens, *[2] * (4 - len(tokens)))
            np.testing.assert_array_equal(found.tokens[row, k], padded)
            np.testing.assert_allclose(found.scores[row, k], score, rtol=1e-5)


def test_one_beam_is_greedy_and_greedy_is_the_likeliest_token():
    decoding = Decoding(max_tokens=6, eos_id=EOS)
    one = jax.jit(lambda: greedy(step, start(), PROMPT, decoding))()
    stop = decoding.replace(early_stopping=True, length_penalty=0.0)
    beam = jax.jit(lambda: beam_search(step, start(), PROMPT, stop))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 0], b, rtol=1e-6), beam, one)
    # With the first logits known, the state is one token further on.
    logits, state = step(PROMPT[:, 0], start())
    again = jax.jit(greedy, static_argnums=0)(step, state, PROMPT, decoding, logits=logits)
    jax.tree.map(np.testing.assert_array_equal, again, one)
    for row, first in enumerate(PROMPT[:, 0]):
        tokens = [int(t) for t in one.tokens[row, : one.lengths[row]]]
        np.testing.assert_allclose(one.scores[row], log_probability(int(first), tokens), rtol=1e-5)
        for i, token in enumerate(tokens):
            others = [log_probability(int(first), [*tokens[:i], v]) for v in range(V)]
            assert np.argmax(others) == token and (token != EOS or i == len(tokens) - 1)
        assert not one.tokens[row, len(tokens) :].any()


@pytest.mark.parametrize("beams", [1, 3])
def test_rules_are_kept(beams):
    decoding = Decoding(
        max_tokens=9, min_tokens=3, eos_id=EOS, no_repeat_ngram=2, forced_bos_id=2,
        forced_eos_id=EOS, num_beams=beams,
    )  # fmt: skip
    prompt = jnp.array([[2, 1, 2, 0, 0], [1, 2, 3, 3, 2], [0, 1, 2, 2, 3]])
    search = beam_search if beams > 1 else greedy
    found = jax.jit(lambda: search(step, start(), prompt, decoding))()
    tokens, lengths = (x.reshape(3 * beams, *x.shape[2 if beams > 1 else 1 :]) for x in found[:2])
    for row, (new, length) in enumerate(zip(np.array(tokens), np.array(lengths))):
        assert new[0] == 2 and new[length - 1] == EOS and 3 < length <= 9
        whole = [int(t) for t in (*prompt[row // beams], *new[:length])]
        pairs = list(itertools.pairwise(whole))
        after = [pairs.index(pair) for pair in pairs[5:-1]]  # the first and last one are forced
        assert after == list(range(5, len(pairs) - 1))


def test_draws_follow_the_distribution_that_is_left():
    rows = 20_000
    prompt = jnp.zeros((rows, 1), jnp.int32)
    p = np.exp(LOG_P[0, 0])
    order = np.argsort(-p)

    @jax.jit
    def draw(decoding):
        return sample(step, start(prompt), prompt, decoding, rng=jax.random.key(1))

    def check(weights, **options):
        found = draw(Decoding(max_tokens=2, sample=True, **options))
        expected = weights / weights.sum()
        frequency = np.bincount(found.tokens[:, 0], minlength=V) / rows
        assert np.all(np.abs(frequency - expected) <= 5 * np.sqrt(expected / rows))
        first = [log_probability(0, [int(t) for t in x]) for x in found.tokens[:20]]
        np.testing.assert_allclose(found.scores[:20], first, rtol=1e-4)

    check(p)
    check(p**0.5, temperature=2.0)
    check(np.where(np.isin(np.arange(V), order[:2]), p, 0), top_k=2)
    inside = p[order[:2]].sum() + 0.5 * p[order[2]]  # the third is needed to reach it
    check(np.where(np.isin(np.arange(V), order[:3]), p, 0), top_p=inside)


@pytest.mark.parametrize("mixer", ["attention", "lstm"])
def test_beams_of_a_sequence_model_have_the_scores_of_one_pass(mixer):
    module = LanguageModel(features=8, depth=1, vocab_size=11, mixer=mixer)
    prompt = jax.random.randint(jax.random.key(7), (2, 4), 0, 11)
    variables = jax.jit(module.init)(jax.random.key(0), prompt)
    decoding = Decoding(max_tokens=7, num_beams=3, length_penalty=0.0, no_repeat_ngram=2)
    found = generate_continuations(module, variables, prompt, decoding)
    whole = jnp.concatenate([prompt, found.tokens], axis=1)
    log_p = jax.nn.log_softmax(jax.jit(module.apply)(variables, whole)[:, 3:-1])
    rescored = jnp.take_along_axis(log_p, found.tokens[..., None], axis=-1).sum((1, 2))
    np.testing.assert_allclose(found.scores, rescored, rtol=1e-4)
    assert len(np.unique(found.tokens)) > 3


def test_gpt2_continues_as_in_transformers(tmp_path):
    pytest.importorskip("transformers")
    from tests.interop import peers
    from transfer_jax.interop import from_pretrained

    config = peers.transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=20, initializer_range=0.5
    )
    peer = peers.make_peer(tmp_path, "GPT2LMHeadModel", config)
    peer.config.pad_token_id = 0
    module, params, _ = from_pretrained(tmp_path)
    prompt = jax.random.randint(jax.random.key(7), (3, 6), 0, 6)
    one = Decoding(max_tokens=8, eos_id=9, no_repeat_ngram=2)
    for decoding in (one, one.replace(num_beams=3, length_penalty=2.0)):
        found = generate_continuations(module, {"params": params}, prompt, decoding)
        peers.assert_generated(found, peer, prompt, np.ones((3, 6), int), decoding)


def test_what_contradicts_itself_is_refused():
    def run(**options):
        return greedy(step, start(), PROMPT, Decoding(**{"max_tokens": 3, **options}))

    with pytest.raises(ValueError, match="max_tokens=0"):
        run(max_tokens=0)
    with pytest.raises(ValueError, match="num_beams > 1"):
        run(sample=True, num_beams=2)
    with pytest.raises(ValueError, match="choose True, False or 'never'"):
        run(early_stopping="always")
    with pytest.raises(ValueError, match="eos_id"):
        run(min_tokens=2)
    module = LanguageModel(features=4, depth=1, vocab_size=V, mixer="gru")
    variables = module.init(jax.random.key(0), PROMPT)
    with pytest.raises(ValueError, match="give rng"):
        generate_continuations(module, variables, PROMPT, Decoding(max_tokens=1, sample=True))
    with pytest.raises(ValueError, match="P >= 1"):
        generate_continuations(module, variables, PROMPT[:, :0], Decoding(max_tokens=1))
