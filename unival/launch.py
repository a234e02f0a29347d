"""Starting a run's ranks on this machine, with the deepspeed launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from unival.config import load_config
from unival.training.options import Run


def launch(ranks: int, arguments: Sequence[str], module: str = "unival.train") -> int:
    """Run a module with some arguments on `ranks` processes; returns the exit status."""
    launcher = Path(sys.executable).with_name("deepspeed")
    with socket.socket() as free:  # the launcher's own port may be another run's
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ)
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment.get('PATH', '')}"
    command = [str(launcher), "--num_gpus", str(ranks), "--master_port", str(port)]
    done = subprocess.run([*command, "--module", module, *arguments], env=environment)
    return done.returncode


def resume(folder: Path, ranks: int | None = None) -> int:
    """Go on with a run that has stopped, from its last checkpoint.

    Args:
        folder: of the run; its config.yaml says what is trained.
        ranks: processes; absent: as many as the last checkpoint was written by.

    Raises:
        ValueError: no run is there, or it has finished.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: no run: it has no config.yaml")
    run = load_config(Run, path)
    unfinished = [s for s in run.stages if not _of_stage(folder, s.name, "finished.json").is_file()]
    if not unfinished:
        raise ValueError(f"{folder}: all {len(run.stages)} stages have finished")
    if ranks is None:
        ranks = _last_world_size(folder, unfinished[0].name)
    return launch(ranks, ["--config", str(path), f"output={folder}"])


def _of_stage(folder: Path, stage: str, name: str) -> Path:
    return folder / "stages" / stage / name


def _last_world_size(folder: Path, stage: str) -> int:
    """Ranks of the newest checkpoint of a stage; 1 where there is none."""
    checkpoints = _of_stage(folder, stage, "checkpoints")
    states = sorted(checkpoints.glob("step-*/state.json"))
    return int(json.loads(states[-1].read_text(encoding="utf-8"))["world_size"]) if states else 1
