"""How well the codes of pictures are foretold: text to image without a VQGAN to see them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unival.generation.generate import to_model
from unival.model.modeling import UnivalForConditionalGeneration
from unival.vocabulary import FIRST_CODE, NUM_CODES


@dataclass(frozen=True)
class CodeScores:
    """Of one picture: nll of its codes, summed in nats; the likeliest code at each place; how many
    are right, and how many there are."""

    nll: float
    likeliest: list[int]
    right: int
    count: int


@torch.inference_mode()
def score_codes(
    model: UnivalForConditionalGeneration, batch: Mapping[str, Tensor]
) -> list[CodeScores]:
    """Each code foretold from the caption and the true codes before it, among all codes.

    Args:
        model: in eval mode.
        batch: of `collate` over training examples of image_generation.
    """
    inputs = batch["decoder_input_ids"].to(model.device)
    labels = batch["labels"].to(model.device)
    out = model(
        **to_model(model, batch),
        decoder_input_ids=inputs,
        code_mask=torch.ones(len(inputs), dtype=torch.bool, device=model.device),
        output_logits=False,
    )
    table = model.get_input_embeddings().weight[FIRST_CODE : FIRST_CODE + NUM_CODES]
    found = []
    for states, target in zip(out.decoder_last_hidden_state, labels, strict=True):
        is_code = (target >= FIRST_CODE) & (target < FIRST_CODE + NUM_CODES)
        codes = target[is_code] - FIRST_CODE
        logits = F.linear(states[is_code], table).float()  # row by row: 1,024 x 8,192 at a time
        likeliest = logits.argmax(dim=-1)
        found.append(
            CodeScores(
                float(F.cross_entropy(logits, codes, reduction="sum")),
                likeliest.tolist(),
                int((likeliest == codes).sum()),
                len(codes),
            )
        )
    return found


def code_metrics(scores: Sequence[CodeScores]) -> dict[str, float]:
    """`code_nll`, nats a code (ln 8192 = 9.01 by chance), and `code_accuracy`."""
    count = sum(score.count for score in scores)
    return {
        "code_nll": sum(score.nll for score in scores) / count,
        "code_accuracy": sum(score.right for score in scores) / count,
    }
