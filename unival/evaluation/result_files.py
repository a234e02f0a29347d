"""Files of predictions and references, those of the official evaluations among them, and scores.

| metric      | predictions                           | references                           |
| ----------- | ------------------------------------- | ------------------------------------ |
| `caption`   | COCO results: `[{image_id, caption}]` | COCO annotations                     |
| `vqa`       | VQA results: `[{question_id, answer}]`| annotations of VQAv2, OK-VQA, VizWiz |
| `grounding` | `{id, box}`, the box may be null      | `{id, box}`                          |
| `accuracy`  | `{id, answer}`                        | `{id, answer}`                       |

A file named `.jsonl` holds an object a line, any other is JSON as a whole. VizWiz names a question
by its `image`. Boxes are x0, y0, x1, y1 in pixels of the original picture. An evaluation.json will
do for predictions, and for references of captions and boxes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from unival.data.fields import check_text, make_box, number
from unival.data.records import Origin, RecordError
from unival.data.tools.running import write_json
from unival.evaluation.caption import coco_caption_scores
from unival.evaluation.grounding import grounding_accuracy, size_contributions
from unival.evaluation.vqa import Accuracy, AnswerScores, exact_match, vqa_accuracy
from unival.generation.boxes import Box
from unival.tasks import TASKS

MAX_BYTES = 1 << 30
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # intersection over union, as in the original
QUESTION = ("question_id", "image")
TYPES = ("answer_type", "question_type")

T = TypeVar("T")
Entries = list[tuple[Origin, dict]]


def score_files(metric: str, predictions: Path, references: Path, task: str = "") -> dict[str, Any]:
    """Score a file of predictions.

    Args:
        metric: `caption`, `vqa`, `grounding` or `accuracy`.
        predictions, references: files as the module describes them.
        task: whose predictions are meant, where an evaluation.json has several of the metric.

    Returns:
        What JSON can hold: `metric`, `samples` and `scores`, which are fractions of 1 (CIDEr: of
        10). Captions have `missing` and `tokenizer` beside (see `CaptionScores`), answers `groups`
        with `accuracy` and `count`.

    Raises:
        ValueError: an unknown metric, a damaged file, or the ids of the two files differ.
        RecordError: a bad entry; the message names file, entry and field.
        FileNotFoundError: there is no such file.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    return {"metric": metric} | METRICS[metric](Path(predictions), Path(references), task)


def read_caption_results(path: Path, task: str = "") -> dict[str, str]:
    """The caption of each image; one without words is a caption too."""
    entries = _predicted(path, "caption", task, {"image_id": "id", "caption": "answer"})
    return _collect(entries, ("image_id",), _text("caption"))


def read_caption_references(path: Path, task: str = "") -> dict[str, list[str]]:
    """The captions of each image. One that `images` names may turn out to have none."""
    content = _json(path)
    if _is_evaluation(content):
        entries = _of_evaluation(path, content, "caption", task)
        return _collect(entries, ("id",), _texts("references"))
    captions: dict[str, list[str]] = {}
    if isinstance(content, dict) and "images" in content:
        images = _listed(path, content, "images")
        captions = _collect(images, ("id",), lambda entry, origin: [])
    for origin, entry in _listed(path, content, "annotations"):
        caption = check_text(_text("caption")(entry, origin), origin, "caption")
        captions.setdefault(_identity(entry, ("image_id",), origin), []).append(caption)
    return captions


@dataclass(frozen=True)
class VqaReferences:
    """By question the answers of the humans, and by `answer_type` and `question_type` its group,
    where the publisher gives one for every question."""

    answers: dict[str, list[str]]
    groups: dict[str, dict[str, str]]


def read_vqa_results(path: Path, task: str = "") -> dict[str, str]:
    """The answer to each question."""
    entries = _predicted(path, "accuracy", task, {"question_id": "id", "answer": "answer"})
    return _collect(entries, QUESTION, _text("answer"))


def read_vqa_references(path: Path) -> VqaReferences:
    """Annotations: an object with `annotations`, or the list that VizWiz gives."""
    content = _json(path)
    if isinstance(content, dict) and "questions" in content:
        raise ValueError(f"{path}: holds the questions; the file with their answers is needed")
    entries = _listed(path, content, "" if isinstance(content, list) else "annotations")
    groups = {
        name: _collect(entries, QUESTION, _text(name))
        for name in TYPES
        if all(name in entry for _, entry in entries)
    }
    return VqaReferences(_collect(entries, QUESTION, _human_answers), groups)


