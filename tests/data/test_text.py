import itertools

import numpy as np
import pytest

from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.text import (
    Vocabulary,
    aan_files,
    arithmetic_text,
    character_text,
    evaluation_windows,
    imdb_files,
    stream_windows,
    training_windows,
    wikitext103,
)

TOKENS = np.arange(100, 153)


def batches(pipeline, count, **processes):
    iterator = pipeline.iterator(**processes)
    result = [next(iterator) for _ in range(count)]
    iterator.close()
    return result


def test_vocabulary():
    vocabulary = Vocabulary.build("abracadabra!", specials=("<pad>", "<unk>"), min_freq=2)
    assert vocabulary.tokens == ("<pad>", "<unk>", "a", "b", "r")
    np.testing.assert_array_equal(vocabulary.encode("bad"), [3, 2, 1])
    assert vocabulary.decode([4, 2]) == ["r", "a"]
    with pytest.raises(ValueError, match="no <unk>"):
        Vocabulary(("a",)).encode("ab")


def test_evaluation_windows_score_every_token_once():
    for length in (4, 5, 13, 52, 60):
        windows = evaluation_windows(TOKENS, length)
        scored = []
        for i in range(len(windows)):
            example = windows[i]
            assert example["inputs"].shape == (length + 1,)
            scored.extend(example["inputs"][1 : example["lengths"]].tolist())
            assert (example["inputs"][example["lengths"] :] == 0).all()
        assert scored == TOKENS[1:].tolist()


def test_training_windows():
    windows = training_windows(TOKENS, 10)
    assert [w[0] for w in windows.take(np.arange(len(windows)))["inputs"]] == list(
        range(100, 150, 10)
    )
    every = training_windows(TOKENS, 10, stride=1)
    assert len(every) == 43 and every[42]["inputs"][-1] == 152
    with pytest.raises(ValueError, match="too short"):
        training_windows(TOKENS, 53)


