"""Video and audio data sets: from miniatures of the published files to the records in the shards,
and the clips that are cut out of films."""

import csv
import errno
import io
import json
import os
import pickle
import random
from concurrent.futures import Future

import pytest
from data.prepare import film_cases as cases

from unival.data.prepare import activitynet, clotho, msrvtt, msvd_qa, webvid
from unival.data.prepare.base import CsvRows, MediaFiles, Source, prepare
from unival.data.records import RecordError
from unival.data.sources import open_table
from unival.data.tools import cut
from unival.data.tools.cut import Cut, cut_film, cut_films
from unival.data.tools.encode import Target
from unival.data_gpu.errors import DecodeError

FIELDS = ["kind", "captions", "question", "dataset", "box", "objects", "label", "codes"]
TARGET = Target(size=480)


def records(out, name, split, media):
    """id -> the fields that are not empty, the medium as the path of the file with its bytes."""
    files = {path.read_bytes(): str(path.relative_to(media)) for path in below(media)}
    found = {}
    for record in open_table(out / f"{name}_{split}-000000.tar"):
        values = {name: getattr(record, name) for name in FIELDS if getattr(record, name)}
        if record.answers:
            values["answers"] = tuple((a.confidence, a.text) for a in record.answers)
        assert record.id not in found
        found[record.id] = values | {"media": files[record.media]}
    return found


def below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_good_row_is_a_record_and_every_bad_row_is_counted(case, tmp_path):
    folder, out, clips = tmp_path / "published", tmp_path / "out", tmp_path / "clips"
    folder.mkdir()
    case.write(folder)
    options = dict(case.options)
    if case.name == "activitynet":
        options["clips"] = str(clips)
    bad = prepare(case.name, case.dataset, Source(folder, None, options), out)
    summary = json.loads((out / f"{case.name}.prepared.json").read_text())
    media = clips if case.name == "activitynet" else folder
    for split, expected in case.records.items():
        assert records(out, case.name, split, media) == expected
    counted = {split: counts["bad"] for split, counts in summary["splits"].items()}
    assert counted == case.bad
    assert bad == sum(sum(counts.values()) for counts in case.bad.values())
    answers = out / f"{case.name}.answers.txt"
    assert (tuple(answers.read_text().splitlines()) if answers.exists() else ()) == case.answers
    for note in case.notes:
        assert any(note in given for given in summary["notes"]), summary["notes"]


def test_clips_of_activitynet_show_the_proposals(tmp_path, here):
    cases.write_activitynet(tmp_path)
    clips = tmp_path / "clips"
    activitynet.read(Source(tmp_path, None, {"clips": str(clips)}))
    # A frame is shown for a tenth of a second: 3 from 0.3 s on, 7 until 0.8 s.
    found = cases.frames(clips / "v_one-_2" / "0.35-0.72.mp4")
    assert [number for _, number in found] == [3, 4, 5, 6, 7]
    assert [number for _, number in cases.frames(clips / "v_one-_2" / "0.0-9.0.mp4")] == [
        *range(12)
    ]
    assert [number for _, number in cases.frames(clips / "v_two" / "0.0-0.3.mp4")] == [0, 1, 2]
    assert not (tmp_path / "one").exists()


def test_activitynet_needs_a_folder_for_clips(tmp_path):
    cases.write_activitynet(tmp_path)
    with pytest.raises(ValueError, match="clips=FOLDER"):
        activitynet.read(Source(tmp_path))


