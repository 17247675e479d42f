"""Recformer: what a vector depends on, the two losses, and a matrix that no gradient reaches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from transfer_jax.models.longformer import longformer_config, longformer_stack
from transfer_jax.models.recformer import Recformer
from transfer_jax.objectives import Variables
from transfer_jax.objectives.recformer import FineTuning, PreTraining, mask_words, matching_scores
from transfer_jax.training import Layout, make_mesh
from transfer_jax.trees import paths

V, PAD, MASK = 30, 1, 4


def network(layers=2, window=2, **fields):
    stack = longformer_stack(
        features=8, num_layers=layers, num_heads=2, hidden=16, window=window, max_global=1,
        dropout=0.0, attention_dropout=0.0, init_scale=0.4,
    )  # fmt: skip
    config = longformer_config(
        vocab_size=V, stack=stack, max_positions=130, head="masked_lm", token_types=4
    )
    return Recformer(config, max_items=5, **fields)


def sequences(rows=4, length=12, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    lengths = jax.random.randint(keys[0], (rows,), 5, length + 1)
    inputs = jax.random.randint(keys[1], (rows, length), 5, V).at[:, 0].set(0)
    places = jnp.minimum(jnp.broadcast_to((jnp.arange(length) + 3) // 4, inputs.shape), 5)
    batch = {
        "inputs": jnp.where(jnp.arange(length) < lengths[:, None], inputs, PAD),
        "token_types": jax.random.randint(keys[2], inputs.shape, 1, 3).at[:, 0].set(0),
        "item_positions": places,
        "lengths": lengths,
    }
    items = {"inputs": inputs[:, :6], "token_types": batch["token_types"][:, ::2]}
    items["lengths"] = jnp.minimum(lengths, 6)
    return batch | {f"item_{name}": value for name, value in items.items()}


BATCH = sequences()


def params_of(module):
    names = ("lengths", "token_types", "item_positions")
    init = functools.partial(module.init, method="encode")
    return jax.jit(init)(jax.random.key(1), BATCH["inputs"], **{n: BATCH[n] for n in names})[
        "params"
    ]


MODULE = network()
PARAMS = params_of(MODULE)


def encode(params, batch, module=MODULE, method="encode"):
    names = ("lengths", "token_types", "item_positions")
    run = jax.jit(functools.partial(module.apply, method=method))
    return run({"params": params}, batch["inputs"], **{name: batch[name] for name in names})


@pytest.mark.parametrize("pooling", ["cls", "avg"])
def test_padding_and_the_rest_of_the_batch_do_not_matter(pooling):
    module = network(pooling=pooling)
    together = encode(PARAMS, BATCH, module)
    longer = {
        name: value if value.ndim == 1 else jnp.pad(value, ((0, 0), (0, 64)), constant_values=1)
        for name, value in BATCH.items()
    }
    np.testing.assert_allclose(encode(PARAMS, longer, module), together, atol=1e-5)
    for row, size in enumerate(BATCH["lengths"]):
        alone = {n: v[row : row + 1, :size] if v.ndim > 1 else v[row : row + 1]
                 for n, v in BATCH.items()}  # fmt: skip
        np.testing.assert_allclose(
            module.apply({"params": PARAMS}, alone["inputs"], method="encode",
                         token_types=alone["token_types"],
                         item_positions=alone["item_positions"])[0],
            together[row], atol=1e-5,
        )  # fmt: skip


def test_order_types_and_item_positions_are_seen_unless_switched_off():
    inputs = jnp.array([[0, 7, 8, 9, 10]])
    first = {
        "inputs": inputs, "token_types": jnp.array([[0, 1, 2, 1, 2]]),
        "item_positions": jnp.array([[0, 1, 1, 2, 2]]), "lengths": jnp.array([5]),
    }  # fmt: skip
    swapped = first | {"inputs": jnp.array([[0, 9, 10, 7, 8]])}
    types = first | {"token_types": jnp.array([[0, 1, 2, 2, 1]])}
    places = first | {"item_positions": jnp.array([[0, 1, 1, 1, 2]])}
    blind = network(use_types=False, use_items=False)
    assert not {"token_types", "item_positions"} & set(params_of(blind))
    for module, unseen in ((MODULE, ()), (blind, (types, places))):
        h = encode(PARAMS, first, module)
        for other in (swapped, types, places):
            change = np.abs(encode(PARAMS, other, module) - h).max()
            assert change == 0 if any(other is u for u in unseen) else change > 1e-3


def test_one_layer_reaches_beyond_the_window_through_the_first_token_alone():
    module = network(layers=1, window=2)
    params = params_of(module)
    full = {**sequences(rows=1), "lengths": jnp.array([12])}
    before = encode(params, full, module, "states")
    other = full | {"inputs": full["inputs"].at[0, 6].add(1)}
    changed = np.abs(encode(params, other, module, "states") - before).max(axis=2)[0] > 1e-6
    assert changed.tolist() == [True] + [False] * 3 + [True] * 5 + [False] * 3
    first = full | {"inputs": full["inputs"].at[0, 0].add(5)}
    assert (np.abs(encode(params, first, module, "states") - before).max(axis=2) > 1e-6).all()
    # The projections of the first token act on its row alone, and set to the others give the same
    # row as attention to everything.
    attention = params["stack"]["layers_0"]["attention"]
    same = {f"{n}_global": attention[n] for n in ("query", "key", "value")}
    equal = jax.tree.map(lambda x: x, params)
    equal["stack"]["layers_0"]["attention"] = {**attention, **same}
    after = encode(equal, full, module, "states")
    assert np.abs(after - before)[0, 0].max() > 1e-3
    np.testing.assert_array_equal(after[0, 1:], before[0, 1:])
    plain = {name: x for name, x in equal["stack"]["layers_0"]["attention"].items()
             if not name.endswith("_global")}  # fmt: skip
    equal["stack"]["layers_0"]["attention"] = plain
    dense = encode(equal, full, network(layers=1, window=None), "states")
    np.testing.assert_allclose(dense[0, 0], after[0, 0], atol=1e-5)


# -- pre-training ---------------------------------------------------------------------------------

TASK = PreTraining(module=MODULE, starts=jnp.arange(V) % 3 != 0, mask_id=MASK)


def test_matching_in_closed_form():
    value = jax.jit(lambda b: TASK.loss(Variables(PARAMS, {}), b, None)[0])
    assert value(jax.tree.map(lambda x: x[:1], BATCH)) == 0
    order = jnp.array([2, 0, 3, 1])
    loss = value(BATCH)
    np.testing.assert_allclose(value(jax.tree.map(lambda x: x[order], BATCH)), loss, rtol=1e-5)
    masked = jax.tree.map(lambda x: jnp.concatenate([x, x[:2]]), BATCH)
    masked["mask"] = jnp.array([1.0, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(value(masked), loss, rtol=1e-5)  # padding rows are no negatives
    equal = matching_scores(jnp.ones((5, 3)), 7 * jnp.ones((5, 3)), 0.1)
    np.testing.assert_allclose(equal, 10.0, rtol=1e-6)  # so the loss is log B
    np.testing.assert_allclose(-jax.nn.log_softmax(equal)[0, 0], np.log(5), rtol=1e-6)


def test_the_batch_is_one_on_any_devices():
    batch = sequences(rows=8)

    def slope(params, task, batch):
        return jax.value_and_grad(lambda p: task.loss(Variables(p, {}), batch, None)[0])(params)

    expected = jax.jit(slope)(PARAMS, TASK, batch)
    layout = Layout(make_mesh({"data": 8}))
    placed = layout.place(PARAMS), layout.place(TASK), layout.place_batch(batch)
    found = jax.jit(slope)(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    assert expected[1]["tokens"]["embedding"][PAD].any() == 0  # padding has no gradient


def test_masks_take_whole_words():
    rows, length = 200, 40
    tokens = jnp.tile(jnp.arange(5, 25).repeat(2), (rows, 1))
    starts = jnp.tile(jnp.arange(length) % 2 == 0, (rows, 1))  # words of two tokens
    lengths = jnp.full(rows, length).at[0].set(10)
    read, chosen = mask_words(
        jax.random.key(0), tokens, starts, lengths, share=0.15, mask_id=MASK, vocab_size=V
    )
    read, chosen = np.array(read), np.array(chosen)
    assert not chosen[:, 0].any() and not chosen[0, 10:].any()
    np.testing.assert_array_equal(read[~chosen], np.array(tokens)[~chosen])
    np.testing.assert_array_equal(chosen[:, 2::2], chosen[:, 3::2])  # never half a word
    assert abs(chosen[1:, 1:].mean() - 0.15) < 0.015
    masked, same = read[chosen] == MASK, read[chosen] == np.array(tokens)[chosen]
    assert abs(masked.mean() - 0.8 - 0.1 / V) < 0.04 and abs(same.mean() - 0.1 - 0.1 / V) < 0.03
    loss, aux = jax.jit(TASK.loss)(Variables(PARAMS, {}), BATCH, jax.random.key(0))
    terms = {name: mean.value() for name, mean in aux.metrics.items()}
    total = terms["iic"] + 0.1 * (terms["mlm"] + terms["item_mlm"])
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    assert 0 < aux.metrics["mlm"].weight < BATCH["lengths"].sum() * 0.5


# -- fine-tuning ----------------------------------------------------------------------------------

ITEMS = 9


def catalogue(rows=12):
    batch = sequences(rows=rows, length=7, seed=3)
    return {name: batch[name] for name in ("inputs", "token_types", "lengths")}


def fine_tuning(**fields):
    options = {"module": MODULE, "catalogue": catalogue(), "num_items": ITEMS, "chunk": 4}
    return FineTuning(**{**options, **fields})


LABELLED = BATCH | {"labels": jnp.array([1, 9, 3, 3])}


def test_all_items_in_chunks_are_each_item_alone():
    table = jax.jit(FineTuning.encode_items)(fine_tuning(), PARAMS)
    rows = catalogue()
    places = jnp.broadcast_to(jnp.minimum(jnp.arange(7), 1), (12, 7))
    np.testing.assert_allclose(table, encode(PARAMS, rows | {"item_positions": places}), atol=1e-5)


def test_the_matrix_is_renewed_at_the_first_step_of_an_epoch_and_gets_no_gradient():
    tuning = fine_tuning(every=5)
    state = tuning.init(jax.random.key(0), LABELLED).state
    assert state["table"].shape == (12, 8) and not state["table"].any()

    @jax.jit
    def step(params, state, number):
        def loss(params):
            value, aux = tuning.at(number).loss(Variables(params, state), LABELLED, key)
            return value, aux.state

        return jax.value_and_grad(loss, has_aux=True)(params)

    key = jax.random.key(5)
    (first, state), slope = step(PARAMS, state, 0)
    table = jax.jit(FineTuning.encode_items)(tuning, PARAMS)
    np.testing.assert_allclose(state["table"], table, atol=1e-6)
    # The same where the matrix is given: it is data.
    (second, kept), other = step(PARAMS, {"table": table, "epoch": jnp.int32(0)}, 0)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), slope, other)
    np.testing.assert_array_equal(kept["table"], table)
    moved = jax.tree.map(lambda x: x + 0.1, PARAMS)
    for number, renewed in ((4, False), (5, True)):
        (_, after), _ = step(moved, state, number)
        assert bool((after["table"] == state["table"]).all()) != renewed
        assert after["epoch"] == renewed

    # A softmax over the cosines of all items, and nothing else.
    unit = table / jnp.linalg.norm(table, axis=1, keepdims=True)
    h = encode(PARAMS, LABELLED)
    scores = h / jnp.linalg.norm(h, axis=1, keepdims=True) @ unit[1 : ITEMS + 1].T / 0.05
    nll = -jax.nn.log_softmax(scores)[jnp.arange(4), LABELLED["labels"] - 1].mean()
    np.testing.assert_allclose(first, nll, rtol=1e-4)
    metrics = jax.jit(tuning.loss)(Variables(PARAMS, state), LABELLED, None)[1].metrics
    right = jnp.argmax(scores, axis=1) + 1 == LABELLED["labels"]
    np.testing.assert_allclose(metrics["hr@1"].value(), right.mean())


def test_the_items_are_encoded_by_all_devices_together():
    tuning = fine_tuning(catalogue=catalogue(16), chunk=8)
    variables = Variables(PARAMS, tuning.init(jax.random.key(0), LABELLED).state)
    rules = (("catalogue/", PartitionSpec("data")), ("table$", PartitionSpec("model")))
    layout = Layout(make_mesh({"data": 4, "model": 2}), rules)

    @jax.jit
    def step(tuning, variables, batch):
        loss, aux = tuning.loss(variables, batch, jax.random.key(0))
        return loss, aux.state["table"]

    expected = step(tuning, variables, LABELLED)
    placed = layout.place(tuning), layout.place(variables), layout.place_batch(LABELLED)
    assert placed[0].catalogue["inputs"].sharding.shard_shape((16, 7)) == (4, 7)
    assert placed[1].state["table"].sharding.shard_shape((16, 8)) == (8, 8)
    found = step(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_a_trainable_matrix_has_a_gradient_and_the_catalogue_adds_no_parameters():
    task = fine_tuning(trainable=True)
    params = {"encoder": PARAMS, "table": jax.random.normal(jax.random.key(2), (12, 8))}

    @jax.jit
    def slope(params):
        key = jax.random.key(0)
        return jax.grad(lambda p: task.loss(Variables(p, {}), LABELLED, key)[0])(params)["table"]

    gradient = np.abs(slope(params)).sum(axis=1)
    assert (gradient[1 : ITEMS + 1] > 0).all() and not gradient[ITEMS + 1 :].any()
    assert not gradient[0]
    sizes = [
        jax.eval_shape(t.init, jax.random.key(0), LABELLED).params
        for t in (fine_tuning(), fine_tuning(catalogue=catalogue(24), num_items=20))
    ]
    assert [x.shape for x in jax.tree.leaves(sizes[0])] == [
        x.shape for x in jax.tree.leaves(sizes[1])
    ]
    assert not any("table" in path for path in paths(sizes[0]))


def test_other_negatives_are_the_softmax_that_they_say():
    state = {"table": jax.random.normal(jax.random.key(2), (12, 8)), "epoch": jnp.int32(0)}

    def loss(**fields):
        task = fine_tuning(**fields)
        return jax.jit(task.loss)(Variables(PARAMS, state), LABELLED, jax.random.key(0))[0]

    unit = state["table"] / jnp.linalg.norm(state["table"], axis=1, keepdims=True)
    h = encode(PARAMS, LABELLED)
    scores = np.array(h / jnp.linalg.norm(h, axis=1, keepdims=True) @ unit.T / 0.05)
    labels = np.array(LABELLED["labels"])
    own = scores[np.arange(4), labels]
    among = [[1, 9, 3, 3], [1, 9, 3, 3], [1, 9, 3], [1, 9, 3]]  # the right one counts once
    expected = [np.log(np.exp(scores[i, a] - own[i]).sum()) for i, a in enumerate(among)]
    np.testing.assert_allclose(loss(negatives="batch"), np.mean(expected), rtol=1e-4)
    # Very many uniform draws: log(e^own + K mean of the others).
    many = loss(negatives="sampled", count=20_000)
    shifted = np.exp(scores[:, 1 : ITEMS + 1] - own[:, None])
    wanted = np.log(1 + 20_000 * (shifted.sum(axis=1) - 1) / ITEMS).mean()
    np.testing.assert_allclose(many, wanted, rtol=5e-3)
    with pytest.raises(ValueError, match="choose one of all, sampled, batch"):
        fine_tuning(negatives="none").init(jax.random.key(0), LABELLED)
    with pytest.raises(ValueError, match="a multiple of chunk=5"):
        fine_tuning(chunk=5).init(jax.random.key(0), LABELLED)
