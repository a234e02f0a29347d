"""CIDEr-D against hand-worked values, dense vectors in float64 and pycocoevalcap."""

from __future__ import annotations

import collections
import json
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from unival.evaluation.cider_d import DocumentFrequencies, cider_d, cider_d_scores

WORDS = [f"w{number}" for number in range(12)]


def captions(rng, count, longest=14):
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def dense_score(hypothesis, references, documents, counts):
    """The formula on vectors over all n-grams that occur."""

    def grams(text, n):
        words = text.split()
        return [" ".join(words[i : i + n]) for i in range(len(words) + 1 - n)]

    total = []
    for n in (1, 2, 3, 4):
        axis = sorted({g for text in [hypothesis, *references] for g in grams(text, n)})
        idf = np.array([math.log(documents) - math.log(max(1, counts.get(g, 0))) for g in axis])
        h = np.array([grams(hypothesis, n).count(g) for g in axis], float) * idf
        for text in references:
            r = np.array([grams(text, n).count(g) for g in axis], float) * idf
            size = np.linalg.norm(h) * np.linalg.norm(r)
            cosine = np.dot(np.minimum(h, r), r) / size if size > 0 else 0.0
            delta = len(grams(hypothesis, 2)) - len(grams(text, 2))
            total.append(cosine * math.e ** (-(delta**2) / 72))
    return 10 * float(np.mean(total))


def test_half_a_caption():
    truth = {"a": ["one two three four"], "b": ["five six seven eight"]}
    # n = 1: cosine 2 / sqrt(2*4); n = 2: 1 / sqrt(1*3); n = 3, 4: 0; lengths differ by 2 bigrams
    expected = 10 * (2 / math.sqrt(8) + 1 / math.sqrt(3)) / 4 * math.exp(-4 / 72)
    assert cider_d({"a": "one two", "b": "five six"}, truth) == pytest.approx(expected, rel=1e-12)


def test_counts_above_the_reference_are_clipped():
    # n = 1, with L = ln 2: min(3L, L) L / (3L L) = 1/3; the others 0; 2 bigrams against none
    found = cider_d({"a": "dog dog dog", "b": "x"}, {"a": ["dog"], "b": ["cat"]})
    assert found == pytest.approx(10 / 3 / 4 * math.exp(-4 / 72) / 2, rel=1e-12)


def test_one_word_against_none_more_has_no_difference_of_length():
    # no bigram on either side, as with an empty caption
    frequencies = DocumentFrequencies(2, {("dog",): 1})
    assert cider_d_scores([["dog", ""]], [["dog"]], frequencies).tolist() == [[2.5, 0.0]]


def test_equal_captions_reach_ten_and_shared_words_nothing():
    truth = {"a": ["a man rides a horse"], "b": ["two dogs play outside today"]}
    assert cider_d({key: texts[0] for key, texts in truth.items()}, truth) == pytest.approx(10.0)
    assert cider_d({"a": "x y", "b": "x y"}, {"a": ["x y"], "b": ["x y"]}) == 0.0


def test_case_and_punctuation_count():
    truth = {"a": ["a man rides a horse"], "b": ["two dogs play outside today"]}
    said = {"a": "A man rides a horse.", "b": "two dogs play outside today"}
    assert 5.0 < cider_d(said, truth) < 10.0


@pytest.mark.parametrize("seed", range(5))
def test_given_frequencies_against_dense_vectors(seed):
    rng = random.Random(seed)
    frequencies = DocumentFrequencies.from_references([captions(rng, 3) for _ in range(20)])
    counts = {" ".join(words): count for words, count in frequencies.counts.items()}
    references = [captions(rng, rng.randint(1, 5)) for _ in range(6)]
    said = [captions(rng, 4) for _ in references]
    found = cider_d_scores(said, references, frequencies)
    assert found.shape == (6, 4) and found.dtype == np.float64
    pairs = zip(said, references, strict=True)
    expected = [[dense_score(c, r, 20, counts) for c in s] for s, r in pairs]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert len(np.unique(found)) > 12  # the case says something


def test_frequencies_count_media_not_captions():
    frequencies = DocumentFrequencies.from_references([["a b a", "a"], ["b a"], [""]])
    assert frequencies.documents == 3
    assert frequencies.counts == {
        ("a",): 2,
        ("b",): 2,
        ("a", "b"): 1,
        ("b", "a"): 2,
        ("a", "b", "a"): 1,
    }
    assert frequencies.weight(("b",)) == pytest.approx(math.log(3 / 2))
    assert frequencies.weight(("unseen",)) == pytest.approx(math.log(3))


def test_equals_pycocoevalcap():
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    rng = random.Random(7)
    truth = {str(i): captions(rng, rng.randint(1, 5)) for i in range(40)}
    said = {key: captions(rng, 1)[0] for key in truth}
    mean, each = cider.compute_score(truth, {key: [text] for key, text in said.items()})
    frequencies = DocumentFrequencies.from_references(truth.values())
    found = cider_d_scores([[text] for text in said.values()], list(truth.values()), frequencies)
    np.testing.assert_allclose(found[:, 0], each, rtol=1e-10, atol=1e-12)
    assert cider_d(said, truth) == pytest.approx(float(mean), rel=1e-10)


