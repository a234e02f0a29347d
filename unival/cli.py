"""The `unival` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

# Reading a command line must not wait for torch: each command imports what it needs.


def _train(arguments: argparse.Namespace) -> int:
    from unival.train import main

    return main(["--config", arguments.config, *arguments.overrides])


def _demo(arguments: argparse.Namespace) -> int:
    from unival.demo import run_demo

    return run_demo(arguments.overrides)


def _make_samples(arguments: argparse.Namespace) -> int:
    from unival.data.samples import make_samples

    for name, count in make_samples(arguments.source, arguments.out).items():
        print(f"{arguments.out / name}: {count} rows")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from unival.evaluation.report import write_report

    print(write_report(arguments.run))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from unival.convert.original import infer_config, load_original, read_original
    from unival.vocabulary import Vocabulary

    state = read_original(arguments.checkpoint)
    overrides = {} if arguments.hop_size is None else {"hop_size": arguments.hop_size}
    model = load_original(state, infer_config(state, **overrides))
    vocabulary = Vocabulary("bart", arguments.dict)
    model.save_pretrained(arguments.out)
    vocabulary.tokenizer.save_pretrained(arguments.out)
    print(f"{arguments.out}: {model.num_parameters():,} parameters")
    return 0


def _load(folder: Path):  # type: ignore[no-untyped-def]
    from unival.model.loading import load_model
    from unival.vocabulary import Vocabulary

    return load_model(folder).eval(), Vocabulary.from_pretrained(folder)


def _run_of(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The run config beside a model: it says how the model's media were prepared."""
    from unival.config import ConfigError, load_config
    from unival.training.options import Run

    path = arguments.config
    if path is None:
        candidates = [folder / "config.yaml" for folder in arguments.model.resolve().parents]
        path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        raise ConfigError(f"{arguments.model}: no config.yaml above it; name the run with --config")
    return load_config(Run, path, [])


def _generate(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from unival.data.batch import MediaOptions
    from unival.generation.generate import generate_answer

    run = _run_of(arguments)
    model, vocabulary = _load(arguments.model)
    answers = []
    if arguments.answers is not None:
        answers = arguments.answers.read_text(encoding="utf-8").splitlines()
    found = generate_answer(
        model,
        vocabulary,
        arguments.task,
        image=arguments.image,
        video=arguments.video,
        audio=arguments.audio,
        question=arguments.question,
        text=arguments.text,
        box=arguments.box,
        options=MediaOptions(**asdict(run.media)),
        answers=answers,
        fine_tuning=arguments.fine_tuned,
        beam_size=arguments.beam_size,
    )
    print(found.text)
    if found.box is not None:
        print("box:", " ".join(f"{value:.1f}" for value in found.box))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from unival.data.batch import MediaOptions
    from unival.evaluation.runner import evaluate
    from unival.training.batches import open_sources, read_answers

    run = _run_of(arguments)
    model, vocabulary = _load(arguments.model)
    result = evaluate(
        model,
        vocabulary,
        open_sources(run),
        arguments.tasks,
        MediaOptions(**asdict(run.media)),
        answers=read_answers(run),
        fine_tuned=arguments.tasks if arguments.fine_tuned else [],
        folder=arguments.out,
    )
    if arguments.out is not None:
        result.save(arguments.out)
    print(json.dumps(result.metrics, indent=2))
    return 0


def _box(text: str) -> tuple[float, float, float, float]:
    values = tuple(float(value) for value in text.split(","))
    if len(values) != 4:
        raise argparse.ArgumentTypeError("a box is x0,y0,x1,y1")
    return values  # type: ignore[return-value]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="unival", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str):  # type: ignore[no-untyped-def]
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(handler=run)
        return sub

    train = command("train", _train, "train a run (the same as `python -m unival.train`)")
    train.add_argument("--config", required=True)
    train.add_argument("overrides", nargs="*", help="key=value")

    demo = command("demo", _demo, "train the tiny model on the samples and write a report")
    demo.add_argument("overrides", nargs="*", help="key=value")

    data = command("data", _make_samples, "make the tables and shards of the samples")
    data.add_argument("action", choices=["make-samples"])
    data.add_argument("--source", type=Path, default=Path("samples"))
    data.add_argument("--out", type=Path, required=True)

    report = command("report", _report, "write report.html of a run")
    report.add_argument("run", type=Path)

    convert = command("convert", _convert, "convert an original UnIVAL or OFA .pt checkpoint")
    convert.add_argument("checkpoint", type=Path)
    convert.add_argument("out", type=Path)
    convert.add_argument("--dict", type=Path, help="fairseq's dict.txt; else facebook/bart-base")
    convert.add_argument("--hop-size", type=int, help="STFT hop of an audio model (200)")

    generate = command("generate", _generate, "answer one question about a file")
    generate.add_argument("--task", required=True)
    generate.add_argument("--image", type=Path)
    generate.add_argument("--video", type=Path)
    generate.add_argument("--audio", type=Path)
    generate.add_argument("--question", default="")
    generate.add_argument("--text", default="", help="a caption or a phrase to find")
    generate.add_argument("--box", type=_box, help="x0,y0,x1,y1 in pixels, for grounded_caption")
    generate.add_argument("--answers", type=Path, help="candidate answers, one a line")
    generate.add_argument("--beam-size", type=int)

    measure = command("evaluate", _evaluate, "measure tasks of a run's model on its sources")
    measure.add_argument("--tasks", nargs="+", required=True)
    measure.add_argument("--out", type=Path, help="folder for evaluation.json and pictures")
    for sub in (generate, measure):
        sub.add_argument("--model", type=Path, default=DEFAULT_MODEL)
        sub.add_argument("--config", type=Path, help="the run's config; else the one above --model")
        sub.add_argument("--fine-tuned", action="store_true", help="ask with fine-tuning prompts")
    return top


DEFAULT_MODEL = Path("runs/demo/stages/image_video_text/model")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 where the input cannot be used."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.handler(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"unival: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
