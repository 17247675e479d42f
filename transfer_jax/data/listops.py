"""ListOps: nested list operations as token sequences, ten classes.

The task of the Long Range Arena (Tay et al. 2021): an expression, as ``[MAX 4 [MED 1 5 8 X 2 X``,
is read token by token, and the label is its value. ``expression`` draws from the same distribution
as the public generator: a node is an operator with probability 0.25, else a digit, and always a
digit at the largest depth; an operator is one of MIN, MAX, MED (rounded down), SM (sum modulo 10),
each with 2 to 10 arguments; an expression is kept if its number of tokens lies strictly between the
bounds. As in the Arena, "]" is written "X" and there are no parentheses.
"""

import os
from typing import NamedTuple

import numpy as np

from transfer_jax.data.bundle import DataBundle, DatasetInfo
from transfer_jax.data.paths import require_file
from transfer_jax.data.sources import CachedSource, Example, GeneratedSource
from transfer_jax.data.splits import Mapped

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
END = "X"
PAD, UNKNOWN, EOS = 0, 1, 2
VOCABULARY = ("<pad>", "<unk>", "<eos>", *map(str, range(10)), *OPERATORS, END)
_DIGIT = 3
_OPERATOR = 13
_END = 17
OPERATOR_PROBABILITY = 0.25


class _Level(NamedTuple):
    """The nodes of one depth, in reading order.

    Attributes:
      value: [n] the digit, where the node is one.
      operator: [n] index into ``OPERATORS``, or -1 for a digit.
      arguments: [n] number of children, all in the next level; 0 for a digit.
    """

    value: np.ndarray
    operator: np.ndarray
    arguments: np.ndarray


def _grow(
    rng: np.random.Generator, max_depth: int, max_arguments: int, max_length: int
) -> tuple[list[_Level], int]:
    """Draws a tree whose root is an operator, level by level, with its number of tokens.

    Stops early once the tree has ``max_length`` tokens, since it is rejected then.
    """
    levels: list[_Level] = []
    count, length = 1, 0
    for depth in range(1, max_depth + 1):
        if depth == 1:
            is_operator = np.ones(1, bool)
        elif depth == max_depth:
            is_operator = np.zeros(count, bool)
        else:
            is_operator = rng.random(count) < OPERATOR_PROBABILITY
        operator = np.where(is_operator, rng.integers(0, len(OPERATORS), count), -1)
        arguments = np.where(is_operator, rng.integers(2, max_arguments + 1, count), 0)
        levels.append(_Level(rng.integers(0, 10, count), operator, arguments))
        length += count + int(is_operator.sum())  # an operator has a closing token
        count = int(arguments.sum())
        if count == 0 or length + count >= max_length:
            break
    return levels, length + count


def _evaluate(levels: list[_Level]) -> int:
    """Returns the value of the tree, from the deepest level upwards."""
    below = np.zeros(0, np.int64)
    for level in reversed(levels):
        value = level.value.copy()
        parents = np.flatnonzero(level.arguments)
        if len(parents):
            counts = level.arguments[parents]
            starts = np.cumsum(counts) - counts
            ordered = below[np.lexsort((below, np.repeat(np.arange(len(parents)), counts)))]
            median = ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]
            results = np.stack(
                [
                    ordered[starts],
                    ordered[starts + counts - 1],
                    median // 2,
                    np.add.reduceat(below, starts) % 10,
                ]
            )
            value[parents] = results[level.operator[parents], np.arange(len(parents))]
        below = value
    return int(below[0])


def _serialise(levels: list[_Level], length: int) -> np.ndarray:
    """Returns the token ids of the tree, [length] int32: positions follow from subtree sizes."""
    sizes: list[np.ndarray] = []
    below = np.zeros(0, np.int64)
    for level in reversed(levels):
        ends = np.cumsum(level.arguments)
        total = np.concatenate([[0], np.cumsum(below)])
        inside = total[ends] - total[ends - level.arguments]
        below = np.where(level.operator < 0, 1, inside + 2)
        sizes.insert(0, below)
    tokens = np.zeros(length, np.int32)
    start = np.zeros(1, np.int64)
    for depth, level in enumerate(levels):
        is_operator = level.operator >= 0
        tokens[start] = np.where(is_operator, _OPERATOR + level.operator, _DIGIT + level.value)
        tokens[(start + sizes[depth] - 1)[is_operator]] = _END
        if depth + 1 < len(levels):
            # A child starts after its parent's opening token and its elder siblings.
            before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
            counts = level.arguments[is_operator]
            first = np.cumsum(counts) - counts
            start = before + np.repeat(start[is_operator] + 1 - before[first], counts)
    return tokens


