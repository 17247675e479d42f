"""Order Matters: sorting, the search over orders, star models, word orders and trees."""

import collections
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from transfer_jax.configuration import (
    ConfigError,
    apply_overrides,
    config_to_json,
    get_config,
    list_configs,
)
from transfer_jax.data import ArraySource, IndexSource, Pipeline, bucketed
from transfer_jax.models import Decoding, generate_targets
from transfer_jax.models.recurrent import RecurrentNetwork
from transfer_jax.nn import Recurrent
from transfer_jax.objectives import Seq2Seq, TruncatedBPTT, UniformInit, Variables
from transfer_jax.papers import set2seq
from transfer_jax.papers.set2seq import OrderSearch, Pointing, SortingExample, TokenSlotModel
from transfer_jax.training import Experiment, Layout, evaluate, make_mesh
from transfer_jax.training.aot import lower_step

VARIANTS = list(list_configs()["set2seq"].variants)


def configured(variant, *overrides):
    return apply_overrides(get_config(f"set2seq:{variant}"), overrides)


# -- sorting ---------------------------------------------------------------------------------------


@functools.cache
def drawer(min_size):
    return jax.jit(jax.vmap(SortingExample(6, min_size), (0, None)))


def sets(order="as_is", min_size=0):
    return drawer(min_size)(
        jax.random.split(jax.random.key(1), 40), set2seq.INPUT_ORDERS.index(order)
    )


def test_examples_are_sorted_by_their_targets_in_every_order():
    drawn = {order: sets(order, min_size=2) for order in set2seq.INPUT_ORDERS}
    lengths = np.asarray(drawn["as_is"]["lengths"])
    assert set(lengths) == {2, 3, 4, 5, 6}
    for order, batch in drawn.items():
        np.testing.assert_array_equal(batch["lengths"], lengths)
        for x, y, n, first in zip(
            batch["inputs"][..., 0], batch["targets"], lengths, drawn["as_is"]["inputs"][..., 0]
        ):
            assert (x[n:] == 0).all() and (y[n:] == -1).all()
            np.testing.assert_array_equal(x[y[:n]], np.sort(first[:n]))  # the same set
            if order == "sorted":
                np.testing.assert_array_equal(y[:n], np.arange(n))
    assert (np.asarray(drawn["random"]["inputs"]) != np.asarray(drawn["as_is"]["inputs"])).any()
    assert "lengths" not in sets()


def experiment(config, workdir):
    exp = Experiment(config, workdir)
    exp.layout = Layout(make_mesh(devices=jax.devices()[:1]))  # compiles sooner
    return exp


@pytest.fixture(scope="module")
def sorters(tmp_path_factory):
    """A recipe that sorts three numbers, long enough to be right at times."""
    config = configured(
        "sorting", "n=3", "test_examples=500", "eval_batch_size=256", "train.steps=60",
        "model.features=16", "batch_size=64", "train.optimizer.learning_rate=0.01",
    )  # fmt: skip
    with config.unlocked():
        config.cells = (("rpw", 2, 1), ("ptrnet_lstm", 0, 0))
    exp = experiment(config, tmp_path_factory.mktemp("sorting"))
    return config, exp, exp.run()


def test_only_the_pointer_network_depends_on_the_order_of_its_inputs(sorters):
    ((_, table),) = sorters[2]["tables"].items()
    (name, *exact), (other, *seen) = (row[:4] for row in table["rows"])
    assert (name, other) == ("rpw-P2-g1", "ptrnet_lstm-g0")
    assert 0.1 < exact[0] < 1 and exact == [exact[0]] * 3
    assert len(set(seen)) == 3


