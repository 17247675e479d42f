"""The generated task, generation with added parameters, the recipe, the published settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from transfer_jax.configuration import ConfigError, apply_overrides, get_config, list_configs
from transfer_jax.models import Bart, BartConfig, Decoding, bart_stack, generate_targets
from transfer_jax.nn import petl
from transfer_jax.objectives import Seq2Seq, Variables
from transfer_jax.papers import unified_petl
from transfer_jax.training import Experiment, Layout, make_mesh
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


def test_recipe_on_one_and_on_eight_devices(tmp_path):
    results = []
    for devices in (1, 8):
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


def test_a_published_setting_has_no_data(tmp_path):
    with pytest.raises(ConfigError, match="published setting"):
        Experiment(get_config("unified_petl:mnli"), tmp_path).run()


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_settings_lower_with_the_published_numbers(variant):
    assert set(PUBLISHED) == set(list_configs()["unified_petl"].variants) - {"markov"}
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
