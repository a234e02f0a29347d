"""Ranks of a run as processes, forked from a server that has imported everything already."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["unival.training.trainer", "deepspeed", "ranks"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(
    output: Path, rank: int, world: int, port: int, ends: Connection, work: Callable, args: tuple
) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    torch.set_num_threads(1)
    status = 1
    try:
        ends.send(work(*args))
        ends.recv()  # tensors are handed over by a process that still lives
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of collectives whose other ranks are gone would keep the process.
        os._exit(status)


_started: list[BaseProcess] = []


@atexit.register
def _kill_what_is_left() -> None:
    """A test that failed in the middle leaves ranks that wait for each other."""
    for process in _started:
        process.kill()


class Ranks:
    """Processes that run `work(*args)` as the ranks of one world, and what they return."""

    def __init__(self, folder: Path, world: int, work: Callable, *args: Any) -> None:
        self.outputs = [folder / f"rank{rank}.log" for rank in range(world)]
        self.processes: list[BaseProcess] = []
        self.ends: list[Connection] = []
        port = free_port()
        for rank, output in enumerate(self.outputs):
            mine, theirs = FORKSERVER.Pipe()
            process = FORKSERVER.Process(
                target=_child, args=(output, rank, world, port, theirs, work, args)
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            _started.append(process)
            self.ends.append(mine)

    def results(self, timeout: float = 240) -> list[Any]:
        """What each rank returned; an AssertionError with the output of one that failed."""
        found = []
        for end, output in zip(self.ends, self.outputs, strict=True):
            try:
                assert end.poll(timeout), "timed out"
                found.append(end.recv())
                end.send(None)
            except (EOFError, AssertionError) as error:
                self.kill()
                told = "\n".join(f"{o}:\n{o.read_text()[-4000:]}" for o in self.outputs)
                raise AssertionError(f"{output.stem} failed: {error}\n{told}") from error
        for process in self.processes:
            process.join()
        return found

    def end(self, patience: float) -> list[Any]:
        """What ranks return after others were killed; None of those that were, or that must be
        because they still wait for a dead one to join them (which launchers do likewise)."""
        found = []
        for end in self.ends:
            try:
                found.append(end.recv() if end.poll(patience) else None)
                end.send(None)
            except (EOFError, BrokenPipeError):
                found.append(None)
        self.kill()
        return found

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def on_ranks(folder: Path, world: int, work: Callable, *args: Any) -> list[Any]:
    """What `work(*args)` returns on each rank of a world."""
    folder.mkdir(parents=True, exist_ok=True)
    return Ranks(folder, world, work, *args).results()
