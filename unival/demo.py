"""The main job on the embedded samples: data, training in stages, measurement, a page to look
at."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from unival.data.samples import make_samples
from unival.evaluation.report import write_report

CONFIG = Path("configs/pretrain/demo.yaml")
DATA = Path("runs/demo_data")
RUN = Path("runs/demo")


def run_demo(overrides: list[str]) -> int:
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
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", "1", "--module", "unival.train"]
    environment = dict(os.environ)
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment.get('PATH', '')}"
    done = subprocess.run([*command, "--config", str(CONFIG), *overrides], env=environment)
    if done.returncode:
        return done.returncode
    page = write_report(RUN)
    print(f"{page}: open it in a browser ({(time.monotonic() - began) / 60:.1f} minutes)")
    return 0
