"""Accuracy of answers: visual and video questions, entailment, matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unival.data.records import Answer


def check_keys(predictions: Mapping[str, object], references: Mapping[str, object]) -> None:
    """Raise ValueError unless both hold the same ids, and at least one."""
    if not references:
        raise ValueError("nothing to evaluate: there are no references")
    different = sorted(predictions.keys() ^ references.keys())
    if different:
        shown = ", ".join(repr(key) for key in different[:3])
        raise ValueError(
            f"predictions and references must have the same ids; {len(different)} are only in one "
            f"of them, for example {shown}"
        )


def accuracy(predictions: Mapping[str, str], references: Mapping[str, Sequence[Answer]]) -> float:
    """Mean over the samples of the confidence of the answer that equals the prediction, 0 if none.

    The strings must be exactly equal; nothing is normalised (case, articles, punctuation), as in
    the published evaluation. Returns a fraction between 0 and 1. Raises ValueError when there is
    nothing to evaluate or the ids differ.
    """
    check_keys(predictions, references)
    scores = (
        {answer.text: answer.confidence for answer in answers}.get(predictions[key], 0.0)
        for key, answers in references.items()
    )
    return sum(scores) / len(references)
