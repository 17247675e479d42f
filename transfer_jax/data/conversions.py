"""Impressions with clicks and conversions: a funnel of known probabilities, Coat, Ali-CCP.

Feature ids of every field begin at 1; 0 is padding. A conversion counts only after a click.
"""

import csv
import dataclasses
import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from transfer_jax.data.paths import require, require_file
from transfer_jax.data.sources import Example


class Field(NamedTuple):
    """A sparse field: its name, the number of ids including the padding, and its slots."""

    name: str
    size: int
    slots: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Impressions:
    """A source of impressions; examples have ``inputs`` (a dictionary) and ``labels``.

    Attributes:
      fields: in the order of their slots.
      ids: int32 [N, S], the slots of all fields side by side, but for common ones.
      labels: float32 [N, K], of the stages: click and conversion.
      weights: float32 [N, S], or None = ones.
      dense: float32 [N, D], or None.
      common_ids: int32 [C, T], or None: the first T slots, shared by many impressions.
      common_weights: float32 [C, T], or None.
      index: int32 [N], each impression's row of ``common_ids``.
      groups: 0: batches have the common slots of every row; else they have so many rows of
        ``common_ids`` and an index into them, which must do for each batch. For one process.
      outcomes: float32 [N], whether a conversion follows if the impression is clicked; None where
        that is not known of all.
      truth: float32 [N], the probability of it, or None.
    """

    fields: tuple[Field, ...]
    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None
    dense: np.ndarray | None = None
    common_ids: np.ndarray | None = None
    common_weights: np.ndarray | None = None
    index: np.ndarray | None = None
    groups: int = 0
    outcomes: np.ndarray | None = None
    truth: np.ndarray | None = None

    def __post_init__(self):
        common = 0 if self.common_ids is None else self.common_ids.shape[1]
        slots = sum(field.slots for field in self.fields)
        if self.ids.shape[1] + common != slots:
            raise ValueError(
                f"the fields have {slots} slots; ids have {self.ids.shape[1]} and common_ids "
                f"{common}."
            )
        if (self.common_ids is None) != (self.index is None):
            raise ValueError("common_ids and index belong together; one of them is missing.")
        for name in ("labels", "weights", "dense", "index", "outcomes", "truth"):
            array = getattr(self, name)
            if array is not None and len(array) != len(self.ids):
                raise ValueError(f"there are {len(self.ids)} rows of ids and {len(array)} {name}.")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Example:
        example = dataclasses.replace(self, groups=0).take(np.array([index]))
        inputs = {name: x[0] for name, x in example["inputs"].items()}
        return {"inputs": inputs, "labels": example["labels"][0]}

    def take(self, indices: np.ndarray) -> Example:
        inputs = {"ids": self.ids[indices]}
        if self.dense is not None:
            inputs["dense"] = self.dense[indices]
        if self.weights is not None:
            inputs["weights"] = self.weights[indices]
        if self.common_ids is not None and self.index is not None:
            rows = self.index[indices]
            if self.groups:
                rows = self._group(rows, inputs)
                inputs["common_ids"] = self.common_ids[rows]
                if self.common_weights is not None:
                    inputs["common_weights"] = self.common_weights[rows]
            else:
                inputs["ids"] = np.concatenate([self.common_ids[rows], inputs["ids"]], axis=1)
                if self.common_weights is not None:
                    own = inputs.get("weights", np.ones_like(self.ids[indices], np.float32))
                    inputs["weights"] = np.concatenate([self.common_weights[rows], own], axis=1)
        return {"inputs": inputs, "labels": self.labels[indices]}

    def _group(self, rows: np.ndarray, inputs: Example) -> np.ndarray:
        """The different rows, filled up with the first; sets ``inputs["index"]``."""
        unique, place = np.unique(rows, return_inverse=True)
        if len(unique) > self.groups:
            raise ValueError(
                f"a batch has {len(unique)} different common rows and groups={self.groups}; give "
                "as many groups as a batch may need, at most the batch size."
            )
        inputs["index"] = place.astype(np.int32)
        return np.concatenate([unique, np.full(self.groups - len(unique), unique[0])])

    def labelled(self, labels: np.ndarray) -> "Impressions":
        """The same impressions with other labels, [N, K]."""
        return dataclasses.replace(self, labels=np.asarray(labels, np.float32))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that ``load`` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fields.json").write_text(json.dumps(self.fields))
        for name, array in self._arrays().items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Impressions":
        """Reads what ``save`` wrote; arrays stay on disk until they are read."""
        how = "It is written by Impressions.save, after read_alicpp."
        fields = json.loads(require_file(Path(folder) / "fields.json", how).read_text())
        names = {f.name for f in dataclasses.fields(cls)}
        arrays: dict[str, Any] = {
            path.stem: np.load(path, mmap_mode="r")
            for path in sorted(Path(folder).glob("*.npy"))
            if path.stem in names
        }
        return cls(fields=tuple(Field(*field) for field in fields), **arrays)

    def _arrays(self) -> dict[str, np.ndarray]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, np.ndarray)}


