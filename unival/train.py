"""Entry of the launchers: `deepspeed --module unival.train --config FILE [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from unival.config import load_config
from unival.training.options import Run


def main(argv: list[str] | None = None) -> int:
    """Train.

    Returns:
        The exit status: 0 done; 1 failed; 2 the config, data or run folder cannot be used; 75
        stopped on request, everything saved: start it again.
    """
    parser = argparse.ArgumentParser(prog="unival train", description="Train a run.")
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", help="key=value, such as stages.0.steps=10")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("unival").setLevel(logging.INFO)
    try:
        run = load_config(Run, arguments.config, arguments.overrides)
    except ValueError as error:
        return _end(2, str(error))
    return _train(run)


def _train(run: Run) -> int:
    from unival.training.checkpoint import SaveError
    from unival.training.faults import (
        PREEMPTED,
        NonFiniteError,
        Preempted,
        broken_collective,
        failed_first,
        write_failure,
    )
    from unival.training.trainer import train

    failures = Path(run.output) / "failures"
    try:
        model = train(run)
    except Preempted as stopped:
        return _end(PREEMPTED, f"stopped on request: {stopped}; the same command goes on")
    except (NonFiniteError, SaveError) as error:
        return _end(1, str(error))
    except (ValueError, FileNotFoundError) as error:
        return _end(2, str(error))
    except Exception as error:
        if not broken_collective(error):
            write_failure(failures, error)
            raise
        first = failed_first(failures)
        why = "it left no traceback: it was killed, perhaps for memory"
        return _end(1, f"another rank is gone: {why if first is None else first}")
    if os.environ.get("RANK", "0") == "0":
        print(f"model: {model}")
    return 0


def _end(status: int, message: str) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"unival train{'' if rank == '0' else f' (rank {rank})'}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
