"""Items as tokens of their attributes, histories as sequences of items (Recformer, section 3.1).

A sequence is <s>, then the items from the newest to the oldest; of every item its attributes, of
every attribute its name and its value. Cut at the right: the oldest text is lost.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from transfer_jax.data.interactions import Sequences
from transfer_jax.data.padding import bucketed
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.recommend import EvaluationSource
from transfer_jax.data.sources import ArraySource, Example
from transfer_jax.data.text import UNKNOWN, Vocabulary

# Token types.
START, KEY, VALUE, PADDING = range(4)

SPECIALS = ("<s>", "<pad>", "</s>", UNKNOWN, "<mask>")


@dataclasses.dataclass(frozen=True, eq=False)
class ItemTokenizer:
    """Texts to numbers of tokens.

    Attributes:
      encode: N texts to N lists of tokens, without special ones.
      vocab_size: V.
      start, pad, mask: the special tokens <s>, <pad>, <mask>.
      begins: bool [V], tokens that begin a word.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    vocab_size: int
    start: int
    pad: int
    mask: int
    begins: np.ndarray


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def frequent_words(texts: Iterable[str], size: int) -> tuple[str, ...]:
    """``SPECIALS`` and the most frequent words of ``texts`` in lower case, ``size`` at most."""
    words = itertools.chain.from_iterable(map(_words, texts))
    return Vocabulary.build(words, SPECIALS).tokens[:size]


