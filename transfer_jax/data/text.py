"""Text as tokens: character and word language modelling, and the text tasks of the Arena.

Language-model examples are windows: ``inputs`` [length + 1] int32, of which a model reads the first
``length`` tokens and is scored on the last ``length``. Evaluation windows do not overlap in what is
scored, so that together they score every token but the very first once; the last is padded, and
``lengths`` counts its valid tokens.
"""

import array
import collections
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from transfer_jax.data.bundle import DataBundle, DatasetInfo
from transfer_jax.data.paths import require, require_file
from transfer_jax.data.sources import Example, Source
from transfer_jax.data.splits import Mapped, stratified_split

PAD, UNKNOWN, EOS = "<pad>", "<unk>", "<eos>"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens and their ids.

    Attributes:
      tokens: the tokens; the id of a token is its position.
    """

    tokens: tuple[str, ...]

    @functools.cached_property
    def ids(self) -> Mapping[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(
        cls, tokens: Iterable[str], specials: Sequence[str] = (), min_freq: int = 1
    ) -> "Vocabulary":
        """Collects a vocabulary: ``specials`` first, then by falling frequency, ties by spelling.

        Args:
          tokens: the training text.
          specials: tokens with the first ids.
          min_freq: tokens that occur less often are left out.
        """
        counts = collections.Counter(tokens)
        for special in specials:
            counts.pop(special, None)
        kept = [(-count, token) for token, count in counts.items() if count >= min_freq]
        return cls((*specials, *(token for _, token in sorted(kept))))

    def encode(self, tokens: Iterable[str]) -> np.ndarray:
        """Returns the ids, [T] int32; tokens not in the vocabulary become ``<unk>``.

        Raises:
          ValueError: an unknown token, in a vocabulary without ``<unk>``.
        """
        unknown = self.ids.get(UNKNOWN, -1)
        ids = self.ids
        encoded = np.array(array.array("i", (ids.get(t, unknown) for t in tokens)), np.int32)
        if unknown < 0 and (encoded < 0).any():
            raise ValueError(f"a token is not in the vocabulary of {len(self)}, which has no <unk>")
        return encoded

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Returns the tokens of ids."""
        return [self.tokens[int(i)] for i in ids]