def test_exact_match_is_that_of_greedy_decoding(sorters):
    config, exp, _ = sorters
    cell = set2seq.Cell("rpw", 2, 1)
    task = set2seq._sorting_objective(config, cell, 5)
    numbers = Pipeline(IndexSource(), config.batch_size, repeat=True)
    fitted = experiment(config, exp.workdir).fit(cell.name, task, numbers, config.train)
    batch = jax.jit(task.batch)({"index": jnp.arange(100)})
    _, aux = jax.jit(task.inner.loss)(fitted.variables, batch, None)
    decoding = Decoding(max_tokens=3, start_id=3)
    variables = {"params": fitted.params}
    out = generate_targets(task.inner.module, variables, batch["inputs"], decoding)
    right = np.asarray(out.tokens) == np.asarray(batch["targets"])
    assert aux.metrics["exact"].total == right.all(axis=1).sum()
    assert 0 < right.all(axis=1).mean() < right.mean()  # all positions, not some
    # Beams that hold everything find the likeliest of all n! outputs.
    module = task.inner.module.clone(mask_used=True)
    beams = Decoding(max_tokens=3, start_id=3, num_beams=6)
    best = generate_targets(module, variables, batch["inputs"], beams)
    assert (np.sort(best.tokens) == np.arange(3)).all()
    every = set2seq.permutations(3)
    rows = jnp.repeat(batch["inputs"], 6, axis=0)
    targets = jnp.tile(every, (100, 1))
    logits = jax.jit(module.apply)(variables, rows, targets)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    total = picked[..., 0].sum(axis=1).reshape(100, 6)
    np.testing.assert_array_equal(best.tokens, every[np.argmax(total, axis=1)])
    assert best.lengths.tolist() == [3] * 100


POINTING = Pointing(module=set2seq.SetToPointers(8, steps=2, mask_used=True))


def test_buckets_padding_and_devices():
    """Variable sizes: two programs for two buckets, one loss on any mesh, permutations out."""
    full = {k: np.asarray(v) for k, v in sets(min_size=2).items()}
    examples = [
        {"inputs": x[:n], "targets": y[:n]}
        for x, y, n in zip(full["inputs"], full["targets"], full["lengths"])
    ]
    data = bucketed(
        examples, full["lengths"], (4, 6), 8, values={"inputs": 0, "targets": -1}, repeat=False
    )
    whole = Pipeline(ArraySource(full), 8)
    variables = jax.jit(POINTING.init)(jax.random.key(0), whole.example_batch())
    step = jax.jit(lambda v, b: POINTING.loss(v, b, None)[1].metrics)
    batches = list(data.iterator())
    found = [step(variables, jax.tree.map(jnp.asarray, batch)) for batch in batches]
    assert {b["inputs"].shape[1] for b in batches} == {4, 6} and step._cache_size() == 2
    assert len({int(n) for b in batches for n in b["lengths"]}) == 5
    total = {k: sum(m[k].total for m in found) / sum(m[k].weight for m in found) for k in found[0]}
    metrics = evaluate(POINTING, variables, whole, Layout(make_mesh()))  # on all eight
    for name, value in total.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5)
    gradient = jax.jit(jax.grad(lambda v, b: POINTING.loss(v, b, jax.random.key(0))[0]))
    for leaf in jax.tree.leaves(gradient(variables, full)):
        assert np.isfinite(leaf).all()
    decoding = Decoding(max_tokens=6, start_id=6)
    written = generate_targets(
        POINTING.module, {"params": variables.params}, jnp.asarray(full["inputs"]), decoding,
        lengths=jnp.asarray(full["lengths"]),
    )  # fmt: skip
    for row, n in zip(np.asarray(written.tokens), full["lengths"]):
        assert sorted(row[:n]) == list(range(n))  # never padding, nothing twice


# -- the search over orders ------------------------------------------------------------------------

N, V = 3, 4
SEARCH = OrderSearch(module=TokenSlotModel(vocab_size=V, slots=N, features=8, embedding=4))
ONE = {"inputs": jnp.array([[2, 0, 1]])}


@pytest.fixture(scope="module")
def frozen():
    @jax.jit
    def make(key):
        variables = SEARCH.init(key, ONE)
        return jax.tree.map(lambda x: x + 0.7 * jax.random.normal(key, x.shape), variables)

    return make(jax.random.key(3))


