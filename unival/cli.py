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


def _resume(arguments: argparse.Namespace) -> int:
    from unival.launch import resume

    return resume(arguments.run, arguments.num_gpus)


def _compare(arguments: argparse.Namespace) -> int:
    import json

    from unival.training.compare import compare, table

    picture = compare(arguments.runs, arguments.out, arguments.metric)
    print(table(json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))))
    print(picture)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from unival.demo import run_demo

    return run_demo(arguments.overrides, arguments.num_gpus)


def _make_samples(arguments: argparse.Namespace) -> int:
    from unival.data.samples import make_samples

    for name, count in make_samples(arguments.source, arguments.out).items():
        print(f"{arguments.out / name}: {count} rows")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    """0 if all is good, 1 if something is bad, 2 if it could not run, 130 after Ctrl-C."""
    try:
        return int(arguments.action(arguments) > 0)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"unival data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unival data: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _rows(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    from unival.data.tools.inputs import Rows

    return Rows(arguments.layout, arguments.medium, arguments.media_root)


def _check(arguments: argparse.Namespace) -> int:
    from unival.data.tools.check import check

    return check(arguments.paths, _rows(arguments), arguments.json, arguments.seconds)


def _shard(arguments: argparse.Namespace) -> int:
    from unival.data.tools.shard import shard

    limits = (arguments.samples_per_shard, arguments.max_bytes)
    return shard(arguments.paths, arguments.out, _rows(arguments), *limits)


def _reencode(arguments: argparse.Namespace) -> int:
    from unival.data.tools.encode import Target
    from unival.data.tools.reencode import reencode

    jpeg = arguments.frames is not None
    if (jpeg and arguments.audio) or (not jpeg and arguments.fps is not None):
        raise ValueError("--fps is for --frames jpeg, whose films hold no sound")
    target = Target(arguments.size, arguments.gop, jpeg, arguments.fps, arguments.audio)
    return reencode(arguments.paths, arguments.out, target, _rows(arguments))


def _stats(arguments: argparse.Namespace) -> int:
    from unival.data.tools.stats import stats

    return stats(arguments.paths, _rows(arguments), arguments.out)


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


def _generate(arguments: argparse.Namespace) -> int:
    from unival.evaluate import run_of
    from unival.generation.generate import generate_answer

    run = run_of(arguments.model, arguments.config)
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
        options=run.media,
        answers=answers,
        fine_tuning=arguments.fine_tuned,
        beam_size=arguments.beam_size,
    )
    print(found.text)
    if found.box is not None:
        print("box:", " ".join(f"{value:.1f}" for value in found.box))
    return 0


def _passed_on(arguments: argparse.Namespace) -> int:
    """Run a command that is a module of its own, on several processes where asked for."""
    if arguments.num_gpus == 1:
        import importlib

        return importlib.import_module(arguments.module).main(arguments.rest)
    from unival.launch import launch

    return launch(arguments.num_gpus, arguments.rest, arguments.module)


def _finetune(arguments: argparse.Namespace) -> int:
    from unival.finetune import Request, finetune

    request = Request(
        task=arguments.task,
        data=arguments.data,
        checkpoint=arguments.checkpoint,
        out=arguments.out or Path("runs") / f"finetune_{arguments.task}",
        media_root=arguments.media_root,
        answers=arguments.answers,
        ranks=arguments.num_gpus,
    )
    return finetune(request, arguments.overrides)


def _score(arguments: argparse.Namespace) -> int:
    import json

    from unival.evaluation.result_files import score_files

    files = (arguments.predictions, arguments.references)
    found = score_files(arguments.metric, *files, task=arguments.task)
    print(json.dumps(found, indent=2))
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from unival.data.prepare import DATASETS
    from unival.data.prepare.base import Source, describe, prepare

    if arguments.dataset == "list":
        print(describe(DATASETS))
        return 0
    if arguments.dataset not in DATASETS:
        known = ", ".join(DATASETS)
        raise ValueError(f"unknown data set {arguments.dataset!r}; known: {known}")
    if arguments.source is None or arguments.out is None:
        raise ValueError("--source and --out are needed")
    options = dict(option.partition("=")[::2] for option in arguments.option)
    source = Source(arguments.source, arguments.media, options)
    return prepare(arguments.dataset, DATASETS[arguments.dataset], source, arguments.out)


