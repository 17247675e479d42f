"""The generated task, generation with added parameters, the recipe, the published settings."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from transfer_jax.configuration import ConfigError, apply_overrides, get_config, list_configs
from transfer_jax.interop import save_pretrained, train_tokenizer
from transfer_jax.models import (
    Bart,
    BartConfig,
    Bert,
    BertConfig,
    Decoding,
    bart_stack,
    bert_stack,
    generate_targets,
)
from transfer_jax.nn import petl
from transfer_jax.objectives import Seq2Seq, Variables
from transfer_jax.papers import unified_petl
from transfer_jax.training import Experiment, Layout, load_variables, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.training.sharding import bytes_per_device, placement_table

PUBLISHED = {
    "mnli": 4 * 16 * 768 * 12,
    "mnli_large": 4 * 16 * 1024 * 24,
    "sst2": 4 * 16 * 768 * 12,
    "xsum": 27_377_664,
    "en_ro": 27_377_664,
}


def test_sentences_follow_the_chain_and_their_translation_can_be_undone():
    language = unified_petl.Language(8, 6, 0.5, seed=0)
    tokens = language.sentences(20_000, seed=1)
    counts = np.zeros((8, 8))
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    rows = np.diff(language.cumulative, prepend=0.0, axis=1)
    often = counts.sum(axis=1) > 2_000
    np.testing.assert_allclose(
        (counts / counts.sum(axis=1, keepdims=True))[often], rows[often], atol=0.03
    )
    back = np.argsort(language.words)[language.translate(tokens)].reshape(len(tokens), -1, 2)
    pairs = tokens.reshape(back.shape)
    swapped = language.exchanging[pairs[..., 0]]
    np.testing.assert_array_equal(back[swapped], pairs[swapped][:, ::-1])
    np.testing.assert_array_equal(back[~swapped], pairs[~swapped])
    gaps = language.gaps(tokens, 0.3, seed=2)
    np.testing.assert_array_equal(gaps["inputs"] == 8, gaps["weights"] == 1)
    assert abs(gaps["weights"].mean() - 0.3) < 0.01


def test_generation_with_prefixes_and_prompts_is_the_full_pass():
    """Greedy tokens against passes without a cache; beam scores against a rescoring pass."""
    encoder = bart_stack(features=16, num_layers=2, num_heads=4, hidden=24, init_scale=0.3)
    decoder = bart_stack(
        features=16, num_layers=2, num_heads=4, hidden=24, init_scale=0.3, causal=True,
        cross_attention=True,
    )  # fmt: skip
    module = Bart(BartConfig(vocab_size=17, encoder=encoder, decoder=decoder, max_positions=16))
    task = Seq2Seq(module=module, start_id=2)
    batch = {
        "inputs": jax.random.randint(jax.random.key(0), (2, 6), 3, 17),
        "lengths": jnp.array([6, 4]), "targets": jnp.zeros((2, 5), jnp.int32),
    }  # fmt: skip
    params = jax.jit(task.init)(jax.random.key(1), batch).params
    method = (*petl.mam(3, 4, scale=2.0), *petl.prompt(2, context=True))

    def loss(params):
        return task.loss(Variables(params, {}), batch, None)[0]

    added = petl.init(method, jax.random.key(2), loss, params)
    rng = np.random.default_rng(0)
    added = jax.tree.map(lambda x: x + np.float32(0.5 * rng.normal(size=x.shape)), added)

    @jax.jit
    def log_probs(targets):
        with petl.adapted(method, added):
            logits = task.predict(Variables(params, {}), {**batch, "targets": targets})
        return jax.nn.log_softmax(logits)

    adapted = petl.AdaptedModule(module, method)
    variables = {"params": params, "added": added}

    def generate(module, **options):
        decoding = Decoding(max_tokens=5, start_id=2, pad_id=1, length_penalty=0.0, **options)
        return generate_targets(
            module, variables if module is adapted else {"params": params}, batch["inputs"],
            decoding, lengths=batch["lengths"],
        )  # fmt: skip

    plain = generate(module)
    found = generate(adapted)
    assert not np.array_equal(plain.tokens, found.tokens)
    targets = np.zeros((2, 5), np.int32)
    for i in range(5):
        targets[:, i] = np.argmax(log_probs(targets)[:, i], axis=-1)
    np.testing.assert_array_equal(found.tokens, targets)
    np.testing.assert_array_equal(generate(module).tokens, plain.tokens)  # nothing was cached
    best = generate(adapted, num_beams=3)
    picked = jnp.take_along_axis(log_probs(best.tokens), best.tokens[..., None], axis=-1)
    np.testing.assert_allclose(best.scores, picked.sum((1, 2)), rtol=1e-4, atol=1e-4)
    assert (best.scores >= found.scores - 1e-4).all()


def small(*overrides):
    config = apply_overrides(
        get_config("unified_petl"),
        ["model.features=8", "model.num_layers=1", "model.hidden=16", "pretrain.steps=3",
         "pretrain.optimizer.warmup_steps=0", "transfer.steps=2", "batch_size=8",
         "data.source=64", "data.target=64", "data.held_out=20", "eval_batch_size=16", *overrides],
    )  # fmt: skip
    with config.unlocked():
        for name in set(config.methods) - {"mam", "bitfit"}:
            del config.methods[name]
        for entry in config.methods.values():
            entry.learning_rates = entry.learning_rates[:1]
    return config


def test_recipe_on_one_and_on_two_devices(tmp_path):
    results = []
    for devices in (1, 2):
        exp = Experiment(small(), tmp_path / str(devices))
        exp.layout = Layout(make_mesh({"data": devices}, jax.devices()[:devices]))
        results.append(exp.run())
    first, second = (r["tables"]["Token accuracy of the translation (test)"] for r in results)
    assert [row[0] for row in first["rows"]] == ["bitfit", "mam"]
    for a, b in zip(first["rows"], second["rows"]):
        assert a[2:] == b[2:]
        np.testing.assert_allclose(a[1], b[1], atol=0.02)
    mam = first["rows"][1][2]
    # Prefixes of 8, a bottleneck of 24 and its biases.
    assert mam == 2 * 8 * 8 + 2 * 24 * 8 + 24 + 8


# -- real data, in files of the same layout -----------------------------------------------------

WORDS = ("good", "bad", "dog", "cat", "runs", "sleeps", "a", "the", "where", "is")
ONE = Layout(make_mesh({"data": 1}, jax.devices()[:1]))


def phrases(count, seed, length=4):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for _ in range(count)]


def run(variant, workdir, overrides, methods=()):
    config = apply_overrides(get_config(f"unified_petl:{variant}"), overrides)
    with config.unlocked():
        for name in set(config.get("methods", {})) - set(methods):
            del config.methods[name]
        for name in methods:
            config.methods[name].learning_rates = (1e-2,)
    exp = Experiment(config, workdir)
    exp.layout = ONE
    return exp.run()


SMALL = [
    "model.features=8", "model.num_layers=1", "model.hidden=16", "model.num_heads=2",
    "model.dropout=0", "data.vocabulary=280", "batch_size=8", "eval_batch_size=16",
    "pretrain.steps=2", "pretrain.optimizer.warmup_steps=0", "transfer.steps=2",
    "transfer.optimizer.warmup_steps=0",
]  # fmt: skip


def store(folder, stems, line):
    """Writes 20 lines to each file of a collection."""
    pytest.importorskip("tokenizers")
    folder.mkdir()
    for seed, stem in enumerate(stems):
        rows = [line(i, text) for i, text in enumerate(phrases(20, seed))]
        (folder / f"{stem}.gz").write_bytes(gzip.compress("\n".join(rows).encode()))


def test_sentences_are_learned_from_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path))
    stems = ("custrev.all", *(f"stsa.binary.{part}" for part in ("train", "dev", "test")))
    store(tmp_path / "sentence_tasks", stems, lambda i, text: f"{i % 2} {text}")
    overrides = [
        *SMALL, "data.sources=cr", "data.target=sst2", "data.length=8", "model.attention_dropout=0",
    ]  # fmt: skip
    results = run("sentences", tmp_path / "run", overrides, ("mam",))
    rows = results["tables"]["Accuracy on sst2 (test)"]["rows"]
    assert [row[2] for row in rows] == [2 * 8 * 8 + 2 * 8 * 8 + 8 + 8]


@pytest.mark.slow
def test_captions_are_translated_from_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path))
    parts = ("train", "val", "test_2016_flickr", "test_2017_flickr")
    stems = [f"{part}.{language}" for language in ("en", "de") for part in parts]
    store(tmp_path / "multi30k_en_de", stems, lambda i, text: text)
    overrides = [*SMALL, "data.length=12"]
    results = run("multi30k", tmp_path / "run", overrides, ("mam",))
    (row,) = results["tables"]["English to German, test_2016"]["rows"]
    assert row[0] == "mam" and 0 <= row[1] <= 100
    assert row[4] == 3 * 2 * 8 * 8 + 2 * (2 * 48 * 8 + 48 + 8)  # three attentions, two FFNs


def test_infilling_hides_spans_and_keeps_the_rest():
    rng = np.random.default_rng(0)
    for length in (1, 7, 40):
        tokens = np.arange(10, 10 + length)
        holes = unified_petl.infill(tokens, 0.35, 3.0, 4, rng)
        kept = holes[holes != 4]
        assert len(kept) <= 0.65 * length and set(kept) <= set(tokens)
        assert (np.diff(kept) > 0).all() and not ((holes[1:] == 4) & (holes[:-1] == 4)).any()
        assert len(kept) < length and (holes == 4).any()


def save_model(path, module):
    """A pretrained directory: weights and a tokeniser."""
    pytest.importorskip("tokenizers")
    tokens = jnp.ones((1, 4), jnp.int32)
    args = (tokens, tokens) if isinstance(module, Bart) else (tokens,)
    save_pretrained(path, module, jax.jit(module.init)(jax.random.key(0), *args)["params"])
    train_tokenizer(WORDS, 290).backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')


STACK = {
    "features": 8, "num_layers": 2, "num_heads": 2, "hidden": 16, "dropout": 0.0,
    "attention_dropout": 0.0,
}  # fmt: skip


def published(tmp_path, variant, model, overrides):
    common = [
        f"data.directory={tmp_path}", f"pretrained={tmp_path / model}", "batch_size=4",
        "train.steps=2", "train.eval_every=2", "train.accumulate=1",
    ]  # fmt: skip
    return run(variant, tmp_path / "run", [*common, *overrides])["scalars"]


def test_a_task_of_glue_runs_on_files(tmp_path):
    config = BertConfig(
        vocab_size=290, stack=bert_stack(norm_eps=1e-5, **STACK), max_positions=34,
        position_offset=2, token_types=1, roberta=True, head="masked_lm",
    )  # fmt: skip
    save_model(tmp_path / "roberta", Bert(config))
    classes = get_config("unified_petl:mnli").data.classes
    for name, seed in (("train", 0), ("dev_matched", 1)):
        rows = [
            "\t".join((a, b, classes[i % 3]))
            for i, (a, b) in enumerate(zip(phrases(12, seed), phrases(12, seed + 9, 12)))
        ]
        text = "\n".join(("sentence1\tsentence2\tgold_label", *rows))
        (tmp_path / f"{name}.tsv").write_text(text)
    overrides = ["length=32", "data.boundaries=32", "train.optimizer.warmup_steps=0"]
    scalars = published(tmp_path, "mnli", "roberta", overrides)
    assert 0 <= scalars["validation accuracy"] <= 1
    stored = load_variables(tmp_path / "run" / "stages" / "train").params
    assert not jax.tree.leaves(stored["full"])  # the drawn head is frozen too


@pytest.mark.slow
def test_summaries_are_learned_from_files(tmp_path):
    encoder = bart_stack(**STACK)
    decoder = bart_stack(**STACK, causal=True, cross_attention=True)
    config = BartConfig(vocab_size=290, encoder=encoder, decoder=decoder, max_positions=34)
    save_model(tmp_path / "bart", Bart(config))
    for name in ("train", "validation", "test"):
        rows = [
            json.dumps({"document": a, "summary": b})
            for a, b in zip(phrases(8, 3, 20), phrases(8, 4))
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    overrides = [
        "length=16", "target_length=8", "data.boundaries=16", "decode.max_tokens=6",
        "decode.min_tokens=1", "decode.num_beams=2",
    ]  # fmt: skip
    scalars = published(tmp_path, "xsum", "bart", overrides)
    assert set(scalars) == {"test rouge1", "test rouge2", "test rougeLsum"}


def test_a_published_setting_says_what_it_needs(tmp_path):
    for variant in ("mnli", "en_ro"):
        with pytest.raises(ConfigError, match=r"published setting needs both.*tokenizer\.json"):
            Experiment(get_config(f"unified_petl:{variant}"), tmp_path / variant).run()


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_settings_lower_with_the_published_numbers(variant):
    small = {"markov", "sentences", "multi30k"}
    assert set(PUBLISHED) == set(list_configs()["unified_petl"].variants) - small
    config = get_config(f"unified_petl:{variant}")
    rules = tuple((pattern, PartitionSpec(*spec)) for pattern, spec in config.sharding.rules)
    objective, batch, settings = unified_petl.plan(config)
    layout = Layout(make_mesh({"data": 4, "model": 2}), rules, config.sharding.min_size)
    lowered, arrays = lower_step(objective, batch, settings, layout)
    added = arrays["params"]["added"]
    assert petl.count(objective.method, added) == PUBLISHED[variant]
    assert not jax.tree.leaves(arrays["params"]["full"])
    mib = {name: bytes_per_device({name: tree}) / 2**20 for name, tree in arrays.items()}
    print(f"\n{variant}, MiB on a device: " + ", ".join(f"{k} {v:.1f}" for k, v in mib.items()))
    print(placement_table(arrays["params"]))
    if variant in ("mnli_large", "xsum"):
        memory = lowered.compile().memory_analysis()
        print(f"temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB on a device")
        # What stays on the devices, and little else: the batch is small.
        assert memory.argument_size_in_bytes == pytest.approx(bytes_per_device(arrays), rel=0.01)
    for kernel in ("down", "up"):
        x = added["adapter_ffn"]
        while "mlp" not in x:
            x = next(iter(x.values()))
        leaf = x["mlp"][kernel]["kernel"]
        axis = 2 if kernel == "down" else 1
        assert leaf.sharding.shard_shape(leaf.shape)[axis] == leaf.shape[axis] // 2