@jax.jit
def terms(variables, inputs, orders):
    return SEARCH.module.apply({"params": variables.params}, inputs, orders)


@jax.jit
def predict(search, variables):
    return search.predict(variables, ONE)


def test_all_orders_at_once_and_one_by_one(frozen):
    orders = set2seq.permutations(N)
    rows = jnp.repeat(ONE["inputs"], 6, axis=0)
    slot, token = terms(frozen, rows, orders)
    log_probs = predict(SEARCH, frozen)
    np.testing.assert_allclose(log_probs[0], (slot + token).sum(axis=1), rtol=1e-5)
    two = predict(SEARCH.replace(candidates=((2, 0, 1), (0, 1, 2))), frozen)
    np.testing.assert_allclose(two[0], log_probs[0][jnp.array([4, 0])], rtol=1e-5)
    # Both bounds of the likelihood of the set; slots are always charged.
    _, aux = jax.jit(lambda variables: SEARCH.loss(variables, ONE, None))(frozen)
    values = {k: float(m.value()) for k, m in aux.metrics.items()}
    assert values["set_nll"] == pytest.approx(-float(jax.nn.logsumexp(log_probs)), rel=1e-5)
    assert values["max_nll"] == pytest.approx(-float(log_probs.max()), rel=1e-5)
    assert values["max_nll"] == pytest.approx(values["slot"] + values["token"], rel=1e-5)
    assert values["slot"] > 0 and values["set_nll"] < values["max_nll"]
    p = jax.nn.softmax(log_probs[0])
    assert values["entropy"] == pytest.approx(float(-(p * jnp.log(p)).sum()), rel=1e-4)


def test_the_probabilities_of_all_sequences_add_up(frozen):
    everything = jnp.array(list(itertools.product(range(V), repeat=N)))
    for order in ((0, 1, 2), (2, 0, 1)):
        _, token = terms(frozen, everything, jnp.tile(jnp.array(order), (V**N, 1)))
        np.testing.assert_allclose(jnp.exp(token.sum(axis=1)).sum(), 1, rtol=1e-5)


def draws(search, variables, step=10**6, count=20_000):
    """How often each order is chosen, [6]."""
    batch = {"inputs": jnp.tile(ONE["inputs"], (count, 1))}
    choose = jax.jit(lambda s, v, k: s.at(step).choose(v, batch, k))
    chosen = np.asarray(choose(search, variables, jax.random.key(0)))
    index = {tuple(order): i for i, order in enumerate(set2seq.permutations(N).tolist())}
    counts = collections.Counter(index[tuple(row)] for row in chosen.tolist())
    return np.array([counts[i] for i in range(6)])


def test_orders_are_drawn_with_the_right_probabilities(frozen):
    orders = set2seq.permutations(N)
    slot, token = terms(frozen, jnp.repeat(ONE["inputs"], 6, axis=0), orders)
    joint = np.exp(slot + token).astype(float)  # [order, step]
    ancestral = np.ones(6)
    for t in range(N):
        for i, order in enumerate(orders):
            # What else could have come at step t after the same beginning.
            rivals = {
                orders[j][t]: joint[j, t] for j in range(6) if (orders[j][:t] == order[:t]).all()
            }
            ancestral[i] *= joint[i, t] / sum(rivals.values())
    np.testing.assert_allclose(ancestral.sum(), 1, rtol=1e-6)
    exact = np.asarray(jax.nn.softmax(predict(SEARCH, frozen)[0]), float)
    assert np.abs(ancestral - exact).max() > 0.02  # not the same distribution
    for mode, expected in {
        "ancestral": ancestral, "exact_sample": exact / exact.sum(), "uniform": np.full(6, 1 / 6),
    }.items():  # fmt: skip
        counts = draws(SEARCH.replace(order_search=mode, warmup=5), frozen)
        assert stats.chisquare(counts, 20_000 * expected).pvalue > 1e-3, mode
    greedy = draws(SEARCH.replace(order_search="exact_max"), frozen, count=10)
    assert greedy[np.argmax(exact)] == 10
    assert draws(SEARCH.replace(order_search="fixed"), frozen, count=10)[0] == 10


