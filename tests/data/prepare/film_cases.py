"""Miniatures of what the publishers of video and audio data sets distribute, with the records that
they must become and what of them is bad."""

from __future__ import annotations

import json
import pickle
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from unival.data.prepare import activitynet, audiocaps, clotho, msrvtt, msvd_qa, webvid
from unival.data.prepare.base import DataSet

SAMPLES = Path(__file__).parents[3] / "samples" / "video"
FILMS = ("bbb_00", "bbb_01", "bbb_02", "bbb_04", "bbb_05", "bbb_06", "bbb_07", "bbb_09")


@dataclass(frozen=True)
class Case:
    """`records` maps split -> id -> the fields that are not empty, `media` as the path of the file;
    `bad` split -> (field, number of rows)... of what is left out; `notes` parts of the notes."""

    name: str
    dataset: DataSet
    write: Callable[[Path], None]
    records: dict[str, dict[str, dict]]
    bad: dict[str, dict[str, int]]
    answers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)


def films(folder: Path, *names: str) -> None:
    """Films of different content under some names."""
    for name, sample in zip(names, FILMS, strict=False):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((SAMPLES / f"{sample}.mp4").read_bytes())
    assert len(names) <= len(FILMS)


def sounds(folder: Path, *names: str) -> None:
    """Different sounds of ten milliseconds."""
    for place, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(np.full(80, 100 + place, dtype="<i2").tobytes())


def grey(number: int) -> np.ndarray:
    return np.full((48, 64, 3), 20 + 16 * number, dtype=np.uint8)


