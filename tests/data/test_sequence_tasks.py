"""Generated tasks: pure functions of a key, with the targets that NumPy finds."""

import re

import jax
import numpy as np
import pytest

from transfer_jax.data.sequence_tasks import (
    REBER_SYMBOLS,
    Adding,
    Copy,
    DelayedXor,
    Parity,
    Reber,
    TemporalOrder,
)


def draw(task, count=200, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    examples = jax.jit(jax.vmap(task))(keys)
    # The same key gives the same example, alone or in a batch.
    for name, value in task(keys[7]).items():
        np.testing.assert_array_equal(value, examples[name][7])
    return {name: np.asarray(value) for name, value in examples.items()}


def test_adding():
    batch = draw(Adding(length=21))
    values, marks = batch["inputs"][..., 0], batch["inputs"][..., 1]
    assert (marks[:, :10].sum(1) == 1).all() and (marks[:, 10:].sum(1) == 1).all()
    assert set(np.flatnonzero(marks.any(0))) == set(range(21))
    np.testing.assert_allclose(
        batch["labels"][:, 0], [v[m > 0].sum() for v, m in zip(values, marks)]
    )


def test_copy():
    task = Copy(longest=4, shortest=2, width=3)
    batch = draw(task)
    assert batch["inputs"].shape == (200, 9, 4)
    assert set(batch["lengths"]) == {5, 7, 9}
    for x, y, w, length in zip(*(batch[k] for k in ("inputs", "labels", "weights", "lengths"))):
        n = (length - 1) // 2
        assert x[n].tolist() == [0, 0, 0, 1] and not x[:n, 3].any() and not x[n + 1 :].any()
        np.testing.assert_array_equal(y[n + 1 : length], x[:n, :3])
        assert np.flatnonzero(w).tolist() == list(range(n + 1, length))
        assert not y[w == 0].any()
    assert 0.4 < batch["labels"][batch["weights"] > 0].mean() < 0.6


def test_temporal_order():
    batch = draw(TemporalOrder(length=30))
    for tokens, label in zip(batch["inputs"], batch["labels"]):
        places = np.flatnonzero(tokens < 2)
        assert len(places) == 2 and 3 <= places[0] < 6 and 12 <= places[1] < 15
        assert label == 2 * tokens[places[0]] + tokens[places[1]]
    assert set(batch["labels"]) == {0, 1, 2, 3} and batch["inputs"].max() == 5


@pytest.mark.parametrize("delay", [3, -2])
def test_delayed_xor_and_parity(delay):
    batch = draw(DelayedXor(length=12, delay=delay))
    bits = batch["inputs"][..., 0].astype(int)
    for t in range(12):
        known = 0 <= t + delay < 12
        assert (batch["weights"][:, t] == known).all()
        if known:
            np.testing.assert_array_equal(batch["labels"][:, t], bits[:, t] ^ bits[:, t + delay])
    batch = draw(Parity(length=9))
    np.testing.assert_array_equal(batch["labels"], batch["inputs"].sum((1, 2)) % 2)


def test_reber_strings_belong_to_the_grammar():
    batch = draw(Reber(longest=16), count=400)
    arcs = {0: "T1P2", 1: "S1X3", 2: "T2V4", 3: "X2S5", 4: "P3V5", 5: "E6"}
    seen = set()
    for tokens, length, labels, weights in zip(
        *(batch[k] for k in ("inputs", "lengths", "labels", "weights"))
    ):
        text = "".join(REBER_SYMBOLS[t] for t in tokens[:length])
        assert re.fullmatch(r"B([TP])B.+E\1E", text) and not tokens[length:].any()
        seen.add(length)
        allowed, state = ["TP", "B"], 0
        for symbol in text[3:-2]:
            allowed.append(arcs[state][::2])
            state = int(arcs[state][arcs[state].index(symbol) + 1])
        assert state == 6
        allowed += [text[1], "E"]
        for i, symbols in enumerate(allowed):
            assert {REBER_SYMBOLS[j] for j in np.flatnonzero(labels[i])} == set(symbols)
        assert weights.sum() == length - 1 == len(allowed)
    assert min(seen) == 9 and max(seen) == 16


def test_impossible_sizes_are_refused():
    for make in (lambda: Adding(length=1), lambda: Copy(longest=1, shortest=2), lambda: Reber(8)):
        with pytest.raises(ValueError, match="too small"):
            make()