@pytest.mark.parametrize("candidates", [(), ((0, 1, 2), (2, 0, 1))])
def test_the_warm_up_is_uniform(frozen, candidates):
    search = SEARCH.replace(order_search="exact_max", warmup=5, candidates=candidates)
    counts = draws(search, frozen, step=4)
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3
    assert (counts > 0).sum() == (len(candidates) or 6)
    assert (draws(search, frozen, step=5, count=10) > 0).sum() == 1


def test_no_gradient_flows_through_the_choice(frozen):
    batch = {"inputs": jnp.array([[2, 0, 1], [1, 1, 3]])}
    key = jax.random.key(4)
    orders = jax.jit(SEARCH.choose)(frozen, batch, key)

    def given(params):
        slot, token = SEARCH.module.apply({"params": params}, batch["inputs"], orders)
        return -(slot + token).sum(axis=1).mean()

    def searched(params):
        return SEARCH.loss(Variables(params, {}), batch, key)[0]

    expected = jax.jit(jax.value_and_grad(given))(frozen.params)
    found = jax.jit(jax.value_and_grad(searched))(frozen.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, found)


def test_with_one_element_all_searches_are_the_same():
    batch = {"inputs": jnp.array([[2], [0]])}
    module = TokenSlotModel(vocab_size=V, slots=1, features=4, embedding=2)
    task = OrderSearch(module=module)

    @jax.jit
    def every(key):
        variables = task.init(key, batch)
        searches = [task.replace(order_search=mode) for mode in set2seq.ORDER_SEARCHES]
        values = [search.loss(variables, batch, key)[0] for search in searches]
        return [*values, task.loss(variables, batch, None)[0]]

    values = [float(value) for value in every(jax.random.key(0))]
    assert max(values) - min(values) < 1e-6


def trained(search, tokens, warmups, steps):
    """Training from a seed for each warm-up.

    Returns:
      Probabilities of the orders in the end, [seeds, examples, n!], and their entropy after each
      step, [seeds, steps].
    """
    optimizer, batch = optax.adam(1e-2), {"inputs": tokens}

    def run(seed, warmup):
        key = jax.random.key(seed)
        params = search.init(key, batch).params

        def body(carry, step):
            params, moments = carry

            def loss(params):
                now = search.replace(warmup=warmup).at(step)
                return now.loss(Variables(params, {}), batch, jax.random.fold_in(key, step))[0]

            updates, moments = optimizer.update(jax.grad(loss)(params), moments)
            params = optax.apply_updates(params, updates)
            p = jax.nn.softmax(search.predict(Variables(params, {}), batch))
            return (params, moments), p

        _, p = jax.lax.scan(body, (params, optimizer.init(params)), jnp.arange(steps))
        return p[-1], -(p * jnp.log(p + 1e-9)).sum(axis=-1).mean(axis=-1)

    run = jax.jit(jax.vmap(run))
    return jax.tree.map(np.asarray, run(jnp.arange(len(warmups)), jnp.array(warmups)))


def test_without_warm_up_seeds_get_stuck_and_with_it_orders_collapse_later():
    # The second word follows from the first, so some orders are easier than others.
    rng = np.random.default_rng(0)
    first = rng.integers(0, 6, 40)
    tokens = jnp.asarray(np.stack([first, (first * 5 + 1) % 6, rng.integers(0, 6, 40)], axis=1))
    module = TokenSlotModel(vocab_size=6, slots=3, features=8, embedding=4)
    search = OrderSearch(module=module, order_search="exact_max")
    p, entropy = trained(search, tokens, [0, 0, 0, 0, 0, 80, 80], 200)
    assert entropy[:5, 79].max() < 0.5 * math.log(6)  # settled early,
    assert len(set(np.argmax(p[:5].mean(axis=1), axis=-1).tolist())) > 1  # on whatever luck chose
    assert entropy[5:, 79].min() > 0.8 * math.log(6)
    assert entropy[5:, -1].max() < 0.5 * math.log(6)


