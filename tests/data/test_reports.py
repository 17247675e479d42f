"""Reports: readers, the one split, gap sentences by hand, tags, tokens."""

import os

import numpy as np
import pytest

from transfer_jax.data import reports
from transfer_jax.data.reports import Lexicon, Report, WordTokenizer

FIVE = "Heart big. Lungs clear. No edema. Bones intact. Aorta tortuous."


def by(*values):
    return lambda i, parts: values[i]


def test_rows_without_a_text_are_left_out(tmp_path):
    file = tmp_path / "r.csv"
    file.write_text('F,I,P\n"Big heart, yes.",Cardiomegaly.,a;b/c\nx,,d\n,y,d\n')
    got = reports.read_reports(file, findings="F", impression="I", concepts=("P",))
    assert got == [Report("Big heart, yes.", "Cardiomegaly.", ("a", "b/c"))]
    with pytest.raises(ValueError, match=r"no column \['impression'\]; it has \['F', 'I', 'P'\]"):
        reports.read_reports(file, findings="F")
    with pytest.raises(FileNotFoundError, match="CSV file"):
        reports.read_reports(tmp_path / "none.csv")


@pytest.mark.parametrize("source", ["generated", "open_i"])
def test_no_report_is_in_two_splits(source):
    if source == "open_i" and not os.environ.get("TRANSFER_JAX_DATA"):
        pytest.skip("TRANSFER_JAX_DATA is not set")
    everything = reports.open_i() if source == "open_i" else reports.generated_reports(500)
    splits = reports.split_reports(everything)
    keys = {name: {(r.findings, r.impression) for r in part} for name, part in splits.items()}
    assert all(len(keys[name]) == len(part) for name, part in splits.items())
    union = set().union(*keys.values())
    assert len(union) == sum(map(len, keys.values()))
    assert union == {(r.findings, r.impression) for r in everything}
    assert len(union) < len(everything), "there are copies to remove"
    if source == "open_i":
        assert [len(part) for part in splits.values()] == [2106, 263, 263]
        assert len(everything) == 3331
    assert splits == reports.split_reports(everything)
    assert splits["test"] != reports.split_reports(everything, seed=1)["test"]


def test_generated_impressions_say_what_is_abnormal():
    for report in reports.generated_reports(200, seed=3):
        normal = report.impression == "No acute cardiopulmonary abnormality."
        assert not normal or set(report.concepts) <= {"normal", "degenerative change"}
        for side in ("left", "right"):
            assert side not in report.impression.lower() or side in report.findings
        assert "{" not in report.findings + report.impression
        assert 3 <= len(report.findings.split(". ")) <= 5
    assert reports.generated_reports(5, 1) == reports.generated_reports(5, 1)


def test_gaps_are_the_best_sentences_and_sentinels_follow_the_document():
    source, target = reports.gap_sentences(FIVE, by(0.1, 0.5, 0.0, 0.9, 0.2))
    assert source == ("fill in the blank: Heart big. <extra_id_0>. No edema. <extra_id_1>. "
                      "<extra_id_2>")  # fmt: skip
    assert (
        target == "<extra_id_0> Lungs clear <extra_id_1> Bones intact <extra_id_2> Aorta tortuous."
    )
    _, joined = reports.gap_sentences(FIVE, by(0.1, 0.5, 0.0, 0.9, 0.2), target="joined")
    assert joined == "Bones intact.Lungs clear.Aorta tortuous."
    with pytest.raises(ValueError, match="'sentinel' or 'joined'"):
        reports.gap_sentences(FIVE, by(*range(5)), target="both")


@pytest.mark.parametrize("count, masked", [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3), (9, 3)])
def test_how_many_are_masked_and_ties_go_to_the_earlier(count, masked):
    parts = [f"s{i}" for i in range(count)]
    source, target = reports.gap_sentences(". ".join(parts), by(*[0.0] * count))
    assert target == " ".join(f"<extra_id_{i}> s{i}" for i in range(masked))
    assert source.count("<extra_id_") == masked


def test_the_reference_is_the_impression_or_the_rest():
    report = Report("a. b. c", "the impression")
    seen = []
    for reference in ("impression", "rest"):
        reports.gap_pairs([report], lambda s, r: seen.append((s, r)) or 0.0, reference=reference)
    assert seen == [(s, "the impression") for s in "abc"] + [
        ("a", "b. c"), ("b", "a. c"), ("c", "a. b"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'impression' or 'rest'"):
        reports.gap_pairs([report], lambda s, r: 0.0, reference="document")


def test_lexicons(tmp_path):
    indexed = [
        Report("f", "i", ("Pleural Effusion/left", "Cardiomegaly/mild", "normal")),
        Report("f", "i", ("Pleural Effusion", "Cardiomegaly", "Pericardial Effusion")),
        Report("f", "i", ("Aorta, Thoracic", "Aorta/tortuous", "Pleural Effusion")),
    ]
    lexicon = Lexicon.from_reports(indexed)
    assert lexicon.terms == {
        "pleural effusion": "pleural effusion", "cardiomegaly": "cardiomegaly",
        "effusion": "pleural effusion",
    }  # fmt: skip
    text = "An effusion, a Pleural Effusion and cardiomegaly; effusional."
    assert lexicon.tags(text) == ("pleural effusion", "cardiomegaly")
    source, target = reports.summary_pairs([Report(text, "I.")], lexicon)[0]
    assert source == f"tags: pleural effusion; cardiomegaly | summarize: {text}" and target == "I."
    assert reports.summary_pairs([Report("none", "I.")], lexicon)[0][0] == "summarize: none"
    assert Lexicon({}).tags(text) == ()

    file = tmp_path / "terms.tsv"
    file.write_text("Effusion\tPN\n\nheart size\tLC\n")
    assert Lexicon.from_tsv(file).tags("Heart size; effusion") == ("LC", "PN")
    file.write_text("effusion PN\n")
    with pytest.raises(ValueError, match=r"terms.tsv:1: .*term<TAB>tag"):
        Lexicon.from_tsv(file)


def test_words_go_there_and_back_and_examples_end():
    text = "No edema. Heart is big. " * 3
    tokenizer = WordTokenizer.build([text, "rare"])
    assert tokenizer.vocabulary.tokens[:3] == ("<pad>", "</s>", "<unk>")
    assert tokenizer.decode(tokenizer.encode("No edema. Heart rare.")) == "no edema. heart <unk>."
    for prefix in (reports.GAP_PREFIX, reports.SUMMARY_PREFIX, "tags"):
        assert 2 not in tokenizer.encode(prefix)
    source, target = reports.gap_sentences(text, by(*range(6)))
    assert len({*tokenizer.encode(target)} & {3, 4, 5}) == 3 and 3 in tokenizer.encode(source)

    examples = reports.encode_pairs([("no edema", "big"), ("no " * 9, "is is is")], tokenizer, 5, 3)
    assert examples.arrays["lengths"].tolist() == [3, 5]
    assert examples.arrays["target_lengths"].tolist() == [2, 3]
    inputs, targets = examples.arrays["inputs"], examples.arrays["targets"]
    assert inputs.dtype == np.int32 and inputs[0, 2:].tolist() == [1, 0, 0]
    assert inputs[1, -1] == 1 and targets[1].tolist() == [*tokenizer.encode("is is"), 1]
    assert tokenizer.decode(targets[0]) == "big"


def test_a_tokeniser_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = reports.PretrainedTokenizer.from_file(tmp_path / "tokenizer.json")
    assert read.encode("b a") == [3, 2] and len(read) == 4
    assert read.decode([3, 2, 1, 3]) == "b a"
