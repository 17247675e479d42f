"""Items as tokens, histories as sequences of items, places drawn from histories."""

import numpy as np
import pytest

from transfer_jax.data import recformer
from transfer_jax.data.interactions import Sequences
from transfer_jax.data.recommend import EvaluationSource

ITEMS = [
    {"title": "red tape", "brand": "acme"},
    {"title": "glue gun for wood", "brand": "bond"},
    {"title": "blue tape", "brand": ""},
]
TOKENIZER = recformer.word_tokenizer(
    recformer.frequent_words([" ".join(sum(item.items(), ())) for item in ITEMS], 40)
)
CATALOGUE = recformer.tokenize_items(ITEMS, TOKENIZER, limits=(4, 3))


def number(word):
    return TOKENIZER.encode([word])[0][0]


def words(*names):
    return [0 if name == "<s>" else number(name) for name in names]


def test_items_become_names_and_values_up_to_a_limit():
    assert CATALOGUE.num_items == 3 and CATALOGUE.lengths.tolist() == [0, 5, 6, 4]
    assert CATALOGUE.tokens[2].tolist() == words("title", "glue", "gun", "for", "brand", "bond")
    assert CATALOGUE.types[2].tolist() == [1, 2, 2, 2, 1, 2]
    assert CATALOGUE.tokens[3, 4:].tolist() == [TOKENIZER.pad] * 2
    assert CATALOGUE.types[3].tolist() == [1, 2, 2, 1, 3, 3]
    rows = CATALOGUE.rows(8)
    assert rows["inputs"].shape == (8, 7) and rows["lengths"].tolist() == [1, 6, 7, 5, 1, 1, 1, 1]
    for i in (1, 2, 3):  # an item alone is a sequence of one
        packed = recformer.pack_sequence(CATALOGUE, np.array([i]), length=20)
        size = len(packed["inputs"])
        for name in ("inputs", "token_types"):
            assert rows[name][i, :size].tolist() == packed[name].tolist()
        assert packed["item_positions"].tolist() == [0] + [1] * (size - 1)
    small = recformer.frequent_words(["a a a b b c"], 7)
    assert small == (*recformer.SPECIALS, "a", "b")
    assert recformer.word_tokenizer(small).encode(["B, c!"]) == [[6, 3]]
    with pytest.raises(ValueError, match="no number for 'brand'"):
        recformer.tokenize_items(ITEMS, TOKENIZER, limits=(4,))


def test_the_newest_item_comes_first_and_the_oldest_text_is_cut():
    packed = recformer.pack_sequence(CATALOGUE, np.array([2, 3, 1]), length=50)
    newest = ["title", "red", "tape", "brand", "acme"]
    assert packed["inputs"][:8].tolist() == words("<s>", *newest, "title", "blue")
    assert packed["item_positions"].tolist() == [0] + [1] * 5 + [2] * 4 + [3] * 6
    assert packed["token_types"][:7].tolist() == [0, 1, 2, 2, 1, 2, 1]
    cut = recformer.pack_sequence(CATALOGUE, np.array([2, 3, 1]), length=12)
    for name, values in packed.items():
        assert cut[name].tolist() == values[:12].tolist() and cut[name].dtype == np.int32
    two = recformer.pack_sequence(CATALOGUE, np.array([2, 3, 1]), length=50, max_items=2)
    assert two["item_positions"].max() == 2 and len(two["inputs"]) == 10
    assert recformer.pack_sequence(CATALOGUE, np.zeros(0, int), length=9)["inputs"].tolist() == [0]


def test_the_longest_history_bounds_every_beginning():
    rng = np.random.default_rng(0)
    for _ in range(20):
        items = rng.integers(1, 4, rng.integers(1, 9))
        lengths = [
            len(recformer.pack_sequence(CATALOGUE, items[:t], length=15, max_items=3)["inputs"])
            for t in range(len(items))
        ]
        found = recformer.longest_history(CATALOGUE, items, length=15, max_items=3)
        assert found == max(lengths)


@pytest.mark.parametrize("pretraining", [False, True])
def test_places_are_drawn_anew_in_every_epoch_and_the_item_after_them_is_right(pretraining):
    lists = [[1, 2, 3, 2, 1, 3], [3, 1, 2, 1, 3, 2], [2]]
    data = recformer.training_pairs(
        Sequences.of(lists), CATALOGUE, 2, buckets=(8, 24), max_items=4, seed=1,
        pretraining=pretraining,
    )  # fmt: skip
    again = iter(data.iterator())
    places = []
    for batch in (next(again) for _ in range(120)):
        assert batch["inputs"].shape[1] in (8, 24)
        for row in np.flatnonzero(batch["mask"]):
            tokens = batch["inputs"][row, : batch["lengths"][row]].tolist()
            if pretraining:
                size = batch["item_lengths"][row] - 1
                right = batch["item_inputs"][row, 1 : size + 1].tolist()
                item = next(i for i in (1, 2, 3) if right == CATALOGUE.tokens[i, :size].tolist())
            else:
                item = int(batch["labels"][row])
            options = {"length": 24, "max_items": 4}
            fits = [
                t for items in lists[:2] for t in range(6)
                if items[t] == item and tokens
                == recformer.pack_sequence(CATALOGUE, np.array(items[:t], int), **options)[
                    "inputs"
                ].tolist()
            ]  # fmt: skip
            assert fits
            places += fits[:1]
    low = 2 if pretraining else 0
    counts = np.bincount(places, minlength=6)
    assert (counts[:low] == 0).all() and (counts[low:] > 0).all()
    first = data.example_batch()
    np.testing.assert_array_equal(first["inputs"], next(iter(data.iterator()))["inputs"])


def test_evaluation_keeps_what_ranking_needs():
    history = Sequences.of([[1, 2], [3], [2, 3, 1]])
    source = EvaluationSource(history, np.array([3, 0, 2], np.int32), 1)
    data = recformer.evaluation_histories(source, CATALOGUE, 2, buckets=(40,), max_items=4)
    (batch,) = list(data.iterator())
    assert batch["user"].tolist() == [0, 2] and batch["labels"].tolist() == [3, 2]
    assert batch["seen"].tolist() == [[1, 2, -1], [2, 3, 1]] and batch["mask"].tolist() == [1, 1]
    assert batch["inputs"].shape == (2, 40) and batch["lengths"].tolist() == [12, 16]
    assert batch["token_types"][0, 12:].tolist() == [3] * 28
