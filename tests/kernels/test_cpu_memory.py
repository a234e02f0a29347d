"""Memory of a process that repeats a step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SECOND_TOUCH = """
import resource, sys, torch
from unival.kernels.cpu import memory

if sys.argv[1] == "keep":
    memory.keep_freed()
torch.set_num_threads(1)
pages = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(50 << 20)]
    held += [torch.ones(2 << 20) for _ in range(24)]  # 8 MB each
    del held
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(pages[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_kept_memory_is_not_touched_anew() -> None:
    """392 MB have 100,352 pages of 4 KB; without, all but 64 MB go back each time."""

    def touched(mode: str) -> int:
        command = [sys.executable, "-c", SECOND_TOUCH, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert touched("keep") < 5_000
    assert touched("plain") > 40_000