def expression(
    rng: np.random.Generator,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_arguments: int = 10,
) -> tuple[np.ndarray, int]:
    """Draws one expression.

    Args:
      rng: where the draws come from.
      min_length: the number of tokens is greater than this,
      max_length: and less than this.
      max_depth: of the tree; the root has depth 1.
      max_arguments: of an operator; it has at least 2.

    Returns:
      Token ids [T] int32 (see ``VOCABULARY``; without ``<eos>``) and the value, 0..9.
    """
    # The root is an operator: a root that is a digit has one token, which the bounds reject.
    while True:
        levels, length = _grow(rng, max_depth, max_arguments, max_length)
        if min_length < length < max_length:
            return _serialise(levels, length), _evaluate(levels)


def encode(text: str) -> np.ndarray:
    """Returns the ids of an expression written out; accepts "]" for "X", and parentheses."""
    words = text.replace("]", END).replace("(", " ").replace(")", " ").split()
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    return np.array([ids.get(word, UNKNOWN) for word in words], np.int32)


def _example(tokens: np.ndarray, label: int, length: int) -> Example:
    inputs = np.full(length, PAD, np.int32)
    inputs[: len(tokens)] = tokens
    inputs[len(tokens)] = EOS
    return {
        "inputs": inputs,
        "labels": np.int32(label),
        "lengths": np.int32(len(tokens) + 1),
    }


def listops(
    *,
    num_train: int = 96_000,
    num_validation: int = 2_000,
    num_test: int = 2_000,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_arguments: int = 10,
    seed: int = 0,
    cache: bool = True,
) -> DataBundle:
    """Returns generated ListOps; example i of a split is a pure function of (seed, split, i).

    Args:
      num_train: examples in "train"; likewise "validation" and "test".
      num_validation: see above.
      num_test: see above.
      min_length: see ``expression``. With short expressions splits may share some.
      max_length: see ``expression``; also the padded length: tokens, at most max_length - 1, and
        ``<eos>``.
      max_depth: see ``expression``.
      max_arguments: see ``expression``.
      seed: of everything.
      cache: keep examples in memory once made (4 bytes per token).

    Returns:
      Examples with ``inputs`` [max_length] int32 padded with 0, ``labels`` int32 in 0..9 and
      ``lengths`` int32.

    Raises:
      ValueError: bounds between which no expression lies.
    """
    longest = 1
    for _ in range(max_depth - 1):
        longest = 2 + max_arguments * longest
    shortest = max(min_length + 1, 4)
    if max_depth < 2 or max_arguments < 2 or shortest >= max_length or shortest > longest:
        raise ValueError(
            f"no expression of depth at most {max_depth} with at most {max_arguments} arguments "
            f"has more than {min_length} and fewer than {max_length} tokens: the shortest has 4, "
            f"the longest {longest}"
        )

    def make(rng: np.random.Generator, index: int) -> Example:
        tokens, value = expression(rng, min_length, max_length, max_depth, max_arguments)
        return _example(tokens, value, max_length)

    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    sources = {
        name: GeneratedSource(make, size, (seed, i)) for i, (name, size) in enumerate(sizes.items())
    }
    info = DatasetInfo(
        num_classes=10, vocab_size=len(VOCABULARY), length=max_length, vocabulary=VOCABULARY
    )
    splits = {name: CachedSource(s) if cache else s for name, s in sources.items()}
    return DataBundle(splits, info)


def listops_files(directory: str | os.PathLike[str], *, length: int = 2048) -> DataBundle:
    """Returns the published ListOps of the Long Range Arena.

    Args:
      directory: the folder ``listops-1000`` of ``lra_release.gz``, with ``basic_train.tsv``,
        ``basic_val.tsv`` and ``basic_test.tsv``.
      length: padded length; longer expressions are cut, then ``<eos>`` is appended.

    Returns:
      As ``listops``.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a line that is no ListOps example.
    """
    how = (
        "Download lra_release.gz from the releases of github.com/google-research/long-range-arena, "
        "unpack it, and give the folder listops-1000 as directory."
    )

    def make(row: tuple[str, int]) -> Example:
        return _example(encode(row[0])[: length - 1], row[1], length)

    splits = {}
    for name, short in {"train": "train", "validation": "val", "test": "test"}.items():
        path = require_file(os.path.join(directory, f"basic_{short}.tsv"), how)
        rows = []
        with open(path, encoding="utf-8") as lines:
            next(lines)
            for number, line in enumerate(lines, start=2):
                text, tab, target = line.rstrip("\r\n").partition("\t")
                if not tab or not target.strip().isdigit():
                    raise ValueError(
                        f"{path}, line {number}: expected an expression, a tab and a digit; "
                        f"got {line[:80]!r}"
                    )
                rows.append((text, int(target)))
        splits[name] = CachedSource(Mapped(rows, make))
    info = DatasetInfo(
        num_classes=10, vocab_size=len(VOCABULARY), length=length, vocabulary=VOCABULARY
    )
    return DataBundle(splits, info)