def word_tokenizer(tokens: Sequence[str]) -> ItemTokenizer:
    """Whole words in lower case; those that are not among ``tokens`` become <unk>.

    Args:
      tokens: see ``frequent_words``.
    """
    vocabulary = Vocabulary(tuple(tokens))
    numbers = vocabulary.ids
    return ItemTokenizer(
        encode=lambda texts: [vocabulary.encode(_words(text)).tolist() for text in texts],
        vocab_size=len(vocabulary), start=numbers["<s>"], pad=numbers["<pad>"],
        mask=numbers["<mask>"], begins=np.ones(len(vocabulary), bool),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Catalogue:
    """The tokens of items 1 … n, without <s>; row 0 is padding.

    Attributes:
      tokens: int32 [n + 1, L], padded.
      types: int32 [n + 1, L], ``KEY``, ``VALUE`` or ``PADDING``.
      lengths: int32 [n + 1].
      start, pad: the special tokens.
    """

    tokens: np.ndarray
    types: np.ndarray
    lengths: np.ndarray
    start: int
    pad: int

    @property
    def num_items(self) -> int:
        """n."""
        return len(self.lengths) - 1

    def rows(self, multiple: int) -> Example:
        """Every item as a sequence of one, with rows of <s> alone up to a multiple of ``multiple``.

        Returns:
          int32 ``inputs`` and ``token_types`` [R, L + 1], ``lengths`` [R]; row i is item i.
        """
        end = -len(self.lengths) % multiple
        width = ((0, end), (1, 0))
        inputs = np.pad(self.tokens, width, constant_values=self.pad)
        types = np.pad(self.types, width, constant_values=PADDING)
        inputs[:, 0], types[:, 0] = self.start, START
        return {
            "inputs": inputs,
            "token_types": types,
            "lengths": np.pad(self.lengths, (0, end)) + 1,
        }


def tokenize_items(
    items: Sequence[Mapping[str, str]],
    tokenizer: ItemTokenizer,
    *,
    limits: int | Sequence[int] = 32,
    attributes: int = 3,
) -> Catalogue:
    """Items to tokens: of each attribute those of its name, then those of its value.

    Args:
      items: attribute -> text, of n items.
      tokenizer: of names and values.
      limits: the most tokens of an attribute, its name included; one number, or one for each.
      attributes: the first so many count.

    Raises:
      ValueError: an item has more attributes than ``limits`` has numbers.
    """
    used = [list(item.items())[:attributes] for item in items]
    parts = sorted({text for item in used for pair in item for text in pair})
    encoded = dict(zip(parts, tokenizer.encode(parts), strict=True))
    rows: list[list[int]] = [[]]
    types: list[list[int]] = [[]]
    for item in used:
        own = [limits] * len(item) if isinstance(limits, int) else list(limits)
        if len(own) < len(item):
            raise ValueError(f"limits={tuple(own)} has no number for {item[len(own)][0]!r}.")
        tokens, kinds = [], []
        for (key, value), limit in zip(item, own):
            found = [*encoded[key], *encoded[value]][:limit]
            tokens += found
            kinds += [KEY if i < len(encoded[key]) else VALUE for i in range(len(found))]
        rows.append(tokens)
        types.append(kinds)
    lengths = np.array([len(row) for row in rows], np.int32)
    shape = (len(rows), max(1, int(lengths.max())))
    arrays = np.full(shape, tokenizer.pad, np.int32), np.full(shape, PADDING, np.int32)
    for array, lists in zip(arrays, (rows, types)):
        for i, row in enumerate(lists):
            array[i, : len(row)] = row
    return Catalogue(*arrays, lengths, tokenizer.start, tokenizer.pad)


def pack_sequence(
    catalogue: Catalogue, items: np.ndarray, *, length: int, max_items: int = 50
) -> Example:
    """The tokens of a history.

    Args:
      catalogue: of the items.
      items: int [m], oldest first; may be empty.
      length: T, the most tokens.
      max_items: the newest so many count.

    Returns:
      int32 [L], L <= T: ``inputs``; ``token_types``; ``item_positions``, 0 for <s> and k for the
      k-th newest item.
    """
    newest = np.asarray(items)[::-1][:max_items]
    counts = catalogue.lengths[newest]
    valid = np.arange(catalogue.tokens.shape[1]) < counts[:, None]
    places = np.repeat(np.arange(1, len(newest) + 1, dtype=np.int32), counts)
    start = np.array([catalogue.start], np.int32)
    return {
        "inputs": np.concatenate([start, catalogue.tokens[newest][valid]])[:length],
        "token_types": np.concatenate([[START], catalogue.types[newest][valid]])[:length].astype(
            np.int32
        ),
        "item_positions": np.concatenate([[0], places])[:length].astype(np.int32),
    }


def pack_histories(
    catalogue: Catalogue, history: Sequences, *, length: int, max_items: int = 50
) -> Example:
    """The tokens of many histories, padded to ``length``; see ``pack_sequence``.

    Returns:
      int32 ``inputs``, ``token_types`` and ``item_positions`` [U, T]; ``lengths`` [U].
    """
    packed = [
        pack_sequence(catalogue, items, length=length, max_items=max_items) for items in history
    ]
    shape = (len(packed), length)
    batch = {name: np.full(shape, pad, np.int32) for name, pad in _padding(catalogue).items()}
    for row, example in enumerate(packed):
        for name, array in example.items():
            batch[name][row, : len(array)] = array
    return {**batch, "lengths": np.array([len(e["inputs"]) for e in packed], np.int32)}


def _padding(catalogue: Catalogue) -> dict[str, int]:
    return {
        "inputs": catalogue.pad, "token_types": PADDING,
        "item_positions": 0,  # of padding, that is masked
    }  # fmt: skip


def longest_history(
    catalogue: Catalogue, items: np.ndarray, *, length: int, max_items: int = 50
) -> int:
    """The most tokens that any beginning of ``items``, without the last one, can have."""
    ends = np.concatenate([[0], np.cumsum(catalogue.lengths[items])])[:-1]
    begins = np.concatenate([np.zeros(max_items, int), ends])[: len(ends)]
    return min(length, 1 + int((ends - begins).max(initial=0)))


class _Drawn(grain.transforms.RandomMap):
    """A user to a history and the item after it, at a random place."""

    def __init__(self, sequences: Sequences, catalogue: Catalogue, late: bool, **options: Any):
        self.sequences, self.catalogue, self.late = sequences, catalogue, late
        self.options = options

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        items = self.sequences[int(element["user"])]
        last = len(items) - 1
        place = rng.integers(last // 2 if self.late else 0, last, endpoint=True)
        packed = pack_sequence(self.catalogue, items[:place], **self.options)
        if self.late:
            return {**packed, **next_item(self.catalogue, items[place])}
        return {**packed, "labels": items[place], "user": np.int32(element["user"])}


def next_item(catalogue: Catalogue, item: int) -> Example:
    """An item as a sequence of one, under the names that ``objectives.recformer`` reads."""
    tokens = np.concatenate([[catalogue.start], catalogue.tokens[item]]).astype(np.int32)
    types = np.concatenate([[START], catalogue.types[item]]).astype(np.int32)
    return {
        "item_inputs": tokens,
        "item_token_types": types,
        "item_lengths": np.int32(catalogue.lengths[item] + 1),
    }


def training_pairs(
    sequences: Sequences,
    catalogue: Catalogue,
    batch_size: int,
    *,
    buckets: Sequence[int],
    max_items: int,
    seed: int,
    pretraining: bool,
) -> Pipeline:
    """Endless epochs over the users, each time at another place of their histories.

    Of m items the place t is drawn uniformly from 0 … m - 1; in pre-training from the later half,
    (m - 1) // 2 … m - 1. A draw depends on the seed and the number of the example alone.

    Args:
      sequences: of every user; those with fewer than two items are left out.
      catalogue: of the items.
      batch_size: global; what is left over at the end of an epoch is filled up with padding.
      buckets: increasing lengths that batches are padded to; the last is T.
      max_items: see ``pack_sequence``.
      seed: non-negative.
      pretraining: give the next item's tokens (see ``objectives.recformer.PreTraining``), else its
        number as ``labels``.

    Raises:
      ValueError: nobody has two items.
    """
    users = np.flatnonzero(sequences.lengths >= 2)
    if not len(users):
        raise ValueError("no user has two items: there is nothing to train on.")
    options = {"length": buckets[-1], "max_items": max_items}
    lengths = [longest_history(catalogue, sequences[int(user)], **options) for user in users]
    return _bucketed(
        ArraySource({"user": users.astype(np.int32)}), np.array(lengths), catalogue, buckets,
        batch_size, seed=seed,
        transforms=(_Drawn(sequences, catalogue, pretraining, **options),),
    )  # fmt: skip


def evaluation_histories(
    source: EvaluationSource,
    catalogue: Catalogue,
    batch_size: int,
    *,
    buckets: Sequence[int],
    max_items: int,
    pretraining: bool = False,
) -> Pipeline:
    """One pass over the users of a source, with ``labels``, ``seen`` and ``user`` as it has them.

    Args:
      source: of histories; its own ``inputs`` are replaced by the tokens.
      Others: see ``training_pairs``.
    """
    options = {"length": buckets[-1], "max_items": max_items}

    def packed(example: Mapping[str, Any]) -> Example:
        tokens = pack_sequence(catalogue, source.history[int(example["user"])], **options)
        if pretraining:
            return {**tokens, **next_item(catalogue, example["labels"])}
        return {**example, **tokens}

    counts = [
        len(pack_sequence(catalogue, source.history[int(user)], **options)["inputs"])
        for user in source.users
    ]
    return _bucketed(
        source, np.array(counts), catalogue, buckets, batch_size, transforms=(packed,),
        shuffle=False, repeat=False,
    )  # fmt: skip


def _bucketed(
    source: Any, lengths: np.ndarray, catalogue: Catalogue, buckets: Sequence[int],
    batch_size: int, **options: Any,
) -> Pipeline:  # fmt: skip
    values = _padding(catalogue)
    return bucketed(source, lengths, tuple(buckets), batch_size, values=values, **options)