def read_predicted_boxes(path: Path, task: str = "") -> dict[str, Box | None]:
    """The box of each id, None where the model gave none. It may be empty or out of the picture."""
    entries = _predicted(path, "grounding", task, {"id": "id", "box": "box"})
    return _collect(entries, ("id",), _predicted_box)


def read_reference_boxes(path: Path, task: str = "") -> dict[str, Box]:
    """The box of each id."""
    entries = _predicted(path, "grounding", task, {"id": "id", "box": "box_reference"})
    return _collect(entries, ("id",), _reference_box)


def read_answers(path: Path, task: str = "") -> dict[str, str]:
    """The answer of each id."""
    entries = _predicted(path, "accuracy", task, {"id": "id", "answer": "answer"})
    return _collect(entries, ("id",), _text("answer"))


def write_caption_results(path: Path, captions: Mapping[str, str]) -> None:
    """Write COCO's file for submission, a list of `image_id` and `caption`.

    Raises:
        ValueError: an id is not a whole number, as those of COCO are.
    """
    write_json(path, [{"image_id": _whole(key), "caption": captions[key]} for key in captions])


def write_vqa_results(path: Path, answers: Mapping[str, str]) -> None:
    """Write VQAv2's file for submission, a list of `question_id` and `answer`.

    Raises:
        ValueError: an id is not a whole number, as those of VQAv2 are.
    """
    write_json(path, [{"question_id": _whole(key), "answer": answers[key]} for key in answers])


def _score_captions(predictions: Path, references: Path, task: str) -> dict[str, Any]:
    truth = read_caption_references(references, task)
    found = coco_caption_scores(read_caption_results(predictions, task), truth)
    return {"samples": len(truth)} | asdict(found)


def _score_vqa(predictions: Path, references: Path, task: str) -> dict[str, Any]:
    truth = read_vqa_references(references)
    return _told(vqa_accuracy(read_vqa_results(predictions, task), truth.answers, truth.groups))


def _score_boxes(predictions: Path, references: Path, task: str) -> dict[str, Any]:
    found, truth = read_predicted_boxes(predictions, task), read_reference_boxes(references, task)
    scores = grounding_accuracy(found, truth, THRESHOLDS)
    for threshold in THRESHOLDS:
        parts = size_contributions(found, truth, threshold)
        scores |= {f"Acc@{threshold:g}, of it {size}": value for size, value in parts.items()}
    return {"samples": len(truth), "scores": scores}


def _score_answers(predictions: Path, references: Path, task: str) -> dict[str, Any]:
    if references.suffix != ".jsonl" and _is_evaluation(_json(references)):
        raise ValueError(f"{references}: an evaluation keeps no confidences of right answers")
    return _told(exact_match(read_answers(predictions, task), read_answers(references)))


METRICS: dict[str, Callable[[Path, Path, str], dict[str, Any]]] = {
    "caption": _score_captions,
    "vqa": _score_vqa,
    "grounding": _score_boxes,
    "accuracy": _score_answers,
}


def _told(scores: AnswerScores) -> dict[str, Any]:
    def tell(found: Accuracy) -> dict[str, float]:
        return {"accuracy": found.value, "count": found.count}

    return {
        "samples": scores.overall.count,
        "scores": {"accuracy": scores.overall.value},
        "groups": {
            name: {group: tell(found) for group, found in groups.items()}
            for name, groups in scores.groups.items()
        },
    }