def test_many_elements_are_searched_without_listing_orders():
    batch = {"inputs": jnp.arange(9)[None] % V}
    task = OrderSearch(module=TokenSlotModel(vocab_size=V, slots=9, features=4, embedding=2))
    variables = jax.eval_shape(task.init, jax.random.key(0), batch)
    for key in (None, jax.random.key(1)):
        aux = jax.eval_shape(lambda v, key=key: task.loss(v, batch, key)[1], variables)
        assert "entropy" not in aux.metrics and aux.outputs.shape == (1, 9)
    with pytest.raises(ValueError, match="ancestral"):
        set2seq.permutations(9)


# -- star models and language models ---------------------------------------------------------------


def test_no_model_of_a_star_is_better_than_its_entropy():
    star = set2seq.Star.draw(0, symbols=3, variables=4, peakiness=1.0)
    everything = np.array(list(itertools.product(range(3), repeat=4)))
    p = star.head[everything[:, 0]].copy()
    for t in range(3):
        p *= star.leaves[t][everything[:, 0], everything[:, t + 1]]
    assert p.sum() == pytest.approx(1)
    assert -(p * np.log(p)).sum() == pytest.approx(star.entropy())
    drawn = star.sample(np.random.default_rng(1), 20_000) @ (27, 9, 3, 1)
    assert stats.chisquare(np.bincount(drawn, minlength=81), 20_000 * p).pvalue > 1e-3
    config = configured("star", "symbols=3", "variables=4", "model.features=8")
    task = set2seq._star_objective(config)
    nll = jax.jit(lambda v, b: -jnp.take_along_axis(
        jax.nn.log_softmax(task.predict(v, b)), b["inputs"][:, 1:, None], axis=-1
    )[..., 0].sum(1))  # fmt: skip
    for roll in (0, -1):
        rows = np.pad(np.roll(everything, roll, axis=1), ((0, 0), (1, 0)), constant_values=3)
        batch = {"inputs": jnp.asarray(rows)}
        variables = jax.jit(task.init)(jax.random.key(roll + 1), batch)
        bits = np.asarray(nll(variables, batch), float)
        assert np.exp(-bits).sum() == pytest.approx(1, rel=1e-5)  # p(Y) over all Y
        assert (p * bits).sum() > star.entropy()


def test_words_are_reordered_as_in_the_paper():
    sentence = ["This", "is", "a", "sentence", "."]
    assert set2seq.reorder(sentence, "natural") == sentence
    assert set2seq.reorder(sentence, "reversed") == [".", "sentence", "a", "is", "This"]
    assert set2seq.reorder(sentence, "threes") == ["a", "is", "This", "<pad>", ".", "sentence"]
    with pytest.raises(ConfigError, match="natural, reversed, threes"):
        set2seq.reorder(sentence, "random")


def test_windows_go_on_and_padding_is_not_scored():
    def task(streams):
        body = Recurrent(6, 2, streams=streams)
        module = RecurrentNetwork(body=body, outputs=9, vocab_size=9, embedding=5)
        return UniformInit(inner=set2seq.PaddedNextToken(module=module), scale=0.3)

    tokens = jax.random.randint(jax.random.key(0), (2, 13), 0, 9)  # 0 is the padding
    assert (tokens == 0).any()
    step = jax.jit(lambda t, v, b, k: t.loss(v, b, k)[1])
    carried = TruncatedBPTT(inner=task(2))
    variables = jax.jit(carried.init)(jax.random.key(1), {"inputs": tokens})
    leaves = jax.tree.leaves(variables.params)
    assert 0.25 < max(float(jnp.abs(x).max()) for x in leaves) <= 0.3
    whole = step(task(2), variables, {"inputs": tokens}, None).metrics["nll"]
    stale = jax.tree.map(jnp.ones_like, variables.state)
    parts, weight = 0.0, 0.0
    for reset, window in ((True, tokens[:, :7]), (False, tokens[:, 6:])):
        batch = {"inputs": window, "reset": jnp.array([reset] * 2)}
        aux = step(carried, Variables(variables.params, stale), batch, jax.random.key(0))
        stale = aux.state
        parts, weight = parts + aux.metrics["nll"].total, weight + aux.metrics["nll"].weight
    np.testing.assert_allclose(parts, whole.total, rtol=1e-5)
    assert weight == whole.weight == (tokens[:, 1:] != 0).sum()


