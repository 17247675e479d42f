"""Radiology reports: Findings and the Impression that sums them up; gap sentences; concept tags.

One split is made, once, after exact copies are removed (about one pair in five of Open-I is one),
and every stage of training takes its examples from it. So no test report is ever trained on.
"""

import csv
import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from transfer_jax.data.paths import require, require_file
from transfer_jax.data.sources import ArraySource
from transfer_jax.data.splits import split
from transfer_jax.data.text import PAD, UNKNOWN, Vocabulary

EOS = "</s>"  # T5's name; its ids are 0 for padding, 1 for this and 2 for unknown words
MAX_GAPS = 3
GAP_PREFIX = "fill in the blank: "
SUMMARY_PREFIX = "summarize: "


@dataclasses.dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
      findings: what was seen.
      impression: the conclusion.
      concepts: what an indexer tagged it with.
    """

    findings: str
    impression: str
    concepts: tuple[str, ...] = ()


# -- readers --------------------------------------------------------------------------------------


def read_reports(
    path: str | os.PathLike[str],
    *,
    findings: str = "findings",
    impression: str = "impression",
    concepts: Sequence[str] = (),
) -> list[Report]:
    """Reads reports from a CSV file with a header; rows without one of the two texts are left out.

    Args:
      path: of a UTF-8 file. For MIMIC-CXR, whose use needs credentials, write its sections into one
        row per report.
      findings: name of the column.
      impression: name of the column.
      concepts: names of columns with concepts separated by semicolons.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a column that the file does not have, or no complete report.
    """
    path = require_file(path, "Give the path of a CSV file with a row for each report.")
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if absent := [
            c for c in (findings, impression, *concepts) if c not in (rows.fieldnames or ())
        ]:
            raise ValueError(f"{path} has no column {absent}; it has {rows.fieldnames}.")
        reports = [
            Report(
                row[findings].strip(), row[impression].strip(),
                tuple(c.strip() for name in concepts for c in row[name].split(";") if c.strip()),
            )
            for row in rows
        ]  # fmt: skip
    reports = [r for r in reports if r.findings and r.impression]
    if not reports:
        raise ValueError(f"no row of {path} has both {findings!r} and {impression!r}.")
    return reports


def open_i() -> list[Report]:
    """The 3,331 complete reports of the Indiana University collection (Open-i), with its concepts.

    Read from ``openi_indiana_reports/indiana_reports.csv`` under ``TRANSFER_JAX_DATA``.

    Raises:
      FileNotFoundError: it is not there.
    """
    path = require("openi_indiana_reports", "indiana_reports.csv")
    return read_reports(path, concepts=("MeSH", "Problems"))


# Organ -> what is said of it when normal, and (concept, sentence, conclusion) when not. In braces
# what is drawn and has to be carried over into the conclusion.
_ORGANS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str, str], ...]]] = {
    "heart": (
        ("The heart is normal in size", "Heart size is within normal limits",
         "The cardiac silhouette is unremarkable"),
        (("cardiomegaly", "The heart is {grade}ly enlarged", "{Grade} cardiomegaly"),
         ("cardiomegaly", "There is {grade} enlargement of the cardiac silhouette",
          "{Grade} cardiomegaly")),
    ),
    "lungs": (
        ("The lungs are clear", "Lungs are clear without focal airspace disease",
         "There is no focal consolidation"),
        (("opacity", "There is a {size} opacity in the {side} {zone}", "{Side} {zone} opacity"),
         ("atelectasis", "Streaky densities at the {side} base", "{Side} basilar atelectasis"),
         ("edema", "The interstitial markings are {grade}ly increased", "{Grade} pulmonary edema"),
         ("granuloma", "A {size} calcified nodule lies in the {side} {zone}",
          "{Side} calcified granuloma")),
    ),
    "pleura": (
        ("No pleural effusion or pneumothorax", "There is no pneumothorax",
         "The costophrenic angles are sharp"),
        (("effusion", "There is blunting of the {side} costophrenic angle by {size} fluid",
          "{Size} {side} pleural effusion"),
         ("pneumothorax", "A {size} {side} apical pneumothorax is seen",
          "{Size} {side} pneumothorax")),
    ),
    "mediastinum": (
        ("The mediastinal contours are normal", "Mediastinum is unremarkable"),
        (("hiatal hernia", "A {size} retrocardiac air fluid level is noted",
          "{Size} hiatal hernia"),),
    ),
    "bones": (
        ("The bony structures are intact", "No acute bony abnormality", "Osseous structures are "
         "within normal limits for age"),
        (("degenerative change", "There are {grade} degenerative changes of the spine", ""),
         ("fracture", "There is a fracture of the {side} {rib} rib", "{Side} rib fracture")),
    ),
}  # fmt: skip
_DRAWN = {
    "grade": ("mild", "moderate", "marked"),
    "size": ("small", "moderate", "large"),
    "side": ("left", "right"),
    "zone": ("upper lobe", "mid lung", "lower lobe"),
    "rib": ("third", "fourth", "fifth", "sixth"),
}
_NORMAL = "No acute cardiopulmonary abnormality"


def generated_reports(count: int = 3000, seed: int = 0) -> list[Report]:
    """Reports from a grammar, for runs without any files; made up, of no clinical meaning.

    Each organ is described, in a drawn order, as normal or not; the Impression lists what is not,
    with its side and size, in the order of the Findings. Copies occur, as in real reports.

    Args:
      count: of reports.
      seed: the reports are a function of it.
    """
    rng = np.random.default_rng(seed)

    def pick(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    reports = []
    for _ in range(count):
        said, concluded, concepts = [], [], []
        abnormal = rng.random() < 0.7
        for organ in rng.permutation(list(_ORGANS))[: int(rng.integers(3, 6))].tolist():
            normal, diseases = _ORGANS[organ]
            if not abnormal or rng.random() < 0.55:
                said.append(pick(normal))
                continue
            concept, sentence, conclusion = pick(diseases)
            drawn = {name: pick(options) for name, options in _DRAWN.items()}
            drawn |= {name.capitalize(): word.capitalize() for name, word in drawn.items()}
            said.append(sentence.format(**drawn))
            concepts.append(concept)
            if conclusion:
                concluded.append(conclusion.format(**drawn))
        impression = ". ".join(concluded or [_NORMAL]) + "."
        reports.append(Report(". ".join(said) + ".", impression, tuple(concepts) or ("normal",)))
    return reports


def split_reports(
    reports: Sequence[Report],
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> dict[str, tuple[Report, ...]]:
    """Removes exact copies, then splits: the one split that every stage uses.

    Args:
      reports: those with equal Findings and Impression are copies; the first is kept.
      seed: of the split.
      fractions: of "train", "validation" and "test"; they sum to 1.
    """
    first: dict[tuple[str, str], Report] = {}
    for report in reports:
        first.setdefault((report.findings, report.impression), report)
    distinct: Any = list(first.values())
    parts = split(distinct, dict(zip(("train", "validation", "test"), fractions)), seed=seed)
    return {name: tuple(part[i] for i in range(len(part))) for name, part in parts.items()}  # type: ignore[misc]


# -- gap sentences --------------------------------------------------------------------------------


def gap_sentences(
    findings: str, scores: Callable[[int, Sequence[str]], float], *, target: str = "sentinel"
) -> tuple[str, str]:
    """Masks the key sentences of a report (gap sentence generation, Zhang et al. 2020).

    Of n sentences the ``max(1, min(3, n - 2))`` with the highest scores are masked, the earlier
    first where scores are equal, and replaced by T5's sentinels from left to right.

    Args:
      findings: sentences are what lies between occurrences of ". ".
      scores: ``scores(i, sentences)`` is the importance of sentence i.
      target: ``sentinel``: each masked sentence after its sentinel, in the order of the document;
        ``joined``: the masked sentences by falling score, joined by ".", as the paper's code does.

    Returns:
      The input, with its prefix, and the target.

    Raises:
      ValueError: no sentence, or an unknown target.
    """
    if target not in ("sentinel", "joined"):
        raise ValueError(f"target={target!r}; choose 'sentinel' or 'joined'.")
    parts = [part.strip() for part in findings.split(". ") if part.strip()]
    if not parts:
        raise ValueError("the findings have no sentence to mask.")
    count = max(1, min(MAX_GAPS, len(parts) - 2))
    values = np.array([scores(i, parts) for i in range(len(parts))])
    ranked = np.argsort(-values, kind="stable")[:count].tolist()
    masked = sorted(ranked)
    sentinel = {i: f"<extra_id_{k}>" for k, i in enumerate(masked)}
    source = GAP_PREFIX + ". ".join(sentinel.get(i, part) for i, part in enumerate(parts))
    if target == "joined":
        return source, ".".join(parts[i] for i in ranked)
    return source, " ".join(f"{sentinel[i]} {parts[i]}" for i in masked)


def gap_pairs(
    reports: Iterable[Report],
    importance: Callable[[str, str], float],
    *,
    reference: str = "impression",
    target: str = "sentinel",
) -> list[tuple[str, str]]:
    """Makes the examples of gap sentence generation.

    Args:
      reports: of one split.
      importance: ``importance(sentence, reference)``, such as ``metrics.text.importance``.
      reference: what a sentence is compared with: ``impression`` (as the paper's code does), or
        ``rest``, the other sentences (as the paper says).
      target: see ``gap_sentences``.

    Raises:
      ValueError: an unknown option.
    """
    if reference not in ("impression", "rest"):
        raise ValueError(f"reference={reference!r}; choose 'impression' or 'rest'.")

    def pair(report: Report) -> tuple[str, str]:
        def score(i: int, parts: Sequence[str]) -> float:
            rest = ". ".join((*parts[:i], *parts[i + 1 :]))
            return importance(parts[i], report.impression if reference == "impression" else rest)

        return gap_sentences(report.findings, score, target=target)

    return [pair(report) for report in reports]


# -- concept tags ---------------------------------------------------------------------------------


class TagSource(Protocol):
    """Whatever gives the clinical concepts of a text, such as a lexicon or a trained tagger."""

    def tags(self, text: str) -> tuple[str, ...]: ...


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Tags by terms that occur as whole words, in the order in which they occur, each once.

    Attributes:
      terms: lower-case term -> tag.
    """

    terms: Mapping[str, str]

    @classmethod
    def from_tsv(cls, path: str | os.PathLike[str]) -> "Lexicon":
        """Reads lines of a term, a tab and its tag.

        Raises:
          FileNotFoundError: no such file.
          ValueError: a line without exactly one tab.
        """
        path = require_file(path, "Give the path of a file of lines 'term<TAB>tag'.")
        terms = {}
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                fields = line.rstrip("\n").split("\t")
                if len(fields) != 2:
                    raise ValueError(f"{path}:{number}: {line!r} is not 'term<TAB>tag'.")
                terms[fields[0].strip().lower()] = fields[1].strip()
        return cls(terms)

    @classmethod
    def from_reports(cls, reports: Iterable[Report], min_count: int = 2) -> "Lexicon":
        """Collects the concepts of training reports.

        A concept is a heading without qualifiers ("Cardiomegaly/borderline", "Aorta, Thoracic");
        its terms are the heading and its last word ("pleural effusion", "effusion"). A term of
        several headings stands for the most frequent one.

        Args:
          reports: with ``concepts``.
          min_count: rarer headings are left out.
        """
        headings = Counter(
            heading
            for report in reports
            for heading in {re.split(r"[/,]", c)[0].strip().lower() for c in report.concepts}
            if len(heading) > 2 and heading not in ("normal", "no indexing")
        )
        ranked = sorted(headings.items(), key=lambda pair: (-pair[1], pair[0]))
        terms: dict[str, str] = {}
        for heading, count in ranked:
            if count >= min_count:
                terms[heading] = heading
        for heading in list(terms.values()):
            terms.setdefault(heading.split()[-1], heading)
        return cls(terms)

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        longest_first = sorted(self.terms, key=len, reverse=True)
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")

    def tags(self, text: str) -> tuple[str, ...]:
        if not self.terms:
            return ()
        found = (self.terms[m[0]] for m in self._pattern.finditer(text.lower()))
        return tuple(dict.fromkeys(found))


def summary_pairs(
    reports: Iterable[Report], tags: TagSource | None = None
) -> list[tuple[str, str]]:
    """Makes the examples of summarisation: Findings with their prefix, and the Impression.

    Args:
      reports: of one split.
      tags: if given, concepts come first: "tags: effusion; edema | summarize: ...".
    """

    def source(findings: str) -> str:
        found = tags.tags(findings) if tags is not None else ()
        return (f"tags: {'; '.join(found)} | " if found else "") + SUMMARY_PREFIX + findings

    return [(source(r.findings), r.impression) for r in reports]


# -- tokens ---------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """Text to ids and back; id 0 is padding, id 1 ends a sequence and is not part of ``encode``."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """Lower-case words, full stops and T5's sentinels.

    Attributes:
      vocabulary: its first tokens are those of ``WordTokenizer.build``.
    """

    vocabulary: Vocabulary

    _TOKEN = re.compile(r"<extra_id_\d+>|[a-z0-9]+|\.")

    @classmethod
    def build(cls, texts: Iterable[str], min_freq: int = 3) -> "WordTokenizer":
        """Collects the words that occur at least ``min_freq`` times in the training texts."""
        sentinels = (f"<extra_id_{i}>" for i in range(MAX_GAPS))
        prefixes = [*cls._TOKEN.findall(GAP_PREFIX + SUMMARY_PREFIX + "tags")]
        specials = (PAD, EOS, UNKNOWN, *sentinels, *prefixes)
        words = (word for text in texts for word in cls._TOKEN.findall(text.lower()))
        return cls(Vocabulary.build(words, specials, min_freq))

    def encode(self, text: str) -> list[int]:
        return self.vocabulary.encode(self._TOKEN.findall(text.lower())).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        words = []
        for token in self.vocabulary.decode(ids):
            if token == EOS:
                break
            if token != PAD:
                words.append(token)
        return " ".join(words).replace(" .", ".")

    def __len__(self) -> int:
        return len(self.vocabulary)


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokeniser in the format of the ``tokenizers`` package, such as T5's ``tokenizer.json``.

    Attributes:
      tokenizer: a ``tokenizers.Tokenizer``; its id 0 is padding and id 1 the end, as T5's are.
    """

    tokenizer: Any

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "PretrainedTokenizer":
        """Reads a ``tokenizer.json``.

        Raises:
          FileNotFoundError: no such file.
          ImportError: the package ``tokenizers`` is not installed.
        """
        path = require_file(path, "Give the path of the model's tokenizer.json.")
        try:
            import tokenizers
        except ImportError as e:
            raise ImportError(
                "reading a tokenizer.json needs the package tokenizers: "
                "pip install 'transfer_jax[text]'."
            ) from e
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        kept = list(ids)
        kept = kept[: kept.index(1)] if 1 in kept else kept
        return self.tokenizer.decode([i for i in kept if i])

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, source_length: int, target_length: int
) -> ArraySource:
    """Turns pairs of texts into examples for ``objectives.Seq2Seq``.

    Longer texts are cut, and each ends with the end token.

    Args:
      pairs: N pairs (input, target).
      tokenizer: see ``Tokenizer``.
      source_length: S.
      target_length: T.

    Returns:
      Examples with int32 ``inputs`` [S], ``lengths``, ``targets`` [T], ``target_lengths``; the
      lengths count the end token, and what lies beyond them is 0.
    """

    def padded(texts: Iterable[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        rows = [[*tokenizer.encode(text)[: length - 1], 1] for text in texts]
        ids = np.zeros((len(rows), length), np.int32)
        for row, values in zip(ids, rows):
            row[: len(values)] = values
        return ids, np.array([len(row) for row in rows], np.int32)

    inputs, lengths = padded((source for source, _ in pairs), source_length)
    targets, target_lengths = padded((target for _, target in pairs), target_length)
    return ArraySource(
        {"inputs": inputs, "lengths": lengths, "targets": targets,
         "target_lengths": target_lengths}
    )  # fmt: skip
