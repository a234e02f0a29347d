"""Hundreds of broken files through the loader: each one refused with a reason, none that kills,
hangs or swells the process, and the good ones beside them untouched."""

import json
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from broken_media import broken_files

from unival.data.media import Loading, MediaLoader, MediaOptions
from unival.data.records import Origin, Record, RecordError
from unival.data.shards import TarShards
from unival.data_gpu.limits import Limits
from unival.data_gpu.quarantine import Quarantine

SAMPLES = Path(__file__).parents[2] / "samples"
KINDS = {"image": "caption", "video": "video_caption", "audio": "audio_caption"}
GOOD = {
    "image": SAMPLES / "images" / "cat.jpg",
    "video": SAMPLES / "video" / "bbb_00.mp4",
    "audio": SAMPLES / "audio" / "sp_ambi_choir.ogg",
}
OPTIONS = MediaOptions(image_size=32, video_size=32, video_frames=4, audio_samples=16_000)
LIMITS = Limits(decode_seconds=10.0, decode_bytes=512 << 20)
LOADING = Loading(video_backend="pyav", limits=LIMITS)
GROWTH = 400 << 20  # of this process over the whole corpus


def record(kind, media, name):
    return Record(name, KINDS[kind], media, Origin("corpus", name), captions=("x",))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return broken_files(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def others():
    """Processes that were there before the loader's."""
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture(scope="module")
def loader(others):
    with MediaLoader(OPTIONS, LOADING) as running:
        # A film for each process: its first one waits for imports, on a busy machine for longer
        # than any broken file may take.
        films = [record("video", GOOD["video"], str(number)) for number in range(LOADING.workers)]
        running.load(films, [""] * LOADING.workers)
        yield running


def test_the_corpus_is_large_and_of_every_kind(corpus):
    assert len(corpus) >= 300
    counts = Counter(broken.kind for broken in corpus)
    assert set(counts) == {"image", "video", "audio", "tar"}
    assert min(counts.values()) >= 10
    assert len({broken.path for broken in corpus}) == len(corpus)


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_every_broken_file_is_quarantined_with_a_reason(corpus, loader, others, tmp_path, kind):
    broken = [entry for entry in corpus if entry.kind == kind]
    good = record(kind, GOOD[kind], "good")
    alone = loader.load([good], [""])[0]
    before = psutil.Process().memory_info().rss
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 1.0)
    longest, passed = 0.0, []
    for start in range(0, len(broken), 8):
        part = broken[start : start + 8]
        records = [record(kind, entry.path, str(entry.path)) for entry in part]
        began = time.monotonic()
        *found, kept = loader.load([*records, good], [""] * (len(part) + 1))
        longest = max(longest, time.monotonic() - began)
        assert torch.equal(kept.tensor, alone.tensor)
        for entry, given, result in zip(part, records, found, strict=True):
            if not isinstance(result, RecordError):
                passed.append(entry.what)
                continue
            quarantine.add(
                kind,
                id=given.id,
                file=result.origin.file,
                row=result.origin.row,
                field=result.field,
                reason=result.problem,
            )
    assert not passed
    assert longest < LIMITS.decode_seconds
    assert psutil.Process().memory_info().rss - before < GROWTH
    own = [child for child in psutil.Process().children() if child.pid not in others]
    assert own or kind == "image"
    for child in own:
        assert child.memory_info().rss < LIMITS.decode_bytes + (200 << 20)
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == len(broken)
    for line in lines:
        entry = json.loads(line)
        assert entry["field"] == "media"
        assert len(entry["reason"].removeprefix(entry["row"]).strip(": ")) > 4


def test_every_hostile_tar_is_refused_with_file_and_reason(corpus):
    for broken in (entry for entry in corpus if entry.kind == "tar"):
        began = time.monotonic()
        with pytest.raises(RecordError, match=broken.path.name) as caught:
            shards = TarShards(broken.path)
            records = [shards[row] for row in range(len(shards))]
            pytest.fail(f"{broken.what}: {len(records)} records")
        assert caught.value.problem
        assert time.monotonic() - began < 2


def test_the_loader_still_works_after_all_of_it(loader):
    found = loader.load([record(kind, path, kind) for kind, path in GOOD.items()], ["", "", ""])
    assert not any(isinstance(one, RecordError) for one in found)
