"""The recommender's network: what it sees, what it ties, and BertForMaskedLM with its weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.data.interactions import Sequences
from transfer_jax.models import counting
from transfer_jax.models.recommender import SequentialRecommender, encoder_stack, last_position

N, L = 20, 8
RNG = np.random.default_rng(0)
FULL = RNG.integers(1, N + 1, (3, L)).astype(np.int32)


def module(*, causal=False, num_layers=1, **fields):
    stack = encoder_stack(16, num_layers=num_layers, num_heads=2, hidden=32, causal=causal)
    return SequentialRecommender(**{
        "num_items": N, "max_length": L + 8, "stack": stack, **fields
    })  # fmt: skip


@functools.partial(jax.jit, static_argnames=("module", "method"))
def apply(module, variables, *inputs, method="__call__"):
    return module.apply(variables, *inputs, method=method)


@functools.cache
def initialise(module):
    variables = jax.jit(module.init)(jax.random.key(0), FULL)
    keys = iter(jax.random.split(jax.random.key(1), 50))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), variables)


MODULES = {
    "bert4rec": module(),
    "sasrec": module(causal=True, head="dot"),
    "gru4rec": module(encoder="gru", head="dot"),
    "right": module(alignment="right"),
    "causal right": module(causal=True, alignment="right"),
}


@pytest.mark.parametrize("name", MODULES)
def test_who_sees_whom(name):
    """Bidirectional: a later item changes an earlier place. Causal: it must not."""
    m = MODULES[name]
    variables = initialise(m)
    changed = FULL.copy()
    changed[:, 5] = changed[:, 5] % N + 1
    before, after = apply(m, variables, FULL), apply(m, variables, changed)
    difference = np.abs(np.array(before - after)).max(axis=(0, 2))
    assert difference[5:].min() > 1e-4
    if m.stack.causal or m.encoder == "gru":
        np.testing.assert_array_equal(difference[:5], 0)
    else:
        assert difference[:5].min() > 1e-4


@pytest.mark.parametrize("name", MODULES)
def test_padding_is_not_seen(name):
    m = MODULES[name]
    variables = initialise(m)
    if m.alignment == "left":
        longer = np.pad(FULL, ((0, 0), (0, 8)))
        np.testing.assert_allclose(
            apply(m, variables, longer)[:, :L], apply(m, variables, FULL), atol=1e-5
        )
        np.testing.assert_array_equal(last_position(longer), L - 1)
        return
    # Positions count from the left end, so shift the table with the items.
    longer = np.pad(FULL, ((0, 0), (8, 0)))
    table = variables["params"]["position_table"]["embedding"]
    shifted = {"params": {**variables["params"]}}
    shifted["params"]["position_table"] = {"embedding": jnp.roll(table, 8, axis=0)}
    np.testing.assert_allclose(
        apply(m, shifted, longer)[:, 8:], apply(m, variables, FULL), atol=1e-5
    )
    np.testing.assert_array_equal(last_position(longer), L + 7)


def test_the_output_table_is_the_input_table():
    """The gradient is the sum of both paths, and row i alone moves score i of other inputs."""
    m = MODULES["bert4rec"]
    variables = initialise(m)

    def loss(inside, outside):
        params = {**variables["params"], "items": {"embedding": inside}}
        queries = m.apply({"params": params}, FULL)
        return jnp.sum(jnp.sin(queries @ outside.T))

    def tied(table):
        params = {"params": {**variables["params"], "items": {"embedding": table}}}
        return jnp.sum(jnp.sin(m.apply(params, FULL) @ m.apply(params, method="output")[0].T))

    table = variables["params"]["items"]["embedding"]
    both = jax.jit(jax.grad(loss, argnums=(0, 1)))(table, table)
    np.testing.assert_allclose(jax.jit(jax.grad(tied))(table), sum(both), rtol=1e-4, atol=1e-5)
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in both)
    assert "output" not in variables["params"]


def test_without_positions_and_with_uniform_attention_it_is_a_bag():
    """Wq = 0, no positions: the masked place sees the mean of the context (CBOW)."""
    m = module(positions=False)
    variables = initialise(m)
    params = variables["params"]
    assert "position_table" not in params
    attention = params["body"]["layers_0"]["attention"]
    query = jax.tree.map(jnp.zeros_like, attention["query"])
    layer = {**params["body"]["layers_0"], "attention": {**attention, "query": query}}
    uniform = {"params": {**params, "body": {"layers_0": layer}}}
    masked = np.concatenate([FULL[:, :-1], np.full((3, 1), m.mask_id)], axis=1).astype(np.int32)
    shuffled = masked[:, [4, 2, 6, 0, 1, 5, 3, 7]]
    first, second = apply(m, uniform, masked)[:, -1], apply(m, uniform, shuffled)[:, -1]
    np.testing.assert_allclose(first, second, atol=1e-5)
    ordered = module()
    apart = apply(ordered, initialise(ordered), masked) - apply(
        ordered, initialise(ordered), shuffled
    )
    assert float(jnp.abs(apart[:, -1]).max()) > 1e-2


def test_tables_are_rounded_up_and_settings_checked():
    m = module(special_rows=4, round_rows_to=16)
    assert (m.rows, m.mask_id) == (32, N + 1)
    assert initialise(m)["params"]["items"]["embedding"].shape == (32, 16)
    assert initialise(m)["params"]["output_bias"].shape == (32,)
    for fields, message in (
        ({"alignment": "middle"}, "left, right"),
        ({"encoder": "gru", "alignment": "right"}, "must be 'left'"),
        ({"max_length": 4}, "positions for 4"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module(**fields).init, jax.random.key(0), FULL)


def test_equals_bert_for_masked_lm(tmp_path):
    """Encoder and head with the weights of transformers' model: one row of token types added."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.interop.peers import make_peer, to_torch
    from transfer_jax.interop import from_pretrained

    config = transformers.BertConfig(
        vocab_size=N + 2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=L, type_vocab_size=1,
    )  # fmt: skip
    peer = make_peer(tmp_path, "BertForMaskedLM", config)
    params = dict(from_pretrained(tmp_path).params)
    types = params.pop("token_types")["embedding"][0]
    params["position_table"] = {"embedding": params.pop("positions")["embedding"] + types}
    params["items"], params["body"] = params.pop("tokens"), params.pop("stack")
    stack = encoder_stack(16, num_layers=2, num_heads=2, dropout=0.1)
    ours = SequentialRecommender(num_items=N, max_length=L, stack=stack)
    inputs = FULL.copy()
    inputs[0, 5:] = 0
    inputs[1, 3] = ours.mask_id
    queries = apply(ours, {"params": params}, inputs)
    table, bias = ours.apply({"params": params}, method="output")
    logits = np.array(queries @ table.T + bias)
    tokens = to_torch(inputs.astype(np.int64))
    expected = peer(tokens, attention_mask=(tokens > 0).long()).logits.detach().numpy()
    valid = inputs > 0
    np.testing.assert_allclose(logits[valid], expected[valid], atol=2e-5)


def test_counting():
    train = Sequences.of([[1, 2, 3], [1, 2], [4, 2, 3, 3], []])
    history = Sequences.of([[4, 1], [2]])
    pop = counting.popularity(train, 4)(history)
    np.testing.assert_array_equal(pop, [[0, 2, 3, 3, 1]] * 2)
    follows = counting.markov(train, 4)(history)
    np.testing.assert_array_equal(follows.astype(int), [[0, 0, 2, 0, 0], [0, 0, 0, 2, 0]])
    assert follows[0, 3] > follows[0, 4]  # never followed: the more popular one first
    users = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]], float)  # each item once a user
    norms = np.linalg.norm(users, axis=0)
    cosine = users.T @ users / norms[:, None] / norms
    np.fill_diagonal(cosine, 0)
    expected = [cosine[0] + cosine[3] / 2, cosine[1]]
    np.testing.assert_allclose(counting.item_knn(train, 4)(history)[:, 1:], expected, rtol=1e-5)