# -- trees -----------------------------------------------------------------------------------------

TREE = ("S", ("NP", ("DT", "the"), ("NN", "cat")), ("VP", ("VB", "sleeps")))
WRITTEN = {
    "depth_first": "(S (NP XX XX ) (VP XX ) )",
    "breadth_first": "S NP VP / XX XX / XX /",
}


def test_trees_are_written_and_read_back():
    for order, text in WRITTEN.items():
        assert " ".join(set2seq.linearise(TREE, order)) == text
        expected = {("S", 0, 3): 1, ("NP", 0, 2): 1, ("VP", 2, 3): 1}
        assert set2seq.brackets(text.split(), order) == expected
    for tree in set2seq.Grammar().sample(np.random.default_rng(0), 100, 12):
        for order in set2seq.TREE_ORDERS:
            tokens = set2seq.linearise(tree, order)
            assert set(tokens) <= set(set2seq.tree_vocabulary(order).tokens)
            assert set2seq.brackets(tokens, order) == set2seq.spans_of(tree)
            for cut in range(len(tokens)):  # whatever is missing, it is no tree
                assert set2seq.brackets(tokens[:cut], order) is None
            assert set2seq.brackets([*tokens, "XX"], order) is None


def test_f1_counts_brackets_of_all_sentences_together():
    true = [set2seq.spans_of(TREE)] * 2
    half = collections.Counter({("S", 0, 3): 1, ("NP", 0, 1): 1})
    assert set2seq.bracket_f1(true, true) == 1
    assert set2seq.bracket_f1([half, None], true) == pytest.approx(2 * 1 / (2 + 6))


def test_a_set_of_tokens_is_answered_alike_in_every_order():
    module = set2seq.SetToTokens(
        source_vocab_size=7, vocab_size=5, features=8, steps=2, layers=2, embedding=6
    )
    inputs, lengths = jnp.array([[1, 4, 6, 2], [3, 3, 5, 0]]), jnp.array([4, 3])
    batch = {"inputs": inputs, "lengths": lengths, "targets": jnp.array([[1, 2, 4], [4, 0, 1]])}
    task = Seq2Seq(module=module)
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    other = {**batch, "inputs": jnp.array([[6, 2, 4, 1], [5, 3, 3, 6]])}
    predict = jax.jit(task.predict)
    np.testing.assert_allclose(predict(variables, batch), predict(variables, other), atol=1e-6)
    decoding = Decoding(max_tokens=3)
    written = [
        generate_targets(
            module, {"params": variables.params}, b["inputs"], decoding, lengths=lengths
        )
        for b in (batch, other)
    ]
    np.testing.assert_array_equal(written[0].tokens, written[1].tokens)


# -- configs and recipes ---------------------------------------------------------------------------

TINY = {
    "ngrams": ["n=3", "warmup=2", "train_examples=200", "validation_examples=40",
               "eval_batch_size=40", "text.generated=200", "model.features=8", "text.limit=50",
               "model.embedding=4"],
    "star": ["train_examples=(40,)", "held_out_examples=50", "train.eval_every=2",
             "model.features=4", "symbols=3", "variables=3"],
    "lm_orders": ["orders=('threes',)", "text.generated=400", "model.features=8",
                  "unroll=8", "eval_length=16", "text.limit=50", "batch_size=8",
                  "eval_batch_size=8"],
    "parsing": ["orders=('breadth_first',)", "max_words=6", "train_examples=50",
                "test_examples=20", "model.features=8", "batch_size=8"],
}  # fmt: skip


