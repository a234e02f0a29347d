"""MSVD-QA: questions about films of MSVD, in the files that MSRVTT-QA has too."""

from __future__ import annotations

import re
from dataclasses import replace

from unival.data.prepare.base import DataSet, MediaFiles, Prepared, Source
from unival.data.prepare.msrvtt import ANSWERS_OPTION, video_questions

FILM = re.compile("vid[0-9]+")
MAPPING = ("youtube_mapping.txt", "*/youtube_mapping.txt")
FOLDERS = ("", "YouTubeClips", "videos")
NUM_ANSWERS = 1_000


def read(source: Source) -> Prepared:
    """One row a question, with its one answer."""
    files = MediaFiles(source.media, "video", FOLDERS)
    names, bad = _names(source)

    def film(number: int) -> str:
        stem = f"vid{number}"
        return files.find(stem, *names.get(stem, ()))

    prepared = video_questions(source, "msvd_qa", NUM_ANSWERS, film)
    note = f"{bad} lines of the mapping are not `NAME vidN`; they count for nothing"
    return replace(prepared, notes=(*prepared.notes, note)) if bad else prepared


def _names(source: Source) -> tuple[dict[str, list[str]], int]:
    """`vid1` -> the names that the mapping gives it, as `-4wsuPCjDBc_5_15`, nothing without a
    mapping; and how many lines of it are not of that form.

    Raises:
        ValueError: no line of the mapping is.
    """
    names: dict[str, list[str]] = {}
    path = source.look(*MAPPING)
    lines = source.lines(*MAPPING) if path is not None else []
    for line in lines:
        name, _, film = line.strip().partition(" ")
        if FILM.fullmatch(film):
            names.setdefault(film, []).append(name)
    if lines and not names:
        raise ValueError(f"{path}: no line `NAME vidN`")
    return names, len(lines) - sum(map(len, names.values()))


DATASET = DataSet(
    title="MSVD-QA",
    needs=(
        "train_qa.json, val_qa.json and test_qa.json",
        "youtube_mapping.txt, where the films have the names of YouTube",
        "the films as vid1.avi or -4wsuPCjDBc_5_15.avi, in a folder YouTubeClips or not (the media "
        "folder)",
    ),
    read=read,
    options={"answers": f"{ANSWERS_OPTION} ({NUM_ANSWERS})"},
)
