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
from unival.tasks.base import Decoding
from unival.vocabulary import BOS, EOS, FIRST_TEXT, PAD, UNK

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

    @classmethod
    def of(cls, rules: Decoding, beam_size: int, max_length: int) -> SearchOptions:
        """A task's rules with these beams and this length, a forced prompt included."""
        return cls(
            beam_size=beam_size,
            max_length=max_length,
            min_length=rules.min_length,
            normalize_scores=rules.normalize_scores,
            length_penalty=rules.length_penalty,
            temperature=rules.temperature,
            no_repeat_ngram_size=rules.no_repeat_ngram_size,
        )


@dataclass(frozen=True)
class Hypothesis:
    """tokens end with </s> and do not hold <s>; positional_scores are log-probabilities."""

    tokens: list[int]
    score: float
    positional_scores: list[float]


class Steps:
    """Log-probabilities of the next token, position after position, with cached keys and values.

    Rows are sentence * copies + copy. The keys and values of cross attention are projected once a
    sentence, and stay in place when rows are reordered among the copies of their sentence.

    Args:
        encoder: encoder output of B sentences.
        copies: rows of each sentence.
        constraints: called with (tokens [B*K, t] with <s>, logits [B*K, V]) before the softmax.
        prefix: int64 [B, P], the decoder prompt without <s>, right-padded with pad.
        code_mask: bool [B], True where image codes are written: specials wait until max_length.
    """

    def __init__(
        self,
        model: UnivalForConditionalGeneration,
        encoder: EncoderOutput,
        copies: int,
        options: SearchOptions,
        constraints: Sequence[LogitsConstraint] = (),
        prefix: Tensor | None = None,
        code_mask: Tensor | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.constraints = constraints
        self.cache = cross_attention_cache(model, encoder, copies)
        self.encoder = expand_encoder(encoder, copies)
        self.prefix = None if prefix is None else prefix.repeat_interleave(copies, dim=0)
        self.code_mask = None if code_mask is None else code_mask.repeat_interleave(copies, dim=0)

    def start(self) -> Tensor:
        """int64 [B*K, 1], <s> in every row."""
        states = self.encoder.last_hidden_state
        return torch.full((states.shape[0], 1), BOS, device=states.device)

    def log_probs(self, tokens: Tensor) -> Tensor:
        """int64 [B*K, t] with <s>, of which all but the last have been seen, to float [B*K, V]."""
        decoded = self.model(
            decoder_input_ids=tokens[:, -1:],
            encoder_outputs=self.encoder,
            past_key_values=self.cache,
            use_cache=True,
            code_mask=self.code_mask,
        )
        logits = decoded.logits[:, -1].float()
        if self.options.temperature != 1.0:
            logits = logits / self.options.temperature
        for constraint in self.constraints:
            logits = constraint(tokens, logits)
        return self._adjust(torch.log_softmax(logits, dim=-1), tokens)

    def forced(self, step: int) -> Tensor | None:
        """int64 [B*K], the prompt's tokens of this step, pad in rows that are past theirs; None
        where all are."""
        if self.prefix is None or step >= min(self.prefix.shape[1], self.options.max_length):
            return None
        return self.prefix[:, step]

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] has decoded; both are of one sentence."""
        self.cache.self_attention_cache.reorder_cache(rows)

    def _adjust(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        """Prompt, length, padding and n-gram rules; may write to log_probs."""
        options, step = self.options, tokens.shape[1] - 1
        forced = self.forced(step)
        if forced is not None:
            log_probs = force_prefix(log_probs, forced, PAD, bool(self.constraints))
        elif step < options.min_length:
            log_probs[:, EOS] = -torch.inf
        log_probs.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        log_probs[:, PAD] = -torch.inf
        log_probs[:, UNK] -= options.unknown_penalty
        if step >= options.max_length:
            ends = log_probs[:, EOS].clone()
            log_probs.fill_(-torch.inf)
            log_probs[:, EOS] = ends
        elif self.code_mask is not None:
            log_probs[:, :FIRST_TEXT].masked_fill_(self.code_mask[:, None], -torch.inf)
        if options.no_repeat_ngram_size > 0:
            ban_repeated_ngrams(log_probs, tokens, options.no_repeat_ngram_size)
        return log_probs


def cross_attention_cache(
    model: UnivalForConditionalGeneration, encoder: EncoderOutput, copies: int
) -> EncoderDecoderCache:
    """An empty cache for `copies` rows a sentence that knows the encoder's keys and values.

    They are projected once a sentence, then repeated.
    """
    cross = DynamicCache()
    for layer in model.decoder.layers:
        keys_values = layer.cross_attn.project_keys(encoder.last_hidden_state)
        cross.update(*(x.repeat_interleave(copies, dim=0) for x in keys_values), layer.index)
    return EncoderDecoderCache(DynamicCache(), cross)


def expand_encoder(encoder: EncoderOutput, beams: int) -> EncoderOutput:
    """Repeat every row for its beams; positions shared by all rows stay one row in memory."""
    states = encoder.last_hidden_state.repeat_interleave(beams, dim=0)
    positions = encoder.position_embeddings
    shared = one_row(positions)
    if shared.shape[0] == 1:
        positions = shared.expand(states.shape[0], -1, -1)
    else:
        positions = positions.repeat_interleave(beams, dim=0)
    padding = encoder.padding_mask
    padding = None if padding is None else padding.repeat_interleave(beams, dim=0)
    return EncoderOutput(states, padding, positions)


def ban_repeated_ngrams(log_probs: Tensor, tokens: Tensor, size: int) -> None:
    """Set to -inf what would repeat an n-gram of a row, <s> and prompt included; in place."""
    length = tokens.shape[1]
    if length < size:
        return
    ngrams = tokens.unfold(1, size, 1)  # [rows, length - size + 1, size]
    tail = tokens[:, length - size + 1 :]
    repeats = (ngrams[..., :-1] == tail[:, None]).all(dim=-1)
    floor = torch.full(repeats.shape, torch.inf, dtype=log_probs.dtype, device=log_probs.device)
    # A token can end several n-grams: the smallest bound on it counts.
    log_probs.scatter_reduce_(1, ngrams[..., -1], floor.masked_fill(repeats, -torch.inf), "amin")


def force_prefix(log_probs: Tensor, prefix: Tensor, pad: int, constrained: bool) -> Tensor:
    """Leave only the prefix token of rows that have one at this step.

    prefix is int64 [B * K], pad where the row generates freely.
    """
    forced = prefix != pad
    own = log_probs.gather(1, prefix[:, None])
    other = torch.full_like(own, -torch.inf) if constrained else own.min().expand_as(own) - 1.0
    rows = other.expand_as(log_probs).scatter(1, prefix[:, None], own)
    return torch.where(forced[:, None], rows, log_probs)


@dataclass
class _Beams:
    """State of the search: rows are sentence * K + beam."""

    tokens: Tensor  # [B * K, length]
    scores: Tensor  # [B * K, length], cumulative
    ignored: Tensor  # bool [B, K], beams that are no longer alive


@dataclass
class _Finished:
    """Hypotheses of each sentence in the order they were found, at most `most` of each."""

    most: int
    found: list[list[Hypothesis]]
    full: int = 0  # sentences that have all of theirs

    def add(self, sentence: int, hypothesis: Hypothesis) -> None:
        """Keep a hypothesis unless its sentence has enough."""
        kept = self.found[sentence]
        if len(kept) < self.most:
            kept.append(hypothesis)
            self.full += len(kept) == self.most


@torch.inference_mode()
def beam_search(
    model: UnivalForConditionalGeneration,
    encoder: EncoderOutput,
    options: SearchOptions,
    constraints: Sequence[LogitsConstraint] = (),
    prefix: Tensor | None = None,
    code_mask: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Search for the best outputs of every row; arguments are those of Steps.

    Returns:
        For every sentence at most beam_size hypotheses, best first.

    Raises:
        ValueError: a sentence cannot end within max_length (its constraint never allows </s>), or
            beam_size is not below the size of the vocabulary.
    """
    beams, size = options.beam_size, model.config.vocab_size
    if beams >= size:
        raise ValueError(f"beam_size {beams}: the vocabulary has {size} entries")
    steps = Steps(model, encoder, beams, options, constraints, prefix, code_mask)
    start = steps.start()
    batch, device = start.shape[0] // beams, start.device
    state = _Beams(
        start,
        torch.zeros(batch * beams, 0, device=device),
        torch.zeros(batch, beams, dtype=torch.bool, device=device),
    )
    finished = _Finished(beams, [[] for _ in range(batch)])
    for step in range(options.max_length + 1):
        rows = _advance(state, steps.log_probs(state.tokens), step, options, finished)
        if finished.full == batch:
            break
        steps.reorder(rows)
    for sentence, found in enumerate(finished.found):
        if not found:
            raise ValueError(f"sentence {sentence}: no output can end within {options.max_length}")
    return [sorted(found, key=lambda h: -h.score) for found in finished.found]


