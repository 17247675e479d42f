"""Text metrics against the libraries' own aggregates and against counting by hand."""

import collections
import os

import numpy as np
import pytest

from transfer_jax.data.reports import open_i
from transfer_jax.metrics import text

RNG = np.random.default_rng(0)
WORDS = [
    "no",
    "acute",
    "heart",
    "is",
    "normal",
    "in",
    "size",
    "lungs",
    "clear",
    "effusion",
    "opacities",
    ".",
    "left",
    "small",
]


def report():
    return " ".join(RNG.choice(WORDS, RNG.integers(3, 25))).replace(" .", ".")


PREDICTIONS, REFERENCES = [report() for _ in range(200)], [report() for _ in range(200)]
LEXICON = {"effusion": "Effusion", "effusions": "Effusion", "pleural effusion": "Pleural",
           "pneumothorax": "Pneumothorax", "edema": "Edema"}  # fmt: skip


@pytest.fixture(scope="module", params=["generated", "open_i"])
def pairs(request):
    if request.param == "generated":
        return PREDICTIONS, REFERENCES
    if not os.environ.get("TRANSFER_JAX_DATA"):
        pytest.skip("TRANSFER_JAX_DATA is not set")
    reports = open_i()[:200]
    return [r.findings for r in reports], [r.impression for r in reports]


def test_rouge_is_the_mean_of_the_bootstrap_aggregate(pairs):
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator

    scorer = RougeScorer(list(text.ROUGE), use_stemmer=True)
    aggregator = BootstrapAggregator(n_samples=2)
    one_by_one = collections.defaultdict(list)
    for prediction, reference in zip(*pairs):
        lines = [t.replace(". ", ".\n") for t in (reference, prediction)]
        scores = scorer.score(*lines)
        aggregator.add_scores(scores)
        for name, s in scores.items():
            one_by_one[name].append(s.fmeasure)
    got = text.rouge(*pairs)
    for name, interval in aggregator.aggregate().items():
        assert got[name] == pytest.approx(np.mean(one_by_one[name]), abs=1e-6)
        assert interval.low.fmeasure - 0.05 < got[name] < interval.high.fmeasure + 0.05
    # Sentences matter to Lsum alone, and stemming joins "opacities" and "opacity".
    assert got["rougeLsum"] > got["rougeL"]
    assert text.rouge(["opacities"], ["opacity"])["rouge1"] == 1.0
    assert text.rouge(["opacities"], ["opacity"], stem=False)["rouge1"] == 0.0


def ngrams(words, n):
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_bleu_is_sacrebleu_and_its_precisions_are_clipped_counts(pairs):
    import sacrebleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    got = text.bleu(*pairs)
    peer = sacrebleu.corpus_bleu(pairs[0], [pairs[1]], smooth_method="none", force=True)
    assert got["bleu_4"] == pytest.approx(peer.score / 100, abs=1e-6)
    tokenise = Tokenizer13a()
    words = [[tokenise(t).split() for t in texts] for texts in pairs]
    sizes = [sum(map(len, w)) for w in words]
    penalty = min(1.0, np.exp(1 - sizes[1] / sizes[0]))
    assert got["brevity_penalty"] == pytest.approx(penalty, abs=1e-6)
    logs = 0.0
    for n in range(1, 5):
        pairs = [(ngrams(p, n), ngrams(r, n)) for p, r in zip(*words)]
        matched = sum((p & r).total() for p, r in pairs)
        precision = matched / sum(p.total() for p, _ in pairs)
        logs += np.log(precision)
        assert got[f"bleu_precision_{n}"] == pytest.approx(precision, abs=1e-6)
        assert got[f"bleu_{n}"] == pytest.approx(penalty * np.exp(logs / n), abs=1e-6)


def test_a_short_answer_inflates_precision_and_not_cumulative_bleu():
    got = text.bleu(["lungs clear"], ["the lungs are clear and the heart is normal"])
    assert got["bleu_precision_1"] == 1.0 and got["mean_length"] == 2
    assert got["brevity_penalty"] == pytest.approx(np.exp(1 - 9 / 2))
    assert got["bleu_1"] == pytest.approx(np.exp(1 - 9 / 2))
    assert text.bleu([""], ["a b"])["bleu_1"] == 0.0


def test_importance_is_the_harmonic_mean_and_zero_without_four_words_in_common():
    sentence, reference = "the heart is normal in size", "heart is normal in size and shape"
    r = text.rouge([sentence], [reference], stem=False)["rouge1"]
    b = text.bleu([sentence], [reference])["bleu_4"]
    assert text.importance(sentence, reference) == pytest.approx(2 * r * b / (r + b))
    assert text.importance("heart is big", reference) == 0.0
    assert text.importance("nothing", reference) == 0.0


@pytest.mark.parametrize(
    "report, expected",
    [
        ("No pneumothorax.", {("Pneumothorax", True)}),
        ("No edema, pneumothorax or effusions", {("Edema", True), ("Pneumothorax", True),
                                                  ("Effusion", True)}),
        ("No pneumothorax. Small Effusion.", {("Pneumothorax", True), ("Effusion", False)}),
        ("Effusion without edema; pneumothorax", {("Effusion", False), ("Edema", True),
                                                   ("Pneumothorax", False)}),
        ("No edema but effusion", {("Edema", True), ("Effusion", False)}),
        ("Negative for pleural effusion", {("Pleural", True)}),
        ("Nodules, noneffusion", set()),
    ],
)  # fmt: skip
def test_negation_reaches_to_the_next_punctuation(report, expected):
    assert text.mentions(report, LEXICON) == expected


def test_entities_count_only_with_the_right_negation():
    predictions = ["no effusion. edema.", "pneumothorax"]
    references = ["effusion. edema.", "pneumothorax. edema."]
    got = text.entity_f1(predictions, references, LEXICON)
    assert got["entity_precision"] == pytest.approx(2 / 3)
    assert got["entity_recall"] == pytest.approx(2 / 4)
    assert got["entity_f1"] == pytest.approx(4 / 7)
    with pytest.raises(ValueError, match="lexicon is empty"):
        text.entity_f1(predictions, references, {})


def test_label_agreement_over_fourteen_observations():
    assert len(text.CHEXPERT) == 14
    assert text.observations("No acute disease. Pacemaker.")["No Finding"]
    assert not text.observations("Mild cardiomegaly.")["No Finding"]
    got = text.label_agreement(["mild cardiomegaly"], ["no cardiomegaly. small effusion"])
    assert got["label_accuracy"] == pytest.approx(12 / 14) and got["label_f1"] == 0.0
    same = text.label_agreement(REFERENCES, REFERENCES)
    assert same == {"label_accuracy": 1.0, "label_f1": 1.0}


def test_floors():
    known = ["heart is large.", "lungs are clear. no effusion.", "left opacity seen."]
    answers = ["cardiomegaly", "normal", "opacity"]
    queries = ["the lungs are clear", "a large heart"]
    assert text.nearest_neighbour(queries, known, answers) == ["normal", "cardiomegaly"]
    assert text.most_common(["a", "b", "b", "a", "c"]) == "a"
    assert text.lead(["one. two. three.", ""], 2) == ["one. two.", ""]
    central = "lungs clear heart normal."
    assert text.lex_rank([f"tubes. lungs clear. {central} heart normal."]) == [central]
    assert text.lex_rank(["only one."]) == ["only one."]


def test_pairs_must_match():
    for score in (text.rouge, text.bleu, text.label_agreement):
        with pytest.raises(ValueError, match="one reference for each"):
            score(["a"], [])
        with pytest.raises(ValueError, match="at least one"):
            score([], [])
