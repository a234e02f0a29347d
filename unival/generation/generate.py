"""Ask the model one of its tasks about a user's own file, and the search that tasks share."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unival.data.batch import MEDIUM_KEYS, collate
from unival.data.media import MediaOptions, load_media
from unival.data.records import MEDIUM_OF_KIND, Answer, Origin, Record, RecordError
from unival.data_gpu.image import decode_image
from unival.generation.boxes import Box, ids_to_box
from unival.generation.candidates import AnswerList, score_candidates
from unival.generation.constraints import BinConstraint, RangeConstraint, TrieConstraint
from unival.generation.sampling import sample
from unival.generation.search import Hypothesis, LogitsConstraint, SearchOptions, beam_search
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks import TASKS
from unival.tasks.base import Decoding, Example, Task, decoder_prompt
from unival.vocabulary import EOS, FIRST_CODE, NUM_CODES, PAD, Vocabulary

# What a user must say beside the medium; everything else is refused.
WANTED = {
    "image_text_matching": ("text",),
    "video_text_matching": ("text",),
    "vqa": ("question",),
    "video_qa": ("question",),
    "answer_matching": ("question", "text"),
    "grounding": ("text",),
    "grounded_caption": ("box",),
    "visual_entailment": ("text",),
    "image_generation": ("text",),
}


@dataclass(frozen=True)
class GeneratedAnswer:
    """text as a person reads it; score of the search; box in pixels of the user's picture."""

    text: str
    score: float
    box: Box | None = None


def answer_list(task: Task, answers: Sequence[str], vocabulary: Vocabulary) -> AnswerList | None:
    """The answers a task may give: its own candidates, else the data set's `answers`.

    None where the task's search has no such constraint or there is no list: the search is free.
    Raises ValueError, naming the answer, as `AnswerList.of` and `AnswerList.check` do.
    """
    choices = task.candidates or answers
    if task.decoding.constraint != "answers" or not choices:
        return None
    found = AnswerList.of(choices, vocabulary)
    found.check(task.decoding.max_length)
    return found


def inference_example(task: Task, source: list[int], fine_tuning: bool = False) -> Example:
    """A source as `collate` takes it; the decoder's input is where the search starts from."""
    prompt = decoder_prompt(task, source, fine_tuning)
    return Example(source, prompt, prompt)