def test_no_media_and_no_captions():
    frequencies = DocumentFrequencies(2, {})
    assert cider_d_scores([], [], frequencies).shape == (0, 0)
    assert cider_d_scores([[]], [["dog"]], frequencies).shape == (1, 0)


@pytest.mark.parametrize(
    ("said", "truth", "message"),
    [
        ([["a"]], [], "1 media with captions, 0 with references"),
        ([["a"], ["a", "b"]], [["a"], ["b"]], r"as many captions: there are \[1, 2\]"),
        ([["a"], ["a"]], [["a"], []], "medium 1: there are no references"),
        ([["a"], ["a"]], [["a"], ["b", " "]], "medium 1: reference 1 has no words"),
        (["abc"], [["a"]], "must be a list of texts"),
        ([["a"]], ["abc"], "must be a list of texts"),
    ],
)
def test_bad_batches_are_refused(said, truth, message):
    with pytest.raises(ValueError, match=message):
        cider_d_scores(said, truth, DocumentFrequencies(2, {}))


def test_bad_ids_are_named():
    with pytest.raises(ValueError, match=r"1 without a prediction \('b'\)"):
        cider_d({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(ValueError, match="2 ids have a reference without words: 'b', 'c'"):
        cider_d({"a": "x", "b": "", "c": ""}, {"a": ["x"], "b": ["y", ""], "c": []})


def test_saved_frequencies_are_read_back(tmp_path):
    frequencies = DocumentFrequencies.from_references([["naïve café a b c", '"x" \\'], ["a"]])
    frequencies.save(tmp_path / "words.json")
    read = DocumentFrequencies.load(tmp_path / "words.json")
    assert read == DocumentFrequencies(2, dict(frequencies.counts))


def test_a_pickle_of_the_original_is_read(tmp_path):
    counts = collections.defaultdict(float, {("a",): 2.0, ("a", "b"): 1.0})
    content = {"document_frequency": counts, "ref_len": 3.0}
    for protocol in (2, 4):
        path = tmp_path / f"words{protocol}.p"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        read = DocumentFrequencies.from_pickle(path)
        assert read == DocumentFrequencies(3, {("a",): 2, ("a", "b"): 1})
        assert read.weight(("a", "b")) == pytest.approx(math.log(3))


class Runs:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_runs_nothing(tmp_path):
    content = {"document_frequency": Runs(str(tmp_path / "made")), "ref_len": 3}
    (tmp_path / "words.p").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"words\.p: not a pickle of plain data"):
        DocumentFrequencies.from_pickle(tmp_path / "words.p")
    assert not (tmp_path / "made").exists()


BAD = [
    ([], "list indices"),
    ({"documents": 2}, "counts"),
    ({"documents": 2, "counts": []}, "AttributeError"),
    ({"documents": 0, "counts": {}}, "less than 1"),
    ({"documents": True, "counts": {}}, "not an integer"),
    ({"documents": 2.5, "counts": {}}, "not an integer"),
    ({"documents": 2, "counts": {"a": 3}}, "count 3 is not 1 to 2"),
    ({"documents": 2, "counts": {"a": 0}}, "count 0"),
    ({"documents": 2, "counts": {"a": math.nan}}, "count nan"),
    ({"documents": 2, "counts": {"a": True}}, "count True"),
    ({"documents": 2, "counts": {"": 1}}, "without spaces"),
    ({"documents": 2, "counts": {"a  b": 1}}, "without spaces"),
    ({"documents": 2, "counts": {"a b c d e": 1}}, "1 to 4 words"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_damaged_frequencies_name_the_file(tmp_path, content, message):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"words\.json: not document frequencies: .*{message}"):
        DocumentFrequencies.load(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_what_is_not_json_names_the_file(tmp_path, text):
    path = tmp_path / "words.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"words\.json: not document frequencies"):
        DocumentFrequencies.load(path)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"ref_len": 3},
        {"ref_len": 3, "document_frequency": []},
        {"ref_len": math.inf, "document_frequency": {}},
        {"ref_len": 3, "document_frequency": {("a",): math.nan}},
        {"ref_len": 3, "document_frequency": {("a",): 1.5}},
        {"ref_len": 3, "document_frequency": {("a",): 4}},
        {"ref_len": 3, "document_frequency": {"a": 1}},
        {"ref_len": 3, "document_frequency": {(1,): 1}},
        {"ref_len": 3, "document_frequency": {(): 1}},
    ],
)
def test_a_damaged_pickle_names_the_file(tmp_path, content):
    path = tmp_path / "words.p"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"words\.p: not document frequencies"):
        DocumentFrequencies.from_pickle(path)


def test_a_file_that_is_not_there():
    for read in (DocumentFrequencies.load, DocumentFrequencies.from_pickle):
        with pytest.raises(FileNotFoundError):
            read(Path("/nowhere/words"))
