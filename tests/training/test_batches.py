"""Micro-batches: bad samples replaced and refused, the order through stops and other ranks."""

import base64
import json
from pathlib import Path

import pytest
import torch

from unival.data.media import Loaded, MediaOptions
from unival.data.sampler import LoaderState
from unival.data_gpu.quarantine import TooManyBadSamples
from unival.training.batches import BatchMaker
from unival.training.options import MicroBatch, Mixture, Run, Source, Stage
from unival.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
MEDIA = MediaOptions(image_size=32, video_size=32, video_frames=2, audio_samples=3200)
WORDS = Vocabulary()


@pytest.fixture(scope="module")
def make(data):
    def maker(table, rows=4, rank=0, world=1, quarantine=None, medium="image", **loading):
        source = Source(str(table), media_root=str(ROOT / "samples"))
        stage = Stage("one", 10, [MicroBatch(medium, [Mixture("web", rows)])])
        negatives = str(data / "negative_sample")
        run = Run("out", {"web": source}, [stage], media=MEDIA, negatives=negatives)
        for name, value in loading.items():
            setattr(run.loading, name, value)
        return BatchMaker(run, stage, WORDS, rank, world, quarantine)

    return maker


def spoil(data, out, rows, name="vision_language_qa.tsv", keep=12):
    """The first rows of a table, some of them with a picture that is none."""
    lines = (data / name).read_bytes().splitlines(keepends=True)[:keep]
    for row in rows:
        fields = lines[row].split(b"\t")
        fields[1] = base64.b64encode(b"\xff\xd8\xff\xe0 no picture")
        lines[row] = b"\t".join(fields)
    out.write_bytes(b"".join(lines))
    return out


def seen(maker):
    """The records that a step's rows were made of, in order."""
    used = []
    load = maker.loader.load

    def noted(records, seeds):
        loaded = load(records, seeds)
        pairs = zip(records, loaded, strict=True)
        used.extend(r.origin.row for r, m in pairs if isinstance(m, Loaded))
        return loaded

    maker.loader.load = noted
    return used


def test_a_bad_sample_is_quarantined_and_replaced_by_the_same_other_one_each_time(
    make, data, tmp_path
):
    table = spoil(data, tmp_path / "broken.tsv", [2, 5])
    batches = []
    for run in range(2):
        path = tmp_path / f"bad{run}.jsonl"
        with make(table, rows=12, quarantine=path) as maker:
            (batch,) = maker.step(0)
        assert len(batch.tasks) == 24
        assert maker.quarantine.bad == {"web": 2}
        entries = sorted((json.loads(line) for line in path.read_text().splitlines()),
                         key=lambda entry: entry["row"])  # fmt: skip
        assert [entry["row"] for entry in entries] == [2, 5]
        assert {entry["file"] for entry in entries} == {str(table)}
        assert all(entry["field"] == "media" and entry["reason"] for entry in entries)
        assert (
            entries[0]["id"]
            == (data / "vision_language_qa.tsv").read_text().splitlines()[2].split("\t")[0]
        )
        batches.append(batch)
    for name, tensor in batches[0].tensors.items():
        assert tensor.equal(batches[1].tensors[name]), name


def test_a_substitute_is_of_the_same_kind(make, data, tmp_path):
    """A table of captions and one bad question: the substitute is the other question."""
    captions = (data / "vision_language_caption.tsv").read_bytes().splitlines(keepends=True)[:20]
    spoil(data, tmp_path / "questions.tsv", [0], keep=2)
    table = tmp_path / "mixed.tsv"
    table.write_bytes(b"".join(captions) + (tmp_path / "questions.tsv").read_bytes())
    with make(table, rows=22) as maker:
        (batch,) = maker.step(0)
    assert batch.tasks.count("vqa") == 2
    assert batch.tasks.count("image_caption") == 20


def test_a_row_that_cannot_be_read_at_all_is_quarantined_too(make, data, tmp_path):
    lines = (data / "vision_language_qa.tsv").read_bytes().splitlines(keepends=True)[:6]
    lines[3] = b"only\tthree\tcolumns\n"
    (tmp_path / "broken.tsv").write_bytes(b"".join(lines))
    path = tmp_path / "bad.jsonl"
    with make(tmp_path / "broken.tsv", rows=6, quarantine=path) as maker:
        maker.step(0)
    (entry,) = (json.loads(line) for line in path.read_text().splitlines())
    assert (entry["row"], entry["field"], entry["id"]) == (3, "row", "3")


def test_too_many_bad_samples_stop_training_with_the_source_and_the_file(make, data, tmp_path):
    table = spoil(data, tmp_path / "broken.tsv", range(1, 12))
    with (
        make(table, rows=6, quarantine=tmp_path / "bad.jsonl", max_bad_share=0.02) as maker,
        pytest.raises(TooManyBadSamples, match=r"'web': 5 of .*0\.02.*broken\.tsv.*bad\.jsonl"),
    ):
        for step in range(4):
            maker.step(step)


