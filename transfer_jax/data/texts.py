"""Texts from files: labelled ones and pairs, from tables, JSON lines and parallel lines.

The readers of tables take the names of columns, so that one of them reads any of GLUE's tasks and
another XSum and WMT as they are distributed. Texts become tokens elsewhere, with the tokeniser of
the model (``interop.load_tokenizer``).
"""

import ast
import csv
import difflib
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from transfer_jax.data.paths import require, require_file

TABLES = "A table is a .tsv with a header, or a .jsonl with an object in each line; .gz is allowed."


class Labelled(NamedTuple):
    """Texts of classes.

    Attributes:
      texts: N texts.
      pairs: N second texts, or None.
      labels: int32 [N].
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray

    def at(self, indices: np.ndarray) -> "Labelled":
        """The texts at ``indices``, int [K]."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return Labelled([self.texts[i] for i in indices], pairs, self.labels[indices])


Pairs = list[tuple[str, str]]


def open_text(path: Path, encoding: str = "utf-8") -> TextIO:
    """Opens a text file, which may be a ``.gz``; lines end at newlines alone."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding=encoding, newline="\n")


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the line and its object, of a file with one in each line; ``.gz`` too.

    Objects are JSON, or literals of Python, as some older collections have them.

    Raises:
      ValueError: a line is neither, or has no named fields.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                try:
                    record = ast.literal_eval(line.strip())
                except (ValueError, SyntaxError):
                    raise ValueError(
                        f"{path}, line {number} is neither JSON nor a Python literal."
                    ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is no object with named fields.")
            yield number, record


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the line and its fields by name."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".tsv", ".jsonl", ".json"):
        raise ValueError(f"{path} is no table that is read here. {TABLES}")
    if suffix != ".tsv":
        yield from records(path)
        return
    with open_text(path) as file:
        # GLUE's quotes are characters of the texts.
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in reader:
            yield reader.line_num, row


def read_columns(path: str | os.PathLike[str], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Reads columns of a table, each field as a string.

    Args:
      path: see ``TABLES``. Tables with tabs have no quotes; JSON has one object in each line.
      columns: names; "translation.en" is the field "en" of the object "translation".

    Returns:
      A tuple of one string for each column, of every row.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a row without one of the columns, no row, or a file of another kind.
    """
    path = require_file(path, TABLES)
    rows = []
    for number, row in _rows(path):
        found = []
        for column in columns:
            value: Any = row
            for key in column.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is None:
                names = [str(name) for name in row]
                near = difflib.get_close_matches(column, names, n=1) or names
                raise ValueError(
                    f"{path}, line {number}: there is no field {column!r}; nearest: "
                    f"{', '.join(near)}."
                )
            found.append(str(value).strip())
        rows.append(tuple(found))
    if not rows:
        raise ValueError(f"{path} has no rows. {TABLES}")
    return rows


def read_labelled(
    path: str | os.PathLike[str], texts: Sequence[str], label: str, classes: Sequence[str]
) -> Labelled:
    """Reads texts of classes, or pairs of texts, as GLUE's tasks are distributed.

    Args:
      path: see ``read_columns``.
      texts: the column of the text, or two for pairs.
      label: the column of the class.
      classes: the class names as they stand in the file; their order gives the labels.

    Raises:
      FileNotFoundError: no such file.
      ValueError: as ``read_columns``; more than two texts; a class that is not among ``classes``.
    """
    if len(texts) not in (1, 2):
        raise ValueError(f"texts={tuple(texts)}: give one column, or two for pairs.")
    rows = read_columns(path, (*texts, label))
    numbers = {name: i for i, name in enumerate(classes)}
    if unknown := sorted({row[-1] for row in rows} - set(numbers)):
        raise ValueError(
            f"{path}: the column {label!r} has {unknown[:5]}, which are none of the classes "
            f"{tuple(classes)}."
        )
    labels = np.array([numbers[row[-1]] for row in rows], np.int32)
    second = [row[1] for row in rows] if len(texts) == 2 else None
    return Labelled([row[0] for row in rows], second, labels)


