"""Miniatures of the files that publishers of image data sets distribute, and what is in them.

Every case writes its files and pictures to a folder and says which records must come out of the
shards: by split and id, the fields that are not empty, `media` as the picture's name.
"""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from unival.data.prepare import (
    coco_caption,
    coco_image_generation,
    gqa,
    nocaps,
    okvqa,
    refcoco,
    snli_ve,
    visual_genome,
    vizwiz,
    vqav2,
    web_captions,
)
from unival.data.prepare.base import DataSet

COLOURS = itertools.product(range(0, 256, 5), repeat=3)
HALF = "\ud800"  # half a character: JSON can say it, UTF-8 cannot


@dataclass(frozen=True)
class Case:
    """
    records  split -> id -> fields; a split named `train+val` lies in the two
    held_out  media that `train+val` puts into val
    bad      split -> field -> bad rows
    notes    texts that must stand in the notes
    """

    name: str
    dataset: DataSet
    write: Callable[[Path], None]
    records: dict[str, dict[str, dict]]
    bad: dict[str, dict[str, int]] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    held_out: int = 0


def picture(folder: Path, *names: str) -> None:
    """A picture of 1 x 1 for each name, no two alike."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.suffix == ".png" else "JPEG"
        Image.new("RGB", (1, 1), next(COLOURS)).save(path, kind, quality=100, subsampling=0)


def write(folder: Path, name: str, content: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco(part: str, number: int) -> str:
    return f"{part}/COCO_{part}_{number:012}.jpg"


# --- COCO captions ---


def coco_image(number: int, split: str, *raw: object, part: str = "train2014", **changed) -> dict:
    return {
        "filepath": part,
        "filename": f"COCO_{part}_{number:012}.jpg",
        "sentids": list(range(len(raw))),
        "imgid": number,
        "split": split,
        "cocoid": number,
        "sentences": [
            {"tokens": ["a"], "raw": text, "imgid": number, "sentid": place}
            for place, text in enumerate(raw)
        ],
    } | changed


def write_coco_caption(folder: Path) -> None:
    picture(folder, coco("train2014", 9), *(coco("val2014", n) for n in (42, 73, 74)))
    images = [
        coco_image(9, "train", " A man,\n\twith a bike. ", "two"),
        coco_image(42, "restval", "a dog", part="val2014"),
        coco_image(73, "val", "one", " ", "other", part="val2014"),
        coco_image(74, "test", "last", part="val2014"),
        coco_image(1, "dev", "unknown split"),
        coco_image(73, "val", "the same id", part="val2014"),
        coco_image(2, "train", "no picture"),
        coco_image(3, "train", "outside", filename="../../secret.jpg"),
        coco_image(4, "train", "half", filename=HALF),
        coco_image(5, "train", sentences="a text"),
        coco_image(6, "test", cocoid="6"),
        coco_image(7, "test"),
        "no object",
    ]
    write(folder, "dataset_coco.json", {"images": images, "dataset": "coco"})


COCO_CAPTION = Case(
    "coco_caption",
    coco_caption.DATASET,
    write_coco_caption,
    {
        split: {
            id: {"kind": "caption", "dataset": "coco", "media": media, "captions": captions}
            for id, media, captions in rows
        }
        for split, rows in {
            "train": [
                ("9-0", coco("train2014", 9), ("A man, with a bike.",)),
                ("9-1", coco("train2014", 9), ("two",)),
                ("42-0", coco("val2014", 42), ("a dog",)),
            ],
            "val": [("73", coco("val2014", 73), ("one", "other"))],
            "test": [("74", coco("val2014", 74), ("last",))],
        }.items()
    },
    # Unknown split, no object: split; 2 and 3: media; 4: filename; 5: sentences; 6: cocoid (its
    # picture's split is not looked at before). A test picture without captions: captions.
    {
        "train": {"split": 2, "media": 2, "filename": 1, "sentences": 1, "cocoid": 1},
        "val": {"raw": 1, "id": 1},
        "test": {"captions": 1},
    },
)


# --- VQAv2 and OK-VQA ---


def question(number: object, image: object, text: object = "What?") -> dict:
    return {"image_id": image, "question": text, "question_id": number}


def annotation(number: object, image: object, answers: list, majority: object = None) -> dict:
    given = {} if majority is None else {"multiple_choice_answer": majority}
    return given | {
        "question_type": "what",
        "answers": [
            {"answer": text, "answer_confidence": "yes", "answer_id": place + 1}
            for place, text in enumerate(answers)
        ],
        "image_id": image,
        "answer_type": "other",
        "question_id": number,
    }


def vqa_files(folder: Path, prefix: str, part: str, questions: list, annotations: list) -> None:
    head = {"info": {}, "license": {}, "data_subtype": part, "data_type": "mscoco"}
    name = f"OpenEnded_mscoco_{part}_questions.json"
    write(folder, prefix + name, head | {"task_type": "Open-Ended", "questions": questions})
    if annotations:
        name = f"mscoco_{part}_annotations.json"
        write(folder, prefix + name, head | {"annotations": annotations})


MIXED = ["Red"] + ["blue "] * 2 + ["green"] * 3 + ["yes", "Yes"] * 2
MIXED_SOFT = ((1.0, "yes"), (0.9, "green"), (0.6, "blue"), (0.3, "red"))


def write_vqav2(folder: Path) -> None:
    picture(folder, coco("train2014", 1), coco("train2014", 2))
    picture(folder, coco("val2014", 3), coco("val2014", 4), coco("test2015", 5))
    questions = [question(100 + n, 1, f" Question\n{n}? ") for n in range(9)]
    questions += [question(200 + n, 2) for n in range(8)]
    annotations = [annotation(100 + n, 1, MIXED, ("The Yes!", "yes")[n % 2]) for n in range(9)]
    annotations += [annotation(200 + n, 2, [*["no"] * 9, " "], "no") for n in range(8)]
    questions += [
        question(300, 1),  # without an annotation
        question(301, 1),  # whose annotation is of another picture
        question(302, 1),  # that nobody answered
        question(303, 1, 7),
        question("304", 1),
        question(305, 99),  # of a picture that is not there
        question(200, 2),  # of which "no" must not get a ninth count
    ]
    annotations += [
        annotation(301, 2, ["a"] * 10, "a"),
        annotation(302, 1, [""] * 10, ""),
        annotation(303, 1, ["a"] * 10, "a"),
        annotation(305, 99, ["cup"] * 10, "a"),
        annotation(200, 2, ["again"] * 10, "again"),
        "no object",
    ]
    vqa_files(folder, "v2_", "train2014", questions, annotations)
    questions = [question(400, 3), question(401, 3), question(500, 4)]
    annotations = [annotation(number, 3, ["two"] * 10, "two") for number in (400, 401)]
    annotations.append(annotation(500, 4, ["two"] * 10, "two"))
    vqa_files(folder, "v2_", "val2014", questions, annotations)
    vqa_files(folder, "v2_", "test2015", [question(600, 5), question(601, 77)], [])


def qa(media: str, dataset: str, *answers: tuple, question: str = "What?") -> dict:
    known = {"answers": answers} if answers else {"unanswered": True}
    return {"kind": "qa", "dataset": dataset, "media": media, "question": question} | known


VQAV2 = Case(
    "vqav2",
    vqav2.DATASET,
    write_vqav2,
    {
        "train+val": {
            str(100 + n): qa(coco("train2014", 1), "vqav2", *MIXED_SOFT, question=f"Question {n}?")
            for n in range(9)
        }
        | {str(200 + n): qa(coco("train2014", 2), "vqav2", (1.0, "no")) for n in range(8)}
        | {
            id: qa(coco("val2014", number), "vqav2", (1.0, "2"))
            for id, number in (("400", 3), ("401", 3), ("500", 4))
        },
        "test": {"600": qa(coco("test2015", 5), "vqav2")},
    },
    # question_id: no annotation of 300, an annotation again, one that is no object, and "304".
    {
        "train": {"question_id": 4, "image_id": 1, "answers": 1, "question": 1, "media": 1}
        | {"id": 1},
        "test": {"media": 1},
    },
    # "The Yes!" is "yes" once it is normalised, which makes 9; "no" has 8, "two" 3, "a" 1.
    ("yes",),
    ("answers: 1 ",),
    held_out=1,
)


def write_okvqa(folder: Path) -> None:
    picture(folder, coco("train2014", 1), coco("train2014", 2), coco("val2014", 3))
    rows = [
        annotation(11, 1, ["race"] * 4 + ["sport"] * 4 + ["fun"] * 2),
        annotation(21, 2, ["race"] * 10),
    ]
    vqa_files(folder, "", "train2014", [question(11, 1), question(21, 2)], rows)
    rows = [annotation(31, 3, ["pony tail"] * 6 + ["braid"] * 2 + ["bun"] * 2)]
    vqa_files(folder, "", "val2014", [question(31, 3), question(32, 3)], rows)


OKVQA = Case(
    "okvqa",
    okvqa.DATASET,
    write_okvqa,
    {
        "train+val": {
            "11": qa(coco("train2014", 1), "okvqa", (1.0, "race"), (1.0, "sport"), (0.6, "fun")),
            "21": qa(coco("train2014", 2), "okvqa", (1.0, "race")),
        },
        "test": {
            "31": qa(coco("val2014", 3), "okvqa", (1.0, "pony tail"), (0.6, "braid"), (0.6, "bun"))
        },
    },
    {"test": {"question_id": 1}},
    ("race", "pony tail", "sport"),
    ("test is the questions of val2014",),
    held_out=1,
)


# --- VizWiz ---


def vizwiz_row(part: str, number: int, *answers: str, **changed) -> dict:
    row = {"image": f"VizWiz_{part}_{number:08}.jpg", "question": "What's this?"}
    if answers:
        row["answers"] = [{"answer_confidence": "yes", "answer": text} for text in answers]
        row |= {"answer_type": "other", "answerable": 1}
    return row | changed


def write_vizwiz(folder: Path) -> None:
    picture(folder, *(f"train/VizWiz_train_{n:08}.jpg" for n in (0, 1)))
    picture(folder, "val/VizWiz_val_00000000.jpg", "test/VizWiz_test_00000000.jpg", "secret.jpg")
    soup = ["Soup"] * 2 + ["can"] * 8
    train = [
        vizwiz_row("train", 0, *soup),
        vizwiz_row("train", 1, *["unanswerable"] * 10),
        vizwiz_row("train", 0, *soup),
        vizwiz_row("train", 2, *["unanswerable"] * 10, image="../../secret.jpg"),
        vizwiz_row("train", 3, *soup, question=""),
        vizwiz_row("train", 4),
    ]
    write(folder, "train.json", train)
    write(folder, "val.json", [vizwiz_row("val", 0, *["unanswerable"] * 10)])
    write(folder, "test.json", [vizwiz_row("test", 0), vizwiz_row("test", 1)])


VIZWIZ = Case(
    "vizwiz",
    vizwiz.DATASET,
    write_vizwiz,
    {
        split: {
            name: qa(f"{folder}/{name}", "vizwiz", *answers, question="What's this?")
            for name, answers in rows.items()
        }
        for split, folder, rows in (
            (
                "train+val",
                "train",
                {
                    "VizWiz_train_00000000.jpg": ((1.0, "can"), (0.6, "soup")),
                    "VizWiz_train_00000001.jpg": ((1.0, "unanswerable"),),
                },
            ),
            ("test", "val", {"VizWiz_val_00000000.jpg": ((1.0, "unanswerable"),)}),
            ("challenge", "test", {"VizWiz_test_00000000.jpg": ()}),
        )
    },
    {
        "train": {"media": 1, "question": 1, "answers": 1},
        "val": {"id": 1},  # the picture of the repeated row is the one held out
        "challenge": {"media": 1},
    },
    ("unanswerable", "can"),
    held_out=1,
)


# --- RefCOCO ---


def reference(number: int, split: str, image: int, *raw: str, **changed) -> dict:
    return {
        "sent_ids": [10 * number + place for place in range(len(raw))],
        "file_name": f"COCO_train2014_{image:012}_{number}.jpg",
        "ann_id": number,
        "ref_id": number,
        "image_id": image,
        "split": split,
        "category_id": 1,
        "sentences": [
            {"tokens": ["a"], "raw": text, "sent_id": 10 * number + place, "sent": "a"}
            for place, text in enumerate(raw)
        ],
    } | changed


def refcoco_files(folder: Path, name: str, file: str, references: list) -> None:
    picture(folder, *(coco("train2014", n) for n in (1, 2)))
    (folder / name).mkdir()
    # Protocol 2 is what Python 2 wrote.
    (folder / name / file).write_bytes(pickle.dumps(references, protocol=2))
    boxes = {
        1: [230.79, 121.75, 192.87, 341.31],
        2: [0, 0, 10, 20.5],
        3: [1, 1, 0, 5],
        4: [float("nan"), 1, 5, 5],
        5: [-1, 1, 5, 5],
        6: [1, 2, 3],
        7: ["a", 1, 2, 3],
        8: [0, 0, 1, 1],
    }
    write(
        folder,
        f"{name}/instances.json",
        {
            "images": [
                {"id": n, "file_name": f"COCO_train2014_{n:012}.jpg", "width": 640, "height": 480}
                for n in (1, 2, 9)
            ],
            "annotations": [
                {"id": id, "bbox": box, "image_id": 2 if id == 2 else 1, "category_id": 1}
                for id, box in boxes.items()
            ],
            "categories": [{"id": 1, "name": "person"}],
        },
    )


def grounding(dataset: str, number: int, text: str, *box: float) -> dict:
    media = coco("train2014", number)
    fields = {"kind": "visual_grounding", "dataset": dataset, "media": media}
    return fields | {"captions": (text,), "box": box}


def write_refcoco(folder: Path) -> None:
    references = [
        reference(1, "train", 1, "The lady,\twith\nblue shirt ", "back to us", " "),
        reference(2, "val", 2, "left"),
        reference(1, "testA", 1, "man"),
        reference(2, "testB", 2, "cup"),
        reference(1, "test", 1, "a split of another version"),
        reference(3, "train", 1, "no width", "counts twice: by row"),
        reference(4, "train", 1, "not a number"),
        reference(5, "train", 1, "outside"),
        reference(6, "train", 1, "three numbers"),
        reference(7, "train", 1, "a text"),
        reference(8, "train", 2, "annotation of another picture"),
        reference(70, "train", 1, "no such annotation"),
        reference(8, "train", 30, "no such picture"),
        reference(2, "val", 2, "the id of an earlier row"),
        reference(8, "train", 1, sentences=[{"raw": "no id"}]),
        7,
    ]
    refcoco_files(folder, "refcoco", "refs(unc).p", references)


LADY = (230.79, 121.75, 423.66, 463.06)  # 230.79 + 192.87, 121.75 + 341.31
REFCOCO = Case(
    "refcoco",
    refcoco.REFCOCO,
    write_refcoco,
    {
        "train": {
            "10": grounding("refcoco", 1, "The lady, with blue shirt", *LADY),
            "11": grounding("refcoco", 1, "back to us", *LADY),
        },
        "val": {"20": grounding("refcoco", 2, "left", 0.0, 0.0, 10.0, 20.5)},
        "testA": {"10": grounding("refcoco", 1, "man", *LADY)},
        "testB": {"20": grounding("refcoco", 2, "cup", 0.0, 0.0, 10.0, 20.5)},
    },
    # split: "test", and what is no object. box: no width (two expressions) and outside.
    {
        "train": {"raw": 1, "split": 2, "box": 3, "bbox": 3, "image_id": 2, "ann_id": 1}
        | {"sent_id": 1},
        "val": {"id": 1},
    },
)


def write_refcocog(folder: Path) -> None:
    references = [
        reference(1, "train", 1, "A woman in a white blouse holding a glass of wine."),
        reference(2, "val", 2, "left"),
        reference(1, "test", 1, "man"),
    ]
    refcoco_files(folder, "refcocog", "refs(umd).p", references)


REFCOCOG = Case(
    "refcocog",
    refcoco.REFCOCOG,
    write_refcocog,
    {
        "train": {
            "10": grounding(
                "refcocog", 1, "A woman in a white blouse holding a glass of wine.", *LADY
            )
        },
        "val": {"20": grounding("refcocog", 2, "left", 0.0, 0.0, 10.0, 20.5)},
        "test": {"10": grounding("refcocog", 1, "man", *LADY)},
    },
)


def write_refcoco_plus(folder: Path) -> None:
    splits = ("train", "val", "testA", "testB")
    refcoco_files(
        folder, "refcoco+", "refs(unc).p", [reference(1, split, 1, split) for split in splits]
    )


REFCOCO_PLUS = Case(
    "refcoco_plus",
    refcoco.REFCOCO_PLUS,
    write_refcoco_plus,
    {
        split: {"10": grounding("refcoco+", 1, split, *LADY)}
        for split in ("train", "val", "testA", "testB")
    },
)


# --- SNLI-VE ---


def pair(id: str, label: object, hypothesis: str = "A hat.", **changed) -> str:
    number = id.partition(".")[0]
    row = {
        "annotator_labels": ["neutral"],
        "captionID": id[:-3],
        "gold_label": label,
        "pairID": id,
        "sentence1": "Two men",
        "sentence2": hypothesis,
        "Flickr30K_ID": number,
    }
    return json.dumps(row | changed) + "\n"


def write_snli_ve(folder: Path) -> None:
    picture(folder, "flickr30k_images/11.jpg", "flickr30k_images/12.jpg", "secret.jpg")
    train = [
        pair("11.jpg#1r1n", "neutral", " A\u2028hat. "),
        "\n",
        pair("11.jpg#1r1e", "entailment", Flickr30K_ID=11),
        pair("12.jpg#4r1c", "contradiction"),
        pair("12.jpg#4r1n", "-"),
        "{not JSON\n",
        pair("12.jpg#5r1n", "maybe"),
        pair("11.jpg#1r1n", "neutral", "the id of an earlier row"),
        pair("13.jpg#1r1n", "neutral", Flickr30K_ID="../secret"),
        pair("13.jpg#2r1n", "neutral", ""),
        pair("13.jpg#3r1n", "neutral", Flickr30K_ID=HALF),
        pair("13.jpg#4r1n", "neutral", Flickr30K_ID=None),
        "[1]\n",
    ]
    (folder / "snli_ve_train.jsonl").write_text("".join(train))
    (folder / "snli_ve_dev.jsonl").write_text(pair("11.jpg#0r1n", "neutral"))
    (folder / "snli_ve_test.jsonl").write_text(pair("12.jpg#0r1n", "neutral").rstrip("\n"))


def entailment(number: int, label: str) -> dict:
    fields = {"kind": "visual_entailment", "dataset": "snli_ve", "captions": ("A hat.",)}
    return fields | {"media": f"flickr30k_images/{number}.jpg", "label": label}


SNLI_VE = Case(
    "snli_ve",
    snli_ve.DATASET,
    write_snli_ve,
    {
        "train": {
            "11.jpg#1r1n": entailment(11, "neutral"),
            "11.jpg#1r1e": entailment(11, "entailment"),
            "12.jpg#4r1c": entailment(12, "contradiction"),
        },
        "val": {"11.jpg#0r1n": entailment(11, "neutral")},
        "test": {"12.jpg#0r1n": entailment(12, "neutral")},
    },
    {
        "train": {"gold_label": 2, "json": 2, "id": 1, "media": 1, "sentence2": 1}
        | {"Flickr30K_ID": 2}
    },
)


# --- nocaps ---


def write_nocaps(folder: Path) -> None:
    picture(folder, *(f"val/{name}.jpg" for name in "abc"))
    domains = {"a": "in-domain", "b": "near-domain", "c": "in-domain", "d": "near-domain"}
    images = [
        {"license": 0, "file_name": f"{name}.jpg", "open_images_id": name, "id": id}
        | {"coco_url": "", "date_captured": "", "height": 1, "width": 1, "domain": domain}
        for id, (name, domain) in enumerate(domains.items())
    ]
    images.append(images[0] | {"id": 9, "domain": "elsewhere"})
    images.append(images[0] | {"id": 1})
    captions = [(0, "one"), (1, "two"), (0, " three "), (0, ""), (2, None), (3, "no picture")]
    annotations = [
        {"image_id": image, "id": id, "caption": text} for id, (image, text) in enumerate(captions)
    ]
    content = {"licenses": [], "info": {}, "images": images, "annotations": annotations}
    write(folder, "nocaps_val_4500_captions.json", content)


def nocaps_row(name: str, *captions: str) -> dict:
    return {
        "kind": "caption",
        "dataset": "nocaps",
        "media": f"val/{name}.jpg",
        "captions": captions,
    }


NOCAPS = Case(
    "nocaps",
    nocaps.DATASET,
    write_nocaps,
    # No picture is out of the domain, so there is no split for those.
    {
        "test": {"0": nocaps_row("a", "one", "three"), "1": nocaps_row("b", "two")},
        "in_domain": {"0": nocaps_row("a", "one", "three")},
        "near_domain": {"1": nocaps_row("b", "two")},
    },
    {
        "test": {"caption": 2, "domain": 1, "id": 1, "captions": 1, "media": 1},
        "in_domain": {"captions": 1},
        "near_domain": {"media": 1},
    },
)


# --- text to image ---


def codes(first: int) -> list[int]:
    return [(first + 7 * place) % 8192 for place in range(1024)]


def line(*columns: object) -> str:
    return "\t".join(
        " ".join(map(str, column)) if isinstance(column, list) else str(column)
        for column in columns
    )


def write_generation(folder: Path) -> None:
    for part, rows in {
        "train2014": [
            (901, 1, "A Cat"),
            (902, 1, "the same cat"),
            (903, 2, "1023 codes"),
            (904, 3, "a code too large"),
            (905, 4, "no codes"),
            (901, 1, "the id of an earlier row"),
            (906, 1, ""),
        ],
        "val2014": [(801, 51, "A Dog"), (802, 52, "a bird"), (803, 51, "a second caption")],
    }.items():
        annotations = [{"image_id": i, "id": id, "caption": text} for id, i, text in rows]
        content = {"info": {}, "images": [], "licenses": [], "annotations": annotations}
        write(folder, f"annotations/captions_{part}.json", content)
    rows = [
        line("000000000001", codes(1)),
        line(2, codes(2)[:-1]),
        line(3, [8192, *codes(3)[1:]]),
        line(51, codes(51)),
        line(52, codes(52)),
        line(1, codes(9)),  # a second time: the first holds
    ]
    (folder / "codes.tsv").write_text("\n".join(rows) + "\n")


def generation(text: str, first: int, **more) -> dict:
    return {"kind": "image_generation", "captions": (text,), "codes": tuple(codes(first))} | more


GENERATION = Case(
    "coco_image_generation",
    coco_image_generation.DATASET,
    write_generation,
    {
        "train": {
            "901": generation("a cat", 1, dataset="coco"),
            "902": generation("the same cat", 1, dataset="coco"),
        },
        "val+test": {
            "51": generation("a dog", 51, dataset="coco"),
            "52": generation("a bird", 52, dataset="coco"),
        },
    },
    {"train": {"codes": 3, "id": 1, "caption": 1}},
    notes=("a caption of each of 1 pictures of val2014, val one of each of the 1 others",),
)


def write_published_generation(folder: Path) -> None:
    for name, id in (("train_1", 7), ("dev", 8), ("full_test", 9)):
        text = line(id, codes(id), "the people are posing") + "\n"
        (folder / f"coco_vqgan_{name}.tsv").write_text(text)


PUBLISHED_GENERATION = Case(
    "published_generation",
    coco_image_generation.DATASET,
    write_published_generation,
    {
        split: {id: generation("the people are posing", int(id))}
        for split, id in (("train", "7"), ("val", "8"), ("test", "9"))
    },
    notes=("published tables",),
)


# --- Visual Genome ---


def region(id: object, image: int, phrase: object, *box: object) -> dict:
    x, y, width, height = box
    place = {"region_id": id, "x": x, "y": y, "width": width, "height": height}
    return place | {"image_id": image, "phrase": phrase}


def write_pictures(folder: Path) -> None:
    names = {1: "VG_100K_2/1.jpg", 2: "VG_100K/2.jpg"}
    picture(folder, *names.values())
    root = "https://cs.stanford.edu/people/rak248/"
    images = [
        {"width": 800, "url": root + name, "height": 600, "image_id": id}
        | {"coco_id": 5 if id == 1 else None, "flickr_id": None}
        for id, name in names.items()
    ]
    images.append(images[0] | {"image_id": 3, "url": root + "../3.jpg"})
    write(folder, "image_data.json", images)


def write_regions(folder: Path) -> None:
    write_pictures(folder)
    regions = [
        {
            "id": 1,
            "regions": [
                region(11, 1, " the clock\n", 421, 57, 82, 139),  # 82 x 139 = 11398 < 16384
                region(12, 1, "a street", 0, 0, 128, 128),  # 16384: no longer one to find
                region(13, 1, "a whole street", 0, 0, 800, 600),
                region(14, 1, "a text for a number", 1, 1, "9", 9),
                region(15, 1, "not a number", 1, 1, float("nan"), 9),
                region(16, 1, "no width", 1, 1, 0, 9),
                region(17, 1, "outside", -1, 1, 5, 9),
                region(11, 1, "the id of an earlier row", 1, 1, 5, 9),
                region(18, 1, "", 1, 1, 5, 9),
                region(19, 1, "too large for a float", 10**400, 1, 5, 9),
                region(12, 1, "the id of an earlier caption", 0, 0, 800, 600),
            ],
        },
        {
            "id": 2,
            "regions": [
                region(21, 2, "tree", 1, 2, 3, 4),
                region(22, 2, "a park", 0, 0, 300, 300),
                region(23, 2, "green park", 0, 0, 300, 300),
            ],
        },
        {"id": 3, "regions": [region(31, 3, "picture with a wrong address", 1, 2, 3, 4)]},
        {"id": [1], "regions": {}},
        {"id": {}, "regions": []},
    ]
    write(folder, "region_descriptions.json", regions)


# Both pictures have the same chance to be held out, so where the bad rows are counted depends on
# it: of 1 and 2, sha256("2") = d4735e... is above sha256("1") = 6b86b2..., so that 1 is held out.
VG_NOTES = (
    "val is held out of training: 1 of 2 pictures",
    "1 pictures are also in COCO",
)
VG_REGIONS = Case(
    "vg_regions",
    visual_genome.REGIONS,
    write_regions,
    {
        split: {
            id: {"kind": "visual_grounding", "dataset": "vg_regions", "media": media}
            | {"captions": (text,), "box": box}
        }
        for split, id, media, text, box in (
            ("val", "11", "VG_100K_2/1.jpg", "the clock", (421.0, 57.0, 503.0, 196.0)),
            ("train", "21", "VG_100K/2.jpg", "tree", (1.0, 2.0, 4.0, 6.0)),
        )
    },
    {
        "val": {"width": 2, "box": 2, "id": 1, "phrase": 1, "x": 1},
        "train": {"image_id": 1, "regions": 1},
    },
    notes=VG_NOTES,
)
VG_CAPTIONS = Case(
    "vg_caption",
    visual_genome.CAPTIONS,
    write_regions,
    {
        split: {
            id: {"kind": "caption", "dataset": "vg_caption", "media": media, "captions": captions}
            for id, media, captions in rows
        }
        for split, rows in {
            "val": [("1", "VG_100K_2/1.jpg", ("a street", "a whole street"))],
            "train": [
                ("22", "VG_100K/2.jpg", ("a park",)),
                ("23", "VG_100K/2.jpg", ("green park",)),
            ],
        }.items()
    },
    {"val": {"id": 1}, "train": {"regions": 1}},
    notes=VG_NOTES,
)


def write_vg_qa(folder: Path) -> None:
    write_pictures(folder)
    rows = [
        (1, 986769, "What color is the clock?", "Green."),
        (1, 986770, "Who?", " "),
        (2, 986771, "Where is it?", "On a hill"),
        (2, 986771, "Again?", "Yes"),
        (4, 986772, "Of which picture?", "None"),
    ]
    content = [
        {
            "id": image,
            "qas": [
                {"a_objects": [], "question": question, "image_id": about, "qa_id": id}
                | {"answer": answer, "q_objects": []}
                for about, id, question, answer in rows
                if about == image
            ],
        }
        for image in (1, 2, 4)
    ]
    write(folder, "question_answers.json", content)


VG_QA = Case(
    "vg_qa",
    visual_genome.QUESTIONS,
    write_vg_qa,
    {
        "val": {
            "986769": qa(
                "VG_100K_2/1.jpg", "vg_qa", (1.0, "green."), question="What color is the clock?"
            )
        },
        "train": {
            "986771": qa("VG_100K/2.jpg", "vg_qa", (1.0, "on a hill"), question="Where is it?")
        },
    },
    {"val": {"answer": 1}, "train": {"id": 1, "image_id": 1}},
    notes=VG_NOTES,
)


# --- GQA ---


def gqa_question(image: str, answer: object, **changed) -> dict:
    return {
        "question": "Is it overcast?",
        "imageId": image,
        "answer": answer,
        "fullAnswer": "No, it is clear.",
        "isBalanced": True,
        "entailed": [],
    } | changed


def write_gqa(folder: Path) -> None:
    picture(folder, "images/2354786.jpg", "images/n12.jpg", "secret.jpg")
    unanswered = {"question": "Is it overcast?", "imageId": "n12", "isBalanced": True}
    files = {
        "train": {
            "02930152": gqa_question("2354786", "No"),
            "1": gqa_question("2354786", "no"),
            "2": gqa_question("2354786", "left"),
            "3": gqa_question("../secret", "yes"),
            "4": gqa_question("2354786", None),
            "5": gqa_question("2354786", "yes", question=["a"]),
            HALF: gqa_question("2354786", "yes"),
        },
        "val": {"6": gqa_question("2354786", "right"), "7": gqa_question("1", "red")},
        "testdev": {"8": gqa_question("n12", "blue")},
        "test": {"9": unanswered},
    }
    for split, content in files.items():
        write(folder, f"{split}_balanced_questions.json", content)


GQA = Case(
    "gqa",
    gqa.DATASET,
    write_gqa,
    {
        split: {
            id: qa(f"images/{image}.jpg", "gqa", *answers, question="Is it overcast?")
            for id, image, *answers in rows
        }
        for split, rows in {
            "train": [
                ("02930152", "2354786", (1.0, "no")),
                ("1", "2354786", (1.0, "no")),
                ("2", "2354786", (1.0, "left")),
            ],
            "val": [("6", "2354786", (1.0, "right"))],
            "testdev": [("8", "n12", (1.0, "blue"))],
            "test": [("9", "n12")],
        }.items()
    },
    {"train": {"media": 1, "answer": 1, "question": 1, "id": 1}, "val": {"media": 1}},
    # Those of the rows whose picture is refused later are candidates all the same.
    ("no", "left", "red", "right", "yes"),
)


# --- SBU, CC3M, CC12M ---


def sidecar(folder: Path, name: str, caption: object, suffix: str = ".jpg", **changed) -> None:
    fields = {"url": "http://a/b.jpg", "caption": caption, "key": Path(name).name}
    write(folder, f"{name}.json", fields | {"status": "success", "width": 1} | changed)
    if suffix:
        picture(folder, name + suffix)


def write_cc12m(folder: Path) -> None:
    sidecar(folder, "00000/000000001", " a\tcat ")
    sidecar(folder, "00000/000000003", "a <PERSON>", ".png")
    sidecar(folder, "00001/000010000", "a dog")
    (folder / "00000_stats.json").write_text("{}")
    (folder / "other").mkdir()
    sidecar(folder, "other/000000001", "not of img2dataset")
    lines = [f"http://a/{n}.jpg\ta caption" for n in range(10)]
    (folder / "cc12m.tsv").write_text("\n".join(lines))


def web(dataset: str, media: str, text: str) -> dict:
    return {"kind": "caption", "dataset": dataset, "media": media, "captions": (text,)}


CC12M = Case(
    "cc12m",
    web_captions.CC12M,
    write_cc12m,
    {
        "train+val": {
            "00000/000000001": web("cc12m", "00000/000000001.jpg", "a cat"),
            "00000/000000003": web("cc12m", "00000/000000003.png", "a <PERSON>"),
            "00001/000010000": web("cc12m", "00001/000010000.jpg", "a dog"),
        }
    },
    notes=("7 of the 10 pictures of cc12m.tsv were not downloaded", "1 of 3 pictures"),
    held_out=1,
)


def write_cc3m(folder: Path) -> None:
    sidecar(folder, "train/00000/000000000", "a cat")
    sidecar(folder, "train/00000/000000001", "no picture", "")
    sidecar(folder, "train/00000/000000002", "failed", status="failed_to_download")
    sidecar(folder, "train/00000/000000003", "")
    sidecar(folder, "train/00000/000000004", "x")
    (folder / "train/00000/000000004.json").write_text("[" * 100_000)
    (folder / "train/00000/000000005.json").symlink_to("/etc/hostname")
    (folder / "train/00000/000000006.json").mkdir()
    sidecar(folder, "val/00000/000000000", "a dog")
    (folder / "Train_GCC-training.tsv").write_text("a cat\thttp://a/b.jpg\n" * 3)


CC3M = Case(
    "cc3m",
    web_captions.CC3M,
    write_cc3m,
    {
        split: {
            f"{split}/00000/000000000": web("cc3m", f"{split}/00000/000000000.jpg", text),
        }
        for split, text in (("train", "a cat"), ("val", "a dog"))
    },
    {"train": {"media": 1, "status": 1, "caption": 1, "json": 1, "file": 2}},
    notes=("7 pictures are there, more than the 3 of Train_GCC-training.tsv",),
)


def write_sbu(folder: Path) -> None:
    sidecar(folder, "00000/000000000", "a cat")
    sidecar(folder, "00000/000000001", "a dog")
    (folder / "SBU_captioned_photo_dataset_urls.txt").write_text("http://a\n" * 5)


SBU = Case(
    "sbu",
    web_captions.SBU,
    write_sbu,
    {
        "train+val": {
            "00000/000000000": web("sbu", "00000/000000000.jpg", "a cat"),
            "00000/000000001": web("sbu", "00000/000000001.jpg", "a dog"),
        }
    },
    notes=("3 of the 5 pictures of SBU_captioned_photo_dataset_urls.txt",),
    held_out=1,
)

CASES = (
    COCO_CAPTION,
    VQAV2,
    OKVQA,
    VIZWIZ,
    REFCOCO,
    REFCOCO_PLUS,
    REFCOCOG,
    SNLI_VE,
    NOCAPS,
    GENERATION,
    PUBLISHED_GENERATION,
    VG_REGIONS,
    VG_CAPTIONS,
    VG_QA,
    GQA,
    SBU,
    CC3M,
    CC12M,
)