def write_film(path: Path, count: int = 12, ticks: list[int] | None = None) -> None:
    """Frames of a tenth of a second whose grey tells their number, or at `ticks` tenths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(grey(number), format="rgb24")
            frame.pts = number if ticks is None else ticks[number]
            frame.time_base = Fraction(1, 10)
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))


def frames(path: Path) -> list[tuple[float, int]]:
    """(seconds, number by its grey) of all frames."""
    with av.open(str(path)) as film:
        decoded = [(f.time, f.to_ndarray(format="rgb24").mean()) for f in film.decode(video=0)]
    found = [(time, round((level - 20) / 16)) for time, level in decoded]
    for (_, level), (_, number) in zip(decoded, found, strict=True):
        assert abs(level - 20 - 16 * number) < 5
    return found


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def video(media: str, dataset: str, *captions: str) -> dict:
    return {"kind": "video_caption", "captions": captions, "dataset": dataset, "media": media}


def sound(media: str, dataset: str, *captions: str) -> dict:
    return video(media, dataset, *captions) | {"kind": "audio_caption"}


def answered(media: str, dataset: str, question: str, answer: str) -> dict:
    answers = ((1.0, answer),)
    return {
        "kind": "video_qa",
        "question": question,
        "answers": answers,
        "dataset": dataset,
        "media": media,
    }


# --- WebVid ---------------------------------------------------------------------------------------

WEBVID_HEADER = b"videoid,contentUrl,duration,page_dir,name\n"
URL = b"https://ak.picdn.net/shutterstock/videos/1/preview/stock.mp4,PT00H00M12S"


def write_webvid(folder: Path) -> None:
    (folder / "results_2M_train.csv").write_bytes(
        WEBVID_HEADER
        + b'101,%b,000001_000050,"A cat, asleep on a sofa"\n' % URL
        + b'102,%b,000001_000050,"Two lines\r\nof ""text"" \xc3\xa9"\r\n' % URL
        + b"\n"
        + b"101,%b,000001_000050,The id again\n" % URL
        + b"1e3,%b,000001_000050,No number\n" % URL
        + b"103,%b,000001_000050,   \n" % URL
        + b"104,%b,000001_000050,Its film is not there\n" % URL
        + b"105,%b,../..,Out of the folder\n" % URL
        + b"106,too few columns\n"
        + b"107,%b,000001_000050,not UTF-8 \xff\n" % URL
        + b"108,%b,%b,A folder of a long name\n" % (URL, b"x" * 300)
        + b"109,%b,,No folder" % URL
    )
    (folder / "results_2M_val.csv").write_bytes(WEBVID_HEADER + b"201,%b,000001_000050,Val\n" % URL)
    films(folder, "000001_000050/101.mp4", "102.mp4", "109.mp4", "000001_000050/201.mp4")


WEBVID_2M = Case(
    "webvid_2m",
    webvid.WEBVID_2M,
    write_webvid,
    {
        "train": {
            "101": video("000001_000050/101.mp4", "webvid", "A cat, asleep on a sofa"),
            "102": video("102.mp4", "webvid", 'Two lines of "text" é'),
            "109": video("109.mp4", "webvid", "No folder"),
        },
        "val": {"201": video("000001_000050/201.mp4", "webvid", "Val")},
    },
    {"train": {"videoid": 2, "name": 1, "media": 3, "row": 2}, "val": {}},
    notes=("no test part",),
)


def write_webvid_10m(folder: Path) -> None:
    header = WEBVID_HEADER.replace(b"videoid", b"\xef\xbb\xbfvideoid")  # with a mark of UTF-8
    row = b"7,%b,a,Train\n" % URL
    (folder / "results_10M_train.csv").write_bytes(header + row)
    (folder / "results_10M_val.csv").write_bytes(header + row.replace(b"7", b"8", 1))
    films(folder, "videos/a/7.mp4", "videos/8.mp4", "a/7.mp4")


WEBVID_10M = Case(
    "webvid_10m",
    webvid.WEBVID_10M,
    write_webvid_10m,
    {
        "train": {"7": video("videos/a/7.mp4", "webvid", "Train")},
        "val": {"8": video("videos/8.mp4", "webvid", "Train")},
    },
    {"train": {}, "val": {}},
)

PAIRS = {
    "101": {
        "text": "a cat",
        "question": ["What is this?", "Where is it?", 7, "Is it asleep?\n"],
        "answer": ["a cat", "on a sofa", "seven", " "],
    },
    "102": {"text": "", "question": ["Who?"], "answer": ["a dog", "too many"]},
    "103": {"text": "", "question": ["Who  is it?"], "answer": ["A man"]},
    "104": {"text": "", "question": "no list", "answer": []},
    "201": {"text": "", "question": ["What?"], "answer": ["a hat"]},
}


def write_webvid_qa(folder: Path, *names: str) -> None:
    (folder / "webvidvqa.pkl").write_bytes(pickle.dumps(PAIRS))
    ids = ["103", "101", "102", "104", "105", "../x", "101"]
    rows = [f"{id}.mp4.npy,{id}\n" for id in ids]
    (folder / "train_webvidvqa.csv").write_text("feature_path,video_id\n" + "".join(rows))
    (folder / "val_webvidvqa.csv").write_text("feature_path,video_id\n201.mp4.npy,201\n")


def write_webvid_qa_flat(folder: Path) -> None:
    write_webvid_qa(folder)
    films(folder, "101.mp4", "103.mp4", "201.mp4")


def write_webvid_qa_folders(folder: Path) -> None:
    write_webvid_qa(folder)
    (folder / "results_2M_train.csv").write_bytes(
        WEBVID_HEADER + b"101,%b,b,One\n" % URL + b"99,%b,b,Other\n" % URL
    )
    (folder / "results_2M_val.csv").write_bytes(WEBVID_HEADER + b"201,%b,c,Val\n" % URL)
    films(folder, "b/101.mp4", "c/201.mp4", "103.mp4")


def webvid_qa(name: str, write: Callable[[Path], None], a: str, b: str) -> Case:
    train = {
        "101-0": answered(f"{a}101.mp4", "webvidqa", "What is this?", "a cat"),
        "101-1": answered(f"{a}101.mp4", "webvidqa", "Where is it?", "on a sofa"),
    }
    # 102: as many questions as answers are needed; 104: a list; 105: in no pickle; ../x: no number;
    # 101: again; of 101 the third question is no text, the fourth answer is empty.
    bad = {"answer": 2, "question": 2, "video_id": 2, "videoid": 1}
    if not a:
        train["103-0"] = answered("103.mp4", "webvidqa", "Who  is it?", "A man")
    else:
        bad["video_id"] += 1  # results_2M_train.csv has no 103
    val = {"201-0": answered(f"{b}201.mp4", "webvidqa", "What?", "a hat")}
    records = {"train": train, "val": val}
    return Case(name, webvid.WEBVID_QA, write, records, {"train": bad, "val": {}})


# --- MSR-VTT --------------------------------------------------------------------------------------


def film(number: int, split: str) -> dict:
    return {
        "category": 9,
        "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
        "video_id": f"video{number}",
        "start time": 137.72,
        "end time": 149.44,
        "split": split,
        "id": number,
    }


def sentence(number: int, film: int, caption: object) -> dict:
    return {"caption": caption, "video_id": f"video{film}", "sen_id": number}


TRAIN_VAL_FILMS = [film(0, "train"), film(1, "validate"), film(0, "train"), film(5, "dev")]
TRAIN_VAL_FILMS += [film(6, "train"), film(7, "validate"), {"split": "train"}]
TRAIN_VAL_SENTENCES = [
    sentence(10, 0, " a man\tdrives\n"),
    sentence(11, 0, "a car"),
    sentence(12, 1, "a dog runs"),
    sentence(11, 0, "the id again"),
    sentence(13, 1, "an animal"),
    sentence(14, 99, "of no film"),
    sentence(15, 1, ""),
    sentence(16, 0, None),
    sentence(17, 6, "its film is not there"),
    {"caption": "no ids"},
    "no object",
]
TEST_FILMS = [film(7010, "test")]
TEST_SENTENCES = [sentence(20, 7010, "a test"), sentence(21, 7010, "another")]


def write_msrvtt(folder: Path) -> None:
    write_json(
        folder / "train_val_videodatainfo.json",
        {"info": {}, "videos": TRAIN_VAL_FILMS, "sentences": TRAIN_VAL_SENTENCES},
    )
    write_json(
        folder / "test_videodatainfo.json",
        {"info": {}, "videos": TEST_FILMS, "sentences": TEST_SENTENCES},
    )
    names = ("TrainValVideo/video0.mp4", "TrainValVideo/video1.mp4", "TestVideo/video7010.mp4")
    films(folder, *names, "video5.mp4")


def write_msrvtt_in_one(folder: Path) -> None:
    write_json(
        folder / "annotation" / "MSRVTT_data.json",
        {
            "videos": [*TRAIN_VAL_FILMS, *TEST_FILMS],
            "sentences": [*TRAIN_VAL_SENTENCES, *TEST_SENTENCES],
        },
    )
    films(folder, "videos/all/video0.mp4", "videos/all/video1.mp4", "videos/all/video7010.mp4")


def msrvtt_captions(name: str, write: Callable[[Path], None], train: str, test: str) -> Case:
    return Case(
        name,
        msrvtt.CAPTIONS,
        write,
        {
            "train": {
                "10": video(f"{train}/video0.mp4", "msrvtt", "a man drives"),
                "11": video(f"{train}/video0.mp4", "msrvtt", "a car"),
            },
            "val": {"video1": video(f"{train}/video1.mp4", "msrvtt", "a dog runs", "an animal")},
            "test": {"video7010": video(f"{test}/video7010.mp4", "msrvtt", "a test", "another")},
        },
        {
            # video0 again, an entry without a name, a sentence of no film; dev; 11 again and two
            # without ids; an empty caption and null; video6.
            "train": {"video_id": 3, "split": 1, "sen_id": 3, "caption": 2, "media": 1},
            "val": {"captions": 1},  # video7
            "test": {},
        },
        notes=("val is the part `validate`",),
    )


# --- MSRVTT-QA and MSVD-QA ------------------------------------------------------------------------


def question(number: object, film: object, text: object, answer: object) -> dict:
    entry = {"answer": answer, "category_id": 1, "id": number}
    return entry | {"question": text, "video_id": film}


def write_questions(folder: Path, base: int) -> None:
    train = [
        question(0, base, "what is it?", "cat"),
        question(1, base, "who sings?", "man"),
        question(2, base, "who runs?", "man"),
        question(3, base, "who eats?", "dog"),
        question(3, base, "the id again", "man"),
        question("4", base, "an id that is text", "man"),
        question(5, base, "", "man"),
        question(6, base, "no answer", ""),
        question(7, None, "no film", "man"),
        question(8, base + 5, "its film is not there", "man"),
        question(True, base, "an id that is no number", "man"),
        [],
    ]
    val = [question(20, base + 1, "what?", "dog"), question(21, base + 1, "where?", "moon")]
    test = [question(30, base + 2, "who?", "man"), question(31, base + 2, "how many?", "two")]
    for name, content in (("train", train), ("val", val), ("test", test)):
        write_json(folder / f"{name}_qa.json", content)


def write_msrvtt_qa(folder: Path) -> None:
    write_questions(folder, 0)
    films(folder, "video0.mp4", "video1.mp4", "TestVideo/video2.webm")


def write_msvd_qa(folder: Path) -> None:
    write_questions(folder, 1)
    (folder / "youtube_mapping.txt").write_text(
        "-4wsuPCjDBc_5_15 vid1\nno number\nKPPCwmU5OHQ_136_141 vid3\n\nother_0_1 vid3\n"
    )
    names = ("-4wsuPCjDBc_5_15.avi", "vid2.mp4", "other_0_1.avi", "-4wsuPCjDBc_5_15.mp4")
    films(folder / "YouTubeClips", *names)


def questions(
    dataset: DataSet, write: Callable[[Path], None], name: str, media: tuple[str, str, str]
) -> Case:
    train, val, test = media
    return Case(
        name,
        dataset,
        write,
        {
            "train": {
                "0": answered(train, name, "what is it?", "cat"),
                "1": answered(train, name, "who sings?", "man"),
                "2": answered(train, name, "who runs?", "man"),
                "3": answered(train, name, "who eats?", "dog"),
            },
            "val": {
                "20": answered(val, name, "what?", "dog"),
                "21": answered(val, name, "where?", "moon"),
            },
            "test": {
                "30": answered(test, name, "who?", "man"),
                "31": answered(test, name, "how many?", "two"),
            },
        },
        {
            # 3 again, "4", True and []; 5; 6; 7; 8
            "train": {"id": 4, "question": 1, "answer": 1, "video_id": 1, "media": 1},
            "val": {},
            "test": {},
        },
        # man: 1, 2 and 8; cat and dog once each; 0 has the one and 3 the other.
        answers=("man", "cat"),
        notes=(
            "the 2 most frequent of 3 in training",
            "1 training rows have no answer",
            "2 val and 1 test rows have no answer",
        ),
        options={"answers": "2"},
    )


# --- ActivityNet Captions -------------------------------------------------------------------------

PROPOSALS = {
    "train": {
        "v_one-_2": {
            "duration": 1.2,
            "timestamps": [[0.35, 0.72], [0, 9], [0.5, 0.5], [0.6, 0.2], [0, "1"], [2, 3]],
            "sentences": [" A man\nruns.", "All.", "Empty", "Backwards", "Text", "After the end"],
        },
        "v_broken": {"duration": 1, "timestamps": [[0, 1]], "sentences": ["Broken"]},
        "v_absent": {"duration": 1, "timestamps": [[0, 1]], "sentences": ["Absent"]},
        "../one": {"duration": 1, "timestamps": [[0, 1]], "sentences": ["Out of the folder"]},
        "v_less": {"duration": 1, "timestamps": [[0, 1]], "sentences": []},
        "v_list": [],
        "v_nan": {
            "duration": 1,
            "timestamps": [[0, float("nan")], [0], [-1, 1], [0, 1e9], [0, 1]],
            "sentences": ["NaN", "One time", "Negative", "Long", " "],
        },
        "v_linked": {"duration": 1, "timestamps": [[0, 1]], "sentences": ["Out by a link"]},
    },
    "val_1": {
        "v_two": {"duration": 1.2, "timestamps": [[0, 0.3], [0, 0.3]], "sentences": ["a", "b"]}
    },
    "val_2": {"v_two": {"duration": 1.2, "timestamps": [[0.0, 0.3]], "sentences": ["c"]}},
}


def write_activitynet(folder: Path) -> None:
    for name, content in PROPOSALS.items():
        write_json(folder / f"{name}.json", content)
    write_film(folder / "v1-2" / "train" / "v_one-_2.mp4")
    write_film(folder / "two.mkv")
    (folder / "v_broken.mp4").write_bytes(b"no film")
    (folder.parent / "outside.mp4").write_bytes(b"outside")
    (folder / "v_linked.mp4").symlink_to(folder.parent / "outside.mp4")


ACTIVITYNET = Case(
    "activitynet",
    activitynet.DATASET,
    write_activitynet,
    {
        "train": {
            "v_one-_2-0": video("v_one-_2/0.35-0.72.mp4", "activitynet", "A man runs."),
            "v_one-_2-1": video("v_one-_2/0.0-9.0.mp4", "activitynet", "All."),
        },
        "val": {
            "v_two-0": video("v_two/0.0-0.3.mp4", "activitynet", "a"),
            "v_two-1": video("v_two/0.0-0.3.mp4", "activitynet", "b"),
        },
        "test": {"v_two-0": video("v_two/0.0-0.3.mp4", "activitynet", "c")},
    },
    {
        # three times of v_one-_2 and the first four of v_nan; after the end, broken, absent and
        # linked; ../one; v_less and an empty one of v_nan; v_list has no timestamps
        "train": {"timestamps": 8, "media": 4, "film": 1, "sentences": 2},
        "val": {},
        "test": {},
    },
    notes=("1 of the 1 films of test are in val", "1 of 5 films are not in the media folder"),
)


# --- AudioCaps and Clotho -------------------------------------------------------------------------


def write_audiocaps(folder: Path) -> None:
    header = "audiocap_id,youtube_id,start_time,caption\n"
    (folder / "train.csv").write_text(
        header
        + '91139,r1nicOVtvkQ,130,"A woman talks, nearby"\n'
        + "58146,-zUXcfqYDKI,30,Hissing\n"
        + "2909,other,0,Rain\n"
        + "58146,again,30,The id again\n"
        + "1,../../x,30,Out of the folder\n"
        + "2,nostart,,No start\n"
        + "3,nan,nan,No number\n"
        + "4,negative,-1,Before\n"
        + "5,nocaption,30,\n"
        + ",noid,30,No id\n"
    )
    (folder / "val.csv").write_text(
        header + "6,v,10,one\n7,w,20,other\n8,v,10,two\n9,v,10,\n8,v,10,again\n"
    )
    (folder / "test.csv").write_text(header + "".join(f"{n},t,5,caption {n}\n" for n in range(5)))
    names = ("train/r1nicOVtvkQ_130.wav", "train/-zUXcfqYDKI.wav", "2909.flac", "val/v_10.wav")
    sounds(folder, *names, "7.wav", "audio/t_5.wav", "r1nicOVtvkQ.wav")


AUDIOCAPS = Case(
    "audiocaps",
    audiocaps.DATASET,
    write_audiocaps,
    {
        "train": {
            "91139": sound("train/r1nicOVtvkQ_130.wav", "audiocaps", "A woman talks, nearby"),
            "58146": sound("train/-zUXcfqYDKI.wav", "audiocaps", "Hissing"),
            "2909": sound("2909.flac", "audiocaps", "Rain"),
        },
        "val": {
            "v_10": sound("val/v_10.wav", "audiocaps", "one", "two"),
            "w_20": sound("7.wav", "audiocaps", "other"),
        },
        "test": {
            "t_5": sound("audio/t_5.wav", "audiocaps", *(f"caption {n}" for n in range(5))),
        },
    },
    {
        "train": {"audiocap_id": 2, "media": 1, "start_time": 3, "caption": 1},
        "val": {"caption": 1, "audiocap_id": 1},
        "test": {},
    },
)

CLOTHO_HEADER = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"


def clotho_row(name: str, *captions: str) -> str:
    return ",".join((f'"{name}"', *captions)) + "\n"


def write_clotho(folder: Path) -> None:
    (folder / "clotho_captions_development.csv").write_text(
        CLOTHO_HEADER
        + clotho_row("Distorted AM, noise.wav", "a1", "a2", "a3", "a4", "a5")
        + clotho_row("b.wav", "b1", " ", "b3", "b4", "b5")
        + clotho_row("b.wav", "c1", "c2", "c3", "c4", "c5")
        + clotho_row("../d.wav", *"12345")
        + clotho_row("", *"12345")
        + clotho_row("e.wav", *"1234")
    )
    rows = clotho_row("v.wav", "v1", "v2", "v3", "v4", "v5")
    empty = clotho_row("empty.wav", *[""] * 5)
    (folder / "clotho_captions_validation.csv").write_text(CLOTHO_HEADER + rows + empty)
    rows = clotho_row("t.wav", "t1", "t2", "t3", "t4", "t5")
    (folder / "clotho_captions_evaluation.csv").write_text(CLOTHO_HEADER + rows)
    names = ("development/Distorted AM, noise.wav", "development/b.wav", "validation/v.wav")
    sounds(folder, *names, "t.wav", "d.wav")


CLOTHO = Case(
    "clotho",
    clotho.DATASET,
    write_clotho,
    {
        "train": {
            f"Distorted AM, noise.wav-{place}": sound(
                "development/Distorted AM, noise.wav", "clotho", f"a{place + 1}"
            )
            for place in range(5)
        }
        | {
            f"b.wav-{place}": sound("development/b.wav", "clotho", text)
            for place, text in enumerate(("b1", "b3", "b4", "b5"))
        },
        "val": {"v.wav": sound("validation/v.wav", "clotho", "v1", "v2", "v3", "v4", "v5")},
        "test": {"t.wav": sound("t.wav", "clotho", "t1", "t2", "t3", "t4", "t5")},
    },
    {
        "train": {"caption_2": 1, "file_name": 2, "media": 5, "row": 1},
        "val": {f"caption_{number}": 1 for number in range(1, 6)},
        "test": {},
    },
    notes=("version 2",),
)

CASES = [
    WEBVID_2M,
    WEBVID_10M,
    webvid_qa("webvid_qa", write_webvid_qa_flat, "", ""),
    webvid_qa("webvid_qa_folders", write_webvid_qa_folders, "b/", "c/"),
    msrvtt_captions("msrvtt", write_msrvtt, "TrainValVideo", "TestVideo"),
    msrvtt_captions("msrvtt_in_one", write_msrvtt_in_one, "videos/all", "videos/all"),
    questions(
        msrvtt.QUESTIONS,
        write_msrvtt_qa,
        "msrvtt_qa",
        ("video0.mp4", "video1.mp4", "TestVideo/video2.webm"),
    ),
    questions(
        msvd_qa.DATASET,
        write_msvd_qa,
        "msvd_qa",
        (
            "YouTubeClips/-4wsuPCjDBc_5_15.mp4",
            "YouTubeClips/vid2.mp4",
            "YouTubeClips/other_0_1.avi",
        ),
    ),
    ACTIVITYNET,
    AUDIOCAPS,
    CLOTHO,
]