@pytest.mark.parametrize("process_count", [1, 2])
def test_streams_continue_from_batch_to_batch(process_count):
    source = stream_windows(TOKENS, 3, batch_size=4)
    pipeline = Pipeline(source, 4, repeat=True)
    assert len(pipeline) == 4  # 13 tokens in a stream: 4 windows
    parts = [
        batches(pipeline, 5, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    steps = [
        {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
        for rows in zip(*parts)
    ]
    for before, after in itertools.pairwise(steps[:4]):
        np.testing.assert_array_equal(before["inputs"][:, -1], after["inputs"][:, 0])
    assert [step["reset"].tolist() for step in steps] == [
        [True] * 4, [False] * 4, [False] * 4, [False] * 4, [True] * 4
    ]  # fmt: skip
    np.testing.assert_array_equal(steps[0]["inputs"], steps[4]["inputs"])
    np.testing.assert_array_equal(steps[0]["inputs"][:, 0], [100, 113, 126, 139])


def test_character_text(tmp_path):
    path = tmp_path / "text.txt"
    text = "the quick brown fox. " * 20
    path.write_text(text)
    bundle = character_text(path, length=8, fractions=(0.8, 0.1, 0.1))
    tokens = bundle.info.vocabulary
    assert tokens == tuple(sorted(set(text))) and bundle.info.length == 9
    rebuilt = "".join(
        "".join(tokens[t] for t in bundle.splits[name][i]["inputs"][skip:][:limit])
        for name in ("train", "validation", "test")
        for i in range(len(bundle.splits[name]))
        for skip in [1 if i else 0]
        for limit in [bundle.splits[name][i].get("lengths", 9) - skip]
    )
    # Training leaves out less than a window at its end; evaluation leaves out nothing.
    train = int(0.8 * len(text))
    full = (train - 1) // 8 * 8 + 1
    assert rebuilt == text[:full] + text[train:]
    streams = character_text(path, length=8, streams=3).splits["train"]
    assert len(streams) % 3 == 0 and "reset" in streams[0]
    with pytest.raises(ValueError, match="either stride or streams"):
        character_text(path, length=8, streams=3, stride=1)
    with pytest.raises(FileNotFoundError, match="plain text"):
        character_text(tmp_path / "absent.txt")


def test_arithmetic_text_is_correct_arithmetic():
    bundle = arithmetic_text(num_train=4000, num_validation=500, num_test=500, length=16, seed=3)
    tokens = bundle.splits["train"].tokens
    assert len(tokens) == 4000
    text = "".join(bundle.info.vocabulary[t] for t in tokens)
    lines = text.split("\n")[:-1]
    assert len(lines) > 300
    for line in lines:
        left, _, right = line.partition("=")
        sign = "-" if "-" in left else "+"
        a, b = map(int, left.split(sign))
        assert int(right) == (a - b if sign == "-" else a + b)
    again = arithmetic_text(num_train=4000, length=16, seed=3).splits["train"].tokens
    np.testing.assert_array_equal(again, tokens)
    assert (bundle.splits["test"].tokens != tokens[:500]).any()


def test_wikitext103(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text(" \n = Title = \n a b b a b <unk> \n", "utf-8")
    (tmp_path / "wiki.valid.tokens").write_text(" a c\n", "utf-8")
    (tmp_path / "wiki.test.tokens").write_text(" b\n", "utf-8")
    bundle = wikitext103(tmp_path, length=2)
    assert bundle.info.vocabulary == ("<eos>", "b", "=", "a", "<unk>", "Title")
    np.testing.assert_array_equal(
        bundle.splits["train"].tokens, [0, 2, 5, 2, 0, 3, 1, 1, 3, 1, 4, 0]
    )
    np.testing.assert_array_equal(bundle.splits["validation"].tokens, [3, 4, 0])
    (tmp_path / "wiki.test.tokens").unlink()
    with pytest.raises(FileNotFoundError, match="wikitext-103"):
        wikitext103(tmp_path)


def test_imdb(tmp_path):
    for name in ("train", "test"):
        for kind in ("neg", "pos"):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(4):
                text = f"{'good' if kind == 'pos' else 'bad'}{i if name == 'train' else 'z'}"
                (tmp_path / name / kind / f"{i}_1.txt").write_text(text)
    bundle = imdb_files(tmp_path, length=6, min_freq=3)
    assert bundle.info.vocabulary == ("<pad>", "<unk>", "<eos>", "d", "o", "a", "b", "g")
    example = bundle.splits["train"][4]
    np.testing.assert_array_equal(example["inputs"], [7, 4, 4, 3, 1, 2])
    assert example["labels"] == 1 and example["lengths"] == 6
    np.testing.assert_array_equal(bundle.splits["test"][0]["inputs"], [6, 5, 3, 1, 2, 0])
    assert bundle.splits["validation"] is bundle.splits["test"]
    carved = imdb_files(tmp_path, length=6, min_freq=3, validation_fraction=0.25).splits
    assert [len(carved[n]) for n in ("train", "validation", "test")] == [6, 2, 8]
    batch = Pipeline(carved["train"], 3).example_batch()
    assert batch["inputs"].shape == (3, 6) and batch["lengths"].dtype == np.int32
    with pytest.raises(FileNotFoundError, match="aclImdb_v1"):
        imdb_files(tmp_path / "absent")


def test_aan(tmp_path):
    for name in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text(
            '1.0\tA\tB\tabc\t"ab\n0.0\tA\tC\tabcdef\ta\n'
        )
    bundle = aan_files(tmp_path, length=5)
    first, second = bundle.splits["validation"][0], bundle.splits["validation"][1]
    assert first["inputs"].shape == (2, 5) and first["labels"] == 1 and second["labels"] == 0
    np.testing.assert_array_equal(first["lengths"], [4, 4])
    np.testing.assert_array_equal(second["lengths"], [5, 2])
    words = ["".join(bundle.info.vocabulary[t] for t in row if t) for row in second["inputs"]]
    assert words == ["abcd<eos>", "a<eos>"]
    (tmp_path / "new_aan_pairs.test.tsv").write_text("1.0\tA\tB\tabc\n")
    with pytest.raises(ValueError, match="4 columns"):
        aan_files(tmp_path)