def test_clotho_1_validates_on_sounds_that_it_does_not_train_on(tmp_path):
    rows = [cases.clotho_row(f"{n}.wav", *(f"{n} {c}" for c in "abcde")) for n in range(40)]
    (tmp_path / "clotho_captions_development.csv").write_text(cases.CLOTHO_HEADER + "".join(rows))
    last = cases.clotho_row("t.wav", *"abcde") + cases.clotho_row("bad.wav", "too few")
    (tmp_path / "clotho_captions_evaluation.csv").write_text(cases.CLOTHO_HEADER + last)
    cases.sounds(tmp_path, *(f"{n}.wav" for n in range(40)), "t.wav")
    prepared = clotho.read(Source(tmp_path))
    train, val = ([row for row in prepared.splits[split]] for split in ("train", "val"))
    # 5% of 40 sounds; each of the others has five rows.
    assert (len(train), len(val), len(prepared.splits["test"])) == (38 * 5, 2, 2)
    assert not {row.media for row in train} & {row.media for row in val}
    name = val[0].media.stem
    assert val[0].captions == tuple(f"{name} {c}" for c in "abcde")
    assert "2 of the 40 sounds" in prepared.notes[0]


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5", "", "²"])
def test_a_number_of_answers_that_is_none_is_refused(number, tmp_path):
    cases.write_msrvtt_qa(tmp_path)
    with pytest.raises(ValueError, match=f"answers={number}: how many"):
        msrvtt.read_questions(Source(tmp_path, None, {"answers": number}))


def test_films_of_msvd_may_have_numbers_without_a_mapping(tmp_path):
    cases.write_questions(tmp_path, 1)
    cases.films(tmp_path, "vid1.avi", "vid2.avi", "vid3.avi")
    test = msvd_qa.read(Source(tmp_path)).splits["test"]
    assert [test[row].media for row in range(2)] == [tmp_path.resolve() / "vid3.avi"] * 2


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    cases.write_msvd_qa(tmp_path)
    (tmp_path / "youtube_mapping.txt").write_text("vid1\tname\nvid2\n")
    with pytest.raises(ValueError, match=r"youtube_mapping\.txt: no line `NAME vidN`"):
        msvd_qa.read(Source(tmp_path))


def test_lines_of_a_mapping_that_say_nothing_are_told(tmp_path):
    cases.write_msvd_qa(tmp_path)
    assert "1 lines of the mapping" in msvd_qa.read(Source(tmp_path)).notes[-1]


class Call:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


