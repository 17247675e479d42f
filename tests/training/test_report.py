import json
import re
import subprocess
import sys

import pytest

from transfer_jax.training.report import format_table, print_results, write_report
from transfer_jax.training.writers import MetricWriter

_RESULTS = {
    "scalars": {"retention": 0.98765432, "best_model": "a|b", "seeds": 3, "broken": "NaN"},
    "tables": {"per_task accuracy": {"columns": ["task", "before", "after"],
                                     "rows": [["cola", 0.5, 0.25], ["sst2", 0.75, None]]}},
    "curves": {"forgetting": {"x": [1, 2, 3], "series": {"EWC": [1, 0.5, 0.25],
                                                         "none": [1, "NaN", None]},
                              "xlabel": "task", "ylabel": "accuracy"}},
    "bars": {"mixing/weights": {"labels": ["adapter one", "adapter two"], "ylabel": "weight",
                                "series": {"layer 1": [0.1, 0.9], "layer 2": [0.5, 0.5]}}},
}  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    for stage in ("source", "target"):
        with MetricWriter(tmp_path / "stages" / stage, tensorboard=False) as writer:
            for step in range(1, 5):
                writer.write(step * 10, {"train/loss": 1 / step, "learning_rate": 0.1})
            writer.write(40, {"eval/loss": 0.5, "eval/accuracy": float("nan")})
    (tmp_path / "stages/source/summary.json").write_text('{"steps": 40, "eval": {"loss": 0.5}}')
    (tmp_path / "config.json").write_text('{"seed": 0, "model": {"features": 8}}')
    (tmp_path / "results.json").write_text(json.dumps(_RESULTS))
    return tmp_path


def _png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_report_of_a_finished_run(workdir):
    path = write_report(workdir)
    assert path == workdir / "report" / "report.md"
    text = path.read_text()
    for line in (
        "| retention | 0.9877 |", "| best_model | a\\|b |", "| seeds | 3 |",
        "| cola | 0.5 | 0.25 |", "| sst2 | 0.75 |  |", "|---|---:|---:|", "|---|---|",
        "| model.features | 8 |", "| eval.loss | 0.5 |",
        "| train/loss | 0.25 | 40 | 0.25 | 1 |", "| eval/accuracy | nan | 40 | nan | nan |",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert "missing" not in text
    assert text.count("has not finished") == 1  # the stage without a summary
    plots = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert plots == [
        "curves-forgetting.png", "bars-mixing_weights.png", "stage-source.png", "stage-target.png",
    ]  # fmt: skip
    for plot in plots:
        width, height = _png_size(workdir / "report" / plot)
        assert width > 600 and height > 400
    # Three panels (loss with two curves, learning rate, accuracy) stand beside each other.
    assert _png_size(workdir / "report" / "stage-source.png")[0] > 3 * 500


def test_report_of_a_killed_run_says_what_is_missing(workdir):
    (workdir / "results.json").unlink()
    (workdir / "config.json").write_text('{"seed": 0')
    with open(workdir / "stages/target/metrics.jsonl", "a") as file:
        file.write('{"step": 50, "tra')
    (workdir / "stages/source/metrics.jsonl").write_text("")
    text = write_report(workdir).read_text()
    assert "**This run has not finished**" in text
    assert "`results.json` does not exist." in text
    assert "`config.json` cannot be read" in text
    assert "Stage `source` has no metrics." in text
    assert "| train/loss | 0.25 | 40 | 0.25 | 1 |" in text


def test_one_bad_record_does_not_cost_the_report(workdir):
    bad = {**_RESULTS, "curves": {"bad": {"x": [1, 2], "series": {"a": [1, 2, 3]}}, "worse": 3}}
    (workdir / "results.json").write_text(json.dumps(bad))
    text = write_report(workdir).read_text()
    assert "`curves/bad` in `results.json` cannot be shown: ValueError" in text
    assert "`curves/worse` in `results.json` cannot be shown: TypeError" in text
    assert "| retention | 0.9877 |" in text


def test_a_directory_without_any_of_the_files_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no work directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tables_for_the_terminal(capsys):
    text = format_table(["name", "value"], [["[a]", 1.23456789], ["long name", 12]])
    first, second = text.splitlines()[2:]
    assert first.split() == ["[a]", "1.235"] and second.split() == ["long", "name", "12"]
    assert len(first) == len(second)  # numbers end in the same column
    print_results(_RESULTS)
    shown = capsys.readouterr().out
    assert "retention" in shown and "0.9877" in shown
    assert "per task accuracy" in shown and "sst2" in shown
    print_results({})
    assert capsys.readouterr().out == ""


def test_importing_needs_no_plotting_library():
    code = "import sys, transfer_jax.training.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
