"""Clotho: five captions a sound, a CSV file a split."""

from __future__ import annotations

from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    Prepared,
    Source,
    held_out,
    text_of,
)
from unival.data.records import RecordError

CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))


def read(source: Source) -> Prepared:
    """Training has a row for each caption, validation and test one for each sound.

    Version 1 has no validation part: a part of its development sounds is held out.
    """
    train, val, test = (Entries(source.media) for _ in range(3))
    development = _rows(source, "development")
    if source.look(_file("validation"), f"*/{_file('validation')}") is not None:
        validation = _rows(source, "validation")
        notes = ("val is the part validation of version 2, which version 1 does not have",)
    else:
        sounds = [row.media for row in development if isinstance(row, Entry)]
        chosen = held_out(sounds)
        validation = [r for r in development if isinstance(r, Entry) and r.media in chosen]
        development = [
            r for r in development if isinstance(r, RecordError) or r.media not in chosen
        ]
        notes = (
            f"val is held out of training: {len(chosen)} of the {len(set(sounds))} sounds of the "
            "part development; the original trained on all and chose its checkpoint on evaluation",
        )
    for row in development:
        for caption in _one_a_caption(row) if isinstance(row, Entry) else [row]:
            train.add(caption)
    for entries, rows in ((val, validation), (test, _rows(source, "evaluation"))):
        for row in rows:
            entries.add(row)
    return Prepared({"train": train, "val": val, "test": test}, (), notes)


def _file(part: str) -> str:
    return f"clotho_captions_{part}.csv"


def _rows(source: Source, part: str) -> list[Entry | RecordError]:
    """One row a sound, and one for each caption that cannot be used."""
    rows = source.csv_rows(_file(part), f"*/{_file(part)}", columns=("file_name", *CAPTIONS))
    folder = f"{part}/" if (source.media / part).is_dir() else ""
    found: list[Entry | RecordError] = []
    seen: set[str] = set()
    for place in range(len(rows)):
        origin = rows.origin(place)
        try:
            row = rows[place]
            file = text_of(row, "file_name", origin)
            if file in seen:
                raise RecordError(origin, "file_name", f"{file!r} is that of an earlier row")
        except RecordError as error:
            found.append(error)
            continue
        seen.add(file)
        captions = []
        for name in CAPTIONS:
            try:
                captions.append(text_of(row, name, origin))
            except RecordError as error:
                found.append(error)
        if captions:
            values = {"id": file, "kind": "audio_caption", "captions": captions}
            found.append(Entry(values | {"dataset": "clotho"}, folder + file, origin))
    return found


def _one_a_caption(row: Entry) -> list[Entry]:
    return [
        Entry(
            row.values | {"id": f"{row.values['id']}-{place}", "captions": [text]},
            row.media,
            row.origin,
        )
        for place, text in enumerate(row.values["captions"])
    ]


DATASET = DataSet(
    title="Clotho",
    needs=(
        "clotho_captions_development.csv and clotho_captions_evaluation.csv",
        "clotho_captions_validation.csv of version 2; without it a part of development is held out",
        "the sounds, in folders development, validation and evaluation or all in one (the media "
        "folder)",
    ),
    read=read,
)
