"""What is written about the items of a log: attributes by name, as sentences, as vectors.

The names of the items are those of ``Interactions.item_names``, so that the texts of a log are
``[texts[name] for name in log.item_names[1:]]``.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer_jax.data import named
from transfer_jax.data.paths import require, require_file
from transfer_jax.data.texts import open_text, records

# Name of the item -> attribute (title, brand, category, …), in this order -> text.
ItemTexts = dict[str, dict[str, str]]

# Any model of sentences: N texts to a number array [N, d].
SentenceEncoder = Callable[[list[str]], np.ndarray]


# -- readers --------------------------------------------------------------------------------------


def table_file(
    path: str,
    item: str = "item_id",
    columns: Sequence[str] = ("title", "brand", "category"),
    attributes: Sequence[str] = (),
) -> ItemTexts:
    """Reads a CSV or TSV file with a header, or a RecBole ``.item`` file; ``.gz`` too.

    A header such as ``title:token_seq`` (RecBole) names the column ``title``. Fields between tabs
    have no quotes: those in them belong to the text.

    Args:
      path: of the file.
      item: the column of the items' names.
      columns: the columns of the attributes, in their order.
      attributes: what the attributes are called; () = as their columns.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a column is missing (names those there), a row is too short, an item has two rows.
    """
    if attributes and len(attributes) != len(columns):
        raise ValueError(f"attributes={tuple(attributes)} do not match columns={tuple(columns)}.")
    file_path = require_file(path, "Give the file as --config.texts.options.path=FILE.")
    found: ItemTexts = {}
    with open_text(file_path) as file:
        first = file.readline().rstrip("\r\n")
        tabs = "\t" in first
        options: dict[str, Any] = (
            {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}
        )
        header = [name.split(":")[0] for name in next(csv.reader([first], **options))]
        if missing := [name for name in (item, *columns) if name not in header]:
            raise ValueError(
                f"{path} has no column {', '.join(map(repr, missing))}; its columns are "
                f"{', '.join(header)}."
            )
        place = header.index(item)
        pairs = [(name, header.index(c)) for name, c in zip(attributes or columns, columns)]
        for number, row in enumerate(csv.reader(file, **options), start=2):
            if len(row) < len(header):
                raise ValueError(f"{path}, line {number}: {len(row)} fields, not {len(header)}.")
            if row[place] in found:
                raise ValueError(f"{path}, line {number}: item {row[place]!r} is there twice.")
            found[row[place]] = {name: row[column].strip() for name, column in pairs}
    return found


def amazon_scientific_small() -> ItemTexts:
    """Amazon Industrial and Scientific, a part: title, brand, category of 1,585 items."""
    path = require("amazon_scientific_small", "items.tsv.gz")
    return table_file(
        str(path), columns=("title", "brand", "categories"),
        attributes=("title", "brand", "category"),
    )  # fmt: skip


def amazon_metadata(path: str, untitled: bool = False) -> ItemTexts:
    """Reads the metadata of Amazon's reviews: title, brand and category, "" where there is none.

    One object per line, JSON (2018, 2023) or a Python literal (the older files of 2014). The path
    of categories is joined by blanks; of several paths (2014) the first counts.

    Args:
      path: of the file, which may be a ``.gz``.
      untitled: keep items without a title.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line is neither JSON nor a literal, or names no item.
    """
    file_path = require_file(path, "Give the file as --config.texts.options.path=FILE.")
    found: ItemTexts = {}
    for number, record in records(file_path):
        name = record.get("asin") or record.get("parent_asin")
        if not name:
            raise ValueError(f"{path}, line {number}: neither 'asin' nor 'parent_asin'.")
        categories = record.get("category") or record.get("categories") or []
        if categories and isinstance(categories[0], list):
            categories = categories[0]
        title = str(record.get("title") or "").strip()
        if title or untitled:
            found[str(name)] = {
                "title": title,
                "brand": str(record.get("brand") or record.get("store") or "").strip(),
                "category": " ".join(map(str, categories)),
            }
    return found


_SYLLABLES = np.array([a + b for a in "bdfgklmnprstvz" for b in "aeiou"])


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """Made-up words of three syllables, all different."""
    codes = rng.choice(len(_SYLLABLES) ** 3, count, replace=False)
    parts = np.unravel_index(codes, (len(_SYLLABLES),) * 3)
    return ["".join(triple) for triple in zip(*(_SYLLABLES[p] for p in parts))]


def generated(seed: int = 0, items: int = 200, groups: int = 10) -> ItemTexts:
    """Texts of the items of ``interactions.generated`` with the same ``items`` and ``groups``.

    The category (two words) and the brand (one of two) tell the group. The title's two words tell
    the place on the group's ring: the second word of an item's title is the first word of its
    successor's, in all groups alike.

    Args:
      seed: non-negative; another one gives other words.
      items, groups: as of the log.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    size = items // groups
    words = _words(rng, size + 4 * groups)
    ring, rest = words[:size], np.array(words[size:]).reshape(groups, 4)
    texts = {}
    for group in range(groups):
        for place in range(size):
            texts[str(group * size + place + 1)] = {
                "title": f"{ring[place]} {ring[(place + 1) % size]}",
                "brand": str(rest[group, place % 2]),
                "category": f"{rest[group, 2]} {rest[group, 3]}",
            }
    return texts


