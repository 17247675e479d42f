"""Plain recurrent networks: heads under padding, and language models that generate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.models.generation import Decoding, generate_continuations
from transfer_jax.models.recurrent import RecurrentLanguageModel, RecurrentNetwork
from transfer_jax.nn.recurrent import Recurrent

X = jax.random.normal(jax.random.key(0), (3, 6, 4))
LENGTHS = jnp.array([6, 2, 4])


@pytest.mark.parametrize("head", ["last", "mean"])
def test_heads_read_valid_steps_only(head):
    body = Recurrent(5, cell="elman", bidirectional=True)
    module = RecurrentNetwork(body=body, outputs=2, head=head)
    variables = jax.jit(module.init)(jax.random.key(1), X)
    apply = jax.jit(module.apply)
    together = apply(variables, X, lengths=LENGTHS)
    alone = apply(variables, X[1:2, : LENGTHS[1]])
    np.testing.assert_allclose(together[1], alone[0], atol=1e-6)

    def by_hand(module):
        states = module.body(X)
        ends = jnp.concatenate([states[:, -1, :5], states[:, 0, 5:]], axis=-1)
        return module.output(ends if head == "last" else states.mean(1))

    np.testing.assert_allclose(
        module.apply(variables, X), module.apply(variables, method=by_hand), atol=1e-6
    )


def test_a_language_model_generates_what_it_finds_likeliest():
    module = RecurrentLanguageModel(body=Recurrent(8, 2, "gru"), outputs=5, vocab_size=5)
    prompt = jnp.array([[1, 3, 0], [4, 4, 2]])
    variables = jax.jit(module.init)(jax.random.key(1), prompt)
    variables = jax.tree.map(lambda x: 3 * x, variables)
    new = generate_continuations(module, variables, prompt, Decoding(max_tokens=4)).tokens
    whole = jnp.concatenate([prompt, new], axis=1)
    likeliest = jnp.argmax(module.apply(variables, whole), axis=-1)
    np.testing.assert_array_equal(likeliest[:, 2:-1], new)


def test_impossible_networks_are_refused():
    def network(kind=RecurrentNetwork, body=Recurrent(4), **fields):  # noqa: B008
        module = kind(body=body, outputs=5, **fields)
        return module.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))

    both = Recurrent(4, bidirectional=True)
    with pytest.raises(ValueError, match="reads the future"):
        network(RecurrentLanguageModel, both, vocab_size=5)
    with pytest.raises(ValueError, match="outputs = vocab_size"):
        network(RecurrentLanguageModel, vocab_size=6)
    with pytest.raises(ValueError, match="means real inputs"):
        network()
    with pytest.raises(ValueError, match="choose one of steps"):
        network(vocab_size=5, head="first")
