"""The scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load_script(script: str, name: str | None = None) -> ModuleType:
    """benchmarks/SCRIPT.py, as a module of its own or another name, anew at every call."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # the scripts import each other by plain name
    spec = importlib.util.spec_from_file_location(name or script, FOLDER / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
