"""Recformer's recipe: Algorithm 1 to the bit, splits that leak nothing, full scale, weights."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from transfer_jax import recommendation
from transfer_jax.configuration import ConfigError, apply_overrides, get_config, list_configs
from transfer_jax.data import interactions, item_texts
from transfer_jax.data.interactions import leave_one_out
from transfer_jax.interop import save_pretrained
from transfer_jax.models.longformer import Longformer, longformer_config, longformer_stack
from transfer_jax.objectives.recformer import FineTuning
from transfer_jax.papers import recformer
from transfer_jax.training import Experiment, Layout, load_variables, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.training.checkpoint import read_tree
from transfer_jax.trees import path_str

# -- the recipe -----------------------------------------------------------------------------------

TINY = (
    "data.options.users=40", "data.options.items=20", "data.options.groups=2",
    "data.options.length=8", "data.texts.options.items=20", "data.texts.options.groups=2",
    "model.features=8", "model.hidden=8", "model.num_layers=1", "model.num_heads=1",
    "model.window=0", "batch_size=16", "evaluation_batch_size=40", "chunk=8", "freeze_words=True",
    "pretrain.steps=4", "pretrain.eval_every=2", "pretrain.log_every=2",
    "pretrain.checkpoint_every=2", "pretrain.optimizer.warmup_steps=0", "epochs=(3, 2)",
    "patience=(0, 0)", "tune.optimizer.warmup_steps=0", "tune.optimizer.learning_rate=0.03",
    "runs=('two_stage', 'random')", "baselines=('pop', 'tfidf')",
)  # fmt: skip


def experiment(workdir, *overrides):
    config = apply_overrides(get_config("recformer"), (*TINY, *overrides))
    exp = Experiment(config, workdir)
    exp.layout = Layout(make_mesh(devices=jax.devices()[:1]))
    return exp


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("recformer")
    return workdir, experiment(workdir).run()


def matrix(workdir, stage):
    return np.array(load_variables(workdir / "stages" / stage).state["table"])


def test_the_best_pair_of_the_first_stage_goes_into_the_second(finished):
    workdir, results = finished
    first, second = (matrix(workdir, f"two_stage-stage{i}") for i in (1, 2))
    np.testing.assert_array_equal(first, second)  # to the bit
    # The matrix is of the parameters before the best epoch: after it they give another one.
    exp = experiment(workdir)
    source, domain = recformer.domains(exp)
    tokenizer = recformer.tokenizer_of(exp, source)
    module = recformer.encoder(exp.config, tokenizer.vocab_size)
    catalogue = recformer.catalogue_of(exp.config, domain, tokenizer)
    target = recformer.Target(exp, module, domain, catalogue)
    start = read_tree(workdir / "artifacts" / "start")
    encode = jax.jit(FineTuning.encode_items)
    for stage in (1, 2):
        trained = load_variables(workdir / "stages" / f"two_stage-stage{stage}").params
        trained = {name: tree for name, tree in trained.items() if jax.tree.leaves(tree)}
        params = {**start, **trained}
        assert np.abs(encode(target.objective(), params) - first).max() > 1e-2
    # Frozen words and the head are where they were; nothing trains them.
    assert not {"tokens", "transform", "output_bias"} & set(trained)
    tables = results["tables"]
    warm, cold = (next(t for t in tables if f"Test, {kind}" in t) for kind in ("warm", "cold"))
    assert "full ranking of 20 items, seen items removed" in warm
    rows = {row[0]: row[1:] for row in tables[cold]["rows"]}
    assert list(rows) == ["two_stage", "random", "pop", "tfidf"]
    assert rows["pop"] == [0, 0, pytest.approx(rows["pop"][2])]  # never seen, never popular
    assert len(results["curves"]["Fine-tuning"]["x"]) == 5


def test_lists_hold_what_the_tables_count(finished, tmp_path):
    workdir, _ = finished
    domain = recformer.domains(experiment(workdir))[1]
    history, test = domain.split.history("test"), domain.split.test
    names = np.array(domain.names)
    owners = np.repeat(np.arange(len(history)), history.lengths)
    log = interactions.Interactions.of(owners, names[history.items])
    for model in ("two_stage", "random"):
        plan = recommendation.plan(workdir, log, model)
        recommendation.export(plan, tmp_path / "lists.csv", k=10, batch_size=16)
        rows = list(csv.DictReader((tmp_path / "lists.csv").open()))
        offered = {(row["user_id"], row["item_id"]) for row in rows}
        counted = json.loads((workdir / "artifacts" / f"test-{model}.json").read_text())["hr@10"]
        # A right item that the user has had before is ranked, but not offered.
        new = [user for user in range(len(test)) if test[user] not in history[user]]
        found = [(str(user), names[test[user]]) in offered for user in new]
        assert found == [counted[user] > 0 for user in new]
        assert {True, False} == set(found) and len(new) > 20
    assert recommendation.plan(workdir, log).model == "two_stage"
    with pytest.raises(ConfigError, match="choose from two_stage, random"):
        recommendation.plan(workdir, log, "scratch")


class Dying:
    """Training data of a process that is killed after some batches."""

    def __init__(self, data, after):
        self.data, self.after = data, after

    def __len__(self):
        return len(self.data)

    def example_batch(self):
        return self.data.example_batch()

    def iterator(self, *args):
        inner, after = self.data.iterator(*args), self.after

        class Iterator:
            taken = 0

            def __next__(self):
                self.taken += 1
                if self.taken > after:
                    raise InterruptedError
                return next(inner)

            get_state, set_state, close = inner.get_state, inner.set_state, inner.close

        return Iterator()


def test_a_killed_run_goes_on_to_the_same_numbers(finished, tmp_path, monkeypatch):
    workdir, results = finished
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    for stage in (1, 2):
        shutil.rmtree(again / "stages" / f"two_stage-stage{stage}")
    for test in again.glob("artifacts/test-*"):
        test.unlink()
    whole = recformer.tokens.training_pairs

    def dying(*args, **options):
        data = whole(*args, **options)
        return data if options["pretraining"] else Dying(data, 2 * len(data) - 1)

    with monkeypatch.context() as patch:
        patch.setattr(recformer.tokens, "training_pairs", dying)
        with pytest.raises(InterruptedError):
            experiment(again).run()
    assert not (again / "stages" / "two_stage-stage1" / "summary.json").exists()
    saved = list((again / "stages" / "two_stage-stage1" / "checkpoints").glob("[0-9]*"))
    assert len(saved) == 1  # of the first epoch; the second one was cut off
    assert experiment(again).run()["tables"] == results["tables"]
    for stage in ("two_stage-stage1", "two_stage-stage2"):
        np.testing.assert_array_equal(matrix(again, stage), matrix(workdir, stage))
        params = [load_variables(w / "stages" / stage).params for w in (workdir, again)]
        jax.tree.map(np.testing.assert_array_equal, *params)


# -- data -----------------------------------------------------------------------------------------


def test_cold_items_are_in_no_history():
    log = interactions.generated(0, users=80, items=40, groups=4, length=10)
    whole = leave_one_out(log)
    split = recformer.hide_items(whole, 0.25, seed=1)
    hidden = set(range(1, 41)) - set(split.train.items) - set(split.validation)
    assert len(hidden) >= 10
    tested = split.evaluated()
    assert (split.test[tested] == whole.test[tested]).all()
    assert np.isin(split.test[tested], list(hidden)).sum() > 5
    history = split.history("test")
    assert all(len(history[user]) for user in tested)
    for user, items in enumerate(whole.train):
        assert split.train[user].tolist() == [i for i in items if i not in hidden]
    same = recformer.hide_items(whole, 0.0, seed=1)
    assert (same.test == whole.test).all() and (same.train.items == whole.train.items).all()


def test_a_share_of_the_users_is_a_part_of_a_larger_one():
    train = leave_one_out(interactions.generated(0, users=50, items=20, groups=2)).train
    half, fifth = (recformer.few_users(train, share, seed=4) for share in (0.5, 0.2))
    assert [(part.lengths > 0).sum() for part in (half, fifth)] == [25, 10]
    for a, b, c in zip(fifth, half, train):
        assert a.tolist() in ([], b.tolist()) and b.tolist() in ([], c.tolist())
    np.testing.assert_array_equal(recformer.few_users(train, 1.0, seed=4).items, train.items)


def test_halves_share_no_category():
    log = interactions.generated(0, users=80, items=40, groups=4, length=12)
    texts = item_texts.generated(0, items=40, groups=4)
    parts = recformer.halves(log, texts, attribute="category", skip=0, words=2, seed=3)
    found = [{texts[str(name)]["category"] for name in p.item_names[1:]} for p in parts]
    assert not found[0] & found[1] and len(found[0] | found[1]) == 4
    assert min(np.bincount(p.users).min() for p in parts) >= 3
    assert 0.5 < len(parts[0]) / len(parts[1]) < 2


def test_amazon_reviews_of_several_categories(tmp_path):
    for name, items in (("a", "xyz"), ("b", "uv")):
        reviews = [
            {"reviewerID": str(u), "asin": i, "unixReviewTime": 9 - t, "overall": 5}
            for u in range(3) for t, i in enumerate(items)
        ]  # fmt: skip
        meta = [{"asin": i, "title": "" if i == "z" else f"item {i}"} for i in items]
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, reviews)))
        (tmp_path / f"meta_{name}.json").write_text("\n".join(map(json.dumps, meta)))
    files = [[str(tmp_path / f"{kind}{n}.json") for n in "ab"] for kind in ("", "meta_")]
    log, texts = recformer.amazon(*files, core=2)
    assert sorted(texts) == sorted(log.item_names[1:]) == ["u", "v", "x", "y"]  # z has no title
    assert log.num_users == 6  # of each category its own
    lists = [[str(log.item_names[i]) for i in items] for items in log.sequences()]
    assert lists == [["y", "x"]] * 3 + [["v", "u"]] * 3
    with pytest.raises(ConfigError, match="2 files of reviews, but 1"):
        recformer.amazon(files[0], files[1][:1])


# -- tokenisers and weights -----------------------------------------------------------------------


def test_tokenisers_come_back_from_what_a_run_keeps():
    texts = ["title red adhesive tape", "title blue adhesive"] * 3
    for kind, size in (("words", 8), ("bpe", 300)):
        trained = json.loads(json.dumps(recformer.train_tokenizer(kind, texts, size)))
        tokenizer = recformer.read_tokenizer(kind, trained)
        assert tokenizer.vocab_size <= size and len(tokenizer.begins) == tokenizer.vocab_size
        assert (tokenizer.start, tokenizer.pad, tokenizer.mask) == (0, 1, 4)
        (ids,) = tokenizer.encode(["adhesive redder"])
        words = sum(tokenizer.begins[i] for i in ids)
        assert words == 2 and (len(ids) == 2) == (kind == "words")
    with pytest.raises(ConfigError, match="choose words, bpe or files"):
        recformer.read_tokenizer("wrods")


def test_weights_of_a_longformer_are_a_start(tmp_path):
    stack = longformer_stack(features=8, num_layers=2, num_heads=2, hidden=16, window=4)
    config = longformer_config(vocab_size=30, stack=stack, max_positions=40, head="masked_lm")
    theirs = Longformer(config)
    inputs = jnp.array([[0, *range(5, 20)]])
    params = theirs.init(jax.random.key(0), inputs)["params"]
    params["token_types"] = {"embedding": jnp.zeros((1, 8))}
    save_pretrained(tmp_path / "model", theirs, params)
    overrides = (
        "model.features=8", "model.num_layers=2", "model.hidden=16", "model.window=8",
        "model.tied=False", "model.pooling=cls", "model.positions=40", "model.scan=True",
    )  # fmt: skip
    config = apply_overrides(get_config("recformer"), overrides)
    module = recformer.encoder(config, 30)
    read = recformer.longformer_params(str(tmp_path / "model"), module)
    np.testing.assert_array_equal(read["decoder"], params["tokens"]["embedding"])
    drawn = jax.eval_shape(lambda: module.init(jax.random.key(0), inputs, method="encode"))
    missing = {name for name in drawn["params"] if name not in read}
    assert missing == {"token_types", "item_positions"}
    zeros = {n: {"embedding": jnp.zeros(drawn["params"][n]["embedding"].shape)} for n in missing}
    found = module.apply({"params": {**read, **zeros}}, inputs, method="encode")
    first = jnp.zeros(inputs.shape, bool).at[:, 0].set(True)
    expected = theirs.apply({"params": params}, inputs, global_mask=first, method="features")
    np.testing.assert_allclose(found, expected[:, 0], atol=1e-5)
    with pytest.raises(ConfigError, match="has 30 tokens, the tokeniser 31"):
        recformer.longformer_params(str(tmp_path / "model"), recformer.encoder(config, 31))
    with pytest.raises(ConfigError, match=r"num_layers=2, but config.model.num_layers=1"):
        config = apply_overrides(config, ("model.num_layers=1",))
        recformer.longformer_params(str(tmp_path / "model"), recformer.encoder(config, 30))


# -- full scale -----------------------------------------------------------------------------------

FULL = ("pretrain_amazon7", "finetune_scientific")


@pytest.mark.parametrize("variant", FULL)
def test_published_settings_lower(variant):
    config = get_config(f"recformer:{variant}")
    objective, batch, settings = recformer.plan(config)
    assert batch["inputs"].shape[1] == 1024
    rules = tuple((pattern, PartitionSpec(*spec)) for pattern, spec in config.sharding.rules)
    layout = Layout(make_mesh({"data": 2, "fsdp": 2, "model": 2}), rules)
    lowered, arrays = lower_step(objective, batch, settings, layout)
    assert "sdy.mesh" in lowered.as_text() or "num_partitions = 8" in lowered.as_text()
    placed = {path_str(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(arrays)}
    sizes = {path: x.size for path, x in placed.items() if path.startswith(("params", "carried"))}
    layers = sum(size for path, size in sizes.items() if "stack/" in path)
    # Longformer-base: six projections and one out, two hidden layers, two norms.
    attention, mlp = 7 * (768 * 768 + 768), 2 * 768 * 3072 + 3072 + 768
    assert layers == 12 * (attention + mlp + 2 * 2 * 768)
    moments = [path for path in placed if path.startswith("optimizer") and "tokens/" in path]
    assert bool(moments) == (variant != "pretrain_amazon7")  # its words are frozen
    for path, x in placed.items():
        shard = x.sharding.shard_shape(x.shape)
        if path.endswith("attention/query/kernel"):
            assert shard[2] * 2 == x.shape[2]  # heads
        if path.endswith("table") or "catalogue/" in path:
            assert shard[0] < x.shape[0]


def test_every_variant_is_a_config_and_names_are_checked():
    for variant in list_configs()["recformer"].variants:
        config = get_config(f"recformer:{variant}")
        assert config.task == ("pretrain" if variant == "pretrain_amazon7" else "recommend")
    config = apply_overrides(get_config("recformer"), ["runs=('two_stages',)"])
    with pytest.raises(ConfigError, match="'two_stages'; nearest: two_stage"):
        recformer.check_names(config)
