"""The commands, links and code of the documentation."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transfer_jax as tj
from launch import gke, local, slurm, tpu_vm
from tests import toy
from transfer_jax import cli, trees
from transfer_jax.interop import from_pretrained, save_pretrained
from transfer_jax.models import T5, Bert, BertConfig, bert_stack, t5_config
from transfer_jax.training import FitConfig, base_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    "transfer-jax": cli.main,
    "python -m transfer_jax.cli": cli.main,
    "python -m launch.local": local.main,
    "python -m launch.slurm": slurm.main,
    "python -m launch.tpu_vm": tpu_vm.main,
    "python -m launch.gke": gke.main,
}


def blocks(page, language):
    """The fenced blocks of a language, as pairs (rest of the opening line, content)."""
    found = re.findall(r"^```(\w+) *(.*)\n((?:.*\n)*?)```$", page.read_text(), re.MULTILINE)
    return [(title, body) for lang, title, body in found if lang == language]


def commands(page):
    """Our commands in bash blocks and in `inline code`, as (program, arguments)."""
    lines = [
        part.strip()
        for _, body in blocks(page, "bash")
        for line in body.replace("\\\n", " ").splitlines()
        for part in line.split("&&")
    ]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text())
    for line in lines:
        line = re.sub(r"^(\w+=\S* +)+", "", line)  # variables before the command
        for name, program in PROGRAMS.items():
            if line.startswith(f"{name} "):
                yield program, shlex.split(line.removeprefix(name))


COMMANDS = {
    f"{page.stem}: {shlex.join(arguments)}": (program, arguments)
    for page in PAGES
    for program, arguments in commands(page)
}
WRITTEN = {
    title: body for title, body in blocks(ROOT / "docs/adding_a_paper.md", "python") if title
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The configs, and the files that the reader of docs/adding_a_paper.md writes."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, body in WRITTEN.items():
        (tmp_path / name).write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_commands_are_found():
    pages = {name.partition(":")[0] for name in COMMANDS}
    assert {"README", "configs", "work_directory", "adding_a_paper"} <= pages


@pytest.mark.parametrize("program, arguments", COMMANDS.values(), ids=list(COMMANDS))
def test_command_is_accepted(program, arguments, here, monkeypatch, capsys):
    for variable in ("JAX_PLATFORMS", "XLA_FLAGS"):  # set by --platform and --devices
        monkeypatch.setenv(variable, "")
    if arguments[0] == "report":
        # The run is not there, which is all that may be wrong.
        assert program(arguments) == cli.FAILED
        assert "is no work directory" in capsys.readouterr().err
        return
    dry = () if arguments[0] == "list" else ("--dry_run",)
    assert program([*arguments, *dry]) == cli.OK, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_setting_of_a_stage_is_explained():
    text = (ROOT / "docs/configs.md").read_text()
    named = set(re.findall(r"`(\w+)`", text)) | {"optimizer"}
    assert {field.name for field in dataclasses.fields(FitConfig)} <= named


def test_code_of_configs():
    for _, body in blocks(ROOT / "docs/configs.md", "python"):
        exec(body, {})


def test_code_of_work_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exp = tj.Experiment(base_config("none"), "runs/quickstart")
    config = FitConfig(steps=4, log_every=2)
    fitted = exp.fit("pretrain", toy.classifier(), toy.train_data(), config)
    exp.table("Test accuracy", ["way", "accuracy"], [["toy", 0.5]])
    names: dict = {}
    for _, body in blocks(ROOT / "docs/work_directory.md", "python"):
        exec(body, names)
    assert toy.leaves_equal(names["variables"].params, fitted.params)
    assert [step for step, _ in names["losses"]] == [2, 4]
    assert names["accuracy"] == [["toy", 0.5]]


def test_code_of_pretrained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stack = bert_stack(features=8, num_layers=2, num_heads=2)
    config = BertConfig(
        vocab_size=20, stack=stack, roberta=True, position_offset=2, max_positions=12
    )
    model = Bert(dataclasses.replace(config, head="masked_lm"))
    seq2seq = T5(t5_config(vocab_size=20, features=8, num_layers=1, num_heads=2, head_dim=4))
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 3, 20)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    (tmp_path / "models").mkdir()
    save_pretrained("models/roberta", model, params)
    names = {
        "tokens": tokens, "lengths": jnp.array([6, 4]), "labels": jnp.array([0, 1]),
        "key": jax.random.key(2), "seq2seq": seq2seq, "sources": tokens,
        "seq2seq_variables": jax.jit(seq2seq.init)(jax.random.key(3), tokens, tokens),
    }  # fmt: skip
    for _, body in blocks(ROOT / "docs/pretrained.md", "python"):
        exec(body, names)
    assert set(names["fresh"]) == {
        f"{layer}/{part}" for layer in ("classifier", "pooler") for part in ("bias", "kernel")
    }
    # Nothing is trained yet, so the adapter changes nothing, and neither does merging it.
    np.testing.assert_allclose(names["adapted_logits"], names["logits"], atol=1e-6)
    module, merged, _ = from_pretrained("models/merged")
    assert module.config == names["module"].config
    head, body = trees.partition(merged, "^(classifier|pooler)")
    expected = trees.partition(names["params"], "^(classifier|pooler)")[1]
    jax.tree.map(np.testing.assert_array_equal, body, expected)
    assert jax.tree.leaves(head)
    assert names["out"].tokens.shape == (2, 12)


def test_the_worked_example(here):
    config = here / "delta_config.py"
    short = config.read_text().replace("steps=200", "steps=3")
    assert short != config.read_text()
    config.write_text(short)

    tests = importlib.import_module("test_delta")
    ran = [getattr(tests, name)() for name in dir(tests) if name.startswith("test_")]
    assert len(ran) == 3

    (body,) = (
        body for title, body in blocks(ROOT / "docs/adding_a_paper.md", "python") if not title
    )
    names: dict = {}
    exec(body, names)
    (table,) = names["exp"].results["tables"].values()
    assert [row[0] for row in table["rows"]] == ["head only", "fine-tuning", "delta"]
    assert (here / "runs/delta/report/report.md").exists()