@pytest.mark.parametrize("variant", TINY)
def test_recipes_run(variant, tmp_path, monkeypatch):
    monkeypatch.delenv("TRANSFER_JAX_DATA", raising=False)
    config = configured(variant, *TINY[variant], "train.steps=4", "train.log_every=2")
    if variant == "ngrams":
        with config.unlocked():
            config.searches = (("hard", "ancestral", ()),)
    results = experiment(config, tmp_path).run()
    ((_, table),) = results["tables"].items()
    rows = table["rows"]
    assert results["bars"] if variant != "star" else results["curves"]
    if variant == "ngrams":
        assert results["scalars"]["text"] == "generated by a small grammar"
        assert rows[0][1] <= rows[0][2]  # the sum over orders is at least the largest
        (shares,) = [v for k, v in results["bars"].items() if k == "Best orders, hard"]
        assert sum(shares["series"][""]) == pytest.approx(1)
    elif variant == "star":
        assert [row[:2] for row in rows] == [[40, "head first"], [40, "head last"]]
        assert all(row[3] > -0.3 for row in rows)
    elif variant == "lm_orders":
        assert all(1 < row[2] < 200 for row in rows)
    else:
        assert 0 <= rows[0][1] <= 1
    if variant == "star":  # a finished run gives its results again
        again = experiment(config, tmp_path)
        monkeypatch.setattr(again, "evaluate", None)
        assert json.dumps(again.run(), sort_keys=True) == json.dumps(results, sort_keys=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_config_can_be_written_to_a_file(variant):
    assert json.loads(config_to_json(get_config(f"set2seq:{variant}")))["recipe"] == "set2seq"


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.endswith("_paper")])
def test_the_paper_s_scale_lowers(variant):
    task, batch, settings = set2seq.plan(get_config(f"set2seq:{variant}"))
    lowered, arrays = lower_step(task, batch, settings, Layout(make_mesh({"data": 4, "model": 2})))
    assert "sdy.mesh" in lowered.as_text()
    if variant == "lm_orders_paper":  # the medium model: 2 x 650, 10,000 words
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(arrays["params"]))
        biases = 2 * 4 * 650 * 2
        assert count == 2 * 10_000 * 650 + 10_000 + 2 * 2 * 4 * 650 * 650 + biases


def test_the_published_settings():
    sorting = configured("sorting_paper")
    assert sorting.train.steps == 10_000 and sorting.n == 15
    assert set(sorting.cells) == {
        *(("rpw", steps, g) for steps in (0, 1, 5, 10) for g in (0, 1)),
        ("ptrnet_lstm", 0, 0), ("ptrnet_lstm", 0, 1),
    }  # fmt: skip
    assert configured("ngrams_paper").warmup == 1_000
    assert (4, 0, 2, 3, 1) in configured("ngrams").searches[2][2]
    lm = configured("lm_orders_paper")
    assert (lm.model.features, lm.model.num_layers, lm.model.dropout) == (650, 2, 0.5)
    assert (lm.unroll, lm.batch_size, lm.init_scale) == (35, 20, 0.05)


@pytest.mark.parametrize(("search", "message"), [
    (("x", "exact_min", ()), "choose one of fixed"),
    (("x", "exact_max", ((0, 1),)), "no orders of the slots 0 to 4"),
    (("x", "ancestral", ((0, 1, 2, 3, 4),)), "exact_sample"),
])  # fmt: skip
def test_misuse_of_the_search_is_named(search, message):
    task = set2seq._search_objective(configured("ngrams"), set2seq.Search(*search), 9)
    choose = functools.partial(task.choose, None)
    with pytest.raises(ValueError, match=message):
        choose({"inputs": jnp.zeros((2, 5), jnp.int32)}, jax.random.key(0))


def test_misuse_of_the_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="choose one of sorting"):
        Experiment(configured("sorting", "task=sort"), tmp_path).run()
    with pytest.raises(FileNotFoundError, match="text"):
        Experiment(configured("ngrams", "text.path=absent.txt"), tmp_path / "b").run()
