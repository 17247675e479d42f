"""transfer-jax forecast: what is read, written and refused."""

import csv
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from transfer_jax import cli
from transfer_jax.forecast import plan_forecast
from transfer_jax.interop import from_pretrained, save_pretrained
from transfer_jax.models.ttm import TTM, TTMConfig, forecast

CONFIG = TTMConfig(
    context_length=24, prediction_length=6, patch_length=8, patch_stride=8, d_model=8, rpt=True,
    num_layers=1, adaptive_patching_levels=1, decoder_layers=1, decoder_d_model=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "ttm-r2"
    module = TTM(CONFIG)
    token = np.array([7])
    params = jax.jit(lambda k: module.init(k, np.zeros((1, 24, 1)), freq_token=token))(
        jax.random.key(0)
    )["params"]
    return save_pretrained(directory, module, params)


def table(rows=40):
    rng = np.random.default_rng(0)
    return np.stack([1e6 + 1e5 * rng.normal(size=rows), 1e-4 * rng.normal(size=rows)], axis=1)


def write(path, values, *, minutes=60, header="date,load,tiny", start="2024-03-01T00:00:00"):
    times = np.datetime64(start) + np.arange(len(values)) * np.timedelta64(minutes, "m")
    with path.open("w") as file:
        file.write(header + "\n")
        for time, row in zip(times, values):
            cells = ["" if isinstance(x, float) and np.isnan(x) else str(x) for x in row]
            file.write(",".join([str(time).replace("T", " "), *cells]) + "\n")
    return path


def test_forecast(model, tmp_path, capsys):
    """The command writes what the network gives for the end of the file, in the file's units."""
    values = table()
    values[30, 0] = np.nan
    file = write(tmp_path / "a.csv", values)
    out = tmp_path / "out" / "f.csv"
    command = ["forecast", str(file), "--model", str(model), "--out", str(out), "--horizon", "8"]
    assert cli.main([*command, "--dry_run"]) == cli.OK
    text = capsys.readouterr().out
    assert "2 passes" in text and "resolution token: 7" in text and "1 missing" in text
    assert not out.exists()
    assert cli.main(command) == cli.OK
    rows = list(csv.reader(out.open()))
    assert rows[0] == ["timestamp", "load", "tiny"] and len(rows) == 9
    assert rows[1][0] == "2024-03-02 16:00:00" and rows[8][0] == "2024-03-02 23:00:00"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    module, params, _ = from_pretrained(model)
    context = values[-24:]
    known = ~np.isnan(context)
    mean, std = np.nanmean(context, 0), np.nanstd(context, 0)
    x = np.where(known, (context - mean) / std, 0)[None].astype(np.float32)
    expected = jax.jit(lambda x, **given: forecast(module, {"params": params}, x, 8, **given))(
        x, observed=known[None].astype(np.float32), freq_token=np.array([7])
    )
    found = np.array([row[1:] for row in rows[1:]], float)
    np.testing.assert_allclose((found - mean) / std, expected[0], atol=1e-3)


def test_columns_and_resolutions(model, tmp_path):
    file = write(tmp_path / "a.csv", [(*row, "north") for row in table()], minutes=15,
                 header="When,load,tiny,place")  # fmt: skip
    plan = plan_forecast(file, model, time_column="When", columns=["tiny"])
    assert (plan.columns, plan.seconds, plan.token) == (("tiny",), 900, 5)
    assert plan.horizon == 6 and len(plan.values) == 24
    assert plan_forecast(file, model, time_column="When", columns=["load"], horizon=2).horizon == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: (v[:20], {}), r"20 rows.*24 rows are needed, 4 more"),
        (lambda v: (v, {"header": "moment,load,tiny"}), r"no column of timestamps.*--time_column"),
        (lambda v: ([(1.0, "high")] * 30, {}), r"line 2: column 'tiny' has 'high'.*no number"),
        (lambda v: (v, {"minutes": -60}), r"timestamps must increase"),
    ],
)
def test_errors(model, tmp_path, capsys, change, message):
    values, options = change(table())
    file = write(tmp_path / "a.csv", values, **options)
    assert cli.main(["forecast", str(file), "--model", str(model)]) == cli.USAGE
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL) and "Traceback" not in error
    assert not Path("forecast.csv").exists()


def test_other_directories_are_refused(tmp_path, capsys):
    file = write(tmp_path / "a.csv", table())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for model, message in ((tmp_path, "'bert'"), (tmp_path / "none", "no directory")):
        assert cli.main(["forecast", str(file), "--model", str(model)]) == cli.USAGE
        assert message in capsys.readouterr().err


def test_code_of_the_page(model, tmp_path, monkeypatch):
    monkeypatch.chdir(model.parent)
    text = (Path(__file__).parent.parent / "docs/forecast.md").read_text()
    (body,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    without = TTM(TTMConfig(**{**CONFIG.__dict__, "rpt": False}))
    x = np.zeros((1, 24, 1), np.float32)
    params = jax.jit(without.init)(jax.random.key(0), x)["params"]
    save_pretrained(tmp_path / "ttm-r2", without, params)
    monkeypatch.chdir(tmp_path)
    exec(body, {})
    wider = from_pretrained("ttm-r2", fresh=["_channels/"], channels=7, decoder_mode="mix_channel")
    assert wider.fresh and all("_channels/" in path for path in wider.fresh)
