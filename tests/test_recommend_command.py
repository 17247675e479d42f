"""``transfer-jax recommend``: what it writes is the model's own ranking; what it refuses."""

import csv

import jax
import numpy as np
import pytest

from transfer_jax import cli, recommendation
from transfer_jax.configuration import apply_overrides, get_config
from transfer_jax.data import recommend
from transfer_jax.data.interactions import leave_one_out
from transfer_jax.papers import bert4rec
from transfer_jax.training import Experiment, Layout, load_variables, make_mesh

SHORT = (
    "models=('bert4rec',)", "data.options.users=40", "data.options.items=40",
    "model.features=8", "model.hidden=8", "model.num_layers=1", "model.length=8", "batch_size=16",
    "train.steps=1", "train.optimizer.warmup_steps=0",
)  # fmt: skip
ROWS = [  # user, item, time; "new" is an item that the run has never seen
    ("ann", "5", 3), ("ann", "7", 1), ("bob", "new", 1), ("cyd", "new", 1), ("cyd", "9", 2),
    ("ann", "8", 2), *(("dee", str(i), i) for i in range(1, 20)),
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    exp = Experiment(apply_overrides(get_config("bert4rec"), SHORT), path)
    exp.layout = Layout(make_mesh(devices=jax.devices()[:1]))  # compiles sooner
    cfg = exp.config
    log = recommend.load_log(cfg.data.name, **cfg.data.options).by_frequency()
    exp.artifact("items", lambda: [str(name) for name in log.item_names])
    for name in cfg.models:
        objective = bert4rec.recommender(cfg, name, log.num_items)
        data = bert4rec.training_data(cfg, objective, leave_one_out(log).train, 0)
        settings = {**cfg.train.to_dict(), "monitor": "", "select_best": False}
        exp.fit(name, objective, data, settings)
    return path


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "log.csv"
    with path.open("w") as file:
        csv.writer(file).writerows([("user_id", "item_id", "timestamp"), *ROWS])
    return path


def run(workdir, table, *options):
    out = table.with_name("out.csv")
    out.unlink(missing_ok=True)
    code = cli.main(
        ["recommend", str(workdir), f"--interactions={table}", f"--out={out}", *options]
    )
    return code, list(csv.reader(out.open())) if out.exists() else None


def test_writes_the_best_items_of_every_user(workdir, table, capsys):
    code, rows = run(workdir, table, "--k=4", "--batch_size=2")
    assert code == cli.OK and rows[0] == ["user_id", "item_id", "rank", "score"]
    text = capsys.readouterr().out
    assert "25, of them 2 of items" in text and "3, and 1 without a known item" in text

    plan = recommendation.plan(
        workdir, recommendation.read_log(table, user="user_id", item="item_id", time="timestamp")
    )
    assert plan.users.tolist() == ["ann", "cyd", "dee"]
    assert [plan.item_names[i] for i in plan.history[0]] == ["7", "8", "5"]
    objective = bert4rec.recommender(plan.config, "bert4rec", len(plan.item_names) - 1)
    variables = load_variables(workdir / "stages/bert4rec")
    inputs = np.zeros((3, 8), np.int32)
    for user, history in enumerate(plan.history):
        known = [*history[-7:], objective.mask_id]
        inputs[user, : len(known)] = known
    scores = np.array(jax.jit(objective.predict)(variables, {"inputs": inputs}))
    expected = []
    for user, history in enumerate(plan.history):
        scores[user, history] = -np.inf
        best = np.argsort(-scores[user])[:4]
        expected += [[plan.users[user], plan.item_names[i], str(r + 1)] for r, i in enumerate(best)]
    assert [row[:3] for row in rows[1:]] == expected

    sharded = run(workdir, table, "--k=4", "--shards=4")[1]
    assert [row[:3] for row in sharded] == [row[:3] for row in rows]
    one, several = ([float(row[3]) for row in found[1:]] for found in (rows, sharded))
    np.testing.assert_allclose(several, one, rtol=1e-4)
    kept = run(workdir, table, "--k=40", "--model=bert4rec", "--keep_seen")[1]
    assert len(kept) == 1 + 3 * 40  # every item, and neither padding nor [MASK]
    fewer = run(workdir, table, "--k=40")[1]
    assert len(fewer) == 1 + 3 * 40 - 3 - 1 - 19


def test_dry_run_and_errors(workdir, table, tmp_path, capsys):
    assert run(workdir, table, "--dry_run") == (cli.OK, None)
    assert "dry run: nothing was computed or written" in capsys.readouterr().out
    for place, options, message in (
        (tmp_path, (), "is no work directory"),
        (workdir, ("--model=gru4rec",), "choose from bert4rec"),
        (workdir, ("--k=41",), "there are 40 items"),
        (workdir, ("--shards=3",), "do not divide"),
        (workdir, ("--item=product",), "no column 'product'; its columns are user_id"),
    ):
        later = "--k=41" in options or "--shards=3" in options  # found while it is carried out
        assert run(place, table, *options)[0] == (cli.FAILED if later else cli.USAGE)
        assert message in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text("user_id,item_id,timestamp\na,apple,1\n")
    assert run(workdir, other)[0] == cli.USAGE
    assert "none of the items is known" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"recipe": "s4"}')
    assert run(tmp_path, table)[0] == cli.USAGE
    assert "recommends nothing" in capsys.readouterr().err
