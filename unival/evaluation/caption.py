"""Scores of captions: CIDEr, BLEU, ROUGE-L, and METEOR and SPICE where Java can run them."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from unival.evaluation.vqa import check_keys

logger = logging.getLogger(__name__)

CONTRACTION = re.compile(r"(\w)(n't|'(?:s|re|ve|ll|d|m))\b")
TOKEN = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,]\d+)+|\w+(?:-\w+)*")
SPICE_MODELS = "stanford-corenlp-3.6.0-models.jar"

Captions = dict[str, list[str]]


def tokenize(caption: str) -> str:
    """Lower-cased words separated by single spaces, in the manner of the Penn Treebank.

    Contractions are split (`don't` -> `do n't`), hyphenated words and numbers stay whole,
    punctuation and symbols are dropped. The published scores come from Stanford's Java tokenizer,
    which differs in rare cases (abbreviations with dots, symbols such as `&`).
    """
    text = caption.lower().replace("\u2019", "'")
    return " ".join(TOKEN.findall(CONTRACTION.sub(r"\1 \2", text)))


def caption_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    java_metrics: bool = False,
) -> dict[str, float]:
    """`{"CIDEr", "BLEU-1" ... "BLEU-4", "ROUGE-L"}`, with `java_metrics` also METEOR and SPICE.

    Both arguments are keyed by the id of the medium. CIDEr takes its word frequencies from the
    references given here, so it is 0 for a single medium; it reaches 10 (papers print 100 times
    the value), the others reach 1. Tokens come from `tokenize`, not from Stanford's tokenizer.
    Raises ValueError when there is nothing to evaluate, the ids differ or a medium has no usable
    reference, ImportError when pycocoevalcap is missing.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError("caption scores need: pip install pycocoevalcap") from error
    check_keys(predictions, references)
    truth = {key: _usable(key, texts) for key, texts in references.items()}
    guess = {key: [tokenize(predictions[key])] for key in truth}
    bleu, _ = Bleu(4).compute_score(truth, guess, verbose=0)
    scores = {"CIDEr": float(Cider().compute_score(truth, guess)[0])}
    scores |= {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    scores["ROUGE-L"] = float(Rouge().compute_score(truth, guess)[0])
    return scores | (_java_scores(truth, guess) if java_metrics else {})


def _usable(key: str, texts: Sequence[str]) -> list[str]:
    """The tokenised references that hold a word; an empty one would match an empty prediction."""
    if isinstance(texts, str):
        raise ValueError(f"the references of {key!r} must be a list of captions, not one string")
    tokenized = [words for words in map(tokenize, texts) if words]
    if not tokenized:
        raise ValueError(f"{key!r} has no reference caption with a word in it: {list(texts)}")
    if len(tokenized) < len(texts):
        logger.warning("%r: %d empty references left out", key, len(texts) - len(tokenized))
    return tokenized


def _java_scores(truth: Captions, guess: Captions) -> dict[str, float]:
    """METEOR and SPICE; what cannot run here is left out and the reason is logged."""
    if shutil.which("java") is None:
        logger.warning("METEOR and SPICE are left out: the command `java` was not found")
        return {}
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice import spice

    scores = {"METEOR": float(Meteor().compute_score(truth, guess)[0])}
    models = Path(spice.__file__).parent / "lib" / SPICE_MODELS
    if models.exists():
        scores["SPICE"] = float(spice.Spice().compute_score(truth, guess)[0])
    else:
        # Spice() would download them without asking.
        logger.warning("SPICE is left out: its language models are not installed at %s", models)
    return scores
