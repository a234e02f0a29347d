"""Ask the model the tasks about every record of some tables and score its answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from unival.data.batch import collate
from unival.data.media import Loading, MediaLoader, MediaOptions
from unival.data.records import Answer, Record, RecordError
from unival.data_gpu.image import decode_image
from unival.evaluation.caption import caption_scores, tokenize
from unival.evaluation.cider_d import cider_d
from unival.evaluation.codes import CodeScores, code_metrics, score_codes
from unival.evaluation.grounding import grounding_accuracy
from unival.evaluation.items import Catalogue, Item, Table, task_items
from unival.evaluation.thumbnails import write_thumbnail
from unival.evaluation.vqa import accuracy
from unival.generation.boxes import ids_to_box
from unival.generation.generate import (
    AnswerList,
    answer_list,
    inference_example,
    search_answers,
)
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks import TASKS
from unival.tasks.base import Decoding, Task, assemble, with_decoding
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
    decoding: Mapping[str, Decoding] | None = None,
    fine_tuned: Collection[str] = (),
    batch_size: int = 16,
    limit: int | None = None,
    folder: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> Evaluation:
    """Answers and scores of the model on the records of `tables`.

    With a group its ranks share the batches, whose rows do not depend on the number of ranks: the
    scores are those of one rank.

    Args:
        tables: by name; each has a length and gives records.
        tasks: keys of `unival.tasks.TASKS`.
        options: sizes of media; what is random in them is replaced by its fixed form.
        loading: how media are decoded; the default if None.
        answers: the data set's answers, for tasks that choose from a list.
        decoding: by task, instead of the task's own.
        fine_tuned: tasks that are asked as in fine-tuning.
        batch_size: items searched at once.
        limit: items of a task at most (records for matching, which makes two of each).
        folder: where thumbnails go; None writes none. `save` is the caller's.
        seed: of the negatives of matching tasks.
        progress: called with (task, items done, items of the task).
        group: of ranks that hold the same model and tables; all must call.

    Returns:
        Metrics by task: CIDEr etc., `accuracy` or `Acc@0.5`, always with `samples` and `skipped`.
        Of a group, rank 0 has it all and the others nothing.

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
                task = TASKS[name]
                if decoding is not None and name in decoding:
                    task = with_decoding(task, decoding[name])
                asking = Asking(
                    task, model, vocabulary, loader, options, name in fine_tuned, folder, answers
                )
                items, skipped = task_items(task, catalogue, vocabulary, seed, limit)
                answered = asking.answer_all(items, batch_size, progress, group)
                if answered is not None:
                    answered.skipped += skipped
                    result.metrics[name] = answered.metrics()
                    result.predictions += answered.predictions
    finally:
        model.train(training)
    if catalogue.unreadable and _rank(group) == 0:
        result.metrics["tables"] = {"skipped": float(catalogue.unreadable)}
    return result


