"""AudioCaps: captions of ten seconds of sound, a CSV file a split."""

from __future__ import annotations

from collections.abc import Iterator

from unival.data.fields import number
from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    MediaFiles,
    Prepared,
    Source,
    text_of,
)
from unival.data.records import Origin, RecordError

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")


def read(source: Source) -> Prepared:
    """Training has a row for each caption, validation and test one for each sound, whose id is
    `YOUTUBE_ID_START`."""
    splits = {split: _split(source, split) for split in ("train", "val", "test")}
    notes = ("the original had no validation part and chose its checkpoint on test",)
    return Prepared(dict(splits), (), notes)


def _split(source: Source, split: str) -> Entries:
    entries = Entries(source.media)
    files = MediaFiles(source.media, "audio", (split, "", "audio", f"audio/{split}"))
    captions: dict[str, list[str]] = {}  # of the sounds of val and test
    seen: set[str] = set()
    for row, origin in _rows(source, split):
        if isinstance(row, RecordError):
            entries.add(row)
            continue
        id, sound, stem, caption = row
        if id in seen:
            entries.add(RecordError(origin, "audiocap_id", f"{id} is the id of an earlier row"))
            continue
        seen.add(id)
        if sound in captions:
            captions[sound].append(caption)
            continue
        values = {"kind": "audio_caption", "captions": [caption], "dataset": "audiocaps"}
        values["id"] = id
        if split != "train":
            captions[sound] = [caption]
            values |= {"id": sound, "captions": captions[sound]}
        entries.add(Entry(values, files.find(sound, stem, id), origin))
    return entries


def _rows(
    source: Source, split: str
) -> Iterator[tuple[tuple[str, str, str, str] | RecordError, Origin]]:
    """(audiocap_id, YOUTUBE_ID_START, youtube_id, caption) of each row, and where it stands."""
    rows = source.csv_rows(f"{split}.csv", f"*/{split}.csv", columns=COLUMNS)
    for place in range(len(rows)):
        origin = rows.origin(place)
        try:
            row = rows[place]
            id, film, caption = (
                text_of(row, name, origin) for name in ("audiocap_id", "youtube_id", "caption")
            )
            start = number(row["start_time"], origin, "start_time")
            if start < 0:
                raise RecordError(origin, "start_time", f"{start} is negative")
            yield (id, f"{film}_{start:g}", film, caption), origin
        except RecordError as error:
            yield error, origin


DATASET = DataSet(
    title="AudioCaps",
    needs=(
        "train.csv, val.csv and test.csv",
        "the sounds as YOUTUBEID_START.wav, YOUTUBEID.wav or AUDIOCAPID.wav (or .flac, .mp3 ...), "
        "all in one folder or in train, val and test (the media folder)",
    ),
    read=read,
)