# -- which impressions train the conversion rate --------------------------------------------------


def with_missing_as_negative(clicks: np.ndarray, share: float, seed: int) -> np.ndarray:
    """AMAN: the clicked rows and a share of the others, whose label 0 is then believed.

    Args:
      clicks: [N] of 0 and 1.
      share: of the rows without a click, in [0, 1].
      seed: of the draw.

    Returns:
      int64 rows in ascending order.
    """
    _check_share("share", share)
    missing = np.flatnonzero(clicks == 0)
    count = round(share * len(missing))
    drawn = np.random.default_rng(seed).choice(missing, count, replace=False)
    return np.sort(np.concatenate([np.flatnonzero(clicks), drawn]))


def oversampled(clicks: np.ndarray, conversions: np.ndarray, times: int) -> np.ndarray:
    """OVERSAMPLING: the clicked rows, those with a conversion ``times`` times; int64 rows."""
    if times < 1:
        raise ValueError(f"times={times}; a conversion occurs once at least.")
    clicked = np.flatnonzero(clicks)
    return np.repeat(clicked, np.where(conversions[clicked] > 0, times, 1))


def rejection_sampled(
    clicks: np.ndarray, click_rates: np.ndarray, seed: int, quantile: float = 0.05
) -> tuple[np.ndarray, float]:
    """UNBIAS: clicked rows, each kept with the chance ``min(1, c / pCTR)``.

    What is left is distributed as the impressions are, but where pCTR < c. The paper says only
    that pCTR is the rejection probability.

    Args:
      clicks: [N] of 0 and 1.
      click_rates: [N], pCTR of another network.
      seed: of the draw.
      quantile: c is this quantile of pCTR among the clicked rows.

    Returns:
      int64 rows, and c.
    """
    _check_share("quantile", quantile)
    clicked = np.flatnonzero(clicks)
    rates = np.asarray(click_rates, np.float64)[clicked]
    c = float(np.quantile(rates, quantile))
    kept = np.random.default_rng(seed).random(len(clicked)) < c / np.maximum(rates, 1e-300)
    return clicked[kept], c


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}; it must be in [0, 1].")


# -- a funnel whose probabilities are known -------------------------------------------------------


def funnel(
    seed: int = 0,
    train: int = 200_000,
    test: int = 60_000,
    cardinalities: Sequence[int] = (2000, 1000, 300, 100, 30),
    zipf: float = 0.8,
    click_bias: float = -4.2,
    conversion_bias: float = -2.2,
    shared: float = 0.6,
) -> dict[str, Impressions]:
    """Impressions whose clicks and conversions are drawn from known probabilities.

    Every value of a field has a hidden vector h in R^3, N(0, 1). A click has the logit
    ``click_bias + sum_f <w_f, h_f> + <h_0, h_1> / (2 sqrt 3)`` with unit vectors w_f, a conversion
    after it ``conversion_bias + sum_f <shared * w_f + v_f, h_f>`` and the same product: what is
    clicked is what would be bought, so clicked impressions are no sample of all.

    Args:
      seed: of everything.
      train, test: numbers of impressions.
      cardinalities: values of each field, two fields at least; drawn with probability ~ rank^-zipf.
      zipf: exponent.
      click_bias, conversion_bias: of the logits.
      shared: how much of what makes clicks makes conversions.

    Returns:
      ``train`` and ``test``, with ``outcomes`` and ``truth``.
    """
    rng = np.random.default_rng(seed)
    hidden = [rng.normal(size=(n, 3)) for n in cardinalities]

    def directions() -> np.ndarray:
        drawn = rng.normal(size=(len(cardinalities), 3))
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    w, v = directions(), directions()
    fields = tuple(Field(f"field_{i}", n + 1) for i, n in enumerate(cardinalities))
    parts = {}
    for name, count in (("train", train), ("test", test)):
        values = []
        for n in cardinalities:
            chances = np.arange(1, n + 1) ** -zipf
            values.append(rng.choice(n, count, p=chances / chances.sum()))
        h = np.stack([hidden[f][x] for f, x in enumerate(values)], axis=1)  # [N, F, 3]
        linear = np.einsum("nfd,fd->n", h, w)
        product = (h[:, 0] * h[:, 1]).sum(axis=1) / (2 * np.sqrt(3))
        own = np.einsum("nfd,fd->n", h, v)
        click_rate = _sigmoid(click_bias + linear + product)
        truth = _sigmoid(conversion_bias + shared * linear + own + product)
        clicks = rng.random(count) < click_rate
        outcomes = rng.random(count) < truth
        parts[name] = Impressions(
            fields=fields,
            ids=(np.stack(values, axis=1) + 1).astype(np.int32),
            labels=np.stack([clicks, clicks & outcomes], axis=1).astype(np.float32),
            outcomes=outcomes.astype(np.float32),
            truth=truth.astype(np.float32),
        )
    return parts


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# -- Coat -----------------------------------------------------------------------------------------