@pytest.mark.parametrize("content", [pickle.dumps(Call()), pickle.dumps([1]), b"no pickle"])
def test_a_pickle_that_is_no_dictionary_of_questions_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases.write_webvid_qa(tmp_path)
    (tmp_path / "webvidvqa.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"webvidvqa\.pkl: no"):
        webvid.read_questions(Source(tmp_path))
    assert not (tmp_path / "made by a pickle").exists()


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_file_of_the_publisher_that_is_missing_is_named(case, tmp_path):
    options = {"clips": str(tmp_path / "clips")}
    with pytest.raises(FileNotFoundError, match=r"needs .*\.(json|csv|pkl)"):
        case.dataset.read(Source(tmp_path, None, options))


# --- tables and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_csv_file_are_those_of_the_csv_module(seed, tmp_path):
    rng = random.Random(seed)
    alphabet = ['"', ",", "\n", "\r\n", "a", "é", "😀", " ", "\t", "'"]
    rows = [["x", "y"]]
    rows += [["".join(rng.choices(alphabet, k=rng.randrange(9))) for _ in "xy"] for _ in range(50)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=rng.choice(["\n", "\r\n"]))
    for row in rows:
        text.write("\n" * rng.randrange(2))
        writer.writerow(row)
    path = tmp_path / "table.csv"
    path.write_bytes(
        text.getvalue().encode().rstrip(b"\r\n") if seed % 2 else text.getvalue().encode()
    )
    expected = list(filter(None, csv.reader(io.StringIO(path.read_bytes().decode(), newline=""))))
    assert expected == rows
    table = CsvRows(path, ["y"])
    found = [table[row] for row in range(len(table))]
    assert found == [{"x": x, "y": y} for x, y in rows[1:]]


def test_a_mark_that_is_not_closed_costs_no_rows_far_behind_it(tmp_path):
    path = tmp_path / "table.csv"
    lines = [f"{number},text\n" for number in range(60_000)]
    lines[10] = '10,"open\n'
    path.write_text("id,name\n" + "".join(lines))
    table = CsvRows(path, ["id", "name"])
    with pytest.raises(RecordError, match=r"table\.csv, row 10: field 'row'"):
        table[10]
    # 11 bytes a row and more than 131,072 characters: about 11,900 rows are lost.
    assert 47_000 < len(table) < 49_000
    assert table[9] == {"id": "9", "name": "text"}
    last = len(table) - 1
    assert [table[row]["id"] for row in range(11, 20)] == [
        str(60_000 - 1 - last + row) for row in range(11, 20)
    ]


@pytest.mark.parametrize("content", ["", "\n", "a,b\n1,2\n"])
def test_a_csv_file_without_a_column_is_refused(content, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.csv: no column 'name'"):
        CsvRows(path, ["name"])


def test_a_file_of_webvid_without_rows_is_empty(tmp_path):
    (tmp_path / "t.csv").write_bytes(cases.WEBVID_HEADER)
    assert len(webvid.Videos(CsvRows(tmp_path / "t.csv", ["videoid"]), tmp_path)) == 0


def test_the_earlier_folder_and_suffix_count(tmp_path):
    cases.sounds(tmp_path, "b/x.wav", "a/y.wav", "a/y.flac", "a/z.txt", "x.mp3", "A/v.WAV")
    files = MediaFiles(tmp_path, "audio", ("A", "a", "b", "", "absent"))
    assert files.find("x") == "b/x.wav"
    assert files.find("y") == "a/y.wav"
    assert files.find("v") == "A/v.WAV"
    assert files.find("absent", "x") == "b/x.wav"
    assert ("z" in files, "y" in files) == (False, True)
    assert files.find("z", "w") == "z.ogg"


# --- clips ----------------------------------------------------------------------------------------


def shown(path):
    return [(round(time, 3), number) for time, number in cases.frames(path)]


def test_a_clip_is_what_the_film_shows_from_start_to_end(tmp_path):
    film = tmp_path / "film.mp4"
    cases.write_film(film)
    spans = [(0.35, 0.72), (0.0, 0.1), (1.1, 9.0), (0.42, 0.44), (1.2, 2.0)]
    cuts = [Cut(*span, tmp_path / f"{place}.mp4") for place, span in enumerate(spans)]
    assert cut_film(film, cuts, TARGET) == [None] * 4 + ["the film ends before the clip begins"]
    # 0.4 - 0.35 = 0.05 s after its begin the clip shows frame 4.
    assert shown(cuts[0].out) == [(0.0, 3), (0.05, 4), (0.15, 5), (0.25, 6), (0.35, 7)]
    assert shown(cuts[1].out) == [(0.0, 0)]
    assert shown(cuts[2].out) == [(0.0, 11)]
    assert shown(cuts[3].out) == [(0.0, 4)]
    assert below(tmp_path) == sorted([film, *(cut.out for cut in cuts[:4])])


def test_a_frame_that_is_shown_long_is_in_the_clips_that_begin_meanwhile(tmp_path):
    film = tmp_path / "film.mkv"
    cases.write_film(film, 5, ticks=[0, 1, 2, 6, 7])
    cuts = [Cut(0.3, 0.65, tmp_path / "a.mp4"), Cut(0.3, 0.5, tmp_path / "b.mp4")]
    assert cut_film(film, cuts, TARGET) == [None, None]
    assert shown(cuts[0].out) == [(0.0, 2), (0.3, 3)]
    assert shown(cuts[1].out) == [(0.0, 2)]


def test_a_film_that_breaks_off_keeps_the_clips_before(tmp_path, monkeypatch):
    film = tmp_path / "film.mp4"
    cases.write_film(film)
    whole = cut._frames

    def breaking(*arguments):
        for number, frame in enumerate(whole(*arguments)):
            if number == 6:
                raise DecodeError(film, "damaged at frame 6")
            yield frame

    monkeypatch.setattr(cut, "_frames", breaking)
    spans = [(0.0, 0.3), (0.2, 0.9), (0.8, 1.0)]
    cuts = [Cut(*span, tmp_path / f"{place}.mp4") for place, span in enumerate(spans)]
    assert cut_film(film, cuts, TARGET) == [None, "damaged at frame 6", "damaged at frame 6"]
    assert below(tmp_path) == sorted([cuts[0].out, film])
    assert shown(cuts[0].out) == [(0.0, 0), (0.1, 1), (0.2, 2)]


@pytest.mark.parametrize(
    "content", [None, b"", b"no film", b"ffconcat version 1.0\nfile film.mp4\n"]
)
def test_what_is_no_film_gives_no_clip(content, tmp_path):
    film = tmp_path / "x.mp4"
    if content is not None:
        film.write_bytes(content)
    (reason,) = cut_film(film, [Cut(0.0, 1.0, tmp_path / "clip.mp4")], TARGET)
    assert reason
    assert not (tmp_path / "clip.mp4").exists()


def test_a_full_disk_is_no_fault_of_the_film(tmp_path, monkeypatch):
    film = tmp_path / "film.mp4"
    cases.write_film(film)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cut, "_add_video", full)
    with pytest.raises(OSError, match="No space left"):
        cut_film(film, [Cut(0.0, 1.0, tmp_path / "clip.mp4")], TARGET)
    assert below(tmp_path) == [film]


class Here:
    """In the place of the processes: counts the films that are cut, and cuts them at once."""

    films: list = []  # noqa: RUF012

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        self.films.append(arguments[0].name)
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(cut, "Processes", Here)
    monkeypatch.setattr(Here, "films", [])
    return Here.films


def test_what_is_cut_is_not_cut_again_until_its_film_changes(tmp_path, here):
    good, bad, clips = tmp_path / "good.mp4", tmp_path / "bad.mp4", tmp_path / "clips"
    cases.write_film(good)
    bad.write_bytes(b"no film")
    first, later = Cut(0.0, 0.2, clips / "good/a.mp4"), Cut(0.5, 0.7, clips / "good/b.mp4")
    broken = Cut(0.0, 1.0, clips / "bad/a.mp4")
    films = {good: [first], bad: [broken]}
    reasons = cut_films(films, clips, TARGET)
    assert list(reasons) == [broken.out]
    assert here == ["good.mp4", "bad.mp4"]

    made = first.out.stat().st_mtime_ns
    films[good].append(later)
    assert cut_films(films, clips, TARGET) == reasons
    assert here[2:] == ["good.mp4"]
    assert first.out.stat().st_mtime_ns == made
    assert shown(later.out) == [(0.0, 5), (0.1, 6)]

    later.out.unlink()
    cut_films(films, clips, TARGET)
    assert here[3:] == ["good.mp4"]
    assert later.out.exists()

    cases.write_film(bad, 3)
    assert cut_films(films, clips, TARGET) == {}
    assert here[4:] == ["bad.mp4"]
    assert shown(broken.out) == [(0.0, 0), (0.1, 1), (0.2, 2)]

    with pytest.raises(ValueError, match="made from other inputs or options"):
        cut_films(films, clips, Target(size=100))


def test_clips_that_were_finished_before_their_process_ended_are_good(tmp_path, monkeypatch):
    film = tmp_path / "film.mp4"
    cases.write_film(film)
    cuts = [Cut(0.0, 0.2, tmp_path / "a.mp4"), Cut(0.5, 0.7, tmp_path / "b.mp4")]

    class Ending(Here):
        def submit(self, function, film, cuts, target):
            future = Future()
            function(film, cuts[:1], target)
            future.set_exception(ValueError("its process ended"))
            return future

    monkeypatch.setattr(cut, "Processes", Ending)
    assert cut_films({film: cuts}, tmp_path, TARGET) == {cuts[1].out: "its process ended"}
    assert shown(cuts[0].out) == [(0.0, 0), (0.1, 1)]