def test_nothing_but_bad_samples_is_an_end_and_no_endless_search(make, data, tmp_path):
    table = spoil(data, tmp_path / "broken.tsv", range(40), keep=40)
    with make(table, rows=1, max_bad_share=1.0) as maker, pytest.raises(
        RuntimeError, match="'web': 16 records in a row are unusable"
    ):  # fmt: skip
        maker.step(0)


def test_prefetched_steps_are_the_steps_and_their_state_is_that_after_them(make, data):
    table = data / "vision_language_caption.tsv"
    with make(table) as plain, make(table, prefetch=3) as ahead:
        expected = [plain.step(step)[0] for step in range(5)]
        for number, ((batch,), state) in enumerate(ahead.steps(0, 5)):
            assert batch.tensors["pixel_values"].equal(expected[number].tensors["pixel_values"])
            assert state == LoaderState(7, {"web": 4 * (number + 1)})


def test_an_abandoned_iteration_ends_its_preparation(make, data):
    with make(data / "vision_language_caption.tsv", prefetch=4) as maker:
        steps = maker.steps(0, 10)
        next(steps)
        steps.close()
        done = maker.state.samples["web"]
        assert done <= 4 * 6


def test_the_samples_go_on_in_order_on_one_two_four_and_one_ranks(make, data):
    """Stops in the middle of an epoch; the samples of all ranks are those of an undisturbed run."""
    table = data / "vision_language_caption.tsv"
    with make(table, rows=2) as whole:
        used = seen(whole)
        for step in range(13):
            whole.step(step)
    state, found = LoaderState(7), []
    for world, steps in ((1, 2), (2, 2), (4, 1), (1, 3)):
        for _ in range(steps):
            after = []
            for rank in range(world):
                with make(table, rows=2 * world, rank=rank, world=world) as maker:
                    maker.state = state.copy()
                    rows = seen(maker)
                    maker.step(1)
                    found += rows
                    after.append(maker.state)
            assert all(one == after[0] for one in after)
            state = after[0]
    assert found == used[: len(found)]
    assert state.samples == {"web": len(found)} == {"web": 26}


def test_films_and_sounds_come_through_the_decoding_processes(make, data):
    for name, medium, key in (
        ("video_caption.tsv", "video", "video_values"),
        ("audio_caption.tsv", "audio", "audio_values"),
    ):
        with make(data / name, rows=3, medium=medium, video_backend="pyav") as maker:
            (batch,) = maker.step(0)
        assert batch.tensors[key].shape[0] == 3
        assert batch.tensors[key].isfinite().all()
        assert batch.tensors[key].std() > 0


def test_rows_shared_by_sources_are_cut_into_passes_of_ranks_in_one_order(data):
    """The passes of all ranks, one after the other, are the rows of one rank in one pass."""
    sources = {
        "qa": Source(str(data / "vision_language_qa.tsv")),
        "caption": Source(str(data / "vision_language_caption.tsv")),
    }
    mixture = [Mixture("qa", weight=3.0), Mixture("caption", weight=1.0)]

    def passes(rank, world, accumulate):
        micro = MicroBatch("image", mixture, rows=8, balance="weights")
        stage = Stage("one", 10, [micro], accumulate=accumulate)
        run = Run("out", sources, [stage], media=MEDIA, negatives=str(data / "negative_sample"))
        with BatchMaker(run, stage, WORDS, rank, world) as maker:
            return [maker.step(step) for step in range(3)], maker.state

    whole, state = passes(0, 1, 1)
    assert state.samples == {"qa": 18, "caption": 6}  # 3 : 1 of 24 rows
    parts = [passes(rank, 2, 2) for rank in range(2)]
    assert all(found == state for _, found in parts)
    for step, (batch,) in enumerate(whole):
        split = [parts[rank][0][step][number] for number in range(2) for rank in range(2)]
        assert [s for part in split for s in part.samples] == batch.samples
        assert [task for part in split for task in part.tasks] == batch.tasks
        assert [part.group for part in split] == [0] * 4
        pixels = torch.cat([part.tensors["pixel_values"] for part in split])
        assert pixels.equal(batch.tensors["pixel_values"])


@pytest.mark.parametrize(
    ("balance", "share"),
    [("balanced", {"qa": 6, "few": 6}), ("proportional", {"qa": 10, "few": 2})],
)
def test_balance_is_even_or_by_the_sizes_of_the_sources(data, tmp_path, balance, share):
    lines = (data / "vision_language_qa.tsv").read_bytes().splitlines(keepends=True)
    (tmp_path / "many.tsv").write_bytes(b"".join(lines[:20]))
    (tmp_path / "few.tsv").write_bytes(b"".join(lines[:4]))
    sources = {"qa": Source(str(tmp_path / "many.tsv")), "few": Source(str(tmp_path / "few.tsv"))}
    mixture = [Mixture("qa"), Mixture("few")]
    stage = Stage("one", 10, [MicroBatch("image", mixture, rows=12, balance=balance)])
    run = Run("out", sources, [stage], media=MEDIA, negatives=str(data / "negative_sample"))
    with BatchMaker(run, stage, WORDS, 0, 1) as maker:
        maker.step(0)
        assert maker.state.samples == share