# Columns of the one-hot groups.
_COAT_USER = {"user_gender": (0, 2), "age": (2, 8), "location": (8, 11), "interest": (11, 14)}
_COAT_ITEM = {"gender": (0, 2), "jacket": (2, 18), "colour": (18, 31), "front_page": (31, 33)}


def coat(minimum: int = 4, exclude_test: bool = False) -> dict[str, Impressions]:
    """Coat (Schnabel et al. 2016): ratings of coats that users chose, and of random coats.

    The impressions are all pairs of a user and a coat. A click is a coat that the user chose to
    rate, a conversion a rating of at least ``minimum``. The test coats were drawn at random: there
    every pair counts as clicked, and the conversions are those of the entire space.

    Args:
      minimum: rating that is a conversion, 1 to 5.
      exclude_test: leave the test pairs out of the training impressions, where they are mostly
        pairs without a click.

    Raises:
      FileNotFoundError: ``coat`` is not in ``TRANSFER_JAX_DATA``.
      ValueError: files of other shapes.
    """
    folder = require("coat")
    users, items = (_table(folder, f"{name}_features.ascii") for name in ("user", "item"))
    ratings = {name: _table(folder, f"{name}.ascii.gz") for name in ("train", "test")}
    shape = (len(users), len(items))
    for name, matrix in ratings.items():
        if matrix.shape != shape:
            raise ValueError(f"{folder}: ratings {name} have shape {matrix.shape}, not {shape}.")
    columns = [np.arange(shape[0]), np.arange(shape[1])]
    sizes = {"user": shape[0], "item": shape[1]}
    sides = [0, 1]
    for side, (table, groups) in enumerate(((users, _COAT_USER), (items, _COAT_ITEM))):
        for name, (start, stop) in groups.items():
            columns.append(table[:, start:stop].argmax(axis=1))
            sizes[name] = stop - start
            sides.append(side)
    fields = tuple(Field(name, size + 1) for name, size in sizes.items())

    def impressions(
        pairs: np.ndarray, labels: np.ndarray, outcomes: np.ndarray | None = None
    ) -> Impressions:
        ids = np.stack([values[pairs[:, s]] + 1 for values, s in zip(columns, sides)], axis=1)
        return Impressions(fields, ids.astype(np.int32), labels, outcomes=outcomes)

    chosen = np.argwhere(ratings["test"] == 0 if exclude_test else np.ones(shape))
    given = ratings["train"][tuple(chosen.T)]
    labels = np.stack([given > 0, given >= minimum], axis=1).astype(np.float32)
    random = np.argwhere(ratings["test"] > 0)
    liked = (ratings["test"][tuple(random.T)] >= minimum).astype(np.float32)
    return {
        "train": impressions(chosen, labels),
        "test": impressions(random, np.stack([np.ones_like(liked), liked], 1), outcomes=liked),
    }


def _table(folder: Path, name: str) -> np.ndarray:
    path = require_file(folder / name, f"Put the file into the data set folder {folder}.")
    return np.loadtxt(path, dtype=np.int64)  # reads .gz too


# -- features to ids ------------------------------------------------------------------------------


class Encoder(Protocol):
    """Maps features, as they are written in a file, to ids."""

    def size(self, field: str) -> int:
        """The number of ids of a field, including the padding."""

    def encode(self, field: str, features: Sequence[str]) -> np.ndarray:
        """int32 ids, one per feature."""