def _plan(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from unival.config import load_config
    from unival.files import write_json
    from unival.planning.plan import Options, plan
    from unival.planning.render import text
    from unival.training.options import Run

    run = load_config(Run, arguments.config, arguments.overrides)
    known = {entry.name for entry in fields(Options)}
    given = {n: v for n, v in vars(arguments).items() if n in known and v is not None}
    given["rows"] = dict(arguments.rows)
    found = plan(run, arguments.gpus, arguments.ceilings, Options(**given))
    print(text(found))
    if arguments.out is not None:
        write_json(arguments.out, found.to_dict())
    return 0 if found.fits else 1


def _recipes(arguments: argparse.Namespace) -> int:
    from unival.recipes import write_recipes

    print(write_recipes(arguments.configs, arguments.out))
    return 0


def _box(text: str) -> tuple[float, float, float, float]:
    values = tuple(float(value) for value in text.split(","))
    if len(values) != 4:
        raise argparse.ArgumentTypeError("a box is x0,y0,x1,y1")
    return values  # type: ignore[return-value]


def _rows_of(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not name or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not SOURCE=N, rows of a source for `epochs`")
    return name, int(count)


def _positive(kind: type[int] | type[float]):  # type: ignore[no-untyped-def]
    def number(text: str) -> float:
        if not 0 < kind(text) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return kind(text)

    return number


def _add_data(data: argparse.ArgumentParser) -> None:
    actions = data.add_subparsers(required=True, metavar="action")

    def action(name: str, run: Callable[[argparse.Namespace], int], text: str, medium: str = ""):  # type: ignore[no-untyped-def]
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(action=run)
        if medium:
            sub.add_argument("paths", type=Path, nargs="+", help="files and folders")
            sub.add_argument("--layout", default="pretrain", help="columns of a .tsv")
            sub.add_argument("--medium", default=medium, help="what a .tsv's rows show")
            sub.add_argument("--media-root", type=Path, help="where a .tsv's paths start")
        return sub

    samples = action("make-samples", _make_samples, "make the tables and shards of the samples")
    samples.add_argument("--source", type=Path, default=Path("samples"))
    samples.add_argument("--out", type=Path, required=True)

    check = action("check", _check, "decode everything and name what is bad", "image")
    check.add_argument("--json", type=Path, help="results, a line each; kept by the next run")
    check.add_argument("--seconds", type=_positive(float), default=120.0, help="for one medium")

    shard = action("shard", _shard, "write tables, folders or COCO JSON as tar shards", "image")
    shard.add_argument("--out", type=Path, help="not needed to index tars")
    size = shard.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=_positive(int))
    size.add_argument("--max-bytes", type=_positive(int), help="of a shard (1 GiB)")

    prepared = action("prepare", _prepare, "write a published data set as shards")
    prepared.add_argument("dataset", help="its name; `list` names all and the files they want")
    prepared.add_argument("--source", type=Path, help="folder of its annotations")
    prepared.add_argument("--media", type=Path, help="folder of its media (the source's)")
    prepared.add_argument("--out", type=Path, help="folder of the shards")
    prepared.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")

    reencode = action("reencode", _reencode, "encode films and pictures anew", "video")
    reencode.add_argument("--out", type=Path, required=True)
    reencode.add_argument("--size", type=_positive(int), required=True, help="short side, pixels")
    form = reencode.add_mutually_exclusive_group()
    form.add_argument("--gop", type=_positive(int), default=8, help="frames between key frames")
    form.add_argument("--frames", choices=["jpeg"], help="films as JPEG frames")
    reencode.add_argument("--fps", type=_positive(float), help="JPEG frames a second")
    reencode.add_argument("--audio", action="store_true", help="films keep their sound")

    stats = action("stats", _stats, "count kinds, lengths and sizes", "image")
    stats.add_argument("--out", type=Path, required=True, help="folder of stats.json, stats.png")


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

    resume = command("resume", _resume, "go on with a run that has stopped")
    resume.add_argument("run", type=Path, help="the run's folder")
    resume.add_argument("--num-gpus", type=_positive(int), help="ranks; else as many as before")

    runs = commands.add_parser("runs", help="compare runs").add_subparsers(required=True)
    compare = runs.add_parser("compare", help="draw the curves of several runs into one picture")
    compare.set_defaults(handler=_compare)
    compare.add_argument("runs", type=Path, nargs="+", help="the runs' folders")
    compare.add_argument("--out", type=Path, default=Path("runs/compare.png"), help=".png or .svg")
    compare.add_argument("--metric", help="only this one, such as grad_norm or tasks/vqa")

    demo = command("demo", _demo, "train the tiny model on the samples and write a report")
    demo.add_argument("--num-gpus", type=_positive(int), default=1, help="processes")
    demo.add_argument("overrides", nargs="*", help="key=value")

    _add_data(command("data", _data, "check, shard, re-encode and count data; make the samples"))

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

    generate.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    generate.add_argument("--config", type=Path, help="the run's; else the one above --model")
    generate.add_argument("--fine-tuned", action="store_true", help="ask with fine-tuning prompts")

    for name, module, text in (
        ("evaluate", "unival.evaluate", "measure tasks of a run's model on its sources"),
        ("zero-shot", "unival.zero_shot", "measure a model on the data sets of a table"),
    ):
        # Their options are the module's own, which the launcher starts too.
        passed = commands.add_parser(name, help=text, add_help=False)
        passed.set_defaults(handler=_passed_on, module=module)
        passed.add_argument("--num-gpus", type=_positive(int), default=1)

    tune = command("finetune", _finetune, "fine-tune on your own table, by the recipe of a task")
    tune.add_argument("--task", required=True)
    tune.add_argument("--data", type=Path, required=True, help="folder of train, val and test")
    tune.add_argument("--from", dest="checkpoint", type=Path, required=True, help="a saved model")
    tune.add_argument("--out", type=Path, help="the run's folder (runs/finetune_TASK)")
    tune.add_argument(
        "--media-root", type=Path, help="where media paths start (the table's folder)"
    )
    tune.add_argument("--answers", type=Path, help="candidate answers, one a line")
    tune.add_argument("--num-gpus", type=_positive(int), default=1, help="processes")
    tune.add_argument("overrides", nargs="*", help="key=value")

    score = command("score", _score, "score a file of results against its references")
    score.add_argument(
        "--metric", choices=["caption", "vqa", "grounding", "accuracy"], required=True
    )
    score.add_argument("--predictions", type=Path, required=True)
    score.add_argument("--references", type=Path, required=True)
    score.add_argument("--task", default="", help="which, where an evaluation.json has several")

    planned = command("plan", _plan, "memory, time and cost of a run, predicted before it is run")
    planned.add_argument("--config", type=Path, required=True)
    planned.add_argument("--gpus", required=True, help="such as 8xA100-80 or 4xA6000")
    planned.add_argument("--ceilings", type=Path, help="of a GPU that configs/ceilings lacks")
    planned.add_argument("--price", type=float, help="of a GPU for an hour")
    planned.add_argument("--text", type=_positive(int), help="tokens of a padded source")
    planned.add_argument("--target", type=_positive(int), help="tokens of a padded target")
    planned.add_argument("--rows", type=_rows_of, nargs="*", default=[], metavar="SOURCE=N")
    planned.add_argument("--out", type=Path, help="the plan as JSON")
    planned.add_argument("overrides", nargs="*", help="key=value")

    recipes = command("recipes", _recipes, "write the table of fine-tuning recipes")
    recipes.add_argument("--configs", type=Path, default=Path("configs/finetune"))
    recipes.add_argument("--out", type=Path, default=Path("docs/recipes.md"))
    return top


DEFAULT_MODEL = Path("runs/demo/stages/image_video_text/model")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 where the input cannot be used."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and arguments.handler is not _passed_on:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return arguments.handler(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"unival: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