def to_model(
    model: UnivalForConditionalGeneration, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The encoder's part of a batch on the model's device; pixels in the model's dtype.

    Sounds stay float32: the spectrogram is computed in float32 whatever the model's dtype.
    """
    names = ("input_ids", "attention_mask", "media_index", *MEDIUM_KEYS.values())
    moved = {name: batch[name].to(model.device) for name in names if name in batch}
    if not {*MEDIUM_KEYS.values()} & moved.keys():
        moved.pop("media_index", None)
    for name in ("pixel_values", "video_values"):
        if name in moved:
            moved[name] = moved[name].to(model.dtype)
    return moved


@torch.inference_mode()
def search_answers(
    model: UnivalForConditionalGeneration,
    task: Task,
    batch: Mapping[str, Tensor],
    choices: AnswerList | None = None,
    beam_size: int | None = None,
    decoding: Decoding | None = None,
) -> list[Hypothesis]:
    """The best hypothesis of every row, without the decoder's prompt.

    Args:
        model: in eval mode.
        batch: of `collate` over examples of `inference_example`.
        choices: of `answer_list`; used where the decoding's constraint is "answers".
        beam_size: instead of the decoding's; no matter where all candidates are scored.
        decoding: instead of the task's.

    Raises:
        ValueError: scoring "all_candidates" without choices, a choice longer than max_length, or
            a row that cannot end within max_length.
    """
    rules = decoding or task.decoding
    if beam_size is not None:
        rules = replace(rules, beam_size=beam_size)
    if rules.constraint != "answers":
        choices = None
    if choices is not None:
        choices.check(rules.max_length)
    if rules.scoring == "beam":
        return _search(model, batch, rules, choices)
    if choices is None:
        raise ValueError(f"task {task.name!r}: scoring 'all_candidates' needs a list of answers")
    encoder = model.encoder(**to_model(model, batch))
    prompts = batch["decoder_input_ids"].to(model.device)
    return score_candidates(model, encoder, choices, prompts, rules.temperature).best(choices)


def _search(
    model: UnivalForConditionalGeneration,
    batch: Mapping[str, Tensor],
    rules: Decoding,
    choices: AnswerList | None,
) -> list[Hypothesis]:
    prompts = batch["decoder_input_ids"]
    lengths = ((prompts != PAD).sum(dim=1) - 1).tolist()
    limit, constraints = rules.max_length, list[LogitsConstraint]()
    if choices is not None:
        limit = choices.longest
        constraints.append(TrieConstraint(choices.trie, lengths, rules.beam_size))
    elif rules.constraint == "bins":
        constraints.append(BinConstraint())
    elif rules.constraint == "codes":
        constraints.append(RangeConstraint(FIRST_CODE, FIRST_CODE + NUM_CODES))
    options = SearchOptions.of(rules, rules.beam_size, limit + max(lengths))
    encoder = model.encoder(**to_model(model, batch))
    prefix = prompts[:, 1:].to(model.device) if max(lengths) else None
    code_mask = None
    if rules.constraint == "codes":
        code_mask = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    if rules.top_k is not None:
        drawn = sample(
            model,
            encoder,
            samples=1,
            max_length=options.max_length,
            min_length=rules.min_length,
            top_k=rules.top_k,
            temperature=rules.temperature,
            constraints=constraints,
            prefix=prefix,
            code_mask=code_mask,
            generator=torch.Generator(model.device).manual_seed(0),
        )
        return [
            _drawn(tokens, logs, length)
            for tokens, logs, length in zip(
                drawn.tokens[:, 0].tolist(), drawn.log_probs[:, 0].tolist(), lengths, strict=True
            )
        ]
    found = beam_search(model, encoder, options, constraints, prefix, code_mask)
    return [
        replace(best[0], tokens=best[0].tokens[length:])
        for best, length in zip(found, lengths, strict=True)
    ]


def _drawn(tokens: list[int], log_probs: list[float], prompt: int) -> Hypothesis:
    """A sample without its prompt and padding; its score is the sum of the log-probabilities."""
    end = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
    return Hypothesis(tokens[prompt:end], sum(log_probs), log_probs[prompt:end])


def generate_answer(
    model: UnivalForConditionalGeneration,
    vocabulary: Vocabulary,
    task_name: str,
    *,
    image: str | Path | None = None,
    video: str | Path | None = None,
    audio: str | Path | None = None,
    question: str = "",
    text: str = "",
    box: Sequence[float] | None = None,
    options: MediaOptions | None = None,
    answers: Sequence[str] = (),
    fine_tuning: bool = False,
    beam_size: int | None = None,
) -> GeneratedAnswer:
    """Ask one task about one file.

    Args:
        task_name: a key of `unival.tasks.TASKS`.
        image, video, audio: the file; exactly one, of the medium that the task is about.
        question: for questions.
        text: the phrase (grounding), caption (matching), hypothesis (visual_entailment) or answer
            to check (answer_matching).
        box: x0, y0, x1, y1 in pixels of the picture (grounded_caption).
        answers: choose among these, in tasks that answer from a list; otherwise free text.
        fine_tuning: ask as in fine-tuning.

    Raises:
        ValueError: unknown task; a missing, unfitting or unreadable file or option.
    """
    if task_name not in TASKS:
        raise ValueError(f"unknown task {task_name!r}; known: {', '.join(TASKS)}")
    if beam_size is not None and beam_size < 1:
        raise ValueError(f"beam_size is at least 1, got {beam_size}")
    options = options or MediaOptions()
    task = TASKS[task_name]
    kind, file = _choose_medium(task, {"image": image, "video": video, "audio": audio})
    _check_options(task, {"question": question, "text": text, "box": box})
    record = _record(task, kind, file, question, text, box)
    try:
        medium, seen_box = load_media(record, options.fixed(), random.Random(0))
    except RecordError as error:
        raise ValueError(f"{error.field}: {error.problem}") from error
    source = task.prompt(record, vocabulary, seen_box, fine_tuning)
    batch = collate([(inference_example(task, source, fine_tuning), 0)], [medium], record.medium)
    choices = answer_list(task, answers, vocabulary)
    training = model.training
    model.eval()
    try:
        best = search_answers(model, task, batch, choices, beam_size)[0]
    finally:
        model.train(training)
    found = None
    if task.metric == "grounding":
        width, height = decode_image(file).size
        found = ids_to_box(best.tokens, width, height, options.image_size)
    return GeneratedAnswer(task.answer(best.tokens, vocabulary), best.score, found)


def _choose_medium(task: Task, files: dict[str, str | Path | None]) -> tuple[str, Path]:
    """The record kind that fits the file given, and the file."""
    kinds = {MEDIUM_OF_KIND[kind]: kind for kind in task.kinds}
    given = [name for name, file in files.items() if file is not None]
    if "text" in kinds and not given:
        return kinds["text"], Path("text")
    wanted = " or ".join(f"{name}=" for name in kinds if name != "text") or "none"
    if len(given) != 1 or given[0] not in kinds:
        got = " and ".join(f"{name}=" for name in given) or "no file"
        raise ValueError(f"task {task.name!r} wants one file as {wanted}, got {got}")
    return kinds[given[0]], Path(str(files[given[0]]))


def _check_options(task: Task, options: dict[str, object]) -> None:
    wanted = WANTED.get(task.name, ())
    for name, value in options.items():
        blank = value is None or (isinstance(value, str) and not value.strip())
        if name in wanted and blank:
            raise ValueError(f"task {task.name!r} needs {name}=")
        if name not in wanted and not blank:
            uses = " and ".join(f"{option}=" for option in wanted) or "only the file"
            raise ValueError(f"task {task.name!r} makes no use of {name}=; it takes {uses}")


def _record(
    task: Task, kind: str, file: Path, question: str, text: str, box: Sequence[float] | None
) -> Record:
    if box is not None:
        if len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise ValueError(f"box: {tuple(box)} is not x0, y0, x1, y1 with x0 < x1 and y0 < y1")
        box = tuple(float(value) for value in box)
    return Record(
        id=file.name,
        kind=kind,
        media=file,
        origin=Origin(str(file), 0),
        captions=(text,) if text else (),
        question=question,
        answers=(Answer(text),) if text else (),
        box=box,  # type: ignore[arg-type]
    )
