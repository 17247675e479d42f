"""Metrics of generated texts: overlap of words, clinical facts, and floors to compare with.

All scores lie in [0, 1]; published tables usually print them times 100. ROUGE and BLEU are those of
``rouge-score`` and ``sacrebleu``. Two different things are called "BLEU-n" in the literature, and
both are here: the clipped precision of n-grams alone (``bleu_precision_n``), which an output that
is too short inflates, and the cumulative score (``bleu_n``), the geometric mean of the precisions
of orders 1 to n times the brevity penalty. Read either with the penalty and the mean lengths.
"""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: give one reference "
            "for each prediction, and at least one."
        )


def sentences(text: str) -> list[str]:
    """Cuts a text after full stops that a space follows; blank sentences are dropped."""
    return [s for s in re.split(r"(?<=\.)\s+", text.strip()) if s.strip(" .")]


@lru_cache(maxsize=8)
def _scorer(kinds: tuple[str, ...], stem: bool) -> Callable:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(kinds), use_stemmer=stem).score


def rouge(
    predictions: Sequence[str], references: Sequence[str], *, stem: bool = True
) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (Lin 2004).

    Args:
      predictions: N texts.
      references: N texts.
      stem: whether words are reduced by Porter's stemmer first.

    Returns:
      ``rouge1``, ``rouge2``, ``rougeL``, and ``rougeLsum``, for which texts are cut into sentences.

    Raises:
      ValueError: no texts, or unequal numbers.
    """
    _check_pairs(predictions, references)
    score = _scorer(ROUGE, stem)
    totals = dict.fromkeys(ROUGE, 0.0)
    for prediction, reference in zip(predictions, references):
        scores = score("\n".join(sentences(reference)), "\n".join(sentences(prediction)))
        for name in ROUGE:
            totals[name] += scores[name].fmeasure
    return {name: total / len(predictions) for name, total in totals.items()}


def bleu(
    predictions: Sequence[str], references: Sequence[str], *, max_order: int = 4
) -> dict[str, float]:
    """BLEU of a corpus (Papineni et al. 2002) and its parts; 13a tokens, no smoothing.

    Args:
      predictions: N texts.
      references: N texts, one for each prediction.
      max_order: the longest n-grams.

    Returns:
      For n = 1 .. ``max_order`` ``bleu_precision_n``, the clipped precision of n-grams over the
      corpus, and ``bleu_n``, ``BP * (p_1 ... p_n)^(1/n)``; ``brevity_penalty``; ``mean_length`` and
      ``reference_length``, tokens per text.

    Raises:
      ValueError: no texts, or unequal numbers.
    """
    _check_pairs(predictions, references)
    from sacrebleu.metrics import BLEU

    corpus = BLEU(smooth_method="none", max_ngram_order=max_order, force=True).corpus_score(
        list(predictions), [list(references)]
    )
    counts, totals = np.array(corpus.counts, float), np.array(corpus.totals, float)
    precisions = counts / np.maximum(totals, 1)
    with np.errstate(divide="ignore"):
        cumulative = np.exp(np.cumsum(np.log(precisions)) / np.arange(1, max_order + 1))
    # sacrebleu leaves its penalty at 0 or 1 where nothing matches; this is the definition.
    short = corpus.sys_len < corpus.ref_len
    penalty = float(np.exp(1 - corpus.ref_len / corpus.sys_len)) if short and corpus.sys_len else (
        0.0 if short else 1.0
    )  # fmt: skip
    result = {f"bleu_precision_{n}": float(p) for n, p in enumerate(precisions, 1)}
    result |= {f"bleu_{n}": float(penalty * c) for n, c in enumerate(cumulative, 1)}
    return result | {
        "brevity_penalty": penalty,
        "mean_length": corpus.sys_len / len(predictions),
        "reference_length": corpus.ref_len / len(predictions),
    }


def edit_distance(first: Sequence, second: Sequence) -> int:
    """How many insertions, deletions and substitutions lead from one sequence to the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def label_error_rate(predictions: Sequence[Sequence], references: Sequence[Sequence]) -> float:
    """Edit distances over the length of the references; it may exceed 1.

    Args:
      predictions: N sequences of labels, characters or words.
      references: N sequences.

    Raises:
      ValueError: no sequences, unequal numbers, or no labels in any reference.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references.")
    length = sum(len(reference) for reference in references)
    if not length:
        raise ValueError("the references have no labels: there is nothing to divide by.")
    return sum(edit_distance(a, b) for a, b in zip(predictions, references)) / length


def importance(sentence: str, reference: str) -> float:
    """How much of a reference a sentence says: the harmonic mean of ROUGE-1 F1 and BLEU-4.

    The score by which CSTRL chooses the sentences that are masked. BLEU-4 without smoothing is 0
    for sentences that share no four words with the reference, which most do.
    """
    overlap = _scorer(("rouge1",), False)(reference, sentence)["rouge1"].fmeasure
    if overlap == 0:
        return 0.0
    four = bleu([sentence], [reference])["bleu_4"]
    return 2 * overlap * four / (overlap + four)


# -- clinical facts -------------------------------------------------------------------------------

# The fourteen observations of CheXpert (Irvin et al. 2019), by words that name them in reports.
CHEXPERT: Mapping[str, tuple[str, ...]] = {
    "No Finding": (),
    "Enlarged Cardiomediastinum": ("enlarged mediastinum", "widened mediastinum",
                                   "mediastinal widening", "mediastinal enlargement"),
    "Cardiomegaly": ("cardiomegaly", "enlarged heart", "enlarged cardiac silhouette",
                     "heart is enlarged", "cardiac enlargement"),
    "Lung Lesion": ("nodule", "nodules", "mass", "masses", "lesion", "lesions", "granuloma",
                    "granulomas"),
    "Lung Opacity": ("opacity", "opacities", "infiltrate", "infiltrates", "airspace disease",
                     "opacification"),
    "Edema": ("edema", "vascular congestion", "heart failure", "chf"),
    "Consolidation": ("consolidation", "consolidations"),
    "Pneumonia": ("pneumonia", "infection"),
    "Atelectasis": ("atelectasis", "atelectatic", "collapse"),
    "Pneumothorax": ("pneumothorax", "pneumothoraces"),
    "Pleural Effusion": ("effusion", "effusions", "pleural fluid"),
    "Pleural Other": ("pleural thickening", "pleural scarring", "fibrosis"),
    "Fracture": ("fracture", "fractures"),
    "Support Devices": ("catheter", "pacemaker", "tube", "picc", "device", "stent", "port"),
}  # fmt: skip

_NEGATION = re.compile(
    r"\b(?:no|not|without|negative for|free of|absence of|absent|denies|resolution of)\b"
)
# A comma does not end the scope: "no effusion, consolidation or pneumothorax".
_SCOPE_ENDS = re.compile(r"[.;:!?\n]|\b(?:but|however|although)\b")


def chexpert_lexicon() -> dict[str, str]:
    """``CHEXPERT`` as a lexicon: words of a report -> observation."""
    return {term: label for label, terms in CHEXPERT.items() for term in terms}


def mentions(text: str, lexicon: Mapping[str, str]) -> set[tuple[str, bool]]:
    """Finds the concepts that a text mentions, and whether it denies them (NegEx).

    A mention is denied if a word such as "no" or "without" comes before it with no punctuation in
    between (Chapman et al. 2001, with the scope to the end of the clause).

    Args:
      text: a report.
      lexicon: lower-case term -> concept; terms match whole words, the longest first.

    Returns:
      Pairs (concept, denied).
    """
    found = set()
    clauses, start = [], 0
    lower = text.lower()
    for end in _SCOPE_ENDS.finditer(lower):
        clauses.append(lower[start : end.start()])
        start = end.end()
    pattern = _pattern(tuple(sorted(lexicon)))
    if pattern is None:
        return set()
    for clause in [*clauses, lower[start:]]:
        denial = _NEGATION.search(clause)
        for match in pattern.finditer(clause):
            denied = denial is not None and denial.start() < match.start()
            found.add((lexicon[match[0]], denied))
    return found


@lru_cache(maxsize=8)
def _pattern(terms: tuple[str, ...]) -> re.Pattern | None:
    longest_first = sorted(terms, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b") if terms else None


def entity_f1(
    predictions: Sequence[str], references: Sequence[str], lexicon: Mapping[str, str]
) -> dict[str, float]:
    """Precision, recall and F1 of the concepts mentioned, each with whether it is denied.

    Args:
      predictions: N texts.
      references: N texts.
      lexicon: see ``mentions``.

    Returns:
      ``entity_precision``, ``entity_recall``, ``entity_f1`` over all mentions of the corpus.

    Raises:
      ValueError: no texts, unequal numbers, or an empty lexicon.
    """
    _check_pairs(predictions, references)
    if not lexicon:
        raise ValueError("the lexicon is empty: no concept could be found.")
    both = predicted = stated = 0
    for prediction, reference in zip(predictions, references):
        a, b = mentions(prediction, lexicon), mentions(reference, lexicon)
        both, predicted, stated = both + len(a & b), predicted + len(a), stated + len(b)
    return {
        "entity_precision": both / max(predicted, 1),
        "entity_recall": both / max(stated, 1),
        "entity_f1": 2 * both / max(predicted + stated, 1),
    }


def observations(text: str) -> dict[str, bool]:
    """The fourteen observations of CheXpert that a text affirms.

    ``No Finding`` holds where none of the others does, support devices apart.
    """
    affirmed = {concept for concept, denied in mentions(text, chexpert_lexicon()) if not denied}
    labels = {label: label in affirmed for label in CHEXPERT}
    labels["No Finding"] = not affirmed - {"Support Devices"}
    return labels


def label_agreement(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How far predictions and references affirm the same of CheXpert's observations.

    Returns:
      ``label_accuracy``, the share of the 14 N decisions that agree, and ``label_f1`` over those
      affirmed; agreement alone is high because most observations are absent from most reports.

    Raises:
      ValueError: no texts, or unequal numbers.
    """
    _check_pairs(predictions, references)
    a, b = (
        np.array([list(observations(text).values()) for text in texts])
        for texts in (predictions, references)
    )
    return {
        "label_accuracy": float((a == b).mean()),
        "label_f1": float(2 * (a & b).sum() / max(a.sum() + b.sum(), 1)),
    }


