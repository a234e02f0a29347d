"""Caption scores against values worked out by hand, and Java programs that fail."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

import pytest

from unival.evaluation import caption, coco_tokens
from unival.evaluation.caption import caption_scores, coco_caption_scores
from unival.evaluation.coco_tokens import JavaError, JavaProgram, ptb_tokenize, tokenize

pytest.importorskip("pycocoevalcap")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs the command `java`")

TRUTH = {"a": ["a man rides a horse"], "b": ["two dogs play outside today"]}
SAID = {"a": "a man rides a horse", "b": "two dogs play outside today"}
PYTHON_SCORES = {"CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"}


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Puts a shell script in the place of `java`."""

    def make(script):
        program = tmp_path / "bin" / "java"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return tmp_path

    return make


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_equal_captions_reach_the_maximum():
    scores = caption_scores(SAID, TRUTH)
    # every n-gram occurs in one of two media: cosine 1 for each n, mean 1, times 10
    assert scores["CIDEr"] == pytest.approx(10.0)
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1.0] * 4)
    assert scores["ROUGE-L"] == pytest.approx(1.0)
    assert set(scores) == PYTHON_SCORES


def test_case_and_punctuation_do_not_count():
    scores = caption_scores(
        {"a": "A man, rides a horse.", "b": "Two dogs play outside today!"}, TRUTH
    )
    assert scores["CIDEr"] == pytest.approx(10.0)


def test_half_a_caption():
    # 2 of 4 words, same order: BLEU-1 = brevity exp(1 - 4/2) * 1; ROUGE-L: P = 1, R = 1/2
    truth = {"a": ["one two three four"], "b": ["five six seven eight"]}
    scores = caption_scores({"a": "one two", "b": "five six"}, truth)
    assert scores["BLEU-1"] == pytest.approx(math.exp(-1), rel=1e-6)
    beta = 1.2**2
    assert scores["ROUGE-L"] == pytest.approx((1 + beta) * 0.5 / (0.5 + beta))
    # n = 1: cosine 2 / sqrt(2*4); n = 2: 1 / sqrt(1*3); n = 3, 4: 0; lengths differ by 2 bigrams
    cosines = (2 / math.sqrt(8) + 1 / math.sqrt(3)) / 4
    assert scores["CIDEr"] == pytest.approx(10 * cosines * math.exp(-4 / 72))


def test_each_caption_keeps_its_references_whatever_their_order():
    truth = {"a": ["one two three four", "x y"], "b": ["five six seven eight"]}
    scores = caption_scores({"b": "five six seven eight", "a": "one two three four"}, truth)
    assert scores["BLEU-4"] == pytest.approx(1.0) and scores["ROUGE-L"] == pytest.approx(1.0)


def test_words_that_all_media_share_are_worth_nothing():
    truth = {"a": ["the dog"], "b": ["the dog"]}
    assert caption_scores({"a": "the dog", "b": "the dog"}, truth)["CIDEr"] == 0.0


def test_an_empty_prediction_scores_zero_and_nothing_is_printed(capfd):
    scores = caption_scores({"a": "", "b": "?!"}, TRUTH)
    assert all(value < 1e-9 for value in scores.values())
    assert capfd.readouterr().out == ""


def test_an_empty_reference_beside_others_is_left_out(caplog):
    scores = caption_scores(SAID | {"a": ""}, TRUTH | {"a": ["...", "a man"]})
    assert "'a': 1 empty references left out" in caplog.text
    assert scores["BLEU-1"] < 1.0


def test_tokenize_splits_contractions_and_keeps_numbers_and_hyphens():
    assert tokenize("A well-known Man's dog isn't (2) 3.5 m, 1,000!") == (
        "a well-known man 's dog is n't 2 3.5 m 1,000"
    )
    assert tokenize("don\u2019t") == "do n't"


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "nothing to evaluate"),
        ({"a": "x"}, TRUTH, r"1 without a prediction \('b'\)"),
        ({"a": "x", "b": "y", "c": "z"}, TRUTH, r"1 predicted but without a reference \('c'\)"),
        ({"a": "x"}, {"a": []}, "no reference caption with a word in it, for 1 ids: 'a'"),
        ({"a": "x"}, {"a": ["..."]}, "no reference caption"),
        ({"a": "x"}, {"a": "x y"}, "must be a list of captions, not one string: 'a'"),
    ],
)
def test_bad_input_is_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references)