class Windows:
    """Windows of ``length`` + 1 tokens, starting at ``starts``.

    Args:
      tokens: [N] int32.
      length: tokens scored in a window.
      starts: [K] where windows start.
      padded: whether examples have ``lengths``, and windows may reach beyond the end, where they
        are padded with 0.
      resets: [K] bool to give as ``reset``, or None.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        length: int,
        starts: np.ndarray,
        *,
        padded: bool = False,
        resets: np.ndarray | None = None,
    ):
        self.tokens = np.asarray(tokens, np.int32)
        self.length = length
        self.starts = starts
        self.padded = padded
        self.resets = resets

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int, /) -> Example:
        return {name: a[0] for name, a in self.take(np.array([int(index)])).items()}

    def take(self, indices: np.ndarray) -> Example:
        positions = self.starts[indices, None] + np.arange(self.length + 1)
        valid = positions < len(self.tokens)
        inputs = np.where(valid, self.tokens[np.minimum(positions, len(self.tokens) - 1)], 0)
        batch = {"inputs": inputs}
        if self.padded:
            batch["lengths"] = valid.sum(1).astype(np.int32)
        if self.resets is not None:
            batch["reset"] = self.resets[indices]
        return batch


def _check_length(tokens: np.ndarray, length: int, rows: int = 1) -> None:
    if length < 1 or len(tokens) < rows * (length + 1):
        raise ValueError(
            f"a text of {len(tokens)} tokens is too short for {rows} window(s) of "
            f"length + 1 = {length + 1} tokens; use a smaller length or more text"
        )


def training_windows(tokens: np.ndarray, length: int, stride: int | None = None) -> Windows:
    """Returns the full windows that start every ``stride`` tokens (by default ``length``).

    Raises:
      ValueError: fewer than ``length`` + 1 tokens.
    """
    _check_length(tokens, length)
    return Windows(tokens, length, np.arange(0, len(tokens) - length, stride or length))


def evaluation_windows(tokens: np.ndarray, length: int) -> Windows:
    """Returns windows that score every token but the first exactly once; the last is padded."""
    return Windows(tokens, length, np.arange(0, len(tokens) - 1, length), padded=True)


def stream_windows(tokens: np.ndarray, length: int, batch_size: int) -> Windows:
    """Returns windows in the order of truncated back-propagation through time.

    The text is cut into ``batch_size`` streams of equal length. In a ``Pipeline`` with this
    ``batch_size`` and ``shuffle=False``, row b of each batch continues row b of the batch before,
    so that recurrent state may be carried on. ``reset`` (bool) is true in the first batch of each
    epoch, where it must be set back.

    Raises:
      ValueError: too few tokens for one window in each stream.
    """
    _check_length(tokens, length, batch_size)
    per_stream = (len(tokens) // batch_size - 1) // length
    starts = np.arange(batch_size) * (len(tokens) // batch_size)
    steps = np.arange(per_stream)
    return Windows(
        tokens,
        length,
        (steps[:, None] * length + starts).ravel(),
        resets=np.repeat(steps == 0, batch_size),
    )


def _language_model(
    encoded: Mapping[str, np.ndarray],
    vocabulary: Vocabulary,
    length: int,
    stride: int | None,
    streams: int | None,
) -> DataBundle:
    if streams is not None and stride is not None:
        raise ValueError("give either stride or streams: streams follow each other without overlap")
    splits: dict[str, Source] = {}
    for name, tokens in encoded.items():
        if name != "train":
            splits[name] = evaluation_windows(tokens, length)
        elif streams is not None:
            splits[name] = stream_windows(tokens, length, streams)
        else:
            splits[name] = training_windows(tokens, length, stride)
    info = DatasetInfo(vocab_size=len(vocabulary), length=length + 1, vocabulary=vocabulary.tokens)
    return DataBundle(splits, info)


def character_text(
    path: str | os.PathLike[str],
    *,
    length: int = 256,
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05),
    stride: int | None = None,
    streams: int | None = None,
) -> DataBundle:
    """Returns a text file as windows of characters, split in the order of the file.

    The vocabulary is all characters of the file, sorted.

    Args:
      path: a UTF-8 file.
      length: characters scored in a window.
      fractions: of "train", "validation", "test".
      stride: between training windows; by default ``length``; 1 = every window there is.
      streams: batch size for ``stream_windows``, in place of shuffled windows; or None.

    Returns:
      Examples with ``inputs`` [length + 1] int32; outside "train" also ``lengths``; with
      ``streams`` in "train" also ``reset``.

    Raises:
      FileNotFoundError: no such file.
      ValueError: fractions that do not sum to 1, or too little text.
    """
    path = require_file(path, "Give the path of a plain text file.")
    if abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
        raise ValueError(f"fractions must not be negative and must sum to 1; got {fractions}")
    text = path.read_text(encoding="utf-8")
    vocabulary = Vocabulary(tuple(sorted(set(text))))
    cuts = np.rint(np.cumsum(fractions) * len(text)).astype(int)
    parts = np.split(vocabulary.encode(text), cuts[:2])
    encoded = {
        name: part for name, part in zip(("train", "validation", "test"), parts) if len(part) > 1
    }
    return _language_model(encoded, vocabulary, length, stride, streams)


def tinyshakespeare(
    *,
    length: int = 256,
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05),
    stride: int | None = None,
    streams: int | None = None,
) -> DataBundle:
    """``character_text`` of ``tinyshakespeare/input.txt`` in the directory TRANSFER_JAX_DATA.

    1,115,394 characters, 65 of them distinct.
    """
    path = require("tinyshakespeare", "input.txt")
    return character_text(path, length=length, fractions=fractions, stride=stride, streams=streams)


def _sums(rng: np.random.Generator, characters: int) -> str:
    count = characters // 5 + 1  # a line has at least 6 characters
    terms = rng.integers(0, 100, (count, 2))
    minus = rng.random(count) < 0.5
    lines = [
        f"{a}{'-' if m else '+'}{b}={a - b if m else a + b}\n"
        for (a, b), m in zip(terms.tolist(), minus.tolist())
    ]
    return "".join(lines)[:characters]


def arithmetic_text(
    *,
    num_train: int = 200_000,
    num_validation: int = 10_000,
    num_test: int = 10_000,
    length: int = 128,
    stride: int | None = None,
    streams: int | None = None,
    seed: int = 0,
) -> DataBundle:
    """Returns made-up text that needs no file: lines such as ``37+45=82`` and ``4-9=-5``.

    Terms are uniform in 0..99. A pure function of (seed, split).

    Args:
      num_train: characters in "train"; likewise "validation" and "test".
      num_validation: see above.
      num_test: see above.
      length: as in ``character_text``, likewise the rest and what is returned.
      stride: see above.
      streams: see above.
      seed: of the text.
    """
    vocabulary = Vocabulary(tuple("\n+-0123456789="))
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    encoded = {}
    for i, (name, size) in enumerate(sizes.items()):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, i))))
        encoded[name] = vocabulary.encode(_sums(rng, size))
    return _language_model(encoded, vocabulary, length, stride, streams)


def wikitext103(
    directory: str | os.PathLike[str],
    *,
    length: int = 1024,
    stride: int | None = None,
    streams: int | None = None,
) -> DataBundle:
    """Returns WikiText-103 as windows of words, with ``<eos>`` at the end of every line.

    The vocabulary comes from the training file, by falling frequency after ``<eos>`` (267,735
    words), as an adaptive softmax needs it.

    Args:
      directory: with ``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens``.
      length: as in ``character_text``, likewise the rest and what is returned.
      stride: see above.
      streams: see above.

    Raises:
      FileNotFoundError: a file is missing.
    """
    how = "Unpack wikitext-103-v1.zip (the word-level release) and give its folder as directory."
    paths = {
        name: require_file(Path(directory).expanduser() / f"wiki.{short}.tokens", how)
        for name, short in {"train": "train", "validation": "valid", "test": "test"}.items()
    }

    def words(path: Path) -> Iterator[str]:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                yield from line.split()
                yield EOS

    vocabulary = Vocabulary.build(words(paths["train"]), specials=(EOS,))
    encoded = {name: vocabulary.encode(words(path)) for name, path in paths.items()}
    return _language_model(encoded, vocabulary, length, stride, streams)


def _padded(rows: Sequence[np.ndarray], length: int) -> Example:
    """Pads token rows to [len(rows), length], with their lengths [len(rows)] int32."""
    inputs = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        inputs[i, : len(row)] = row
    return {"inputs": inputs, "lengths": np.array([len(row) for row in rows], np.int32)}


def _encode_document(vocabulary: Vocabulary, text: str, length: int) -> np.ndarray:
    """Characters, cut to leave room for ``<eos>``; uint16 halves the memory."""
    return vocabulary.encode([*text[: length - 1], EOS]).astype(np.uint16)


def imdb_files(
    directory: str | os.PathLike[str],
    *,
    length: int = 4096,
    min_freq: int = 15,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> DataBundle:
    """Returns sentiment classification of characters (Text of the Long Range Arena).

    Args:
      directory: the folder ``aclImdb``, with ``{train,test}/{neg,pos}/*.txt``.
      length: padded length; reviews are cut to leave room for ``<eos>``.
      min_freq: characters that occur less often in the (cut) training text are ``<unk>``.
      validation_fraction: of "train" that becomes "validation", class by class. With 0,
        "validation" is "test", as in the Arena's published numbers.
      seed: of that split.

    Returns:
      Examples with ``inputs`` [length] int32 padded with 0, ``lengths`` int32, and ``labels``
      int32, 0 negative and 1 positive.

    Raises:
      FileNotFoundError: a folder is missing.
    """
    how = (
        "Download aclImdb_v1.tar.gz from ai.stanford.edu/~amaas/data/sentiment, unpack it, and "
        "give the folder aclImdb as directory."
    )
    documents: dict[str, list[tuple[str, int]]] = {}
    for name in ("train", "test"):
        documents[name] = []
        for label, kind in enumerate(("neg", "pos")):
            folder = require_file(Path(directory).expanduser() / name / kind, how)
            for path in sorted(folder.glob("*.txt")):
                documents[name].append((path.read_text(encoding="utf-8"), label))
        if not documents[name]:
            raise FileNotFoundError(f"{directory}/{name} has no reviews (*.txt). {how}")
    vocabulary = Vocabulary.build(
        (c for text, _ in documents["train"] for c in text[: length - 1]),
        specials=(PAD, UNKNOWN, EOS),
        min_freq=min_freq,
    )

    def make(row: tuple[np.ndarray, int]) -> Example:
        example = {name: a[0] for name, a in _padded([row[0]], length).items()}
        return {**example, "labels": np.int32(row[1])}

    splits: dict[str, Source] = {
        name: Mapped([(_encode_document(vocabulary, t, length), y) for t, y in rows], make)
        for name, rows in documents.items()
    }
    if validation_fraction:
        fractions = {"train": 1 - validation_fraction, "validation": validation_fraction}
        splits.update(stratified_split(splits["train"], fractions, seed=seed))
    else:
        splits["validation"] = splits["test"]
    info = DatasetInfo(
        num_classes=2, vocab_size=len(vocabulary), length=length, vocabulary=vocabulary.tokens
    )
    return DataBundle(splits, info)


def aan_files(directory: str | os.PathLike[str], *, length: int = 4000) -> DataBundle:
    """Returns pairs of papers, cited or not, as characters (Retrieval of the Long Range Arena).

    The texts, cut to ``length``, stay in memory (1.4 GB for the published files).

    Args:
      directory: the folder ``tsv_data`` of ``lra_release.gz``, with
        ``new_aan_pairs.{train,eval,test}.tsv``: label, two identifiers, two texts.
      length: padded length of each text; texts are cut to leave room for ``<eos>``.

    Returns:
      Examples with ``inputs`` [2, length] int32 padded with 0, ``lengths`` [2] int32, and
      ``labels`` int32, 1 = one cites the other.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a line without five columns.
    """
    how = (
        "Download lra_release.gz from the releases of github.com/google-research/long-range-arena, "
        "unpack it, and give the folder tsv_data as directory."
    )
    rows: dict[str, list[tuple[str, str, int]]] = {}
    for name, short in {"train": "train", "validation": "eval", "test": "test"}.items():
        path = require_file(Path(directory).expanduser() / f"new_aan_pairs.{short}.tsv", how)
        rows[name] = []
        with open(path, encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                columns = line.rstrip("\n").split("\t")
                if len(columns) != 5:
                    raise ValueError(
                        f"{path}, line {number}: expected a label, two identifiers and two texts; "
                        f"got {len(columns)} columns"
                    )
                first, second = (text[: length - 1] for text in columns[3:])
                rows[name].append((first, second, int(float(columns[0]))))
    vocabulary = Vocabulary.build(
        (c for first, second, _ in rows["train"] for text in (first, second) for c in text),
        specials=(PAD, UNKNOWN, EOS),
    )

    def make(row: tuple[str, str, int]) -> Example:
        pair = [_encode_document(vocabulary, text, length) for text in row[:2]]
        return {**_padded(pair, length), "labels": np.int32(row[2])}

    splits = {name: Mapped(part, make) for name, part in rows.items()}
    info = DatasetInfo(
        num_classes=2, vocab_size=len(vocabulary), length=length, vocabulary=vocabulary.tokens
    )
    return DataBundle(splits, info)
