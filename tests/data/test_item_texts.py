"""Texts of items: the file formats, the generated catalogue, sentences and vectors."""

import gzip
import itertools
import json
import os

import numpy as np
import pytest

from transfer_jax.data import interactions, item_texts
from transfer_jax.data.recommend import load_log


def test_generated_texts_tell_what_the_log_does():
    log = interactions.generated(3, users=200, items=40, groups=4)
    texts = item_texts.load_item_texts("generated", seed=3, items=40, groups=4)
    assert texts == item_texts.generated(3, items=40, groups=4) != item_texts.generated(4, 40, 4)
    assert set(log.item_names[1:]) <= set(texts) and len(texts) == 40
    titles = {name: t["title"].split() for name, t in texts.items()}
    follows = np.zeros(2)  # pairs of neighbours in time that are neighbours by text; all pairs
    for walk in log.sequences():
        for a, b in itertools.pairwise(walk):
            a, b = str(log.item_names[a]), str(log.item_names[b])
            same = texts[a]["category"] == texts[b]["category"]
            assert same == ((int(a) - 1) // 10 == (int(b) - 1) // 10)
            follows += [same and titles[a][1] == titles[b][0], 1]
    assert follows[0] / follows[1] > 0.6  # the probability of a step along the ring
    assert len({tuple(t.values()) for t in texts.values()}) == 40  # no two items read the same


def test_tables(tmp_path):
    (tmp_path / "a.csv").write_text('item_id,title,brand\n7,"Tape, 3 m",Acme\n8,Glue,\n')
    texts = item_texts.load_item_texts(
        "table_file", path=str(tmp_path / "a.csv"), columns=("brand", "title")
    )
    assert texts == {
        "7": {"brand": "Acme", "title": "Tape, 3 m"},
        "8": {"brand": "", "title": "Glue"},
    }
    assert list(texts["7"]) == ["brand", "title"]
    assert item_texts.sentences(texts, ["8", "7"]) == ["Glue", "Acme Tape, 3 m"]
    with pytest.raises(ValueError, match="1 of 2 items have no text: 9"):
        item_texts.sentences(texts, ["8", "9"])

    with gzip.open(tmp_path / "b.item.gz", "wt") as file:
        file.write('item_id:token\tbrand:token\ttitle:token_seq\n1\tX\t3/4" pipe\n')
    options = {"columns": ("title",), "attributes": ("name",)}
    assert item_texts.table_file(str(tmp_path / "b.item.gz"), **options) == {
        "1": {"name": '3/4" pipe'}
    }
    with pytest.raises(ValueError, match="no column 'category'; its columns are item_id"):
        item_texts.table_file(str(tmp_path / "a.csv"))
    with pytest.raises(TypeError, match="no option 'pth'"):
        item_texts.load_item_texts("table_file", pth="a")
    with pytest.raises(ValueError, match="nearest: generated"):
        item_texts.load_item_texts("generate")


def test_amazon_metadata_of_all_releases(tmp_path):
    records = [
        {"asin": "A", "title": "T", "brand": "B", "category": ["C", "D"]},
        {"asin": "B", "title": "it's", "categories": [["C", "D"], ["E"]]},
        {"parent_asin": "C", "title": "T", "store": "S", "categories": ["C"]},
        {"asin": "D", "brand": "B"},
    ]
    expected = {
        "A": {"title": "T", "brand": "B", "category": "C D"},
        "B": {"title": "it's", "brand": "", "category": "C D"},
        "C": {"title": "T", "brand": "S", "category": "C"},
    }
    for name, write in {"new.json": json.dumps, "old.json.gz": repr}.items():
        opener = gzip.open if name.endswith(".gz") else open
        with opener(tmp_path / name, "wt") as file:
            file.write("\n".join(map(write, records)))
        assert item_texts.load_item_texts("amazon_metadata", path=str(tmp_path / name)) == expected
    assert "D" in item_texts.amazon_metadata(str(tmp_path / "new.json"), untitled=True)
    (tmp_path / "bad.json").write_text('{"asin": "A"}\n{"asin": __import__("os")}\n')
    with pytest.raises(ValueError, match="line 2 is neither"):
        item_texts.amazon_metadata(str(tmp_path / "bad.json"))


def test_vectors(tmp_path):
    array = np.arange(6.0, dtype=np.float16).reshape(3, 2)
    np.save(tmp_path / "v.npy", array)
    np.savez(tmp_path / "v.npz", a=array, b=array[0])
    for path, key in (("v.npy", ""), ("v.npz", "a")):
        read = item_texts.read_vectors(tmp_path / path, key)
        assert read.dtype == np.float32 and (read == array).all()
    with pytest.raises(ValueError, match="there are a, b"):
        item_texts.read_vectors(tmp_path / "v.npz", "c")
    with pytest.raises(ValueError, match=r"\[n, d\] is needed"):
        item_texts.read_vectors(tmp_path / "v.npz", "b")
    with pytest.raises(ValueError, match="2 vectors of 3 texts"):
        item_texts.encode_sentences(["a", "b", "c"], lambda texts: np.zeros((2, 4)))
    encoded = item_texts.encode_sentences(["a", "bb"], lambda ts: np.array([[len(t)] for t in ts]))
    assert encoded.tolist() == [[1.0], [2.0]] and encoded.dtype == np.float32

    texts = item_texts.generated(0, items=40, groups=4)
    sentences = item_texts.sentences(texts, texts)
    vectors = item_texts.tfidf_vectors(sentences, 8, seed=1)
    assert vectors.dtype == np.float32 and vectors.shape == (40, 8)
    np.testing.assert_array_equal(vectors, item_texts.tfidf_vectors(sentences, 8, seed=1))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    same = (np.arange(40)[:, None] // 10) == (np.arange(40) // 10)
    cosines = unit @ unit.T
    assert cosines[same].mean() > 0.5 + cosines[~same].mean()
    with pytest.raises(ValueError, match="have 1 to 26"):
        item_texts.tfidf_vectors(sentences, 500)


@pytest.mark.skipif(not os.environ.get("TRANSFER_JAX_DATA"), reason="needs TRANSFER_JAX_DATA")
def test_scientific_small_has_a_text_for_every_item():
    log = load_log("amazon_scientific_small")
    texts = item_texts.load_item_texts("amazon_scientific_small")
    assert len(texts) == log.num_items == 1585
    found = item_texts.of_items(texts, log.item_names[1:])
    assert all(list(item) == ["title", "brand", "category"] and item["title"] for item in found)
