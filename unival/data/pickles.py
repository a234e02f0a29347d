"""Reading pickles of plain data without running what they hold.

Some publishers give annotations as Python pickles (RefCOCO's `refs(unc).p`, word frequencies of
CIDEr-D, answer lists). A pickle is a program; only the names listed here may be called by it.
"""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 30
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    # What an empty defaultdict makes of a missing key; Python 2 names the module otherwise.
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (dict, float, int, list, str, tuple)
    },
    ("__builtin__", "set"): set,
    ("__builtin__", "unicode"): str,
    ("__builtin__", "long"): int,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not plain data") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference to something outside of the file")


def load_plain(path: Path) -> Any:
    """What a pickle of dictionaries, lists, texts and numbers holds.

    Texts of Python 2 are read as UTF-8.

    Raises:
        ValueError: more than MAX_BYTES, damaged, or it names anything but plain data.
        FileNotFoundError: there is no such file.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: {size} bytes; {MAX_BYTES} at most")
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path}: not a pickle of plain data: {error}") from error
