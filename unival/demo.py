"""The main job on the embedded samples: data, training in stages, measurement, a page to look
at."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from unival.data.samples import make_samples
from unival.evaluation.report import write_report
from unival.launch import launch

CONFIG = Path("configs/pretrain/demo.yaml")
DATA = Path("runs/demo_data")
RUN = Path("runs/demo")


def run_demo(overrides: list[str], ranks: int = 1) -> int:
    """Run the demo from the root of a checkout; returns the exit status.

    The training goes through the deepspeed launcher, as a user's own run does. An interrupted demo
    goes on where it stopped; a finished one starts anew.
    """
    if not CONFIG.is_file() or not Path("samples").is_dir():
        print("unival demo: run it from the root of a checkout of the project", file=sys.stderr)
        return 2
    began = time.monotonic()
    if (RUN / "report.html").is_file():
        finished = RUN.rename(RUN.with_name(f"demo-{int(time.time())}"))
        print(f"the finished run before this one is now {finished}")
    counts = make_samples(Path("samples"), DATA)
    print("samples:", ", ".join(f"{name} {count}" for name, count in counts.items()))
    status = launch(ranks, ["--config", str(CONFIG), *overrides])
    if status:
        return status
    page = write_report(RUN)
    print(f"{page}: open it in a browser ({(time.monotonic() - began) / 60:.1f} minutes)")
    return 0
