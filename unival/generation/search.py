"""Beam search with the arithmetic of the released generator (greedy search is beam_size 1).

It differs from transformers' beam search in what published scores depend on: constraints act before
the softmax, a forced prompt counts in score and length, and finished hypotheses are only taken from
the first beam_size candidates. `model.generate` of transformers works too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from unival.model.encoder import EncoderOutput, one_row
from unival.model.modeling import UnivalForConditionalGeneration

LogitsConstraint = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SearchOptions:
    """Options of beam_search; the defaults are the released generator's.

    max_length counts generated tokens before </s>, a forced prompt included.
    """

    beam_size: int = 5
    max_length: int = 200
    min_length: int = 1
    normalize_scores: bool = True
    length_penalty: float = 1.0
    unknown_penalty: float = 0.0
    temperature: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True)
class Hypothesis:
    """tokens end with </s> and do not hold <s>; positional_scores are log-probabilities."""

    tokens: list[int]
    score: float
    positional_scores: list[float]


@dataclass
class _Beams:
    """State of the search: rows are sentence * K + beam."""

    tokens: Tensor  # [B * K, length]
    scores: Tensor  # [B * K, length], cumulative
    ignored: Tensor  # bool [B, K], beams that are no longer alive


def expand_encoder(encoder: EncoderOutput, beams: int) -> EncoderOutput:
    """Repeat every row for its beams; positions shared by all rows stay one row in memory."""
    states = encoder.last_hidden_state.repeat_interleave(beams, dim=0)
    positions = encoder.position_embeddings
    shared = one_row(positions)
    if shared.shape[0] == 1:
        positions = shared.expand(states.shape[0], -1, -1)
    else:
        positions = positions.repeat_interleave(beams, dim=0)
    return EncoderOutput(states, encoder.padding_mask.repeat_interleave(beams, dim=0), positions)


def ban_repeated_ngrams(log_probs: Tensor, tokens: Tensor, size: int) -> None:
    """Set to -inf what would repeat an n-gram of a row, <s> and prompt included; in place."""
    for row, history in enumerate(tokens.tolist()):
        tail = history[len(history) - size + 1 :]
        for start in range(len(history) - size + 1):
            if history[start : start + size - 1] == tail:
                log_probs[row, history[start + size - 1]] = -torch.inf


def force_prefix(log_probs: Tensor, prefix: Tensor, pad: int, constrained: bool) -> Tensor:
    """Leave only the prefix token of rows that have one at this step.

    prefix is int64 [B * K], pad where the row generates freely.
    """
    forced = prefix != pad
    own = log_probs.gather(1, prefix[:, None])
    other = torch.full_like(own, -torch.inf) if constrained else own.min().expand_as(own) - 1.0
    rows = other.expand_as(log_probs).scatter(1, prefix[:, None], own)
    return torch.where(forced[:, None], rows, log_probs)


@torch.inference_mode()
def beam_search(
    model: UnivalForConditionalGeneration,
    encoder: EncoderOutput,
    options: SearchOptions,
    constraints: Sequence[LogitsConstraint] = (),
    prefix: Tensor | None = None,
    code_mask: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Search for the best outputs of every row.

    Args:
        encoder: encoder output of B sentences.
        constraints: called with (tokens [B*K, t] with <s>, logits [B*K, V]) before the softmax.
        prefix: int64 [B, P], the decoder prompt without <s>, right-padded with pad.
        code_mask: bool [B].

    Returns:
        For every sentence at most beam_size hypotheses, best first.

    Raises:
        ValueError: a sentence cannot end within max_length (its constraint never allows </s>).
    """
    beams = options.beam_size
    batch = encoder.last_hidden_state.shape[0]
    device = encoder.last_hidden_state.device
    config = model.config
    encoder = expand_encoder(encoder, beams)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if prefix is not None:
        prefix = prefix.repeat_interleave(beams, dim=0)
    if code_mask is not None:
        code_mask = code_mask.repeat_interleave(beams, dim=0)
    start = torch.full((batch * beams, 1), config.decoder_start_token_id, device=device)
    state = _Beams(
        start,
        torch.zeros(batch * beams, 0, device=device),
        torch.zeros(batch, beams, dtype=torch.bool, device=device),
    )
    finished: list[list[Hypothesis]] = [[] for _ in range(batch)]
    done = [False] * batch
    for step in range(options.max_length + 1):
        decoded = model(
            decoder_input_ids=state.tokens[:, -1:],
            encoder_outputs=encoder,
            past_key_values=cache,
            use_cache=True,
            code_mask=code_mask,
        )
        logits = decoded.logits[:, -1].float() / options.temperature
        for constraint in constraints:
            logits = constraint(state.tokens, logits)
        log_probs = torch.log_softmax(logits, dim=-1)
        log_probs = _adjust(log_probs, state.tokens, step, options, config, prefix, constraints)
        order = _advance(state, log_probs, step, options, config.eos_token_id, finished, done)
        if all(done):
            break
        cache.reorder_cache(order)
    for sentence, found in enumerate(finished):
        if not found:
            raise ValueError(f"sentence {sentence}: no output can end within {options.max_length}")
    return [sorted(found, key=lambda h: -h.score)[:beams] for found in finished]