def _advance(
    state: _Beams, log_probs: Tensor, step: int, options: SearchOptions, finished: _Finished
) -> Tensor:
    """Choose the next beams and collect finished hypotheses; returns the rows they came from.

    Writes to log_probs.
    """
    batch, beams = state.ignored.shape
    classes = log_probs.shape[-1]
    totals = log_probs.view(batch, beams, classes)
    # At the first step all beams are equal, so only the first one counts.
    totals = totals[:, :1] if step == 0 else totals.add_(state.scores[:, -1].view(batch, beams, 1))
    flat = totals.flatten(1)
    scores, index = flat.topk(min(2 * beams, flat.shape[1] - 1))
    token = index % classes
    row = index // classes + torch.arange(batch, device=index.device)[:, None] * beams
    ends = (token == EOS) & scores.isfinite()
    ends[:, :beams] &= ~state.ignored
    _collect(state, scores[:, :beams], row[:, :beams], ends[:, :beams], step, options, finished)

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
    finished: _Finished,
) -> None:
    """Store the hypotheses that end here, in candidate order."""
    sentences = ends.nonzero()[:, 0].tolist()
    if not sentences:
        return
    sources = row[ends]
    histories = torch.cat([state.scores[sources], scores[ends][:, None]], dim=1).tolist()
    length = (step + 1) ** options.length_penalty
    for sentence, words, cumulative in zip(
        sentences, state.tokens[sources, 1:].tolist(), histories, strict=True
    ):
        score = cumulative[-1] / length if options.normalize_scores else cumulative[-1]
        each = [b - a for a, b in zip([0.0, *cumulative], cumulative, strict=False)]
        finished.add(sentence, Hypothesis([*words, EOS], score, each))
