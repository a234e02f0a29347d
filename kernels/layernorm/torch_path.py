"""The norms by PyTorch's own operators, differentiated by autograd: the fast path of a CPU."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from unival.kernels.layernorm.reference import branch_factor


def norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Tensor:
    """LN(x), or LN(GELU(x)), of x [..., N]; statistics and sums in float32.

    PyTorch's CPU kernels keep statistics in the dtype of the parameters and sum dweight in that of
    x (of 8192 rows in bfloat16, a tenth is lost), and its CUDA kernels take one dtype: both get
    float32 where they need it.
    """
    dtype = x.dtype
    if x.is_cpu or weight.dtype != dtype:
        x, weight, bias = x.float(), weight.float(), bias.float()
    value = F.gelu(x) if gelu else x
    return F.layer_norm(value, weight.shape, weight, bias, eps).to(dtype)


def residual_norm_torch(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    drop_path: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """residual + DropPath(Dropout(branch)) and its norm; [B, S, N].

    Without a seed PyTorch's generator draws what is dropped; with one the kernels' numbers are
    computed, which is slow.
    """
    if seed is not None:
        branch = branch * branch_factor(branch.shape, dropout, drop_path, seed).to(branch.dtype)
    else:
        branch = F.dropout(branch, dropout)
        if drop_path > 0.0:
            keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1.0 - drop_path)
            branch = branch * (keep / (1.0 - drop_path))
    total = residual + branch
    return total, norm_torch(total, weight, bias, eps, gelu=False)