def _adjust(
    log_probs: Tensor,
    tokens: Tensor,
    step: int,
    options: SearchOptions,
    config: object,
    prefix: Tensor | None,
    constraints: Sequence[LogitsConstraint],
) -> Tensor:
    """Prompt, length, padding and n-gram rules of one step."""
    pad, eos, unknown = config.pad_token_id, config.eos_token_id, 3  # type: ignore[attr-defined]
    if prefix is not None and step < min(prefix.shape[1], options.max_length):
        log_probs = force_prefix(log_probs, prefix[:, step], pad, bool(constraints))
    elif step < options.min_length:
        log_probs[:, eos] = -torch.inf
    log_probs = log_probs.masked_fill(log_probs.isnan(), -torch.inf)
    log_probs[:, pad] = -torch.inf
    log_probs[:, unknown] -= options.unknown_penalty
    if step >= options.max_length:
        ends = log_probs[:, eos].clone()
        log_probs.fill_(-torch.inf)
        log_probs[:, eos] = ends
    if options.no_repeat_ngram_size > 0:
        ban_repeated_ngrams(log_probs, tokens, options.no_repeat_ngram_size)
    return log_probs


def _advance(
    state: _Beams,
    log_probs: Tensor,
    step: int,
    options: SearchOptions,
    eos: int,
    finished: list[list[Hypothesis]],
    done: list[bool],
) -> Tensor:
    """Choose the next beams and collect finished hypotheses; returns the rows they came from."""
    batch, beams = state.ignored.shape
    classes = log_probs.shape[-1]
    totals = log_probs.view(batch, beams, classes)
    # At the first step all beams are equal, so only the first one counts.
    totals = totals[:, :1] if step == 0 else totals + state.scores[:, -1].view(batch, beams, 1)
    flat = totals.flatten(1)
    scores, index = flat.topk(min(2 * beams, flat.shape[1] - 1))
    token = index % classes
    row = index // classes + torch.arange(batch, device=index.device)[:, None] * beams
    ends = (token == eos) & scores.isfinite()
    ends[:, :beams] &= ~state.ignored
    _collect(state, scores, row, ends[:, :beams], step, options, eos, finished, done)

    ends[:, :beams] |= state.ignored
    candidates = scores.shape[1]
    rank = ends * candidates + torch.arange(candidates, device=index.device)
    rank, active = rank.topk(beams, dim=1, largest=False)
    state.ignored = rank >= candidates
    rows = row.gather(1, active).flatten()
    state.tokens = torch.cat([state.tokens[rows], token.gather(1, active).view(-1, 1)], dim=1)
    state.scores = torch.cat([state.scores[rows], scores.gather(1, active).view(-1, 1)], dim=1)
    return rows


def _collect(
    state: _Beams,
    scores: Tensor,
    row: Tensor,
    ends: Tensor,
    step: int,
    options: SearchOptions,
    eos: int,
    finished: list[list[Hypothesis]],
    done: list[bool],
) -> None:
    """Store hypotheses that end here, in candidate order, until a sentence has beam_size."""
    for sentence, candidate in ends.nonzero().tolist():
        if done[sentence] or len(finished[sentence]) == options.beam_size:
            continue
        source = int(row[sentence, candidate])
        total = float(scores[sentence, candidate])
        cumulative = [*state.scores[source].tolist(), total]
        steps = [b - a for a, b in zip([0.0, *cumulative], cumulative, strict=False)]
        length = (step + 1) ** options.length_penalty
        score = total / length if options.normalize_scores else total
        tokens = [*state.tokens[source, 1:].tolist(), eos]
        finished[sentence].append(Hypothesis(tokens, score, steps))
    for sentence, found in enumerate(finished):
        if len(found) == options.beam_size or step == options.max_length:
            done[sentence] = True
