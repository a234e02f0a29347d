"""Rounding of bfloat16 in Triton's interpreter, which truncates where a GPU rounds.

Only the conversion to bfloat16 is mended; kernels multiply through `arithmetic.dot`, which does not
meet the interpreter's other fault. Pinned to triton 3.8, whose internals this touches.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of float32 values rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Make float32 -> bfloat16 round; twice does nothing more."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_bfloat16", False):
        return
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def rounding(handle: interpreter.TensorHandle, target: tl.dtype) -> object | None:
        wanted = target.scalar == tl.bfloat16 and handle.dtype.scalar == tl.float32
        if not wanted:
            return None
        return interpreter.TensorHandle(round_to_bfloat16(handle.data), tl.bfloat16)

    def cast_impl(self: object, handle: object, target: object) -> object:
        done = rounding(handle, target)
        return cast(self, handle, target) if done is None else done

    def create_fp_to_fp(self: object, handle: object, target: object, mode: object) -> object:
        done = rounding(handle, target)
        return convert(self, handle, target, mode) if done is None else done

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.rounds_bfloat16 = True
