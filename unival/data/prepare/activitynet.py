"""ActivityNet Captions: films with sentences about parts of them, which are cut out as clips."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unival.data.fields import number
from unival.data.files import resolve_media
from unival.data.prepare.base import (
    DataSet,
    Entries,
    Entry,
    MediaFiles,
    Prepared,
    Source,
    field_of,
    text_of,
)
from unival.data.records import Origin, RecordError
from unival.data.tools.cut import Cut, cut_films
from unival.data.tools.encode import Target
from unival.data_gpu.limits import Limits

FILES = {"train": "train.json", "val": "val_1.json", "test": "val_2.json"}
FOLDERS = (
    "",
    "videos",
    "train",
    "val",
    "v1-2/train",
    "v1-2/val",
    "v1-3/train_val",
    "train_val",
)
FILM = re.compile(r"v_[A-Za-z0-9_-]{1,64}")
TARGET = Target(size=480)  # the model sees 384 x 384 pixels, and in training a crop of a clip


@dataclass(frozen=True)
class Proposal:
    """A part of a film, in seconds, and the sentence about it."""

    id: str
    film: str
    start: float
    end: float
    sentence: str
    origin: Origin

    @property
    def clip(self) -> str:
        """Its path from the folder of clips."""
        return f"{self.film}/{self.start}-{self.end}.mp4"


def read(source: Source) -> Prepared:
    """One row a proposal of the people who wrote the captions; its clip is cut out of its film."""
    if "clips" not in source.options:
        raise ValueError("the clips need a folder: --option clips=FOLDER")
    clips = Path(source.options["clips"]).resolve()
    splits = {split: list(_proposals(source, name)) for split, name in FILES.items()}
    films = MediaFiles(source.media, "video", FOLDERS)
    proposals = [row for rows in splits.values() for row in rows if isinstance(row, Proposal)]
    bad = _cut(source.media, films, proposals, clips)
    tables = {split: Entries(clips) for split in splits}
    for split, rows in splits.items():
        for row in rows:
            tables[split].add(row if isinstance(row, RecordError) else _entry(row, bad))
    return Prepared(dict(tables), (), _notes(splits, films))


def _proposals(source: Source, name: str) -> Iterator[Proposal | RecordError]:
    path, content = source.json(name, f"*/{name}")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no object with the sentences of each film")
    for film, entry in content.items():
        origin = Origin(str(path), film)
        try:
            if not FILM.fullmatch(film):
                raise RecordError(origin, "film", f"{film[:40]!r} is not v_ and an id of YouTube")
            times = field_of(entry, "timestamps", list, origin)
            sentences = field_of(entry, "sentences", list, origin)
            if len(times) != len(sentences):
                problem = f"{len(sentences)} sentences for {len(times)} timestamps"
                raise RecordError(origin, "sentences", problem)
        except RecordError as error:
            yield error
            continue
        for place, pair in enumerate(zip(times, sentences, strict=True)):
            try:
                yield _proposal(film, place, *pair, Origin(str(path), f"{film}[{place}]"))
            except RecordError as error:
                yield error


def _proposal(film: str, place: int, times: Any, sentence: Any, origin: Origin) -> Proposal:
    is_pair = isinstance(times, list) and len(times) == 2
    if not is_pair or any(isinstance(time, str) for time in times):
        raise RecordError(origin, "timestamps", f"{times!r:.40} is not [start, end]")
    start, end = (number(time, origin, "timestamps") for time in times)
    longest = Limits().seconds
    if not 0 <= start < end <= longest:
        problem = f"{start} to {end} seconds; 0 <= start < end <= {longest:g} is needed"
        raise RecordError(origin, "timestamps", problem)
    text = text_of({"sentences": sentence}, "sentences", origin)
    return Proposal(f"{film}-{place}", film, start, end, text, origin)


def _cut(media: Path, films: MediaFiles, proposals: list[Proposal], clips: Path) -> dict[str, str]:
    """Cuts the clips of the proposals; why one cannot be, by its path in the folder of clips."""
    bad: dict[str, str] = {}
    cuts: dict[Path, dict[str, Cut]] = {}
    for proposal in proposals:
        name = films.find(proposal.film, proposal.film[2:])
        try:
            film = resolve_media(name, media, False, proposal.origin, "media")
        except RecordError as error:
            bad[proposal.clip] = error.problem
            continue
        if not film.is_file():
            bad[proposal.clip] = f"{film}: no such file"
            continue
        cut = Cut(proposal.start, proposal.end, clips / proposal.clip)
        cuts.setdefault(film, {})[proposal.clip] = cut  # people may agree on the times
    reasons = cut_films({film: list(c.values()) for film, c in cuts.items()}, clips, TARGET)
    return bad | {str(out.relative_to(clips)): reason for out, reason in reasons.items()}


def _entry(proposal: Proposal, bad: dict[str, str]) -> Entry | RecordError:
    if proposal.clip in bad:
        return RecordError(proposal.origin, "media", bad[proposal.clip])
    values = {
        "id": proposal.id,
        "kind": "video_caption",
        "captions": [proposal.sentence],
        "dataset": "activitynet",
    }
    return Entry(values, proposal.clip, proposal.origin)


def _notes(splits: dict[str, list[Proposal | RecordError]], films: MediaFiles) -> tuple[str, ...]:
    names = {
        split: {row.film for row in rows if isinstance(row, Proposal)}
        for split, rows in splits.items()
    }
    everything = set().union(*names.values())
    missing = sum(film not in films and film[2:] not in films for film in everything)
    both = len(names["val"] & names["test"])
    return (
        "val is val_1.json and test is val_2.json, which the original reports on. They are two "
        f"people's sentences on the same films: {both} of the {len(names['test'])} films of test "
        "are in val too, so that what is chosen on val is chosen on these films",
        f"{missing} of {len(everything)} films are not in the media folder",
    )


DATASET = DataSet(
    title="ActivityNet Captions (proposals of the ground truth)",
    needs=(
        "train.json, val_1.json and val_2.json",
        "the films as v_QOlSCBRmfWY.mp4 (or .mkv, .webm), all in one folder or in v1-2/train, "
        "v1-2/val and v1-3/train_val (the media folder)",
    ),
    read=read,
    options={
        "clips": "folder that the clips are cut to and kept in; a later run takes what is there"
    },
)
