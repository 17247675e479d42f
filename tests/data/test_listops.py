import random
import statistics

import numpy as np
import pytest

from transfer_jax.data.listops import (
    EOS,
    VOCABULARY,
    encode,
    expression,
    listops,
    listops_files,
)

SHORT = dict(min_length=5, max_length=60, max_depth=4, max_arguments=4)


def evaluate(words):
    """Evaluates tokens by recursive descent; also returns depth, and checks the arity."""

    def node(i, depth):
        if not words[i].startswith("["):
            return int(words[i]), i + 1, depth
        values, deepest = [], depth
        operator, i = words[i], i + 1
        while words[i] != "X":
            value, i, below = node(i, depth + 1)
            values.append(value)
            deepest = max(deepest, below)
        assert 2 <= len(values) <= 10
        functions = {
            "[MIN": min,
            "[MAX": max,
            "[MED": lambda v: int(statistics.median(v)),
            "[SM": lambda v: sum(v) % 10,
        }
        return functions[operator](values), i + 1, deepest

    value, end, depth = node(0, 1)
    assert end == len(words)
    return value, depth


@pytest.mark.parametrize("options", [{}, SHORT], ids=["full", "short"])
def test_labels_agree_with_an_independent_evaluator(options):
    rng = np.random.default_rng(0)
    used = set()
    for _ in range(30):
        tokens, value = expression(rng, **options)
        words = [VOCABULARY[t] for t in tokens]
        expected, depth = evaluate(words)
        assert value == expected
        assert depth <= options.get("max_depth", 10)
        assert options.get("min_length", 500) < len(tokens) < options.get("max_length", 2000)
        used |= set(words)
    assert used == set(VOCABULARY[3:])


def reference_tree(rng, depth, max_depth, max_arguments):
    """The grammar as it is stated, drawn depth first: (number of tokens, words)."""
    if depth == max_depth or rng.random() > 0.25:
        return [str(rng.randrange(10))]
    children = [
        reference_tree(rng, depth + 1, max_depth, max_arguments)
        for _ in range(rng.randint(2, max_arguments))
    ]
    return [rng.choice(VOCABULARY[13:17]), *(w for c in children for w in c), "X"]


def test_distribution_is_that_of_the_grammar():
    rng = random.Random(0)
    expected = []
    while len(expected) < 1500:
        words = reference_tree(rng, 1, 4, 4)
        if 5 < len(words) < 60:
            expected.append((len(words), evaluate(words)[0], sum(w[0] == "[" for w in words)))
    generator = np.random.default_rng(1)
    drawn = []
    for _ in range(1500):
        tokens, value = expression(generator, **SHORT)
        drawn.append((len(tokens), value, ((tokens >= 13) & (tokens < 17)).sum()))
    a, b = np.array(expected, float), np.array(drawn, float)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all()
    values = np.stack([np.bincount(x[:, 1].astype(int), minlength=10) for x in (a, b)]) / 1500
    assert np.abs(values[0] - values[1]).max() < 4 * np.sqrt(2 * 0.25 / 1500)


def test_bundle():
    bundle = listops(num_train=12, num_validation=3, num_test=3, seed=5, **SHORT)
    assert bundle.info.vocab_size == 18 and bundle.info.length == 60
    again = listops(num_train=12, seed=5, cache=False, **SHORT).splits["train"]
    seen = []
    for i in reversed(range(12)):
        example = bundle.splits["train"][i]
        np.testing.assert_array_equal(example["inputs"], again[i]["inputs"])
        length = example["lengths"]
        assert example["inputs"][length - 1] == EOS and (example["inputs"][length:] == 0).all()
        words = [VOCABULARY[t] for t in example["inputs"][: length - 1]]
        assert evaluate(words)[0] == example["labels"] == again[i]["labels"]
        seen.append(tuple(words))
    seen += [tuple(map(int, bundle.splits["test"][i]["inputs"])) for i in range(3)]
    other = listops(num_train=2, seed=6, **SHORT).splits["train"]
    assert (other[0]["inputs"] != bundle.splits["train"][0]["inputs"]).any()
    assert len(set(seen)) == 15


def test_impossible_bounds():
    with pytest.raises(ValueError, match="the longest 12"):
        listops(min_length=20, max_length=50, max_depth=2)


def test_reads_the_published_files(tmp_path):
    text = "( ( ( [MAX 4 ) ( ( ( [MED 1 ) 8 ) ] ) ) ] )"
    for name in ("train", "val", "test"):
        (tmp_path / f"basic_{name}.tsv").write_text(f"Source\tTarget\n{text}\t4\n")
    example = listops_files(tmp_path, length=12).splits["validation"][0]
    words = [VOCABULARY[t] for t in example["inputs"]]
    assert words == ["[MAX", "4", "[MED", "1", "8", "X", "X", "<eos>"] + ["<pad>"] * 4
    assert example["lengths"] == 8 and example["labels"] == 4 == evaluate(words[:7])[0]
    np.testing.assert_array_equal(encode("[SM 9 q ]"), [16, 12, 1, 17])
    (tmp_path / "basic_test.tsv").write_text("Source\tTarget\nno target\n")
    with pytest.raises(ValueError, match="line 2"):
        listops_files(tmp_path)
    (tmp_path / "basic_val.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="lra_release"):
        listops_files(tmp_path)
