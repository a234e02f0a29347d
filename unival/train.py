"""Entry of the launchers: `deepspeed --module unival.train --config FILE [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from unival.config import ConfigError, load_config
from unival.training.checkpoint import ResumeError
from unival.training.options import Run


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status: 0, or 2 where the config or data cannot be used."""
    parser = argparse.ArgumentParser(prog="unival train", description="Train a run.")
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", help="key=value, such as stages.0.steps=10")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("unival").setLevel(logging.INFO)
    try:
        run = load_config(Run, arguments.config, arguments.overrides)
        from unival.training.trainer import train

        model = train(run)
    except (ConfigError, ResumeError, ValueError, FileNotFoundError) as error:
        print(f"unival train: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(f"model: {model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