def test_without_java_the_result_says_what_is_missing(monkeypatch, caplog):
    monkeypatch.setattr(coco_tokens.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        found = coco_caption_scores(SAID, TRUTH)
    assert set(found.scores) == PYTHON_SCORES and found.tokenizer == "own"
    assert set(found.missing) == {"PTB tokenizer", "METEOR", "SPICE"}
    assert "`java` was not found; install a Java runtime" in found.missing["METEOR"]
    assert "METEOR is left out: the command `java` was not found" in caplog.text


def test_without_its_models_spice_says_where_they_come_from(monkeypatch):
    monkeypatch.setattr(caption, "SPICE_MODELS", ("absent.jar", "absent-models.jar"))
    with pytest.raises(JavaError, match=r"absent\.jar and absent-models\.jar missing in .*nlp\.st"):
        caption._spice(TRUTH, {"a": [""], "b": [""]})


@needs_java
def test_ptb_tokens():
    said = [
        "A man's dog isn't (2) well-known!",
        "",
        'He said "hi" -- at 3.5 m, in the U.S.',
        "one\u2028two\nthree\x85 caf\u00e9",  # ends of lines for Java, Python or both
        "half \ud800 a character",
        "  ",
    ]
    # Brackets stay: the COCO evaluation drops them in capitals only.
    assert ptb_tokenize(said) == [
        "a man 's dog is n't -lrb- 2 -rrb- well-known",
        "",
        "he said hi at 3.5 m in the u.s.",
        "one two three caf\u00e9",
        "half a character",
        "",
    ]
    assert ptb_tokenize([]) == []


@needs_java
def test_the_coco_scores_of_equal_captions(monkeypatch):
    started = []
    popen = coco_tokens.subprocess.Popen
    monkeypatch.setattr(
        coco_tokens.subprocess,
        "Popen",
        lambda *a, **k: started.append(popen(*a, **k)) or started[-1],
    )
    monkeypatch.setattr(caption, "SPICE_MODELS", ("absent.jar",))
    said = {"a": "A man rides a horse.", "b": "Two dogs play outside today"}
    found = coco_caption_scores(said, TRUTH)
    assert found.tokenizer == "PTB" and set(found.missing) == {"SPICE"}
    assert set(found.scores) == {*PYTHON_SCORES, "METEOR"}
    assert found.scores["METEOR"] == pytest.approx(1.0)  # of equal captions
    assert found.scores["CIDEr"] == pytest.approx(10.0)
    assert len(started) == 2 and all(each.returncode is not None for each in started)


@needs_java
@pytest.mark.slow
def test_tokens_and_meteor_are_those_of_pycocoevalcap():
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    truth = {
        "a": ["A man rides a horse.", "A man (in a hat) on a brown horse: fast!"],
        "b": ["Two dogs play outside today!", "Dogs & cats aren't here; U.S. cafés..."],
        "c": ["one two three"],
    }
    said = {"a": "a man riding a horse", "b": "two hounds running outside", "c": "?"}
    split = PTBTokenizer().tokenize
    words = split({key: [{"caption": text} for text in texts] for key, texts in truth.items()})
    guess = split({key: [{"caption": text}] for key, text in said.items()})
    texts = [text for each in truth.values() for text in each]
    assert ptb_tokenize(texts) == [text for each in words.values() for text in each]
    expected, _ = Meteor().compute_score(words, guess)
    assert 0.1 < expected < 0.9
    assert caption._meteor(words, guess) == pytest.approx(expected, abs=1e-12)


def test_a_java_that_fails_is_told_and_the_rest_is_scored(fake_java):
    fake_java("echo 'first' >&2\necho 'Unsupported version' >&2\necho '\tat x.y' >&2\nexit 3")
    found = coco_caption_scores(SAID, TRUTH)
    assert found.tokenizer == "own" and found.scores["CIDEr"] == pytest.approx(10.0)
    assert found.missing["PTB tokenizer"] == "java ended with status 3: Unsupported version"
    assert found.missing["METEOR"] == "java ended with status 3: Unsupported version"


def test_a_java_that_hangs_is_ended(fake_java, tmp_path, monkeypatch):
    folder = fake_java(f"sleep 60 &\necho $! > {tmp_path}/child\nwait")
    monkeypatch.setattr(coco_tokens, "JAVA_SECONDS", 0.5)
    begin = time.monotonic()
    with pytest.raises(JavaError, match=r"stopped after 0\.5 seconds"):
        ptb_tokenize(["a dog"])
    with pytest.raises(JavaError, match=r"stopped after 0\.5 seconds"):
        caption._meteor(TRUTH, TRUTH)
    assert time.monotonic() - begin < 20
    time.sleep(0.2)
    assert not is_running(int((folder / "pid").read_text()))
    assert not is_running(int((folder / "child").read_text()))


def test_what_a_java_left_running_is_ended_too(fake_java, tmp_path, monkeypatch):
    fake_java(f"sleep 60 &\necho $! > {tmp_path}/child")  # it holds the pipe open
    monkeypatch.setattr(coco_tokens, "JAVA_SECONDS", 0.5)
    begin = time.monotonic()
    with pytest.raises(JavaError):
        ptb_tokenize(["a dog"])
    assert time.monotonic() - begin < 20
    time.sleep(0.2)
    assert not is_running(int((tmp_path / "child").read_text()))


def test_a_java_that_talks_too_much_on_stderr_does_not_stop(fake_java):
    fake_java("head -c 1000000 /dev/zero | tr '\\0' 'x' >&2\ncat")
    assert ptb_tokenize(["a dog", "a cat"]) == ["a dog", "a cat"]


def test_lines_that_are_lost_are_noticed(fake_java):
    fake_java("head -n 1")
    with pytest.raises(JavaError, match="gave 1 lines for 2 captions"):
        ptb_tokenize(["a dog", "a cat"])


def test_java_ends_with_the_block_that_uses_it(fake_java):
    folder = fake_java("while read line; do echo $line; done")
    with pytest.raises(KeyError), JavaProgram([], folder) as program:
        assert program.ask("hello") == "hello"
        pid = int((folder / "pid").read_text())
        assert is_running(pid)
        raise KeyError
    assert not is_running(pid)


def test_a_broken_pipe_is_told(fake_java):
    folder = fake_java("exec 0<&-\necho gone >&2\nexit 1")
    with (
        pytest.raises(JavaError, match="java ended with status"),
        JavaProgram([], folder) as program,
    ):
        for _ in range(1000):
            program._process.stdin.write(b"x" * 100_000)


def test_a_java_that_cannot_be_run(fake_java):
    folder = fake_java("")
    (folder / "bin" / "java").write_text("#!/nowhere/sh\n")
    with pytest.raises(JavaError, match="cannot be run"):
        ptb_tokenize(["a dog"])


METEOR = """
while read -r line; do
  echo "$line" >> {folder}/asked
  case "$line" in
    SCORE*) echo "1 2";;
    EVAL*) echo 0.5; echo 0.25; echo {total};;
  esac
done"""


def test_the_total_of_meteor_is_taken(fake_java, tmp_path):
    fake_java(METEOR.format(folder=tmp_path, total=0.375))
    assert caption._meteor({"a": ["x", "y ||| z"], "b": ["u"]}, {"a": ["p"], "b": ["q"]}) == 0.375
    assert (tmp_path / "asked").read_text().splitlines() == [
        "SCORE ||| x ||| y   z ||| p",
        "SCORE ||| u ||| q",
        "EVAL ||| 1 2 ||| 1 2",
    ]


@pytest.mark.parametrize("total", ["error", "NaN", ""])
def test_a_total_that_is_no_number_is_told(fake_java, tmp_path, total):
    fake_java(METEOR.format(folder=tmp_path, total=total))
    with pytest.raises(JavaError, match=r"METEOR gave .* which is no number"):
        caption._meteor(TRUTH, TRUTH)


def spice_scores(*values):
    return json.dumps([{"image_id": n, "scores": {"All": {"f": v}}} for n, v in enumerate(values)])


def test_spice_is_the_mean_over_media(fake_java, tmp_path, monkeypatch):
    monkeypatch.setattr(caption, "SPICE_MODELS", ())
    # ... -jar spice.jar CAPTIONS -out SCORES -silent
    fake_java(f"cp $5 {tmp_path}/given\necho '{spice_scores(0.25, 0.75)}' > $7")
    assert caption._spice(TRUTH, {"a": ["x"], "b": ["y"]}) == 0.5
    assert json.loads((tmp_path / "given").read_text()) == [
        {"image_id": "a", "test": "x", "refs": TRUTH["a"]},
        {"image_id": "b", "test": "y", "refs": TRUTH["b"]},
    ]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "ended with status 1: no message"),
        ("", "wrote no scores"),
        ("echo '[{}, {}]' > $7", "wrote no scores: KeyError"),
        (f"echo '{spice_scores(1.0)}' > $7", "1 scores for 2 media"),
        (f"echo '{spice_scores(1.0, math.nan)}' > $7", "SPICE gave 'nan'"),
    ],
)
def test_a_spice_that_fails_is_told(fake_java, monkeypatch, script, message):
    monkeypatch.setattr(caption, "SPICE_MODELS", ())
    fake_java(script)
    with pytest.raises(JavaError, match=message):
        caption._spice(TRUTH, {"a": ["x"], "b": ["y"]})
