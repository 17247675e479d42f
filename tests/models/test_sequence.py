"""Whole sequence models: padding, decoding with any mixer, growth, layout."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.models import (
    LanguageModel,
    SequenceClassifier,
    SequenceForecaster,
    SequenceModel,
    SequencePairClassifier,
    generate,
    partition_rules,
)
from transfer_jax.trees import path_str

L, V = 24, 20


@functools.cache
def initialise(module, *shape):
    if module.vocab_size is None:
        x = jax.random.normal(jax.random.key(7), shape)
    else:
        x = jax.random.randint(jax.random.key(7), shape, 0, module.vocab_size)
    return jax.jit(module.init)(jax.random.key(0), x), x


@functools.partial(jax.jit, static_argnames=("module", "method", "mutable", "train"))
def apply(module, *args, **kwargs):
    return module.apply(*args, **kwargs)


MIXERS = {
    "s4": {"mixer_options": {"state_size": 8}},
    "s4d": {"mixer": "s4d", "mixer_options": {"state_size": 8}, "prenorm": False},
    "conv": {"mixer": "conv"},
    "attention": {"mixer": "attention", "pattern": ("mixer", "ffn"), "max_positions": 2 * L},
    "rotary": {"mixer": "attention", "mixer_options": {"rotary": True}},
    "linear_attention": {"mixer": "linear_attention"},
    "lstm": {"mixer": "lstm"},
    "gru": {"mixer": "gru", "norm": "batch"},
    "adaptive": {
        "mixer": "lstm",
        "cutoffs": (6, 12),
        "div_val": 2,
        "pattern": ("mixer", "mixer", "ffn"),
    },
}


@pytest.mark.parametrize("name", MIXERS)
def test_generation_continues_the_teacher_forced_model(name):
    module = LanguageModel(features=8, depth=1, vocab_size=V, l_max=L, **MIXERS[name])
    variables, tokens = initialise(module, 2, L)
    prompt = tokens[:, :9]
    new = generate(module, variables, prompt, L - 9, rng=jax.random.key(1), temperature=0)
    assert new.shape == (2, L - 9) and new.dtype == jnp.int32
    whole = jnp.concatenate([prompt, new], axis=1)
    logits = apply(module, variables, whole)
    # Greedy tokens are the likeliest ones of the parallel model, up to rounding.
    chosen = jnp.take_along_axis(logits[:, 8:-1], new[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, logits[:, 8:-1].max(-1), atol=1e-4)


def test_chunked_prefill_of_a_deep_stack_equals_one_pass():
    module = LanguageModel(
        features=8, depth=2, vocab_size=V, l_max=L, mixer_options={"state_size": 8}
    )
    variables, tokens = initialise(module, 2, L)
    systems = apply(module, variables, method="discretise")
    first, state = apply(module, variables, tokens[:, :15], systems, method="prefill")
    second, state = apply(module, variables, tokens[:, 15:], systems, state, method="prefill")
    features = apply(module, variables, tokens, method="encode")
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), features, atol=1e-4)
    assert int(state.position) == L


def test_sampling_temperature_and_top_k():
    module = LanguageModel(features=8, depth=1, vocab_size=V, mixer="gru")
    variables, tokens = initialise(module, 64, 4)
    sample = functools.partial(generate, module, variables, tokens, 3)
    a, b = (sample(rng=jax.random.key(s)) for s in (0, 1))
    assert (a != b).any()
    np.testing.assert_array_equal(sample(rng=jax.random.key(0)), a)
    greedy = sample(rng=jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(sample(rng=jax.random.key(5), top_k=1), greedy)
    np.testing.assert_array_equal(sample(rng=jax.random.key(5), temperature=1e-4), greedy)


def state_bytes(module, length):
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)

    def prefill(variables, tokens):
        systems = module.apply(variables, method="discretise")
        return module.apply(variables, tokens, systems, None, length, method="prefill")[1]

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(
        jax.eval_shape(prefill, variables, tokens)))  # fmt: skip


def test_state_is_constant_for_s4_and_grows_for_attention():
    s4 = LanguageModel(features=8, depth=1, vocab_size=V, l_max=64, mixer_options={"state_size": 8})
    assert state_bytes(s4, 4) == state_bytes(s4, 64)
    attention = LanguageModel(features=8, depth=1, vocab_size=V, mixer="attention")
    assert state_bytes(attention, 64) > 10 * state_bytes(attention, 4)


@pytest.mark.parametrize("pool,bidirectional", [("mean", True), ("last", False)])
def test_padded_batch_classifies_as_each_sequence_alone(pool, bidirectional):
    module = SequenceClassifier(
        features=8, depth=2, vocab_size=V, num_classes=3, l_max=L, pool=pool, norm="batch",
        mixer_options={"state_size": 8, "bidirectional": bidirectional, "output": "glu"},
    )  # fmt: skip
    variables, tokens = initialise(module, 2, L)
    logits = apply(module, variables, tokens, lengths=jnp.array([L, 10]))
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    alone = apply(module, variables, tokens[1:, :10])
    np.testing.assert_allclose(logits[1], alone[0], atol=1e-4)
    np.testing.assert_allclose(logits[0], apply(module, variables, tokens)[0], atol=1e-4)


def test_batch_statistics_leave_padding_out():
    module = SequenceClassifier(
        features=8, depth=1, vocab_size=V, num_classes=3, mixer="s4d", norm="batch",
        mixer_options={"state_size": 8},
    )  # fmt: skip
    variables, tokens = initialise(module, 2, L)
    run = functools.partial(apply, module, variables, train=True, mutable="batch_stats")
    lengths = jnp.array([10, 10])
    _, padded = run(tokens, lengths=lengths)
    _, cut = run(tokens[:, :10])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), padded, cut)


def test_pairs():
    module = SequencePairClassifier(
        features=8, depth=1, vocab_size=V, num_classes=2, mixer="s4d",
        mixer_options={"state_size": 8},
    )  # fmt: skip
    variables, pairs = initialise(module, 3, 2, L)
    lengths = jnp.array([[L, 5], [7, L], [3, 4]])
    logits = apply(module, variables, pairs, lengths=lengths)
    assert logits.shape == (3, 2)
    # The head is that of [a, b, a - b, a * b].
    pooled = apply(module, variables, pairs.reshape(6, L), lengths=lengths.ravel(), method="pooled")
    a, b = pooled[::2], pooled[1::2]
    p = variables["params"]
    x = jnp.concatenate([a, b, a - b, a * b], -1) @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    expected = jax.nn.gelu(x, approximate=False) @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"\[B, 2, L"):
        apply(module, variables, pairs[:, :1])


def test_forecaster_reads_the_last_outputs():
    module = SequenceForecaster(
        features=8, depth=1, horizon=5, targets=2, mixer="s4d", mixer_options={"state_size": 8}
    )
    variables, x = initialise(module, 2, L, 3)
    y = apply(module, variables, x)
    features = apply(module, variables, x, method="encode")
    head = variables["params"]["head"]
    expected = features[:, -5:] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("cutoffs,tie", [(None, True), (None, False), ((6, 12), True)])
def test_nll_is_that_of_the_logits(cutoffs, tie):
    module = LanguageModel(
        features=8, depth=1, vocab_size=V, mixer="ffn", cutoffs=cutoffs, div_val=2,
        tie_embeddings=tie,
    )  # fmt: skip
    variables, tokens = initialise(module, 2, L)
    targets = jnp.roll(tokens, -1, axis=1)
    lengths = jnp.array([L, 10])
    nll = apply(module, variables, tokens, targets, lengths=lengths, method="nll")
    log_probs = jax.nn.log_softmax(apply(module, variables, tokens))
    expected = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    expected = jnp.where(jnp.arange(L) < lengths[:, None], expected, 0)
    np.testing.assert_allclose(nll, expected, atol=1e-5)
    grows = {path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert ("head/kernel" in grows) == (cutoffs is None and not tie)


def test_remat_changes_nothing_but_memory():
    options = {"features": 8, "depth": 2, "num_classes": 3, "mixer": "ffn", "dropout": 0.3}
    plain = SequenceClassifier(**options)
    variables, x = initialise(plain, 2, L, 1)

    def gradient(module):
        def loss(params):
            rngs = {"dropout": jax.random.key(1)}
            return jnp.sum(module.apply({"params": params}, x, train=True, rngs=rngs) ** 2)

        return jax.jit(jax.grad(loss))(variables["params"])

    ours, theirs = gradient(plain.clone(remat=True)), gradient(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_double_length_and_rate_reach_every_layer():
    module = SequenceModel(
        features=8, depth=2, l_max=L, mixer_options={"state_size": 4, "n_ssm": 1}
    )
    variables, x = initialise(module, 2, L, 1)
    expected = apply(module, variables, x)
    _, grown = apply(module, variables, method="double_length", mutable="params")
    longer = module.clone(l_max=2 * L)
    np.testing.assert_allclose(apply(longer, grown, x), expected, atol=1e-4)
    twice = jnp.repeat(x, 2, axis=1)
    assert apply(longer, grown, twice).shape == (2, 2 * L, 8)
    # Holding each sample twice is the same signal at half the step.
    half = apply(module.clone(rate=0.5), variables, twice)[:, 1::2]
    direct = apply(module, variables, x)
    assert np.abs(half - direct).max() < 0.5 * np.abs(
        apply(longer, grown, twice)[:, 1::2] - direct).max()  # fmt: skip


def test_partition_rules_name_parameters_that_exist():
    module = SequenceModel(features=16, depth=1, l_max=L, mixer_options={"tie_pq": False})
    x = jnp.ones((1, L, 1))
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]

    leaves = {path_str(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(params)}
    for pattern, spec in partition_rules():
        found = [path for path in leaves if re.search(pattern, path)]
        assert found, pattern
        for path in found:
            assert leaves[path][len(spec) - 1] == 16
    assert not any(re.search(r"lambda", pattern) for pattern, _ in partition_rules(n_ssm=2))


def test_modules_are_hashable_and_equal_by_value():
    a = SequenceModel(features=8, mixer_options={"state_size": 8, "channels": 2})
    b = SequenceModel(features=8, mixer_options={"state_size": 8, "channels": 2})
    assert hash(a) == hash(b) and a == b and a != b.clone(depth=1)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mixer": "s5"}, "choose one of s4, s4d"),
        ({"norm": "rms"}, "'layer' or 'batch'"),
        ({"pattern": ("s4",)}, "'mixer' and 'ffn'"),
        ({"vocab_size": 5}, "int tokens"),
    ],
)
def test_errors_say_what_would_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceModel(features=8, depth=1, **options).init(jax.random.key(0), jnp.ones((1, 4, 1)))