@dataclasses.dataclass(frozen=True)
class Hashing:
    """Features to ids 1 .. size - 1 by a hash that is the same everywhere; features may collide.

    Attributes:
      sizes: of each field, at least 2.
    """

    sizes: Mapping[str, int]

    def size(self, field: str) -> int:
        return self.sizes[field]

    def encode(self, field: str, features: Sequence[str]) -> np.ndarray:
        buckets = self.sizes[field] - 1
        if buckets < 1:
            raise ValueError(f"field {field!r} needs a size of at least 2 for hashing.")
        digests = (
            hashlib.blake2b(f"{field}={x}".encode(), digest_size=8).digest() for x in features
        )
        hashes = [int.from_bytes(digest, "little") % buckets for digest in digests]
        return np.array(hashes, np.int32) + 1


@dataclasses.dataclass(frozen=True)
class Vocabularies:
    """Features to ids by a table: 1 is every unknown or rare feature, the others from 2.

    Attributes:
      tables: field -> feature -> id.
    """

    tables: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, counts: Mapping[str, Mapping[str, int]], minimum: int = 1) -> "Vocabularies":
        """Features that occur ``minimum`` times, from ``count_features``; frequent ones first."""
        tables = {}
        for field, known in counts.items():
            kept = sorted((x for x, n in known.items() if n >= minimum), key=lambda x: -known[x])
            tables[field] = {feature: i + 2 for i, feature in enumerate(kept)}
        return cls(tables)

    def size(self, field: str) -> int:
        return len(self.tables[field]) + 2

    def encode(self, field: str, features: Sequence[str]) -> np.ndarray:
        table = self.tables[field]
        return np.array([table.get(feature, 1) for feature in features], np.int32)


# -- Ali-CCP --------------------------------------------------------------------------------------

# Slots per field, longest lists cut to their largest values. Users' fields come first.
ALICPP_USER = {
    "101": 1, "109_14": 32, "110_14": 32, "127_14": 32, "150_14": 32, "121": 1, "122": 1, "124": 1,
    "125": 1, "126": 1, "127": 1, "128": 1, "129": 1,
}  # fmt: skip
ALICPP_AD = {
    "205": 1, "206": 1, "207": 1, "210": 8, "216": 1, "508": 1, "509": 1, "702": 1, "853": 1,
    "301": 1,
}  # fmt: skip
ALICPP_SLOTS = {**ALICPP_USER, **ALICPP_AD}


def alicpp_sample() -> dict[str, Impressions]:
    """The rows of Ali-CCP that torch-rechub ships, with label-encoded features, one per field.

    A column ``D<field>`` is the weight of that field's feature.

    Raises:
      FileNotFoundError: ``ali_ccp_sample`` is not in ``TRANSFER_JAX_DATA``.
    """
    tables = {}
    for split in ("train", "val", "test"):
        path = require("ali_ccp_sample", f"ali_ccp_{split}_sample.csv")
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        tables[split] = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    sizes = {f: 2 + max(int(t[f].max()) for t in tables.values()) for f in ALICPP_SLOTS}
    fields = tuple(Field(name, size) for name, size in sizes.items())
    parts = {}
    for split, table in tables.items():
        ids = np.stack([table[f.name] for f in fields], axis=1).astype(np.int32) + 1
        ones = np.ones(len(ids))
        weights = np.stack([table.get(f"D{f.name}", ones) for f in fields], axis=1)
        labels = np.stack([table["click"], table["purchase"]], axis=1).astype(np.float32)
        name = "validation" if split == "val" else split
        parts[name] = Impressions(fields, ids, labels, weights=weights.astype(np.float32))
    return parts


def parse_features(text: str) -> dict[str, tuple[list[str], list[float]]]:
    """Splits ``field 0x02 feature 0x03 value``, joined by 0x01, into features and values by field.

    Raises:
      ValueError: a feature that is not written so.
    """
    found: dict[str, tuple[list[str], list[float]]] = {}
    for item in text.split("\x01"):
        if not item:
            continue
        try:
            field, rest = item.split("\x02")
            feature, value = rest.split("\x03")
            weight = float(value)
        except ValueError as e:
            raise ValueError(
                f"{item!r} is no feature; a field, 0x02, a feature, 0x03 and a number are needed."
            ) from e
        features, values = found.setdefault(field, ([], []))
        features.append(feature)
        values.append(weight)
    return found


def _rows(path: str | os.PathLike[str], columns: int) -> Iterator[list[str]]:
    how = "It is part of Ali-CCP (Tianchi data set 408, which needs an account)."
    path = require_file(path, how)
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, line in enumerate(file, start=1):
            row = line.rstrip("\r\n").split(",")
            if len(row) != columns:
                raise ValueError(f"{path}, line {number}: {len(row)} columns, not {columns}.")
            yield row


