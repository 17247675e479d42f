"""Tokenisers: padding, truncation, and CLIP's byte pairs against a transcription of their rule."""

import gzip
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from transfer_jax.interop import clip_tokenizer, load_tokenizer, train_tokenizer

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tokeniser of words in the style of BERT."""
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "the", "cat", "sat", "here"]
    numbers = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )  # fmt: skip
    backend.add_special_tokens(names[:4])
    path = tmp_path_factory.mktemp("words")
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"pad_token": {"content": "[PAD]"}}')
    return path


def test_texts_are_padded_cut_and_read_back(directory):
    tokenizer = load_tokenizer(directory, max_length=5)
    inputs, lengths, types = tokenizer(["the cat", "the cat sat here", ""])
    np.testing.assert_array_equal(inputs, [[1, 4, 5, 2, 3], [1, 4, 5, 6, 2], [1, 2, 3, 3, 3]])
    np.testing.assert_array_equal(lengths, [4, 5, 2])
    assert inputs.dtype == lengths.dtype == types.dtype == np.int32 and not types.any()
    assert tokenizer.decode(inputs, lengths) == ["the cat", "the cat sat", ""]
    assert (tokenizer.vocab_size, tokenizer.token("sat"), tokenizer.pad) == (8, 6, 3)

    whole = load_tokenizer(directory / "tokenizer.json", pad=0)
    inputs, lengths, types = whole(["the cat", "a"], ["sat", "the cat"], length=8)
    np.testing.assert_array_equal(inputs, [[1, 4, 5, 2, 6, 2, 0, 0], [1, 0, 2, 4, 5, 2, 0, 0]])
    np.testing.assert_array_equal(types, [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"6 tokens, more than length=4.*max_length=4"):
        whole(["the cat sat here"], length=4)
    with pytest.raises(ValueError, match="sequence of strings"):
        whole("the cat")


def test_what_is_missing_is_said(directory, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*save_pretrained"):
        load_tokenizer(tmp_path)
    with pytest.raises(KeyError, match="MASK"):
        load_tokenizer(directory).token("[MASK]")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install transfer_jax\[text\]"):
        load_tokenizer(directory)


class Rule:
    """CLIP's rule as it is written down: merge the pair of lowest rank until none is left."""

    def __init__(self, lines):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.symbols = {b: chr(b) for b in printable}
        self.symbols |= {b: chr(256 + n) for n, b in enumerate(others)}
        ordered = [self.symbols[b] for b in printable + others]
        merges = [tuple(line.split()) for line in lines]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        names = ordered + [s + "</w>" for s in ordered] + ["".join(m) for m in merges]
        self.numbers = {name: n for n, name in enumerate(names)}
        self.size = len(names) + 2

    def word(self, word):
        parts = [self.symbols[b] for b in word.encode()]
        parts[-1] += "</w>"
        while True:
            pairs = [
                (self.ranks.get(p, 1 << 30), i) for i, p in enumerate(itertools.pairwise(parts))
            ]
            if not pairs or min(pairs)[0] == 1 << 30:
                return [self.numbers[p] for p in parts]
            first = min(pairs)[1]
            parts[first : first + 2] = ["".join(parts[first : first + 2])]

    def __call__(self, text):
        words = re.findall(
            r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", " ".join(text.split()).lower()
        )
        inner = [n for word in words for n in self.word(word)]
        return [self.size - 2, *inner, self.size - 1]


TEXTS = [
    "a photo of a cat", "A  Photo\tof THE cat's  tail, isn't it?!", "", "naïve café 2024 — 東京",
    "snake_case & <b>10.5%</b>", "internationalisation " * 3,
]  # fmt: skip


def test_bytes_of_few_merges(tmp_path):
    lines = ["c a", "ca t</w>", "p h", "o t", "ph ot", "phot o</w>"]
    (tmp_path / "merges.txt").write_text("\n".join(["#version", *lines, ""]))
    tokenizer, rule = clip_tokenizer(tmp_path / "merges.txt"), Rule(lines)
    assert tokenizer.vocab_size == rule.size == 2 * 256 + 6 + 2
    inputs, lengths, _ = tokenizer(TEXTS, length=77)
    for row, n, text in zip(inputs, lengths, TEXTS):
        assert list(row[:n]) == rule(text) and not row[n:].any()
    assert tokenizer.decode(inputs, lengths)[:3] == [
        "a photo of a cat",
        "a photo of the cat 's tail , isn 't it ?!",
        "",
    ]
    cut = clip_tokenizer(tmp_path / "merges.txt", max_length=5)(TEXTS).inputs
    np.testing.assert_array_equal(cut[:, 0], rule.size - 2)
    assert cut[0, -1] == rule.size - 1  # the end stays


def test_the_vocabulary_of_clip():
    if "TRANSFER_JAX_DATA" not in os.environ:
        pytest.skip("TRANSFER_JAX_DATA is not set")
    file = Path(os.environ["TRANSFER_JAX_DATA"]) / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
    if not file.is_file():
        pytest.skip(f"there is no {file}")
    tokenizer = clip_tokenizer(file)
    rule = Rule(gzip.decompress(file.read_bytes()).decode().split("\n")[1:48_895])
    assert tokenizer.vocab_size == rule.size == 49_408
    assert tokenizer.token("<|startoftext|>") == 49_406
    inputs, lengths, _ = tokenizer(TEXTS, length=77)
    # As published with the model.
    assert list(inputs[0, :7]) == [49406, 320, 1125, 539, 320, 2368, 49407] and lengths[0] == 7
    for row, n, text in zip(inputs, lengths, TEXTS):
        assert list(row[:n]) == rule(text)


def test_a_learned_tokeniser_gives_its_texts_back_and_is_read_again(tmp_path):
    texts = ["Ein kleines Mädchen klettert.", "a b", ""]
    learned = train_tokenizer(texts * 3, 290, specials=("<de>",), template="<s> $A </s>")
    made = learned(["<de> Mädchen ☃", *texts])
    assert learned.decode(made.inputs, made.lengths)[1:] == [" " + texts[0], " a b", ""]
    ids = {name: learned.token(name) for name in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
    assert list(ids.values()) == [0, 1, 2, 3, 4] and learned.token("<de>") == 5
    assert made.inputs[0, :2].tolist() == [0, 5] and (made.inputs[3] == [0, 2] + [1] * (
        made.inputs.shape[1] - 2)).all()  # fmt: skip
    assert 3 not in made.inputs  # bytes know every text
    learned.backend.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path, pad=1)(["<de> Mädchen ☃", *texts])
    np.testing.assert_array_equal(again.inputs, made.inputs)
    with pytest.raises(ValueError, match="special tokens alone are 261"):
        train_tokenizer(texts, 260)