ITEM_TEXTS: dict[str, Callable[..., ItemTexts]] = {
    # Built in.
    "generated": generated,
    # Files in the directory named by TRANSFER_JAX_DATA.
    "amazon_scientific_small": amazon_scientific_small,
    # Files whose place is an option.
    "amazon_metadata": amazon_metadata,
    "table_file": table_file,
}


def load_item_texts(name: str, **options: Any) -> ItemTexts:
    """Returns the texts of a catalogue by name.

    Args:
      name: a key of ``ITEM_TEXTS``.
      **options: arguments of that function.

    Raises:
      ValueError: no such texts; has the nearest names.
      TypeError: an option that it does not have; has those there are.
    """
    return named.call("set of item texts", ITEM_TEXTS, name, **options)


def of_items(texts: ItemTexts, names: Iterable[str]) -> list[dict[str, str]]:
    """The attributes of some items, in their order.

    Raises:
      ValueError: items without text; has how many, and the first of them.
    """
    names = [str(name) for name in names]
    if missing := [name for name in names if name not in texts]:
        raise ValueError(
            f"{len(missing)} of {len(names)} items have no text: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}. Names of texts are such as "
            f"{', '.join(list(texts)[:3]) or 'none'}."
        )
    return [texts[name] for name in names]


def sentences(texts: ItemTexts, names: Iterable[str]) -> list[str]:
    """The plain text of each item: its attributes joined by blanks.

    Raises:
      ValueError: as ``of_items``.
    """
    found = of_items(texts, names)
    return [" ".join(value for value in item.values() if value) for item in found]


# -- vectors --------------------------------------------------------------------------------------


def read_vectors(path: str | Path, key: str = "") -> np.ndarray:
    """Reads vectors that were computed elsewhere, from an ``.npy`` or ``.npz`` file.

    Args:
      path: of the file.
      key: the name of the array in an ``.npz``; may be "" where there is only one.

    Returns:
      float32 [n, d].

    Raises:
      FileNotFoundError: no such file.
      ValueError: no such array (names those there), not [n, d], or a number that is not finite.
    """
    path = require_file(path, "Vectors are read from an .npy or .npz file.")
    loaded: Any = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        if key:
            raise ValueError(f"{path} has one array without a name; leave out key={key!r}.")
        array = loaded
    else:
        with loaded:
            names = list(loaded.keys())
            if not key and len(names) == 1:
                key = names[0]
            if key not in names:
                raise ValueError(f"{path} has no array {key!r}; there are {', '.join(names)}.")
            array = loaded[key]
    return _checked(array, str(path))


def encode_sentences(texts: Sequence[str], encoder: SentenceEncoder) -> np.ndarray:
    """The vectors float32 [N, d] that any encoder of sentences gives of N texts.

    Raises:
      ValueError: it gives other than N vectors, or a number that is not finite.
    """
    array = _checked(encoder(list(texts)), "the sentence encoder")
    if len(array) != len(texts):
        raise ValueError(f"the sentence encoder gives {len(array)} vectors of {len(texts)} texts.")
    return array


def tfidf_vectors(texts: Sequence[str], dim: int, seed: int = 0) -> np.ndarray:
    """TF-IDF weights of words reduced to ``dim`` numbers by a singular value decomposition.

    A fallback where no language model is at hand; a report that uses it says "TF-IDF/SVD".

    Args:
      texts: N texts.
      dim: d, at most the number of different words and less than N.
      seed: of the randomised decomposition.

    Returns:
      float32 [N, d].

    Raises:
      ValueError: too large a ``dim``.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    weights = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    most = min(weights.shape[0] - 1, weights.shape[1])
    if not 1 <= dim <= most:
        raise ValueError(f"dim={dim}: {len(texts)} texts of these words have 1 to {most}.")
    reduced = TruncatedSVD(dim, random_state=seed).fit_transform(weights)
    return reduced.astype(np.float32)


def _checked(array: Any, source: str) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 2:
        raise ValueError(f"{source} gives an array {list(array.shape)}; [n, d] is needed.")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise ValueError(f"{source}: row {row} has a number that is not finite.")
    return array
