"""Answers to choose from, and the log-probability of every one of them.

Summing the log-probabilities of each candidate's tokens is exact where a beam search may lose the
best answer; the published visual entailment results are made so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from unival.generation.constraints import FORBIDDEN, Trie, encode_answers
from unival.generation.search import Hypothesis, cross_attention_cache, expand_encoder
from unival.model.encoder import EncoderOutput
from unival.model.modeling import UnivalForConditionalGeneration
from unival.vocabulary import BOS, EOS, PAD, Vocabulary

ROWS = 64  # sentence-candidate pairs that are decoded at once


@dataclass(frozen=True)
class AnswerList:
    """Answers to choose from, the tokens of each, and the trie of <s> tokens </s>."""

    answers: tuple[str, ...]
    tokens: tuple[list[int], ...]
    trie: Trie

    @classmethod
    def of(cls, answers: Iterable[str], vocabulary: Vocabulary) -> AnswerList:
        """Each answer with its leading space.

        Raises ValueError for an empty list, and names the answer that is empty, encodes to nothing
        or is listed twice.
        """
        answers = tuple(answers)
        tokens = tuple(encode_answers(answers, vocabulary))
        return cls(answers, tokens, Trie([BOS, *ids, EOS] for ids in tokens))

    @property
    def longest(self) -> int:
        """Tokens of the longest answer, </s> not counted; they bound a search."""
        return max(len(ids) for ids in self.tokens)

    def check(self, max_length: int) -> None:
        """Raises ValueError, naming the answer, where one has more than max_length tokens."""
        for answer, ids in zip(self.answers, self.tokens, strict=True):
            if len(ids) > max_length:
                raise ValueError(
                    f"answer {answer!r} has {len(ids)} tokens; max_length is {max_length}"
                )


@dataclass(frozen=True)
class CandidateScores:
    """token_log_probs: float32 [B, C, L] of each candidate's tokens and </s>, 0 behind it."""

    token_log_probs: Tensor

    @property
    def totals(self) -> Tensor:
        """float32 [B, C], the log-probability of each candidate."""
        return self.token_log_probs.sum(dim=-1)

    @property
    def ranking(self) -> Tensor:
        """int64 [B, C], candidates of each sentence, best first; equals as they are listed."""
        return self.totals.sort(dim=-1, descending=True, stable=True).indices

    def best(self, choices: AnswerList) -> list[Hypothesis]:
        """The likeliest candidate of each sentence."""
        found = []
        for sentence, candidate in enumerate(self.ranking[:, 0].tolist()):
            tokens = [*choices.tokens[candidate], EOS]
            each = self.token_log_probs[sentence, candidate, : len(tokens)]
            found.append(Hypothesis(tokens, float(each.sum()), each.tolist()))
        return found


@torch.inference_mode()
def score_candidates(
    model: UnivalForConditionalGeneration,
    encoder: EncoderOutput,
    choices: AnswerList,
    prompts: Tensor,
    temperature: float = 1.0,
    rows: int = ROWS,
) -> CandidateScores:
    """Log-probabilities of all candidates behind each sentence's prompt.

    Logits are divided by the temperature, then shared among the tokens that the trie allows. The
    encoder's output serves all candidates: its keys and values are projected once a sentence. The
    decoder reads the prompt with each candidate, and vocabulary logits are made for the answer's
    places alone.

    Args:
        encoder: encoder output of B sentences.
        prompts: int64 [B, P] with <s>, right-padded with pad.
        rows: sentence-candidate pairs decoded at once, which bounds memory; at least one candidate
            of every sentence.
    """
    device, sentences = prompts.device, prompts.shape[0]
    trie = choices.trie.to(device)
    # Candidates of like length share a chunk, so that little of it is padding.
    order = torch.tensor([len(ids) for ids in choices.tokens]).argsort(stable=True).to(device)
    answers = [torch.tensor(ids) for ids in choices.tokens]
    inputs = pad_sequence(answers, batch_first=True, padding_value=PAD).to(device)
    targets = torch.cat([inputs, torch.full_like(inputs[:, :1], PAD)], dim=1)
    ends = (inputs != PAD).sum(dim=1, keepdim=True)
    targets = targets.scatter(1, ends, EOS)
    states = trie.paths(torch.cat([torch.full_like(inputs[:, :1], BOS), inputs], dim=1))

    chunk = min(max(1, rows // sentences), len(answers))
    repeated = expand_encoder(encoder, chunk)
    cache = cross_attention_cache(model, encoder, chunk)
    found = torch.zeros(sentences, *targets.shape, device=device)
    for start in range(0, len(answers), chunk):
        # The last chunk reaches back, so that all have the rows that the cache was made for.
        start = min(start, len(answers) - chunk)
        chosen = order[start : start + chunk]
        width = int(ends[chosen].max())
        cache.self_attention_cache = DynamicCache()
        hidden = model(
            decoder_input_ids=_join(prompts, inputs[chosen, :width]),
            encoder_outputs=repeated,
            past_key_values=cache,
            use_cache=True,
            output_logits=False,
        ).decoder_last_hidden_state
        hidden = _answer_places(hidden.unflatten(0, (sentences, chunk)), prompts, width + 1)
        real = targets[chosen, : width + 1] != PAD
        logits = model.logits(hidden[:, real]).float() / temperature
        allowed = trie.allowed(states[chosen, : width + 1][real], logits.shape[-1])
        log_probs = logits.masked_fill_(~allowed, FORBIDDEN).log_softmax(dim=-1)
        wanted = targets[chosen, : width + 1][real].expand(sentences, -1)[..., None]
        row, place = real.nonzero(as_tuple=True)
        found[:, chosen[row], place] = log_probs.gather(-1, wanted)[..., 0]
    return CandidateScores(found)


def _join(prompts: Tensor, answers: Tensor) -> Tensor:
    """[B, P] prompts and [C, A] answers to [B * C, P + A]: each answer right behind its prompt."""
    sentences, candidates = prompts.shape[0], answers.shape[0]
    padding = prompts.new_full((sentences, answers.shape[1]), PAD)
    joined = torch.cat([prompts, padding], dim=1)[:, None].repeat(1, candidates, 1)
    places = (prompts != PAD).sum(dim=1)[:, None] + torch.arange(
        answers.shape[1], device=prompts.device
    )
    shape = (sentences, *answers.shape)
    return joined.scatter(2, places[:, None].expand(shape), answers.expand(shape)).flatten(0, 1)


def _answer_places(hidden: Tensor, prompts: Tensor, count: int) -> Tensor:
    """[B, C, U, D] to [B, C, count, D]: states of the prompt's last token and those behind it."""
    last = (prompts != PAD).sum(dim=1) - 1
    places = last[:, None] + torch.arange(count, device=last.device)
    index = places[:, None, :, None].expand(-1, hidden.shape[1], -1, hidden.shape[3])
    return hidden.gather(2, index)
