"""OK-VQA 1.1: questions and annotations on the pictures of COCO 2014."""

from __future__ import annotations

from unival.data.prepare.base import DataSet, Entries, Prepared, Source
from unival.data.prepare.vqav2 import best_answers, coco_questions, spread


def read(source: Source) -> Prepared:
    """One row a question. The public validation part is the one that papers report on: `test`."""
    train, val, test = (Entries(source.media) for _ in range(3))
    spread(coco_questions(source, "", "train2014", "okvqa"), train, val)
    for row in coco_questions(source, "", "val2014", "okvqa"):
        test.add(row)
    answers = best_answers(train, val, test)
    notes = (
        "test is the questions of val2014, which papers report on; val is held out of train2014: "
        "the questions on 5% of its pictures",
        f"answers: the {len(answers)} best of a question of train2014 or val2014; the original "
        "takes its candidates from both too",
    )
    return Prepared({"train": train, "val": val, "test": test}, answers, notes)


DATASET = DataSet(
    title="OK-VQA",
    needs=(
        "OpenEnded_mscoco_{train2014,val2014}_questions.json",
        "mscoco_{train2014,val2014}_annotations.json",
        "train2014/*.jpg and val2014/*.jpg of COCO 2014 (the media folder)",
    ),
    read=read,
)
