"""Tables, parallel lines and the collections, on small files of the same layout."""

import gzip
import json

import numpy as np
import pytest

from transfer_jax.data import texts

CLASSES = ("entailment", "neutral", "contradiction")


def test_a_task_of_glue_from_tabs_and_from_json(tmp_path):
    rows = [
        ("0", 'He said "no', "He spoke.", "entailment"),  # a quote without its end
        ("1", "A dog runs.", "A cat sleeps.", "contradiction"),
    ]
    lines = ["index\tsentence1\tsentence2\tgold_label", *("\t".join(row) for row in rows)]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    columns = (("sentence1", "sentence2"), "gold_label", CLASSES)
    tabs = texts.read_labelled(tmp_path / "train.tsv", *columns)
    assert tabs.texts == ['He said "no', "A dog runs."] and tabs.pairs[1] == "A cat sleeps."
    np.testing.assert_array_equal(tabs.labels, [0, 2])
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        for _, a, b, label in rows:
            record = {"premise": a, "hypothesis": b, "label": CLASSES.index(label)}
            file.write(json.dumps(record) + "\n")
    lines = texts.read_labelled(
        tmp_path / "train.jsonl.gz", ("premise", "hypothesis"), "label", ("0", "1", "2")
    )
    assert lines[:2] == tabs[:2]
    np.testing.assert_array_equal(lines.labels, tabs.labels)
    with pytest.raises(ValueError, match=r"has \['contradiction'\], which are none of the classes"):
        texts.read_labelled(tmp_path / "train.tsv", *columns[:2], CLASSES[:2])
    with pytest.raises(ValueError, match=r"line 2: there is no field 'sentence'; nearest: sentenc"):
        texts.read_labelled(tmp_path / "train.tsv", ("sentence",), "gold_label", CLASSES)
    with pytest.raises(ValueError, match="is no table"):
        texts.read_columns(tmp_path, ("a",))


def test_pairs_from_json_and_from_parallel_lines(tmp_path):
    pairs = [("Good morning.", "Bună dimineața."), ("A\u2028b", "c")]  # no end of a line
    records = [{"translation": {"en": a, "ro": b}} for a, b in pairs]
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    (tmp_path / "test.jsonl").write_text(text, encoding="utf-8")
    columns = ("translation.en", "translation.ro")
    assert texts.read_columns(tmp_path / "test.jsonl", columns) == pairs
    for i, name in enumerate(("en", "ro")):
        lines = "".join(f"{pair[i]}\n" for pair in pairs)
        (tmp_path / f"test.{name}.gz").write_bytes(gzip.compress(lines.encode()))
    files = [tmp_path / "test.en.gz", tmp_path / "test.ro.gz"]
    assert texts.read_parallel(*files) == pairs
    files[1].write_bytes(gzip.compress(b"c\n"))
    with pytest.raises(ValueError, match=r"has 2 lines and .* has 1"):
        texts.read_parallel(*files)


def test_sentence_tasks_are_split_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path))
    (tmp_path / "sentence_tasks").mkdir()

    def put(file, first, count):
        lines = "".join(f"{i % 2} caf\xe9 {i}\n" for i in range(first, first + count))
        encoding = "latin-1" if file in ("subj.all", "TREC.train.all") else "utf-8"
        (tmp_path / "sentence_tasks" / f"{file}.gz").write_bytes(
            gzip.compress(lines.encode(encoding))
        )

    for name, files in {
        "subj": ["subj.all"],
        "trec": ["TREC.train.all", "TREC.test.all"],
        "sst2": ["stsa.binary.train", "stsa.binary.dev", "stsa.binary.test"],
    }.items():
        for i, file in enumerate(files):
            put(file, 100 * i, 40)
        parts = texts.sentence_task(name, seed=1)
        assert set(parts) == {"train", "validation", "test"}
        every = [text for part in parts.values() for text in part.texts]
        assert sorted(every) == sorted(f"caf\xe9 {100 * i + k}" for i in range(len(files))
                                       for k in range(40))  # fmt: skip
        for part in parts.values():
            np.testing.assert_array_equal(part.labels, [int(t.split()[1]) % 2 for t in part.texts])
        official = {"subj": 36, "trec": 36, "sst2": 40}[name] - (4 if name == "subj" else 0)
        assert len(parts["train"].texts) == official
    with pytest.raises(ValueError, match="no 'sst'; nearest: sst2"):
        texts.sentence_task("sst")
