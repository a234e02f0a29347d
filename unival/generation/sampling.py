"""Draw outputs from the model: several of each sentence, for rewards or for image codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unival.generation.search import LogitsConstraint, SearchOptions, Steps
from unival.model.encoder import EncoderOutput
from unival.model.modeling import UnivalForConditionalGeneration
from unival.vocabulary import EOS, PAD


@dataclass(frozen=True)
class Samples:
    """What was drawn.

    tokens     int64 [B, samples, L], the prompt first, without <s>; </s>, then pad
    log_probs  float32 [B, samples, L] of each token drawn, after temperature and constraints and
               before the cut to top_k; 0 at prompt and padding
    """

    tokens: Tensor
    log_probs: Tensor


@torch.inference_mode()
def sample(
    model: UnivalForConditionalGeneration,
    encoder: EncoderOutput,
    *,
    samples: int,
    max_length: int,
    min_length: int = 1,
    top_k: int | None = None,
    temperature: float = 1.0,
    constraints: Sequence[LogitsConstraint] = (),
    prefix: Tensor | None = None,
    code_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Samples:
    """Draw outputs token by token, each row for itself.

    The published image codes: samples=16, max_length=min_length=1024, top_k=256, with a
    RangeConstraint over the codes and code_mask True in every row.

    Args:
        encoder: encoder output of B sentences.
        max_length, min_length: tokens before </s>, a forced prompt included.
        top_k: draw among this many likeliest tokens; None draws among all.
        constraints: called with (tokens [B*samples, t] with <s>, logits [B*samples, V]) before the
            softmax.
        prefix: int64 [B, P], the decoder prompt without <s>, right-padded with pad.
        code_mask: bool [B], True where image codes are written: specials wait until max_length.
        generator: on the encoder's device; the same seed draws the same samples.

    Raises:
        ValueError: an option out of range, or a row that no token may continue.
    """
    if samples < 1:
        raise ValueError(f"samples is at least 1, got {samples}")
    if not 1 <= min_length <= max_length:
        raise ValueError(f"lengths want 1 <= min <= max, got {min_length} and {max_length}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is at least 1, got {top_k}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature is a finite number above 0, got {temperature}")
    options = SearchOptions(max_length=max_length, min_length=min_length, temperature=temperature)
    steps = Steps(model, encoder, samples, options, constraints, prefix, code_mask)
    tokens = steps.start()
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    scores = []
    for step in range(max_length + 1):
        log_probs = steps.log_probs(tokens)
        token = _draw(log_probs, top_k, ended, generator, samples)
        score = log_probs.gather(1, token[:, None])[:, 0].masked_fill(ended, 0.0)
        token = token.masked_fill(ended, PAD)
        forced = steps.forced(step)
        if forced is not None:
            score = score.masked_fill(forced != PAD, 0.0)
            token = torch.where(forced != PAD, forced, token)
        scores.append(score)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        ended = ended | (token == EOS)
        if bool(ended.all()):
            break
    shape = (-1, samples, len(scores))
    return Samples(tokens[:, 1:].reshape(shape), torch.stack(scores, dim=1).reshape(shape))


def _draw(
    log_probs: Tensor,
    top_k: int | None,
    ended: Tensor,
    generator: torch.Generator | None,
    samples: int,
) -> Tensor:
    """int64 [rows], a token of each row in proportion to its probability; any in ended rows."""
    stuck = log_probs.amax(dim=1).isneginf() & ~ended
    if bool(stuck.any()):
        sentence = int(stuck.nonzero()[0, 0]) // samples
        raise ValueError(f"sentence {sentence}: no token may come next, its output cannot end")
    index = None
    if top_k is not None and top_k < log_probs.shape[1]:
        log_probs, index = log_probs.topk(top_k, dim=1)
    # Probabilities relative to the likeliest token's: constraints may leave only tiny ones.
    weights = (log_probs - log_probs.amax(dim=1, keepdim=True)).exp()
    weights = torch.where(ended[:, None], 1.0, weights)
    drawn = torch.multinomial(weights, 1, generator=generator)
    return (drawn if index is None else index.gather(1, drawn))[:, 0]
