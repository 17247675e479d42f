"""Conversion networks: tables, padding, common features, heads, gradients, sharding."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees
from transfer_jax.models.conversion import ConversionNetwork, Tower, partition_rules
from transfer_jax.objectives import Variables
from transfer_jax.objectives.conversion import EntireSpace, chain_nll
from transfer_jax.training import Layout, make_mesh

RNG = np.random.default_rng(0)
FIELDS = (("user", 17, 1), ("tags", 9, 3), ("item", 23, 2))
SMALL = {"fields": FIELDS, "features": 4, "stddev": 0.3}
NETWORK = ConversionNetwork(**SMALL, tower=Tower(hidden=(8, 4), activation="prelu"))
BATCH, GROUPS = 16, 5

COMMON = {
    "ids": RNG.integers(0, 9, (GROUPS, 4)).astype(np.int32),
    "weights": RNG.random((GROUPS, 4)).astype(np.float32),
}
OWN = {
    "ids": RNG.integers(0, 23, (BATCH, 2)).astype(np.int32),
    "weights": RNG.random((BATCH, 2)).astype(np.float32),
}
INDEX = RNG.integers(0, GROUPS, BATCH).astype(np.int32)
INPUTS = {k: np.concatenate([COMMON[k][INDEX], OWN[k]], 1) for k in ("ids", "weights")}
INPUTS["dense"] = RNG.normal(size=(BATCH, 2)).astype(np.float32)
CLICKS = (np.arange(BATCH) % 3 == 0).astype(np.float32)
LABELS = np.stack([CLICKS, CLICKS * (np.arange(BATCH) % 2)], 1)


def init(network, seed=0):
    return jax.jit(network.init)(jax.random.key(seed), INPUTS)["params"]


PARAMS = init(NETWORK)


@partial(jax.jit, static_argnums=0)
def apply(network, params, inputs):
    return network.apply({"params": params}, inputs)


LOGITS = apply(NETWORK, PARAMS, INPUTS)


@jax.jit
def _loss_and_grads(task, params, batch):
    return jax.value_and_grad(lambda p: task.loss(Variables(p, {}), batch, None)[0])(params)


def loss_and_grads(network, params, labels=LABELS, **options):
    batch = {"inputs": INPUTS, "labels": labels}
    return _loss_and_grads(EntireSpace(module=network, **options), params, batch)


def test_the_network_read_line_by_line():
    e = PARAMS["embeddings"]
    ids, weights = INPUTS["ids"], INPUTS["weights"] * (INPUTS["ids"] != 0)
    parts, start = [], 0
    for name, _, slots in FIELDS:
        rows = np.asarray(e[name])[ids[:, start : start + slots]]
        parts.append((rows * weights[:, start : start + slots, None]).sum(1))
        start += slots
    h = np.concatenate([*parts, INPUTS["dense"]], 1)
    for k, stage in enumerate(("click", "conversion")):
        tower, x = PARAMS[f"{stage}_tower"], h
        for i in range(3):
            x = x @ tower[f"dense_{i}"]["kernel"] + tower[f"dense_{i}"]["bias"]
            if i < 2:
                x = np.where(x > 0, x, tower[f"prelu_{i}"]["negative_slope"] * x)
        np.testing.assert_allclose(LOGITS[:, k], x[:, 0], rtol=1e-4, atol=1e-5)
    assert tower["prelu_0"]["negative_slope"] == -0.25 and tower["dense_0"]["bias"][0] == 0.1
    wide = Tower(hidden=(512,)).init(jax.random.key(0), jnp.ones((1, 256)))["params"]
    assert np.std(wide["dense_0"]["kernel"]) == pytest.approx(1 / 16, rel=0.02)


def test_padding_contributes_nothing_whatever_its_row_holds():
    changed = jax.tree.map(lambda x: x, PARAMS)
    changed["embeddings"] = {k: v.at[0].set(7.0) for k, v in PARAMS["embeddings"].items()}
    assert (INPUTS["ids"] == 0).any()
    np.testing.assert_array_equal(apply(NETWORK, changed, INPUTS), LOGITS)


def test_common_features_given_once_are_the_same_bit_for_bit():
    grouped = {
        "common_ids": COMMON["ids"], "common_weights": COMMON["weights"], "index": INDEX,
        **OWN, "dense": INPUTS["dense"],
    }  # fmt: skip
    # Operation by operation: what the compiler fuses the lookup with may change the last bit.
    own, expanded = (NETWORK.apply({"params": PARAMS}, x) for x in (grouped, INPUTS))
    np.testing.assert_array_equal(own, expanded)
    np.testing.assert_allclose(apply(NETWORK, PARAMS, grouped), LOGITS, rtol=1e-5)
    with pytest.raises(ValueError, match="whole fields at a time"):
        NETWORK.apply({"params": PARAMS}, {**INPUTS, "ids": INPUTS["ids"][:, 1:]})


def test_two_outputs_are_one_logit():
    double = NETWORK.clone(
        head="softmax2", tower=Tower(hidden=(8, 4), activation="prelu", outputs=2)
    )
    params = init(double)
    logits = apply(double, params, INPUTS)
    single = jax.tree.map(lambda x: x, params)
    for stage in NETWORK.stages:
        last = params[f"{stage}_tower"]["dense_2"]
        single[f"{stage}_tower"]["dense_2"] = {
            k: x[..., 1:] - x[..., :1] for k, x in last.items()
        }  # fmt: skip
    np.testing.assert_allclose(apply(NETWORK, single, INPUTS), logits, atol=1e-6)
    with pytest.raises(ValueError, match=r"2 output\(s\); this one has 1"):
        init(NETWORK.clone(head="softmax2"))


def test_shared_means_one_table_per_field_and_separate_means_two():
    separate = init(NETWORK.clone(shared=False))
    tables = sorted(p for p in trees.paths(PARAMS) if "embeddings" in p)
    assert tables == sorted(f"embeddings/{name}" for name, *_ in FIELDS)
    assert sum("embeddings" in p for p in trees.paths(separate)) == 2 * len(FIELDS)
    ((pattern, _),) = partition_rules()
    for params in (PARAMS, separate):
        for path in trees.paths(params):
            assert bool(re.search(pattern, path)) == ("embeddings/" in path)


def test_without_clicks_the_conversion_tower_still_learns():
    """dL/db = q p (1 - q) / (1 - pq) for every row, through the network."""
    nothing = np.zeros_like(LABELS)
    _, grads = loss_and_grads(NETWORK, PARAMS, nothing, event_weights=(0.0, 1.0))
    p, q = jax.nn.sigmoid(LOGITS.astype(jnp.float32)).T
    outer = jnp.stack([p * q * (1 - p) / (1 - p * q), q * p * (1 - q) / (1 - p * q)], 1) / BATCH

    def pulled(params):
        return (NETWORK.apply({"params": params}, INPUTS) * outer).sum()

    trees_close(grads, jax.jit(jax.grad(pulled))(PARAMS), rtol=1e-4)
    direct = jax.jit(jax.grad(lambda x: chain_nll(x, nothing)[:, 1].sum()))(LOGITS)
    np.testing.assert_allclose(direct, outer * BATCH, rtol=1e-5)
    assert np.abs(grads["conversion_tower"]["dense_0"]["kernel"]).max() > 1e-4


def trees_close(first, second, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max()),
        first, second,
    )  # fmt: skip


def test_both_towers_reach_the_shared_tables_and_their_gradients_add():
    copies = {f"{s}_embeddings": PARAMS["embeddings"] for s in NETWORK.stages}
    apart = {**{k: v for k, v in PARAMS.items() if k != "embeddings"}, **copies}
    options = {"event_weights": (0.0, 1.0)}
    loss, shared = loss_and_grads(NETWORK, PARAMS, **options)
    same, parts = loss_and_grads(NETWORK.clone(shared=False), apart, **options)
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    click, conversion = (parts[f"{s}_embeddings"] for s in NETWORK.stages)
    for each in (click, conversion):
        assert all(np.abs(x).max() > 1e-5 for x in each.values())
    trees_close(shared["embeddings"], jax.tree.map(jnp.add, click, conversion))


def test_gather_and_one_hot_agree_in_value_and_gradient():
    other = NETWORK.clone(lookup="one_hot")
    for a, b in zip(loss_and_grads(other, PARAMS), loss_and_grads(NETWORK, PARAMS)):
        trees_close(a, b)
    with pytest.raises(ValueError, match="choose one of gather, one_hot"):
        NETWORK.clone(lookup="scan").apply({"params": PARAMS}, INPUTS)


def test_tables_over_eight_devices_give_the_same_step():
    network = NETWORK.clone(multiple=8)
    params = init(network)
    assert params["embeddings"]["user"].shape == (24, 4)
    layout = Layout(make_mesh({"data": 2, "model": 4}), partition_rules())
    task = EntireSpace(module=network)
    batch = {"inputs": INPUTS, "labels": LABELS}
    placed = layout.place(params)
    assert placed["embeddings"]["item"].sharding.shard_shape((24, 4)) == (6, 4)
    value, grads = _loss_and_grads(task, placed, layout.place_batch(batch))
    expected, single = _loss_and_grads(task, params, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    trees_close(grads, single)


def test_loss_and_gradients_are_deepctrs():
    """The same parameters in deepctr-torch's ESMM."""
    pytest.importorskip("deepctr_torch")
    import torch
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import ESMM

    fields = (("user", 17, 1), ("item", 23, 1))
    network = ConversionNetwork(fields, features=4, stddev=0.3, tower=Tower((8, 4), bias=0.0))
    inputs = {"ids": RNG.integers(1, 17, (BATCH, 2)).astype(np.int32)}
    params = jax.jit(network.init)(jax.random.key(0), inputs)["params"]
    columns = [SparseFeat(name, size, 4) for name, size, _ in fields]
    peer = ESMM(columns, (8, 4), l2_reg_embedding=0.0, l2_reg_linear=0.0)
    with torch.no_grad():
        for name, table in params["embeddings"].items():
            peer.embedding_dict[name].weight.copy_(torch.tensor(np.asarray(table)))
        for stage, short in (("click", "ctr"), ("conversion", "cvr")):
            tower = params[f"{stage}_tower"]
            dnn = getattr(peer, f"{short}_dnn")
            for i in range(2):
                dnn.linears[i].weight.copy_(
                    torch.tensor(np.asarray(tower[f"dense_{i}"]["kernel"]).T)
                )
                dnn.linears[i].bias.zero_()
            last = getattr(peer, f"{short}_dnn_final_layer")
            last.weight.copy_(torch.tensor(np.asarray(tower["dense_2"]["kernel"]).T))
    events = torch.tensor(np.stack([LABELS[:, 0], LABELS.prod(1)], 1)).float()
    predicted = peer(torch.tensor(inputs["ids"]).float())
    loss = torch.nn.functional.binary_cross_entropy(predicted, events, reduction="sum") / BATCH
    loss.backward()

    task = EntireSpace(module=network)
    batch = {"inputs": inputs, "labels": jnp.asarray(LABELS)}
    value_and_grad = jax.value_and_grad(lambda p: task.loss(Variables(p, {}), batch, None)[0])
    value, grads = jax.jit(value_and_grad)(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    for name, table in grads["embeddings"].items():
        theirs = peer.embedding_dict[name].weight.grad.numpy()
        np.testing.assert_allclose(table, theirs, rtol=1e-4, atol=1e-6)
    for stage, short in (("click", "ctr"), ("conversion", "cvr")):
        theirs = getattr(peer, f"{short}_dnn").linears[0].weight.grad.numpy().T
        np.testing.assert_allclose(
            grads[f"{stage}_tower"]["dense_0"]["kernel"], theirs, rtol=1e-4, atol=1e-6
        )
