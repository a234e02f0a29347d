"""Pictures and sounds that are broken are refused; those that are not pass, whatever their kind."""

import struct
import time
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from broken_media import Broken, broken_files, encode_picture, png, replaced, unbroken
from PIL import Image

from unival.data_gpu.audio import decode_waveform, verify_audio
from unival.data_gpu.errors import DecodeError
from unival.data_gpu.image import decode_image
from unival.data_gpu.inspect import ImageInfo, inspect_image, media_kind, verify_image
from unival.data_gpu.limits import Limits

SAMPLES = Path(__file__).parents[2] / "samples"
LIMITS = Limits()
NAMES = sorted((SAMPLES / "images").iterdir())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Broken]:
    return broken_files(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """203 x 151: no multiple of a block."""
    with Image.open(SAMPLES / "images" / "chameleon.jpg") as image:
        return image.convert("RGB").resize((203, 151))


def refuses(function, *arguments) -> bool:
    """Anything but DecodeError fails the test."""
    try:
        function(*arguments)
    except DecodeError:
        return True
    return False


def test_the_corpus_is_large_and_the_same_on_every_run(corpus, tmp_path):
    assert Counter(broken.kind for broken in corpus).keys() == {"image", "video", "audio", "tar"}
    assert len(corpus) >= 300
    assert len({broken.what for broken in corpus}) == len(corpus)
    again = broken_files(tmp_path)
    assert [(b.what, b.path.read_bytes()) for b in again] == [
        (b.what, b.path.read_bytes()) for b in corpus
    ]


def test_what_the_corpus_is_made_of_is_not_broken():
    for source in unbroken().values():
        if source.kind == "image":
            assert verify_image(source.data, LIMITS).kind == "image"
        if source.kind == "audio":
            assert verify_audio(source.data, LIMITS).kind == "audio"


@pytest.mark.filterwarnings("ignore:Metadata Warning")  # of Pillow, before it refuses
def test_every_broken_picture_is_refused_and_nearly_all_by_structure(corpus):
    pictures = [broken for broken in corpus if broken.kind == "image"]
    passed = [broken for broken in pictures if not refuses(inspect_image, broken.path, LIMITS)]
    # Packed pixels of GIF, TIFF and lossless WebP have no checksum: their decoders find these.
    assert {broken.what.split(",")[0].split(" ")[0] for broken in passed} <= {
        "gif",
        "tiff",
        "lossless",
    }
    assert len(passed) < len(pictures) / 15
    for broken in passed:
        assert not inspect_image(broken.path, LIMITS).plain, broken.what
        assert refuses(decode_image, broken.path, LIMITS), broken.what
    for broken in pictures:
        assert refuses(verify_image, broken.path, LIMITS), broken.what


def test_every_broken_sound_is_refused(corpus):
    for broken in (broken for broken in corpus if broken.kind == "audio"):
        assert refuses(verify_audio, broken.path, LIMITS), broken.what
        assert refuses(decode_waveform, broken.path, 64_000, None, None, LIMITS), broken.what


def test_bytes_are_refused_like_files(corpus):
    for broken in corpus[::7]:
        if broken.kind == "image":
            message = None
            try:
                inspect_image(broken.path, LIMITS)
            except DecodeError as error:
                message = error.problem
            try:
                inspect_image(broken.path.read_bytes(), LIMITS)
            except DecodeError as error:
                assert error.problem == message
            else:
                assert message is None


@pytest.mark.parametrize("path", NAMES, ids=[path.stem for path in NAMES])
def test_samples_pass_as_plain_with_their_size(path):
    with Image.open(path) as image:
        width, height = image.size
    assert inspect_image(path, LIMITS) == ImageInfo("JPEG", width, height, True)
    info = verify_image(path.read_bytes(), LIMITS)
    assert (info.format, info.width, info.height) == ("JPEG", width, height)


def variants(picture: Image.Image) -> dict[str, tuple[bytes, bool]]:
    """Encoded pictures and whether they are plain."""
    grey, alpha = picture.convert("L"), picture.convert("RGBA")
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = {"save_all": True, "append_images": [picture.rotate(9)]}
    cases = [
        *(
            (picture, "JPEG", {"progressive": p, "quality": q}, True)
            for p in (0, 1)
            for q in (1, 99)
        ),
        *(
            (picture, "JPEG", {"subsampling": s}, True)
            for s in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
        ),
        *((picture, "JPEG", {"restart_marker_blocks": n}, True) for n in (1, 7, 500)),
        (picture, "JPEG", {"restart_marker_rows": 1, "progressive": True}, True),
        (picture, "JPEG", {"optimize": True, "exif": exif, "icc_profile": bytes(200_000)}, True),
        (picture, "JPEG", {"comment": b"\xff\xd9\xff\xda"}, True),
        *((grey, "JPEG", {"progressive": p}, True) for p in (0, 1)),
        (picture.convert("CMYK"), "JPEG", {}, False),
        (picture, "JPEG", {"keep_rgb": True}, False),
        (picture, "PNG", {}, True),
        (grey, "PNG", {"optimize": True}, True),
        (alpha, "PNG", {}, False),
        (grey.convert("LA"), "PNG", {}, False),
        (picture.convert("P"), "PNG", {}, False),
        (grey.convert("1"), "PNG", {}, False),
        (deep, "PNG", {}, False),
        (picture, "PNG", {"transparency": (1, 2, 3)}, False),
        (picture, "PNG", turned, False),
        *((form, "WEBP", {"lossless": n}, False) for form in (picture, alpha) for n in (0, 1)),
        (picture, "WEBP", {"exif": exif}, False),
        (picture, "WEBP", turned, False),
        (picture, "GIF", {}, False),
        (picture, "GIF", turned, False),
        (picture, "BMP", {}, True),
        *((form, "BMP", {}, False) for form in (grey, alpha, grey.convert("1"))),
        *((picture, "TIFF", {"compression": c}, False) for c in (None, "tiff_lzw", "jpeg")),
        (picture, "TIFF", {"compression": "tiff_adobe_deflate", "big_tiff": True}, False),
        (grey.convert("1"), "TIFF", {"compression": "group4"}, False),
        (deep, "TIFF", {}, False),
    ]
    return {
        f"{number} {form} {options.keys()}": (encode_picture(image, form, **options), plain)
        for number, (image, form, options, plain) in enumerate(cases)
    }


def test_pictures_of_every_kind_pass_with_the_size_that_pillow_says(picture):
    for name, (data, plain) in variants(picture).items():
        form = name.split()[1]
        assert inspect_image(data, LIMITS) == ImageInfo(form, 203, 151, plain), name
        assert verify_image(data, LIMITS).width == decode_image(data, LIMITS).width == 203, name
        assert media_kind(data) == "image"


def interlaced_png(pixels: np.ndarray) -> bytes:
    """Adam7 by hand: the rows of seven smaller pictures, one after the other."""
    rows = b""
    passes = "0088 0488 4084 0244 2042 0122 1021"  # first row and column, their distances
    for top, left, down, right in (map(int, digits) for digits in passes.split()):
        for row in pixels[top::down, left::right]:
            rows += b"\0" + row.tobytes()
    data = png(pixels.shape[1], pixels.shape[0], zlib.compress(rows))
    header = replaced(data[12:29], 16, b"\1")
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_an_interlaced_png_passes_and_is_left_to_pillow(picture):
    pixels = np.asarray(picture)
    data = interlaced_png(pixels)
    assert inspect_image(data, LIMITS) == ImageInfo("PNG", 203, 151, False)
    assert np.array_equal(np.asarray(decode_image(data, LIMITS)), pixels)


def test_what_follows_the_end_is_left_alone_and_fill_bytes_are_allowed(picture):
    jpeg = encode_picture(picture, "JPEG")
    scan = jpeg.index(b"\xff\xda")
    for data in (
        jpeg + bytes(1000),
        jpeg + jpeg,  # telephones append further pictures
        jpeg[:scan] + b"\xff\xff" + jpeg[scan:],
        jpeg[:-2] + b"\xff\xff" + jpeg[-2:],
        encode_picture(picture, "PNG") + b"appended",
    ):
        assert inspect_image(data, LIMITS).plain
        assert decode_image(data, LIMITS).size == (203, 151)


def test_plain_jpegs_and_bitmaps_decode_in_dali_to_pillows_pixels(picture):
    types = pytest.importorskip("nvidia.dali.types")
    from nvidia.dali import Pipeline, fn

    found = [data for data, plain in variants(picture).values() if plain]
    found += [path.read_bytes() for path in NAMES[::10]]
    pipeline = Pipeline(batch_size=len(found), num_threads=1, device_id=None)
    with pipeline:
        encoded = fn.external_source(
            lambda: [np.frombuffer(data, np.uint8) for data in found], batch=True
        )
        decoded = fn.decoders.image(
            encoded, device="cpu", output_type=types.RGB, adjust_orientation=False
        )
        pipeline.set_outputs(decoded)
    pipeline.build()
    (pixels,) = pipeline.run()
    for number, data in enumerate(found):
        ours = np.asarray(decode_image(data, LIMITS)).astype(int)
        assert np.abs(np.asarray(pixels.at(number)).astype(int) - ours).max() <= 2


@pytest.mark.parametrize("what", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
def test_a_bomb_costs_neither_time_nor_memory(corpus, what):
    bombs = [b for b in corpus if b.what.startswith(f"{what} promises")]
    assert bombs
    for bomb in bombs:
        data = bomb.path.read_bytes()
        started = time.thread_time()
        assert refuses(inspect_image, data, LIMITS), bomb.what
        assert time.thread_time() - started < 0.05
        tracemalloc.start()
        assert refuses(inspect_image, data, LIMITS)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20, bomb.what


def test_a_png_that_unpacks_to_more_than_it_says_is_not_unpacked_further():
    data = png(10, 10, zlib.compress(bytes(200_000_000), 9))
    tracemalloc.start()
    with pytest.raises(DecodeError, match="more or fewer pixels"):
        inspect_image(data, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_segments_and_scans_without_end_are_refused(picture):
    jpeg = encode_picture(picture, "JPEG")
    with pytest.raises(DecodeError, match="4096 segments"):
        inspect_image(jpeg[:2] + b"\xff\xfe\0\2" * 5000 + jpeg[2:], LIMITS)
    progressive = encode_picture(picture.convert("L"), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    with pytest.raises(DecodeError, match="100 scans"):
        inspect_image(progressive[:last] + progressive[last:-2] * 200 + b"\xff\xd9", LIMITS)


def test_a_large_jpeg_is_inspected_in_far_less_time_than_it_is_decoded(picture):
    data = encode_picture(picture.resize((1200, 900)), "JPEG", quality=85)

    def best(function) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            function(data, LIMITS)
            times.append(time.perf_counter() - started)
        return min(times)

    assert best(inspect_image) < best(decode_image) / 5


def test_limits_are_the_callers():
    cat = SAMPLES / "images" / "cat.jpg"
    info = inspect_image(cat, LIMITS)
    assert inspect_image(cat, Limits(pixels=info.width * info.height)) == info
    with pytest.raises(DecodeError, match="at most"):
        inspect_image(cat, Limits(pixels=info.width * info.height - 1))
    with pytest.raises(DecodeError, match="at most"):
        inspect_image(cat, Limits(bytes=cat.stat().st_size - 1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\n <!DOCTYPE HTML><p>gone", "HTML"),
        (b"<?xml version='1.0'?><svg/>", "XML"),
        (b"error 404\n", "text"),
        (b"PK\x03\x04rest", "zip"),
        (b"\x80\x04N.", "pickle"),
        (b"\x7fELF\x02", "program"),
        (bytes(999), "zeros"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x20ftypavif" + bytes(20), "AVIF"),
        (b"\0\0\0\x20ftypisom" + bytes(20), "a film"),
        (b"OggS" + bytes(40), "sound"),
        (b"RIFF\0\0\0\0WAVEfmt ", "sound"),
    ],
)
def test_the_reason_says_what_it_is_instead(data, reason):
    with pytest.raises(DecodeError, match=f"no picture, .*{reason}.*are read"):
        inspect_image(data, LIMITS)


def test_the_content_decides_and_not_the_name(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(NAMES[0].read_bytes())
    assert inspect_image(path, LIMITS).format == "JPEG"
    with pytest.raises(DecodeError, match="no such file"):
        inspect_image(tmp_path / "none.jpg", LIMITS)


def test_kinds_of_samples_and_of_others():
    for kind, folder in (("image", "images"), ("video", "video"), ("audio", "audio")):
        for path in (SAMPLES / folder).iterdir():
            assert media_kind(path) == media_kind(path.read_bytes()) == kind
    for source in unbroken().values():
        if source.suffix != ".webm":  # a container of films, though it may hold sound only
            assert media_kind(source.data) == source.kind
    assert media_kind(unbroken()["vp9"].data) == "video"
    for data in (b"", b"\xff", b"\xff\xfe\0a", b"GIF", b"<html>", bytes(600)):
        assert media_kind(data) is None


def test_damage_that_only_a_full_decoding_finds(picture):
    """Codes that no table holds: libjpeg fills in grey, FFmpeg stops."""
    jpeg = encode_picture(picture, "JPEG", progressive=True)
    scan = jpeg.index(b"\xff\xda") + 14
    damaged = jpeg[:scan] + b"\xfe" * 300 + jpeg[scan + 300 :]
    assert b"\xff" not in jpeg[scan + 299 : scan + 301]  # no marker is cut
    assert inspect_image(damaged, LIMITS).plain
    assert decode_image(damaged, LIMITS).size == (203, 151)
    with pytest.raises(DecodeError, match="damaged pixels"):
        verify_image(damaged, LIMITS)