def count_features(
    skeleton: str | os.PathLike[str], common: str | os.PathLike[str]
) -> dict[str, Counter[str]]:
    """How often each feature of each field of Ali-CCP is listed, for ``Vocabularies.of``.

    A feature of a common block counts once, however many impressions share the block.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in ALICPP_SLOTS}
    lists = ((row[-1] for row in _rows(path, n)) for path, n in ((skeleton, 6), (common, 3)))
    for texts in lists:
        for text in texts:
            for field, (features, _) in parse_features(text).items():
                if field in counts:
                    counts[field].update(features)
    return counts


def read_alicpp(
    skeleton: str | os.PathLike[str],
    common: str | os.PathLike[str],
    encoder: Encoder,
    *,
    slots: Mapping[str, int] | None = None,
) -> Impressions:
    """Reads Ali-CCP as it is released; common features are kept once per block.

    ``skeleton`` has lines ``id,click,buy,block,count,features`` and ``common`` has
    ``block,count,features``, without headers, ``.gz`` too; see ``parse_features``. Conversions
    without a click are dropped, and so are fields of which nothing is known here.

    Args:
      skeleton: path of ``sample_skeleton_train.csv`` or ``..._test.csv``.
      common: path of ``common_features_train.csv`` or ``..._test.csv``.
      encoder: ``Hashing`` or ``Vocabularies``; the same for both parts.
      slots: exceptions to ``ALICPP_SLOTS``. Of a longer list, the largest values are kept.

    Raises:
      ValueError: a line of another form, a label that is not 0 or 1, an unknown block; a name in
        ``slots`` that is no field.
    """
    slots = slots or {}
    if unknown := sorted(set(slots) - set(ALICPP_SLOTS)):
        raise ValueError(f"slots: {unknown} are no fields; there are {list(ALICPP_SLOTS)}.")
    sides = [
        tuple(Field(name, encoder.size(name), slots.get(name, n)) for name, n in side.items())
        for side in (ALICPP_USER, ALICPP_AD)
    ]
    blocks: dict[str, int] = {}

    def common_texts() -> Iterator[str]:
        for name, _, text in _rows(common, 3):
            blocks[name] = len(blocks)
            yield text

    common_ids, common_weights = _packed(common_texts(), sides[0], encoder)
    labels: list[tuple[int, int]] = []
    index: list[int] = []

    def texts() -> Iterator[str]:
        for number, click, buy, block, _, text in _rows(skeleton, 6):
            if click not in "01" or buy not in "01" or not click or not buy:
                raise ValueError(f"impression {number}: click {click!r}, buy {buy!r}; not 0 or 1.")
            if block not in blocks:
                raise ValueError(f"impression {number}: there are no common features {block!r}.")
            if click < buy:
                continue
            labels.append((int(click), int(buy)))
            index.append(blocks[block])
            yield text

    ids, weights = _packed(texts(), sides[1], encoder)
    return Impressions(
        (*sides[0], *sides[1]), ids, np.array(labels, np.float32).reshape(-1, 2), weights=weights,
        common_ids=common_ids, common_weights=common_weights, index=np.array(index, np.int32),
    )  # fmt: skip


def _packed(
    texts: Iterable[str], fields: Sequence[Field], encoder: Encoder, chunk: int = 65_536
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of features as ids and weights [N, S]."""
    width = sum(field.slots for field in fields)
    chunks: list[tuple[np.ndarray, np.ndarray]] = [
        (np.zeros((0, width), np.int32), np.zeros((0, width), np.float32))
    ]
    filled = chunk
    for text in texts:
        if filled == chunk:
            shape = (chunk, width)
            chunks.append((np.zeros(shape, np.int32), np.zeros(shape, np.float32)))
            filled = 0
        found = parse_features(text)
        start = 0
        for field in fields:
            features, values = found.get(field.name, ([], []))
            weights = np.array(values, np.float32)
            if len(features) > field.slots:
                keep = np.sort(np.argsort(-weights, kind="stable")[: field.slots])
                features, weights = [features[i] for i in keep], weights[keep]
            span = slice(start, start + len(features))
            if features:
                chunks[-1][0][filled, span] = encoder.encode(field.name, features)
                chunks[-1][1][filled, span] = weights
            start += field.slots
        filled += 1
    if len(chunks) > 1:
        chunks[-1] = (chunks[-1][0][:filled], chunks[-1][1][:filled])
    return np.concatenate([c[0] for c in chunks]), np.concatenate([c[1] for c in chunks])
