"""A model of twelve symbols, small enough to count all it can say, and its exact probabilities."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.norm import LayerNorm

WORDS = 12  # ids 0 to 3 are special
# The second source is shorter: its padding must change nothing.
SOURCES = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])


class PlainNorm(nn.LayerNorm):
    """The model's norm in PyTorch's own operators, which unlike the kernels take float64."""

    def of_gelu(self, x: Tensor) -> Tensor:
        return self(F.gelu(x))

    def of_sum(self, residual: Tensor, branch: Tensor, *_: float) -> tuple[Tensor, Tensor]:
        return residual + branch, self(residual + branch)


@pytest.fixture(scope="session")
def small() -> UnivalForConditionalGeneration:
    torch.manual_seed(0)
    config = UnivalConfig(
        vocab_size=WORDS,
        d_model=32,
        ffn_dim=64,
        encoder_layers=1,
        decoder_layers=2,
        num_heads=4,
        image_layers=None,
        video_layers=None,
    )
    model = UnivalForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.3)
    model.encoder.embed_tokens.weight.data.mul_(0.7)  # probabilities that are not all 0 or 1
    return model


@pytest.fixture(scope="session")
def sources() -> Tensor:
    return SOURCES


@pytest.fixture(scope="session")
def exact(small: UnivalForConditionalGeneration) -> Callable[..., Tensor]:
    """Logits [U, V] in float64 of one sentence and one decoder input, without padding or cache."""
    double = copy.deepcopy(small).double()
    for module in double.modules():
        if isinstance(module, LayerNorm):
            module.__class__ = PlainNorm

    @torch.no_grad()
    def logits(sentence: int, decoder_input: list[int], codes: bool = False) -> Tensor:
        ids = SOURCES[sentence]
        return double(
            input_ids=ids[ids != 1][None],
            decoder_input_ids=torch.tensor([decoder_input]),
            code_mask=torch.tensor([True]) if codes else None,
        ).logits[0]

    return logits
