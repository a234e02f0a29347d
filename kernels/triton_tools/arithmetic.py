"""Products and elementary functions that give the same values on a GPU and interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc=None):
    """a @ b, plus acc where given, summed in float32.

    float32 operands are multiplied exactly as PyTorch does by default ("ieee"; Triton's own default
    is tf32). Triton 3.8's interpreter multiplies the bit patterns of bfloat16, hence the upcast.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def gelu(x):
    """Exact GELU of float32: x * Phi(x)."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    """Phi(x) + x * phi(x)."""
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
