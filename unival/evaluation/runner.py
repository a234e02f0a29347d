"""Ask the model the tasks about every record of some tables and score its answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from unival.data.batch import collate
from unival.data.media import Loading, MediaLoader, MediaOptions
from unival.data.records import Answer, Record, RecordError
from unival.data_gpu.image import decode_image
from unival.evaluation.caption import caption_scores, tokenize
from unival.evaluation.grounding import grounding_accuracy
from unival.evaluation.items import Catalogue, Item, Table, task_items
from unival.evaluation.thumbnails import write_thumbnail
from unival.evaluation.vqa import accuracy
from unival.generation.boxes import ids_to_box
from unival.generation.generate import answer_list, inference_example, search_answers
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks import TASKS
from unival.tasks.base import Task
from unival.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

FILE = "evaluation.json"

Progress = Callable[[str, int, int], None]


@dataclass
class Prediction:
    """What the model answered to one item, beside the truth.

    `thumbnail` is relative to the evaluation's folder, empty without one. Boxes are x0, y0, x1, y1
    in pixels of the original picture, whose width and height are `picture_size` where there is a
    box. In grounded captioning `box_reference` is the region asked about.
    """

    task: str
    medium: str
    origin: str
    id: str
    question: str
    answer: str
    references: list[str]
    box: list[float] | None = None
    box_reference: list[float] | None = None
    thumbnail: str = ""
    picture_size: list[int] | None = None


@dataclass
class Evaluation:
    """Scores of each task (with `samples` and `skipped`), and every prediction."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)

    def save(self, folder: str | Path) -> Path:
        """Write evaluation.json and return its path."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read what `save` wrote; raises ValueError, naming the file, if it is not that."""
        path = Path(folder) / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["metrics"], [Prediction(**item) for item in content["predictions"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not an evaluation: {error!r}") from error


def evaluate(
    model: UnivalForConditionalGeneration,
    vocabulary: Vocabulary,
    tables: Mapping[str, Table],
    tasks: Sequence[str],
    options: MediaOptions,
    *,
    loading: Loading | None = None,
    answers: Sequence[str] = (),
    fine_tuned: Collection[str] = (),
    batch_size: int = 16,
    limit: int | None = None,
    folder: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Answers and scores of the model on the records of `tables`.

    Args:
        tables: by name; each has a length and gives records.
        tasks: keys of `unival.tasks.TASKS`.
        options: sizes of media; what is random in them is replaced by its fixed form.
        loading: how media are decoded; the default if None.
        answers: the data set's answers, for tasks that choose from a list.
        fine_tuned: tasks that are asked as in fine-tuning.
        batch_size: items searched at once.
        limit: items of a task at most (records for matching, which makes two of each).
        folder: where thumbnails go; None writes none. `save` is the caller's.
        seed: of the negatives of matching tasks.
        progress: called with (task, items done, items of the task).

    Returns:
        Metrics by task: CIDEr etc., `accuracy` or `Acc@0.5`, always with `samples` and `skipped`.

    Raises:
        ValueError: an unknown task, or a task whose records are in none of the tables.
    """
    unknown = [name for name in (*tasks, *fine_tuned) if name not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    options = options.fixed()
    catalogue = Catalogue.scan(tables)
    result = Evaluation()
    training = model.training
    model.eval()
    try:
        with MediaLoader(options, loading or Loading()) as loader:
            for name in tasks:
                run = TaskRun(
                    TASKS[name], model, vocabulary, loader, options, name in fine_tuned, folder
                )
                items, run.skipped = task_items(run.task, catalogue, vocabulary, seed, limit)
                run.answer_all(items, answers, batch_size, progress)
                result.metrics[name] = run.metrics()
                result.predictions += run.predictions
    finally:
        model.train(training)
    if catalogue.unreadable:
        result.metrics["tables"] = {"skipped": float(catalogue.unreadable)}
    return result


def _key(record: Record) -> tuple:
    """The same for records that show the same medium and box."""
    return record.media_key, record.box


@dataclass
class TaskRun:
    """One task's answers as they come in."""

    task: Task
    model: UnivalForConditionalGeneration
    vocabulary: Vocabulary
    loader: MediaLoader
    options: MediaOptions
    fine_tuning: bool
    folder: Path | None
    predictions: list[Prediction] = field(default_factory=list)
    truths: list[list[Answer]] = field(default_factory=list)
    skipped: int = 0

    def answer_all(
        self,
        items: list[Item],
        answers: Sequence[str],
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        """Search the answers in batches of one medium."""
        choices = answer_list(self.task, answers, self.vocabulary)
        start = 0
        while start < len(items):
            batch = items[start : start + batch_size]
            batch = [item for item in batch if item.record.medium == batch[0].record.medium]
            self._answer_batch(batch, choices)
            start += len(batch)
            if progress is not None:
                progress(self.task.name, start, len(items))

    def _answer_batch(self, items: list[Item], choices: object) -> None:
        tensors: dict[tuple, Tensor] = {}
        records = {_key(item.record): item.record for item in items}
        loaded = self.loader.load(list(records.values()), [""] * len(records))
        media = dict(zip(records, loaded, strict=True))
        asked, examples = [], []
        for item in items:
            key = _key(item.record)
            found = media[key]
            try:
                self._check_truth(item)
                if isinstance(found, RecordError):
                    raise found
                source = item.source or self.task.prompt(
                    item.record, self.vocabulary, found.box, self.fine_tuning
                )
            except RecordError as error:
                logger.warning("not evaluated: %s", error)
                self.skipped += 1
                continue
            tensors.setdefault(key, found.tensor)
            asked.append((item, source, found.tensor))
            example = inference_example(self.task, source, self.fine_tuning)
            examples.append((example, list(tensors).index(key)))
        if not asked:
            return
        batch = collate(examples, list(tensors.values()), items[0].record.medium)
        answered = search_answers(self.model, self.task, batch, choices)
        for (item, source, tensor), hypothesis in zip(asked, answered, strict=True):
            self._keep(item, source, tensor, hypothesis.tokens)

    def _check_truth(self, item: Item) -> None:
        """Raises RecordError where there is nothing to compare an answer with."""
        if item.record.kind == "visual_grounding" and item.record.box is None:
            missing = "box"
        elif self.task.metric == "grounding":
            missing = ""
        elif self.task.metric == "caption":
            missing = "" if any(tokenize(answer.text) for answer in item.truth) else "captions"
        else:
            missing = "" if item.truth else "answers"
        if missing:
            problem = f"is empty, but evaluating {self.task.name!r} needs it"
            raise RecordError(item.record.origin, missing, problem)

    def _keep(self, item: Item, source: list[int], tensor: Tensor, tokens: list[int]) -> None:
        record, box, size = item.record, None, None
        if record.box is not None:
            size = decode_image(record.media).size
            if self.task.metric == "grounding":
                box = ids_to_box(tokens, *size, self.options.image_size)
        self.truths.append(item.truth)
        self.predictions.append(
            Prediction(
                task=self.task.name,
                medium=record.medium,
                origin=str(record.origin),
                id=record.id,
                question=self.vocabulary.decode(source).strip(),
                answer=self.task.answer(tokens, self.vocabulary),
                references=[answer.text for answer in item.truth],
                box=None if box is None else list(box),
                box_reference=None if record.box is None else list(record.box),
                thumbnail=write_thumbnail(record, tensor, self.options, self.folder),
                picture_size=None if size is None else list(size),
            )
        )

    def metrics(self) -> dict[str, float]:
        """The task's scores; only the counts where every item was skipped."""
        scores: dict[str, float] = {}
        texts = {str(number): p.answer for number, p in enumerate(self.predictions)}
        if texts and self.task.metric == "caption":
            references = {str(n): p.references for n, p in enumerate(self.predictions)}
            scores = caption_scores(texts, references)
        elif texts and self.task.metric == "grounding":
            boxes = {str(n): p.box for n, p in enumerate(self.predictions)}
            truth = {str(n): p.box_reference for n, p in enumerate(self.predictions)}
            scores = grounding_accuracy(boxes, truth)  # type: ignore[arg-type]
        elif texts and self.task.metric == "accuracy":
            scores["accuracy"] = accuracy(texts, {str(n): t for n, t in enumerate(self.truths)})
        return scores | {
            "samples": float(len(self.predictions)),
            "skipped": float(self.skipped),
        }