def _json(path: Path) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _lines(path: Path) -> Entries:
    """The objects of a file with one a line; blank lines are passed over."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes")
    entries = []
    with open(path, "rb") as lines:
        for row, line in enumerate(lines):
            origin = Origin(str(path), row)
            try:
                value = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise RecordError(origin, "line", f"not JSON: {error}") from error
            if line.strip():
                entries.append((origin, _object(value, origin, "line")))
    return entries


def _listed(path: Path, content: Any, name: str = "") -> Entries:
    """The objects of a list: the content itself, or what it calls `name`."""
    if name:
        if not isinstance(content, dict) or name not in content:
            raise ValueError(f"{path}: not an object with {name!r}")
        content = content[name]
    if not isinstance(content, list):
        raise ValueError(f"{path}: {name or 'content'}: {type(content).__name__}, not a list")
    origins = (Origin(str(path), f"{name}[{place}]") for place in range(len(content)))
    return [(o, _object(entry, o, "entry")) for o, entry in zip(origins, content, strict=True)]


def _predicted(path: Path, metric: str, task: str, fields: Mapping[str, str]) -> Entries:
    """The entries of a list, of lines, or of an evaluation.

    Args:
        fields: what an entry calls something, and what an evaluation calls it.
    """
    if path.suffix == ".jsonl":
        return _lines(path)
    content = _json(path)
    if not _is_evaluation(content):
        return _listed(path, content)
    return [
        (origin, {name: entry.get(theirs) for name, theirs in fields.items()})
        for origin, entry in _of_evaluation(path, content, metric, task)
    ]


def _is_evaluation(content: Any) -> bool:
    return isinstance(content, dict) and {"metrics", "predictions"} <= content.keys()


def _of_evaluation(path: Path, content: dict, metric: str, task: str) -> Entries:
    """The predictions of the one task of a metric, or of the task named."""
    of_task: dict[str, Entries] = {}
    for origin, entry in _listed(path, content, "predictions"):
        name = _text("task")(entry, origin)
        if name not in TASKS:
            raise RecordError(origin, "task", f"unknown task {name!r}; known: {', '.join(TASKS)}")
        if TASKS[name].metric == metric:
            of_task.setdefault(name, []).append((origin, entry))
    names = ", ".join(of_task)
    if not of_task:
        raise ValueError(f"{path}: has no predictions of a task with the metric {metric}")
    if task and task not in of_task:
        raise ValueError(f"{path}: has {metric} predictions of {names}, not of {task!r}")
    if not task and len(of_task) > 1:
        raise ValueError(f"{path}: has {metric} predictions of {names}; name one of these tasks")
    return of_task[task or names]


def _collect(
    entries: Entries, ids: Sequence[str], convert: Callable[[dict, Origin], T]
) -> dict[str, T]:
    """By id what each entry gives; an id that comes twice is refused."""
    found: dict[str, T] = {}
    for origin, entry in entries:
        key = _identity(entry, ids, origin)
        if key in found:
            raise RecordError(origin, ids[0], f"{key!r} comes a second time")
        found[key] = convert(entry, origin)
    return found


def _identity(entry: dict, ids: Sequence[str], origin: Origin) -> str:
    """The first of some fields that is there, a text or a whole number, as a text."""
    name = next((name for name in ids if name in entry), None)
    if name is None:
        raise RecordError(origin, ids[0], "missing")
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RecordError(origin, name, f"{str(value)[:40]!r} is no id: a text or a whole number")
    return str(value)


def _object(value: Any, origin: Origin, field: str) -> dict:
    if not isinstance(value, dict):
        raise RecordError(origin, field, f"{type(value).__name__}, not an object")
    return value


def _get(entry: dict, name: str, kind: type[T], origin: Origin) -> T:
    if name not in entry:
        raise RecordError(origin, name, "missing")
    value = entry[name]
    if not isinstance(value, kind):
        raise RecordError(origin, name, f"{type(value).__name__}, not {kind.__name__}")
    return value


def _text(name: str) -> Callable[[dict, Origin], str]:
    return lambda entry, origin: _get(entry, name, str, origin)


def _texts(name: str) -> Callable[[dict, Origin], list[str]]:
    def convert(entry: dict, origin: Origin) -> list[str]:
        texts = _get(entry, name, list, origin)
        if not all(isinstance(text, str) for text in texts):
            raise RecordError(origin, name, "not a list of texts")
        return texts

    return convert


def _human_answers(entry: dict, origin: Origin) -> list[str]:
    """The `answer` of each object in `answers`."""
    answers = _get(entry, "answers", list, origin)
    return [_text("answer")(_object(each, origin, "answers"), origin) for each in answers]


def _reference_box(entry: dict, origin: Origin) -> Box:
    return make_box(_get(entry, "box", list, origin), origin)


def _predicted_box(entry: dict, origin: Origin) -> Box | None:
    if "box" in entry and entry["box"] is None:
        return None
    corners = [number(value, origin, "box") for value in _get(entry, "box", list, origin)]
    if len(corners) != 4:
        raise RecordError(origin, "box", f"{len(corners)} numbers; a box has 4: x0,y0,x1,y1")
    return corners[0], corners[1], corners[2], corners[3]


def _whole(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise ValueError(f"id {key!r} is not a whole number, which the official format needs")
    return int(key)
