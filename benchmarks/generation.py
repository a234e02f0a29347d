"""Beam search beside the same search that recomputes what it could keep, and what a trie costs.

    python benchmarks/generation.py
    python benchmarks/generation.py --steps 8 --repeats 3 --out runs/generation

Captions are searched for random pictures with random weights on the CPU; every search runs the same
number of steps. The searches take turns in one process, so that the machine's load meets all of
them, and the medians of the rounds are compared:

kept        this project's search: the encoder's keys, values and position terms of cross attention
            are projected once a picture.
recomputed  the same search, but these are projected again from the encoder's states of every beam
            at each step. Keys and values of self-attention are kept in both.
free, trie  the search without and with a trie of synthetic answers, of equal length.

Tokens are counted as pictures x steps (beams search for one and the same token). The encoder's
seconds stand apart: they are in no rate. Writes generation.json and generation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from train_step import describe_machine

from unival.generation.constraints import Trie, TrieConstraint
from unival.generation.search import Hypothesis, SearchOptions, beam_search
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration, UnivalOutput
from unival.vocabulary import BOS, EOS, FIRST_TEXT

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 8  # text tokens of the encoder
FIRST_WORDS = 800  # the answers begin with so many different tokens, as those of VQA do


class Forgetful:
    """The model, but it forgets everything about cross attention before each step."""

    def __init__(self, model: UnivalForConditionalGeneration) -> None:
        self.model, self.decoder, self.config = model, model.decoder, model.config

    def __call__(self, **inputs: Any) -> UnivalOutput:
        cache = inputs["past_key_values"]
        cache.cross_attention_cache.reset()
        cache.is_updated.clear()
        cache.cross_position_key = None
        return self.model(**inputs)


def synthetic_answers(count: int, tokens: int, words: int, seed: int = 0) -> list[list[int]]:
    """Different answers of exactly so many tokens, <s> first and </s> last."""
    rng, found = random.Random(seed), set()
    while len(found) < count:
        first = FIRST_TEXT + rng.randrange(min(FIRST_WORDS, words))
        rest = (FIRST_TEXT + rng.randrange(words) for _ in range(tokens - 1))
        found.add((BOS, first, *rest, EOS))
    return [list(answer) for answer in sorted(found)]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def take_turns(
    calls: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each call in each round, after a round to warm up; and what each gave."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    results = {name: call() for name, call in calls.items()}
    for number in range(repeats):
        for name, call in calls.items():
            seconds, results[name] = timed(call)
            found[name].append(seconds)
            print(f"round {number + 1}: {name:<12}{seconds:>9.2f} s", flush=True)
    return found, results


@torch.inference_mode()
def measure(args: argparse.Namespace, config: UnivalConfig) -> dict[str, Any]:
    """Encode once, let the searches take turns, and compare their medians."""
    machine = describe_machine(torch.device("cpu"))
    torch.manual_seed(0)
    model = UnivalForConditionalGeneration(config).eval()
    pixels = torch.randn(args.batch, 3, args.image, args.image)
    text = torch.randint(FIRST_TEXT, config.vocab_size, (args.batch, PROMPT))
    encoder_seconds, encoded = timed(lambda: model.encoder(text, pixel_values=pixels))
    # </s> waits for the last step: every search is equally long.
    length = args.steps - 1
    options = SearchOptions(args.beams, max_length=length, min_length=length)
    trie = Trie(synthetic_answers(args.answers, length, config.vocab_size - FIRST_TEXT))

    def search(of: Any, constraints: tuple[TrieConstraint, ...] = ()) -> list[list[Hypothesis]]:
        return beam_search(of, encoded, options, constraints)

    calls: dict[str, Callable[[], Any]] = {
        "kept": lambda: search(model),
        "recomputed": lambda: search(Forgetful(model)),
        "trie": lambda: search(model, (TrieConstraint(trie, [0] * args.batch, args.beams),)),
    }
    rounds, results = take_turns(calls, args.repeats)
    median = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    tokens = args.batch * args.steps
    versions = {"python": platform.python_version(), "transformers": transformers.__version__}
    pairs = zip(results["kept"], results["recomputed"], strict=True)
    return {
        "machine": machine | versions | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "command": shlex.join(["python", "benchmarks/generation.py", *sys.argv[1:]]),
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "encoder_tokens": encoded.last_hidden_state.shape[1],
        "encoder_seconds": encoder_seconds,
        "seconds": rounds,
        "tokens_per_second": {name: tokens / seconds for name, seconds in median.items()},
        "same_captions": sum(a[0].tokens == b[0].tokens for a, b in pairs),
        "speedup": median["recomputed"] / median["kept"],
        "trie_cost": median["trie"] / median["kept"] - 1.0,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    options = report["options"]
    lines = [
        "# Beam search",
        "",
        f"`{report['command']}`",
        "",
        ", ".join(f"{key} {value}" for key, value in report["machine"].items()),
        "",
        f"{options['config']}, random weights; {options['batch']} pictures of {options['image']} "
        f"pixels ({report['encoder_tokens']} encoder tokens), beam {options['beams']}, "
        f"{options['steps']} steps, medians of {options['repeats']} rounds in turn.",
        "",
        "| search | median s | fastest s | slowest s | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, seconds in report["seconds"].items():
        lines.append(
            f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | "
            f"{max(seconds):.3f} | {report['tokens_per_second'][name]:.2f} |"
        )
    lines += [
        "",
        f"- encoder, once, in no rate above: {report['encoder_seconds']:.2f} s",
        f"- kept is {report['speedup']:.2f} times as fast as recomputed (wanted: 2); "
        f"{report['same_captions']} of {options['batch']} best captions are the same",
        f"- a trie of {options['answers']} answers costs {report['trie_cost']:+.1%} (wanted: 10 % "
        "at most)",
    ]
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> tuple[argparse.Namespace, UnivalConfig]:
    """Arguments and the model's config; ends with status 2 where they cannot be served."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
    parser.add_argument("--config", default="unival_base", choices=names)
    wanted = (
        ("batch", 16, 1, "pictures"),
        ("image", 480, 32, "pixels of a picture's side"),
        ("beams", 5, 1, "beams"),
        ("steps", 8, 2, "decoder steps, </s> included"),
        ("answers", 3129, 1, "synthetic answers of the trie"),
        ("repeats", 3, 1, "rounds that are timed"),
    )
    for name, value, _, what in wanted:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
    parser.add_argument("--out", type=Path, default=Path("runs/generation"), help="folder")
    args = parser.parse_args(argv)
    for name, _, least, _ in wanted:
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return args, UnivalConfig.from_yaml(ROOT / f"configs/model/{args.config}.yaml")


def main() -> int:
    """Measure, print the table, write JSON and Markdown."""
    args, config = parse(sys.argv[1:])
    report = measure(args, config)
    print(table(report))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "generation.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    (args.out / "generation.md").write_text(table(report), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