def read_lines(path: str | os.PathLike[str], encoding: str = "utf-8") -> list[str]:
    """The lines of a text file, which may be a ``.gz``.

    Raises:
      FileNotFoundError: no such file.
    """
    path = require_file(path, "Give the path of a text file.")
    with open_text(path, encoding) as file:
        return [line.rstrip("\r\n") for line in file]


def read_parallel(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Pairs:
    """Pairs of texts from two files whose lines correspond.

    Raises:
      FileNotFoundError: no such file.
      ValueError: unequal numbers of lines.
    """
    first, second = read_lines(source), read_lines(target)
    if len(first) != len(second):
        raise ValueError(
            f"{source} has {len(first)} lines and {target} has {len(second)}: they do not "
            "correspond."
        )
    return list(zip(first, second))


# -- collections under TRANSFER_JAX_DATA ----------------------------------------------------------

# Name -> file, encoding, number of classes.
_SENTENCES: dict[str, tuple[str, str, int]] = {
    "mr": ("rt-polarity.all", "latin-1", 2),
    "subj": ("subj.all", "latin-1", 2),
    "cr": ("custrev.all", "utf-8", 2),
    "mpqa": ("mpqa.all", "utf-8", 2),
    "sst2": ("stsa.binary", "utf-8", 2),
    "trec": ("TREC", "latin-1", 6),
}
SENTENCE_CLASSES = {name: classes for name, (_, _, classes) in _SENTENCES.items()}


def sentence_task(name: str, *, seed: int = 0) -> dict[str, Labelled]:
    """One of six small sets of sentences (Kim 2014), as tokenised words.

    Read from ``sentence_tasks`` in the directory TRANSFER_JAX_DATA. ``sst2`` has its own three
    parts, ``trec`` its own test part; a tenth of what is left, and of the others a tenth and
    another, become "validation" and "test", by a permutation. Sentences of ``mr`` and ``sst2`` are
    often the same: neither tests what has seen the other.

    Args:
      name: ``mr``, ``subj``, ``cr``, ``mpqa``, ``sst2`` or ``trec``; see ``SENTENCE_CLASSES``.
      seed: of the permutation.

    Returns:
      "train", "validation" and "test".

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: no such set.
    """
    if name not in _SENTENCES:
        near = difflib.get_close_matches(name, _SENTENCES, n=1) or list(_SENTENCES)
        raise ValueError(f"sentence_tasks has no {name!r}; nearest: {', '.join(near)}.")
    stem, encoding, _ = _SENTENCES[name]

    def read(file: str, encoding: str = encoding) -> Labelled:
        lines = read_lines(require("sentence_tasks", f"{file}.gz"), encoding)
        rows = [line.split(" ", 1) for line in lines if line.strip()]
        labels = np.array([int(label) for label, _ in rows], np.int32)
        return Labelled([text.strip() for _, text in rows], None, labels)

    if name == "sst2":
        files = {"train": "train", "validation": "dev", "test": "test"}
        return {split: read(f"{stem}.{part}") for split, part in files.items()}
    pool = read(f"{stem}.train.all" if name == "trec" else stem)
    order = np.random.default_rng(seed).permutation(len(pool.texts))
    tenth = len(order) // 10
    held_out = {"validation": pool.at(order[:tenth])}
    if name == "trec":
        return {**held_out, "train": pool.at(order[tenth:]), "test": read("TREC.test.all", "utf-8")}
    held_out["test"] = pool.at(order[tenth : 2 * tenth])
    return {**held_out, "train": pool.at(order[2 * tenth :])}


def multi30k() -> dict[str, Pairs]:
    """Captions of images in English and German (Elliott et al. 2016), as pairs (English, German).

    Read from ``multi30k_en_de`` in the directory TRANSFER_JAX_DATA.

    Returns:
      "train" (29,000), "validation" (1,014), "test_2016" and "test_2017" (1,000 each).

    Raises:
      FileNotFoundError: a file is missing.
    """
    files = {
        "train": "train", "validation": "val", "test_2016": "test_2016_flickr",
        "test_2017": "test_2017_flickr",
    }  # fmt: skip
    return {
        split: read_parallel(*(require("multi30k_en_de", f"{stem}.{x}.gz") for x in ("en", "de")))
        for split, stem in files.items()
    }
