"""The compiled passes of this folder, which installing the package builds with a C++ compiler.

Without one, or on a processor without AVX2, nothing is AVAILABLE and PyTorch's operators take over.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

INTERFACE = 2  # of passes.h
LINE = 16  # channels that the transforms take at a time


def _load() -> ctypes.CDLL | None:
    built = next(iter(Path(__file__).parent.glob("_passes*.so")), None)
    if built is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    try:
        library = ctypes.CDLL(str(built))
        found = library.unival_interface()
    except (OSError, AttributeError) as error:
        warnings.warn(f"{built}: {error}; PyTorch's slower operators are used", stacklevel=2)
        return None
    if found != INTERFACE:
        warnings.warn(
            f"{built} is of interface {found}, expected {INTERFACE}: install the package again "
            "(pip install -e . --no-deps); PyTorch's slower operators are used until then",
            stacklevel=2,
        )
        return None
    return library


LIBRARY = _load()
AVAILABLE = LIBRARY is not None
NOT_AVAILABLE = (
    "the passes of kernels/cpu are not compiled, or not for this processor (they want AVX2): "
    "PyTorch's slower operators are used; with g++, pip install -e . --no-deps"
)


class Recorder(TorchDispatchMode):
    """A mode that is told of the passes as of PyTorch's operators.

    Attributes:
        meta_is_cpu: tensors without values ("meta") stand for a CPU's.
    """

    meta_is_cpu = False

    def compiled_pass(self, name: str, tensors: list[Tensor], run: Callable[[], None]) -> None:
        """Told instead of a call; `run` makes it, or does nothing for tensors without values."""
        run()


def _recorder() -> Recorder | None:
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Recorder) else None


def is_cpu(x: Tensor) -> bool:
    """Whether a tensor is a CPU's, or stands for one."""
    recorder = _recorder() if x.is_meta else None
    return x.is_cpu or (recorder is not None and recorder.meta_is_cpu)


def takes(*tensors: Tensor, maps: Sequence[Tensor] = ()) -> bool:
    """Whether the compiled passes take these: on a CPU, without gaps, and not traced; float32, or
    maps that are all bfloat16. Maps have one shape: a pass would read beyond the smaller one.
    """
    if not AVAILABLE or torch.compiler.is_compiling():
        return False
    dtype = torch.bfloat16 if maps and is_half(maps[0]) else torch.float32
    if any(x.dtype != torch.float32 for x in tensors):
        return False
    if any(x.dtype != dtype or x.shape != maps[0].shape for x in maps):
        return False
    return all(
        type(x) in (Tensor, torch.nn.Parameter) and is_cpu(x) and x.is_contiguous()
        for x in (*tensors, *maps)
    )


def is_half(x: Tensor) -> bool:
    """What the passes that know both dtypes are told of their maps."""
    return x.dtype == torch.bfloat16


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a pass with tensors that it `takes` and numbers; it releases the interpreter's lock."""
    recorder = _recorder()
    if recorder is None:
        getattr(LIBRARY, name)(*map(_passed, arguments))
        return
    tensors = [value for value in arguments if isinstance(value, Tensor)]

    def run() -> None:
        if not tensors[0].is_meta:
            getattr(LIBRARY, name)(*map(_passed, arguments))

    recorder.compiled_pass(name, tensors, run)


def _passed(value: Tensor | int | float | None) -> ctypes._SimpleCData:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