def _key(record: Record) -> tuple:
    """The same for records that show the same medium and box."""
    return record.media_key, record.box


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def batches_of(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """The items in order, in batches of one medium and at most `batch_size`."""
    batches: list[list[Item]] = []
    for item in items:
        last = batches[-1] if batches else []
        if 0 < len(last) < batch_size and last[0].record.medium == item.record.medium:
            last.append(item)
        else:
            batches.append([item])
    return batches


@dataclass
class Answered:
    """What came of some items of one task, in order."""

    task: Task
    predictions: list[Prediction] = field(default_factory=list)
    truths: list[list[Answer]] = field(default_factory=list)
    codes: list[CodeScores] = field(default_factory=list)
    skipped: int = 0

    def add(self, other: Answered) -> None:
        self.predictions += other.predictions
        self.truths += other.truths
        self.codes += other.codes
        self.skipped += other.skipped

    def metrics(self) -> dict[str, float]:
        """The task's scores; only the counts where every item was skipped."""
        scores: dict[str, float] = {}
        texts = {str(number): p.answer for number, p in enumerate(self.predictions)}
        if texts and self.task.metric == "caption":
            references = {str(n): p.references for n, p in enumerate(self.predictions)}
            scores = caption_scores(texts, references)
            # As the published runs chose: marks are gone, letters keep their case.
            worded = {n: [r for r in texts if r.split()] for n, texts in references.items()}
            scores["CIDEr-D"] = cider_d(texts, worded)
        elif texts and self.task.metric == "grounding":
            boxes = {str(n): p.box for n, p in enumerate(self.predictions)}
            truth = {str(n): p.box_reference for n, p in enumerate(self.predictions)}
            scores = grounding_accuracy(boxes, truth)  # type: ignore[arg-type]
        elif texts and self.task.metric == "accuracy":
            truths = {str(n): truth for n, truth in enumerate(self.truths) if truth}
            if truths:
                scores["accuracy"] = accuracy({n: texts[n] for n in truths}, truths)
            if len(truths) < len(texts):  # their publisher keeps the answers to himself
                scores["unanswered"] = float(len(texts) - len(truths))
        elif texts and self.task.metric == "codes":
            scores = code_metrics(self.codes)
        return scores | {
            "samples": float(len(self.predictions)),
            "skipped": float(self.skipped),
        }


@dataclass
class Asking:
    """How one task is asked."""

    task: Task
    model: UnivalForConditionalGeneration
    vocabulary: Vocabulary
    loader: MediaLoader
    options: MediaOptions
    fine_tuning: bool
    folder: Path | None
    answers: Sequence[str]

    def answer_all(
        self,
        items: Sequence[Item],
        batch_size: int,
        progress: Progress | None,
        group: dist.ProcessGroup | None,
    ) -> Answered | None:
        """Search the answers of all items; None on every rank but the first."""
        choices = answer_list(self.task, self.answers, self.vocabulary)
        rank, size = _rank(group), 1 if group is None else dist.get_world_size(group)
        mine: dict[int, Answered] = {}
        done = 0
        for number, batch in enumerate(batches_of(items, batch_size)):
            if number % size == rank:
                mine[number] = self._answer_batch(batch, choices)
            done += len(batch)
            if progress is not None:
                progress(self.task.name, done, len(items))
        parts: list[dict[int, Answered]] = [mine]
        if group is not None:
            parts = [{} for _ in range(size)]
            dist.gather_object(mine, parts if rank == 0 else None, group=group, group_dst=0)
        if rank:
            return None
        found = {number: answered for part in parts for number, answered in part.items()}
        whole = Answered(self.task)
        for number in sorted(found):
            whole.add(found[number])
        return whole

    def _answer_batch(self, items: Sequence[Item], choices: AnswerList | None) -> Answered:
        tensors: dict[tuple, Tensor] = {}
        records = {_key(item.record): item.record for item in items}
        loaded = self.loader.load(list(records.values()), [""] * len(records))
        media = dict(zip(records, loaded, strict=True))
        answered = Answered(self.task)
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
                answered.skipped += 1
                continue
            tensors.setdefault(key, found.tensor)
            asked.append((item, source, found.tensor))
            example = inference_example(self.task, source, self.fine_tuning)
            if self.task.metric == "codes":
                target = self.vocabulary.code_ids(item.record.codes)
                example = assemble(source, target)
            examples.append((example, list(tensors).index(key)))
        if not asked:
            return answered
        batch = collate(examples, list(tensors.values()), items[0].record.medium)
        outputs = self._outputs(batch, choices, answered)
        for (item, source, tensor), tokens in zip(asked, outputs, strict=True):
            answered.truths.append(item.truth)
            answered.predictions.append(self._prediction(item, source, tensor, tokens))
        return answered

    def _outputs(
        self, batch: Mapping[str, Tensor], choices: AnswerList | None, answered: Answered
    ) -> list[list[int]]:
        """The tokens of every row's answer. Codes are not searched for but foretold one by one."""
        if self.task.metric != "codes":
            found = search_answers(self.model, self.task, batch, choices)
            return [hypothesis.tokens for hypothesis in found]
        answered.codes = score_codes(self.model, batch)
        return [self.vocabulary.code_ids(score.likeliest) for score in answered.codes]

    def _check_truth(self, item: Item) -> None:
        """Raises RecordError where there is nothing to compare an answer with."""
        if item.record.kind == "visual_grounding" and item.record.box is None:
            missing = "box"
        elif self.task.metric == "grounding":
            missing = ""
        elif self.task.metric == "codes":
            missing = "" if item.record.codes else "codes"
        elif self.task.metric == "caption":
            missing = "" if any(tokenize(answer.text) for answer in item.truth) else "captions"
        else:
            missing = "" if item.truth or item.record.unanswered else "answers"
        if missing:
            problem = f"is empty, but evaluating {self.task.name!r} needs it"
            raise RecordError(item.record.origin, missing, problem)

    def _prediction(
        self, item: Item, source: list[int], tensor: Tensor, tokens: list[int]
    ) -> Prediction:
        record, box, size = item.record, None, None
        if record.box is not None:
            size = decode_image(record.media).size
            if self.task.metric == "grounding":
                box = ids_to_box(tokens, *size, self.options.image_size)
        return Prediction(
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
