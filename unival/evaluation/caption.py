"""Scores of captions: BLEU, ROUGE-L and CIDEr, and with Java METEOR and SPICE."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unival.evaluation.coco_tokens import JavaError, JavaProgram, ptb_tokenize, tokenize
from unival.evaluation.vqa import check_keys, first_few

logger = logging.getLogger(__name__)

SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SPICE_SOURCE = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"

Captions = dict[str, list[str]]


@dataclass(frozen=True)
class CaptionScores:
    """The scores that could be computed, and why the others could not.

    Args:
        scores: `CIDEr`, `BLEU-1` ... `BLEU-4`, `ROUGE-L`, `METEOR`, `SPICE`. CIDEr reaches 10
            (papers print 100 times the value), the others reach 1.
        missing: the reason for each of `METEOR`, `SPICE` and `PTB tokenizer` that is left out.
        tokenizer: `PTB`, that of the published scores, or `own` (`coco_tokens.tokenize`).
    """

    scores: dict[str, float]
    missing: dict[str, str]
    tokenizer: str


def caption_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """`{"CIDEr", "BLEU-1" ... "BLEU-4", "ROUGE-L"}` without Java, for use while training.

    Both arguments are keyed by the id of the medium. CIDEr takes its word frequencies from the
    references given here, so it is 0 for a single medium; it reaches 10 (papers print 100 times
    the value), the others reach 1. Tokens come from `coco_tokens.tokenize`, not from Stanford's
    tokenizer; `coco_caption_scores` gives the published scores.

    Raises:
        ValueError: nothing to evaluate, the ids differ, or a medium has no usable reference.
        ImportError: pycocoevalcap is missing.
    """
    truth, guess = _tokenized(predictions, references, _own_tokens)
    return _python_scores(truth, guess)


def coco_caption_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> CaptionScores:
    """All scores of the COCO evaluation, on the tokens of its tokenizer.

    Needs Java for the tokenizer and for METEOR (its start takes some ten seconds), and for SPICE
    Stanford's language models besides, which are never downloaded here. What is missing or fails is
    left out, warned about and named in the result. Arguments and errors as in `caption_scores`.
    """
    missing: dict[str, str] = {}
    tokenizer = "PTB"
    try:
        truth, guess = _tokenized(predictions, references, ptb_tokenize)
    except JavaError as error:
        missing["PTB tokenizer"] = str(error)
        tokenizer = "own"
        truth, guess = _tokenized(predictions, references, _own_tokens)
    scores = _python_scores(truth, guess)
    for name, metric in (("METEOR", _meteor), ("SPICE", _spice)):
        try:
            scores[name] = metric(truth, guess)
        except JavaError as error:
            missing[name] = str(error)
    for name, reason in missing.items():
        logger.warning("%s is left out: %s", name, reason)
    return CaptionScores(scores, missing, tokenizer)


def _own_tokens(captions: Sequence[str]) -> list[str]:
    return [tokenize(caption) for caption in captions]


def _tokenized(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    split: Callable[[Sequence[str]], list[str]],
) -> tuple[Captions, Captions]:
    """(references, predictions) in tokens, all of them split in one go.

    A reference without a word is left out; it would match an empty prediction.
    """
    check_keys(predictions, references)
    single = [key for key, texts in references.items() if isinstance(texts, str)]
    if single:
        raise ValueError(
            f"references must be a list of captions, not one string: {first_few(single)}"
        )
    try:
        tokens = iter(split([*predictions.values(), *(t for r in references.values() for t in r)]))
    except ImportError as error:
        raise ImportError("caption scores need: pip install pycocoevalcap") from error
    guess = {key: [next(tokens)] for key in predictions}
    truth = {key: [next(tokens) for _ in texts] for key, texts in references.items()}
    empty = [key for key, texts in truth.items() if not any(texts)]
    if empty:
        raise ValueError(
            f"no reference caption with a word in it, for {len(empty)} ids: {first_few(empty)}"
        )
    for key, texts in truth.items():
        if not all(texts):
            logger.warning("%r: %d empty references left out", key, texts.count(""))
            truth[key] = [text for text in texts if text]
    return truth, {key: guess[key] for key in truth}


def _python_scores(truth: Captions, guess: Captions) -> dict[str, float]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError("caption scores need: pip install pycocoevalcap") from error
    bleu, _ = Bleu(4).compute_score(truth, guess, verbose=0)
    scores = {"CIDEr": float(Cider().compute_score(truth, guess)[0])}
    scores |= {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    return scores | {"ROUGE-L": float(Rouge().compute_score(truth, guess)[0])}


def _meteor(truth: Captions, guess: Captions) -> float:
    """METEOR 1.5 of pycocoevalcap: statistics of each caption, then one score for all."""
    from pycocoevalcap.meteor import meteor

    arguments = ["-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    with JavaProgram(arguments, Path(meteor.__file__).parent) as program:
        statistics = []
        for key, texts in truth.items():
            parts = [part.replace("|||", " ") for part in (*texts, *guess[key])]
            statistics.append(program.ask(" ||| ".join(["SCORE", *parts])))
        score = program.ask(" ||| ".join(["EVAL", *statistics]))
        for _ in truth:  # a score for each caption comes first, that of all last
            score = program.read_line()
    return _number(score, "METEOR")


def _spice(truth: Captions, guess: Captions) -> float:
    """SPICE 1.0 of pycocoevalcap, whose own class would download the models without asking."""
    from pycocoevalcap.spice import spice

    folder = Path(spice.__file__).parent
    absent = [name for name in SPICE_MODELS if not (folder / "lib" / name).exists()]
    if absent:
        raise JavaError(
            f"{' and '.join(absent)} missing in {folder / 'lib'}; take them from {SPICE_SOURCE}"
        )
    asked = [{"image_id": key, "test": guess[key][0], "refs": truth[key]} for key in truth]
    with tempfile.TemporaryDirectory() as work:
        given, found = Path(work, "captions.json"), Path(work, "scores.json")
        given.write_text(json.dumps(asked), encoding="utf-8")
        arguments = ["-Xmx8G", "-jar", spice.SPICE_JAR, str(given), "-out", str(found), "-silent"]
        with JavaProgram(arguments, folder) as program:
            program.finish()
        try:
            scores = [each["scores"]["All"]["f"] for each in json.loads(found.read_bytes())]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JavaError(f"SPICE wrote no scores: {error!r}") from error
    if len(scores) != len(asked):
        raise JavaError(f"SPICE gave {len(scores)} scores for {len(asked)} media")
    return sum(_number(score, "SPICE") for score in scores) / len(scores)


def _number(value: object, metric: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise JavaError(f"{metric} gave {str(value)[:100]!r}, which is no number")
    return number
