"""The flash-attn package as an implementation, for attention without a relative bias.

Content and position parts of the scores become one product of twice the width (FlashBias, arXiv
2505.12044, first published the concatenation); values are padded to that width, which the package
wants equal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_query: Tensor | None,
    position_key: Tensor | None,
    head_scale: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    deterministic: bool,
) -> Tensor:
    """[B, H, S, d]; arguments as in `attention` (op.py). Differentiable by the package.

    Raises:
        ValueError: the package cannot be imported, or the dtype is not 16 bits.
    """
    try:
        # find_spec alone lies: the package may be there without its compiled part.
        import flash_attn
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(f"backend='flash_attn': the package cannot be used: {error}") from error
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"query: {query.dtype}; flash_attn takes float16 and bfloat16")
    width = value.shape[-1]
    if position_query is not None and position_key is not None:
        batch = query.shape[0]
        query = torch.cat([query, position_query.expand(batch, -1, -1, -1)], dim=-1)
        key = torch.cat([key, position_key.expand(batch, -1, -1, -1)], dim=-1)
        value = F.pad(value, (0, width))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = {
        "dropout_p": dropout,
        "softmax_scale": scale,
        "causal": causal,
        "deterministic": deterministic,
    }
    if key_padding_mask is None:
        output = flash_attn.flash_attn_func(q, k, v, **options)
    else:
        batch, length = q.shape[:2]
        seen = ~key_padding_mask
        lengths = seen.sum(1, dtype=torch.int32)
        output = flash_attn.flash_attn_varlen_func(
            q.flatten(0, 1),
            k[seen],
            v[seen],
            torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device),
            F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            length,
            k.shape[1],
            **options,
        ).unflatten(0, (batch, length))
    output = output.transpose(1, 2)[..., :width]
    return output if head_scale is None else (output * head_scale[:, None, None]).to(output.dtype)
