"""A small stored batch whose loss tells whether a loaded model is the one that was saved."""

from __future__ import annotations

import torch
from torch import Tensor

from unival.data.batch import MEDIUM_KEYS
from unival.training.engine import Engine

WORDS, TARGETS, SEED = 12, 8, 20_230_730
FIRST_WORD, LAST_WORD = 4, 50_000


def probe_batches(engine: Engine) -> dict[str, Tensor]:
    """A row for every medium of the stage, `medium/name`: noise for the medium, random words.

    It is made from a fixed seed, alike on every rank, and stored with each checkpoint, so that a
    later version that would make another one still compares like with like.
    """
    source = torch.Generator().manual_seed(SEED)
    found: dict[str, Tensor] = {}
    for medium in sorted({micro.medium for micro in engine.stage.micro_batches}):
        words = torch.randint(FIRST_WORD, LAST_WORD, (1, WORDS + 2 * TARGETS), generator=source)
        ids, given, labels = words.split([WORDS, TARGETS, TARGETS], dim=1)
        found |= {
            f"{medium}/input_ids": ids.contiguous(),
            f"{medium}/attention_mask": torch.ones_like(ids, dtype=torch.bool),
            f"{medium}/decoder_input_ids": given.contiguous(),
            f"{medium}/labels": labels.contiguous(),
            f"{medium}/loss_weight": torch.ones(1),
        }
        shape = engine.media_shape(medium)
        if shape is not None:
            noise = torch.rand(1, *shape, generator=source) * 2 - 1
            found[f"{medium}/{MEDIUM_KEYS[medium]}"] = noise
    return found


@torch.no_grad()
def probe_loss(engine: Engine, stored: dict[str, Tensor]) -> float:
    """Mean loss of the stored rows in evaluation mode; all ranks call it together."""
    engine.deepspeed.eval()
    total, count = 0.0, 0
    for medium in sorted({name.partition("/")[0] for name in stored}):
        batch = {
            name.partition("/")[2]: tensor.to(engine.device)
            for name, tensor in stored.items()
            if name.startswith(f"{medium}/")
        }
        total += float(engine.deepspeed(batch, 0)[0])
        count += batch["labels"].numel()
    engine.deepspeed.train()
    return total / count
