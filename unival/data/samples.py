"""Writing the sample media, which come with annotations, as tables and as shards."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unival.data.fields import CONFIDENCE_MARK

ANNOTATIONS = "annotations.jsonl"
CAPTION_KINDS = {"image": "caption", "video": "video_caption", "audio": "audio_caption"}
QUESTION_KINDS = {"image": "qa", "video": "video_qa"}
TABLES = {
    "caption": "vision_language_caption.tsv",
    "qa": "vision_language_qa.tsv",
    "visual_grounding": "vision_language_ground.tsv",
    "video_caption": "video_caption.tsv",
    "video_qa": "video_qa.tsv",
    "audio_caption": "audio_caption.tsv",
}
# What follows these words says where a thing is, not what it is.
PLACE = re.compile(r"\b(on|in|at|behind|beside|near|next|under|lying)\b")


@dataclass(frozen=True)
class Row:
    """One caption, question or box of a sample. `file` is relative to the samples' folder."""

    id: str
    kind: str
    medium: str
    file: str
    caption: str = ""
    question: str = ""
    answer: str = ""
    box: tuple[float, ...] = ()


def make_samples(source: Path, out: Path) -> dict[str, int]:
    """Write the sample media of `source` to `out` in both layouts that training reads.

    Tables in the 8-column layout (pictures as base64, films and sounds as paths that start from
    `source`: pass it as media_root), one tar shard per medium with the same rows in the same
    order, the lists that negative captions and answers are drawn from (negative_sample/), and
    answers.txt, the candidate answers. One row per caption, question and box. The same input gives
    the same bytes.

    Returns:
        The number of rows of each table.

    Raises:
        ValueError: a row of annotations.jsonl is no JSON or lacks a field.
    """
    source, out = Path(source), Path(out)
    entries = _read(source / ANNOTATIONS)
    rows = [row for entry in entries for row in _rows(entry)]
    rows.sort(key=lambda row: list(TABLES).index(row.kind))
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for kind, name in TABLES.items():
        chosen = [row for row in rows if row.kind == kind]
        lines = ["\t".join(_columns(row, source)) + "\n" for row in chosen]
        (out / name).write_text("".join(lines), encoding="utf-8", newline="\n")
        counts[name] = len(chosen)
    for medium in CAPTION_KINDS:
        chosen = [row for row in rows if row.medium == medium]
        _write_shard(out / f"samples-{medium}-000000.tar", chosen, source)
    _write_lists(out, rows)
    return counts


def _read(path: Path) -> list[dict]:
    entries = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                texts = [*entry["captions"], *(b["text"] for b in entry.get("boxes", ()))]
                texts += [text for pair in entry.get("qa", ()) for text in (pair["q"], pair["a"])]
                file_parts = PurePosixPath(entry["file"]).parts
                known = entry["kind"] in CAPTION_KINDS and not {"/", ".."} & set(file_parts)
                boxes_known = all(len(b["box"]) == 4 for b in entry.get("boxes", ()))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, row {number}: {error!r}") from error
            if not known or not boxes_known:
                raise ValueError(f"{path}, row {number}: unknown kind, file or box")
            if any(not text.strip() or re.search(r"[\t\r\n]|&&", text) for text in texts):
                raise ValueError(f"{path}, row {number}: an empty text, a tab, newline or &&")
            entries.append(entry)
    return entries


def _rows(entry: dict) -> list[Row]:
    medium, file = entry["kind"], entry["file"]
    name = Path(file).stem.replace(".", "_")  # a shard's key ends at the first dot
    common = {"medium": medium, "file": file}
    rows = [
        Row(f"{name}-c{i}", CAPTION_KINDS[medium], caption=caption, **common)
        for i, caption in enumerate(entry["captions"])
    ]
    rows += [
        Row(
            f"{name}-q{i}",
            QUESTION_KINDS[medium],
            question=pair["q"],
            answer=pair["a"],
            **common,
        )
        for i, pair in enumerate(entry.get("qa", ()))
    ]
    rows += [
        Row(f"{name}-b{i}", "visual_grounding", caption=b["text"], box=tuple(b["box"]), **common)
        for i, b in enumerate(entry.get("boxes", ()))
    ]
    return rows


def _columns(row: Row, source: Path) -> list[str]:
    media = row.file
    if row.medium == "image":
        media = base64.b64encode((source / row.file).read_bytes()).decode("ascii")
    refs = f"1.0{CONFIDENCE_MARK}{row.answer}" if row.answer else ",".join(map(str, row.box))
    return [row.id, media, row.caption, row.question, refs, "", "samples", row.kind]


def _write_shard(path: Path, rows: list[Row], source: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            values: dict = {"kind": row.kind, "dataset": "samples"}
            if row.caption:
                values["captions"] = [row.caption]
            if row.question:
                values["question"] = row.question
                values["answers"] = [[1.0, row.answer]]
            if row.box:
                values["box"] = list(row.box)
            _add(tar, f"{row.id}.json", json.dumps(values).encode())
            _add(tar, row.id + Path(row.file).suffix, (source / row.file).read_bytes())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_lists(out: Path, rows: list[Row]) -> None:
    folder = out / "negative_sample"
    folder.mkdir(exist_ok=True)
    captions = sorted({row.caption for row in rows if row.caption and not row.box})
    objects = sorted({_object(row.caption) for row in rows if row.box})
    answers = sorted({row.answer for row in rows if row.answer})
    _write_lines(folder / "all_captions.txt", captions)
    _write_lines(folder / "object.txt", objects)
    _write_lines(out / "answers.txt", answers)
    types = defaultdict(set)
    for row in rows:
        if row.answer:
            types[_answer_type(row)].add(row.answer)
    text = json.dumps({kind: sorted(types[kind]) for kind in sorted(types)}, indent=1)
    (folder / "type2ans.json").write_text(text + "\n", encoding="utf-8")


def _answer_type(row: Row) -> str:
    if row.answer in ("yes", "no"):
        return "yes/no"
    first_two = " ".join(row.question.lower().split()[:2])
    return first_two if first_two in ("how many", "what color") else "other"


def _object(phrase: str) -> str:
    """`the hen on the far left` -> `hen`: what a phrase names, without where it is."""
    head = PLACE.split(phrase)[0]
    return re.sub(r"^(the|a|an) ", "", head.strip().lower())


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