# -- floors ---------------------------------------------------------------------------------------


def most_common(texts: Sequence[str]) -> str:
    """The text that occurs most often, the first of them in a tie: the best constant answer."""
    return collections.Counter(texts).most_common(1)[0][0]


def lead(texts: Sequence[str], count: int = 1) -> list[str]:
    """The first ``count`` sentences of each text."""
    return [" ".join(sentences(text)[:count]) for text in texts]


def lex_rank(texts: Sequence[str], count: int = 1, *, damping: float = 0.85) -> list[str]:
    """The ``count`` most central sentences of each text, in its order (Erkan and Radev 2004).

    Centrality is the stationary distribution of a walk between sentences by the cosine of their
    TF-IDF vectors (continuous LexRank).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"[A-Za-z0-9]+").fit(texts)
    summaries = []
    for text in texts:
        parts = sentences(text)
        if len(parts) > count:
            vectors = vectorizer.transform(parts)
            similar = (vectors @ vectors.T).toarray() + 1e-12
            walk = similar / similar.sum(axis=1, keepdims=True)
            n = len(parts)
            system = np.eye(n) - damping * walk.T
            centrality = np.linalg.solve(system, np.full(n, (1 - damping) / n))
            best = np.sort(np.argsort(-centrality, kind="stable")[:count])
            parts = [parts[i] for i in best]
        summaries.append(" ".join(parts))
    return summaries


def nearest_neighbour(
    texts: Sequence[str], known_texts: Sequence[str], known_answers: Sequence[str]
) -> list[str]:
    """The answer to the known text that is nearest by the cosine of TF-IDF vectors.

    Args:
      texts: N texts.
      known_texts: M texts, of the training split.
      known_answers: their M answers.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    _check_pairs(known_texts, known_answers)
    vectorizer = TfidfVectorizer(token_pattern=r"[A-Za-z0-9]+").fit(known_texts)
    similar = vectorizer.transform(texts) @ vectorizer.transform(known_texts).T
    return [known_answers[i] for i in np.asarray(similar.argmax(axis=1)).ravel()]
