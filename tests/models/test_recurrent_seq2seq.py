"""Recurrent encoder-decoders: what the decoder sees, one path for training and decoding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.models.generation import Decoding, generate_targets
from transfer_jax.models.recurrent_seq2seq import Captioner, RecurrentSeq2Seq
from transfer_jax.objectives import Seq2Seq

V, SOURCE, H = 3, 5, 6
TOKENS = jax.random.randint(jax.random.key(0), (4, 7), 0, SOURCE)
LENGTHS = jnp.array([7, 3, 1, 5])
TARGETS = jax.random.randint(jax.random.key(1), (4, 4), 0, V)
KINDS = {
    "attention": {"layers": 2, "attention": True, "cell": "gru"},
    "input feeding": {"attention": True, "input_feeding": True, "reverse_source": True},
}


def make(**options):
    return RecurrentSeq2Seq(vocab_size=V, source_vocab_size=SOURCE, features=H, **options)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    module = make(**KINDS[request.param])
    variables = jax.jit(module.init)(jax.random.key(2), TOKENS, TARGETS)
    # Far from the linear regime, so that what is ignored would show.
    return module, jax.tree.map(lambda x: 2.5 * x, variables)


def test_training_and_decoding_agree_and_padding_does_not_count(model):
    module, variables = model
    whole = module.apply(variables, TOKENS, TARGETS, lengths=LENGTHS)
    assert whole.shape == (4, 4, V) and whole.dtype == jnp.float32
    state = module.apply(variables, TOKENS, lengths=LENGTHS, method="start")
    step = jax.jit(
        lambda tokens, state: module.apply(variables, tokens, state, method="step_logits")
    )
    for t in range(TARGETS.shape[1]):
        logits, state = step(TARGETS[:, t], state)
        np.testing.assert_allclose(logits, whole[:, t], atol=1e-5)
    # Each source alone, without padding: reversal stays within the length.
    for row in (1, 3):
        alone = TOKENS[row : row + 1, : LENGTHS[row]]
        logits = module.apply(variables, alone, TARGETS[row : row + 1])
        np.testing.assert_allclose(logits[0], whole[row], atol=1e-5)


def test_a_reversed_source_is_reversed_before_padding():
    variables = jax.jit(make(reverse_source=True).init)(jax.random.key(2), TOKENS, TARGETS)
    flipped = np.array(TOKENS)
    for row, length in enumerate(LENGTHS):
        flipped[row, :length] = flipped[row, :length][::-1]
    assert (flipped != TOKENS).any()
    given, natural = (
        make(reverse_source=reverse).apply(variables, tokens, TARGETS, lengths=LENGTHS)
        for reverse, tokens in ((True, TOKENS), (False, jnp.asarray(flipped)))
    )
    np.testing.assert_allclose(given, natural, rtol=1e-6)


def test_the_decoder_starts_from_every_layer():
    module = make(layers=2)
    task = Seq2Seq(module=module)
    batch = {"inputs": TOKENS, "targets": TARGETS, "lengths": LENGTHS}
    variables = jax.jit(task.init)(jax.random.key(2), batch)
    params = {"params": variables.params}
    state = module.apply(params, TOKENS, lengths=LENGTHS, method="start")
    decode = jax.jit(lambda state: module.apply(params, TARGETS, state, method="decode")[0])
    given = decode(state)
    for layer in range(2):
        layers = list(state.layers)
        layers[layer] = jax.tree.map(jnp.zeros_like, layers[layer])
        without = decode(state._replace(layers=tuple(layers)))
        assert (jnp.abs(without - given).max(axis=(1, 2)) > 1e-5).all()
    gradient = jax.jit(jax.grad(lambda v: task.loss(v, batch, None)[0]))(variables).params
    for layer in range(2):
        assert jnp.abs(gradient["encoder"][f"forward_{layer}"]["hidden"]["kernel"]).max() > 0


def test_additive_attention_by_hand():
    module = make(attention=True)
    variables = jax.jit(module.init)(jax.random.key(3), TOKENS, TARGETS)
    p = jax.tree.map(np.asarray, variables["params"])
    state = module.apply(variables, TOKENS, lengths=LENGTHS, method="start")
    hidden = jax.random.normal(jax.random.key(4), (4, 2, H))
    found = module.apply(variables, hidden, state, method="attend")
    for b, t in itertools.product(range(4), range(2)):
        context = np.asarray(state.context[b, : LENGTHS[b]])
        query = hidden[b, t] @ p["query"]["kernel"]
        score = np.tanh(query + context @ p["key"]["kernel"]) @ p["score"]["kernel"][:, 0]
        weights = np.exp(score) / np.exp(score).sum()
        both = np.concatenate([hidden[b, t], weights @ context])
        np.testing.assert_allclose(found[b, t], np.tanh(both @ p["combine"]["kernel"]), atol=1e-5)


def test_beams_find_the_best_sequence_of_all(model):
    module, variables = model
    end, length = 2, 4
    decoding = Decoding(max_tokens=length, start_id=0, eos_id=end, pad_id=1, length_penalty=0.0)

    def find(**changes):
        return generate_targets(
            module, variables, TOKENS, decoding.replace(**changes), lengths=LENGTHS
        )

    sequences = [
        s[: s.index(end) + 1] if end in s else s for s in itertools.product(range(V), repeat=length)
    ]
    sequences = sorted(set(sequences))
    padded = jnp.array([[*s, *[1] * (length - len(s))] for s in sequences])
    scores = jax.jit(jax.vmap(lambda s: _score(module, variables, s, end)))(padded)
    best = find(num_beams=V**length, early_stopping="never")
    np.testing.assert_allclose(best.scores, scores.max(axis=0), rtol=1e-4)
    np.testing.assert_array_equal(best.tokens, padded[scores.argmax(axis=0)])
    narrow = find(num_beams=2, early_stopping="never")
    assert (narrow.scores <= best.scores + 1e-5).all()
    greedy = find()
    assert (greedy.scores <= best.scores + 1e-5).all()


def _score(module, variables, sequence, end):
    """The log-probability [4] of a padded sequence, up to its end."""
    targets = jnp.tile(sequence, (4, 1))
    inputs = jnp.concatenate([jnp.zeros_like(targets[:, :1]), targets[:, :-1]], axis=1)
    logits = module.apply(variables, TOKENS, inputs, lengths=LENGTHS)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    before = jnp.cumsum(targets == end, axis=1) - (targets == end)
    return jnp.where(before == 0, picked, 0).sum(axis=1)


def test_an_image_is_the_first_input_and_may_be_an_input_of_every_step():
    images = jax.random.normal(jax.random.key(5), (4, 9))
    module = Captioner(vocab_size=V, features=H, embedding=4, every_step=True)
    variables = jax.jit(module.init)(jax.random.key(2), images, TARGETS)

    def by_hand(module):
        first = module.embed_image(images)[:, None]
        words = module.embed(TARGETS)
        x = jnp.concatenate([first, words], axis=1)
        x = jnp.concatenate([x, jnp.broadcast_to(first, x.shape)], axis=-1)
        return module.head(module.decoder(x))[:, 1:]

    logits = module.apply(variables, images, TARGETS)
    np.testing.assert_allclose(logits, module.apply(variables, method=by_hand), atol=1e-6)
    state = module.apply(variables, images, method="start")
    first, _ = module.apply(variables, TARGETS[:, 0], state, method="step_logits")
    np.testing.assert_allclose(first, logits[:, 0], atol=1e-6)
    # Teacher forcing and greedy decoding see the same captions.
    decoding = Decoding(max_tokens=3, num_beams=1)
    written = generate_targets(module, variables, images, decoding)
    shifted = jnp.pad(written.tokens[:, :-1], ((0, 0), (1, 0)))
    again = jnp.argmax(module.apply(variables, images, shifted), axis=-1)
    np.testing.assert_array_equal(again, written.tokens)


def test_impossible_models_are_refused():
    with pytest.raises(ValueError, match="set attention=True"):
        make(input_feeding=True).init(jax.random.key(0), TOKENS, TARGETS)
    with pytest.raises(ValueError, match="choose one of"):
        make(cell="lsmt").init(jax.random.key(0), TOKENS, TARGETS)
