"""Clips: which frames of a film are taken, decoded and brought to size."""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unival.data_gpu.errors import DecodeError, Media, require_content

INDICES = ("random", "uniform")
MODES = ("exact", "center_crop_pad", "random_resized_crop")
MAX_FRAME_PIXELS = 4096 * 2304  # 4K; all frames of a clip are held at once
MAX_FRAMES = 250_000  # two hours at 30 frames a second
# A playlist may name other files and addresses, and FFmpeg would open them: only true containers.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ogg,flv,mpeg,mpegts,mp3,aac,flac,wav"
AV_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
AV_ERRORS = (av.error.FFmpegError, OSError, ValueError)
AREA = (0.5, 1.0)
RATIO = (3 / 4, 4 / 3)


@contextmanager
def open_container(media: Media) -> Iterator[av.container.InputContainer]:
    """A container of a known format; every error of FFmpeg becomes a DecodeError."""
    require_content(media)
    try:
        source = str(media.absolute()) if isinstance(media, Path) else io.BytesIO(media)
        with av.open(source, mode="r", options=AV_OPTIONS) as container:
            yield container
    except DecodeError:
        raise
    except AV_ERRORS as error:
        raise DecodeError(media, f"cannot be decoded: {error}") from error


def decode_clip(
    media: Media,
    num_frames: int,
    size: int,
    *,
    indices: str = "uniform",
    mode: str = "exact",
    rng: random.Random | None = None,
) -> Tensor:
    """Frames of a film.

    Args:
        media: the encoded film.
        num_frames: frames wanted (F); a shorter film repeats its last one.
        size: pixels of a side.
        indices: `random`, the original's rule in training and evaluation; `uniform`, the middle of
            each interval, which repeats (see `frame_indices`).
        mode: `exact` resizes the whole frame; `center_crop_pad` cuts or pads with black and never
            resizes (the original's evaluation); `random_resized_crop` takes half to all of the
            area and flips half of the clips, all frames of a clip alike (3.2).
        rng: for what is random.

    Returns:
        uint8 [3, F, size, size].

    Raises:
        DecodeError: missing, truncated, no film, too large.
    """
    if indices not in INDICES or mode not in MODES:
        raise ValueError(f"indices {indices!r}, mode {mode!r}; known: {INDICES}, {MODES}")
    if rng is None:
        if indices == "random" or mode == "random_resized_crop":
            raise ValueError("random frames and crops need rng")
        rng = random.Random(0)  # never drawn from
    frames = _read_frames(media, num_frames, indices, rng)
    if mode == "exact":
        frames = [_resize(frame, size) for frame in frames]
    elif mode == "center_crop_pad":
        frames = [_center_crop_pad(frame, size) for frame in frames]
    else:
        frames = _random_resized_crop(frames, size, rng)
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()


def frame_indices(num_frames: int, length: int, indices: str, rng: random.Random) -> list[int]:
    """Which of `length` frames to take: one in each of n = min(num_frames, length) intervals.

    Their borders are the whole parts of linspace(0, length, n + 1). The last frame chosen is
    repeated up to num_frames.

    `random` draws among a..b-2 of an interval [a, b): its last frame never comes, as in the
    original. Where an interval has fewer than two frames, n frames of the film are drawn instead.
    `uniform` takes (a + b - 1) // 2.
    """
    count = min(num_frames, length)
    borders = np.linspace(0, length, count + 1).astype(int).tolist()
    intervals = list(itertools.pairwise(borders))
    if indices == "uniform":
        chosen = [(first + end - 1) // 2 for first, end in intervals]
    elif all(end - first >= 2 for first, end in intervals):
        chosen = [rng.randrange(first, end - 1) for first, end in intervals]
    else:
        chosen = sorted(rng.sample(range(length), count))
    return chosen + [chosen[-1]] * (num_frames - count)


def _read_frames(
    media: Media, num_frames: int, indices: str, rng: random.Random
) -> list[np.ndarray]:
    """uint8 [H, W, 3] of each wanted frame."""
    length = _frames_by_header(media) or _frames_by_packets(media)
    if not 0 < length <= MAX_FRAMES:
        raise DecodeError(media, f"{length} frames; 1 to {MAX_FRAMES} are read")
    wanted = frame_indices(num_frames, length, indices, rng)
    decoded, total = _decode_frames(media, set(wanted))
    if wanted[-1] not in decoded and 0 < total < length:
        # An edit list hides frames that the header counts: choose among those that are shown.
        wanted = frame_indices(num_frames, total, indices, rng)
        decoded, total = _decode_frames(media, set(wanted))
    if not set(wanted) <= set(decoded):
        raise DecodeError(media, f"ends after {total} frames; frame {wanted[-1]} was expected")
    if len({frame.shape for frame in decoded.values()}) > 1:
        raise DecodeError(media, "the frames' size changes")
    return [decoded[index] for index in wanted]


def _frames_by_header(media: Media) -> int:
    """0 where the container does not count them (WebM)."""
    with open_container(media) as container:
        return max(_video_stream(container, media).frames, 0)


def _frames_by_packets(media: Media) -> int:
    """Reads the film and decodes nothing; stops above MAX_FRAMES."""
    count = 0
    with open_container(media) as container:
        for packet in container.demux(_video_stream(container, media)):
            count += packet.size > 0
            if count > MAX_FRAMES:
                break
    return count


def _video_stream(
    container: av.container.InputContainer, media: Media
) -> av.video.stream.VideoStream:
    if not container.streams.video:
        raise DecodeError(media, "no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise DecodeError(media, "no decoder for its video stream")
    if context.width * context.height > MAX_FRAME_PIXELS:
        problem = f"{context.width} x {context.height} pixels; {MAX_FRAME_PIXELS} at most"
        raise DecodeError(media, problem)
    # The size may also change later in the stream: FFmpeg itself then refuses.
    context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    context.thread_count = 1  # the loader's processes are the parallelism
    return stream


def _decode_frames(media: Media, wanted: set[int]) -> tuple[dict[int, np.ndarray], int]:
    """The wanted frames, and how many were shown until the last of them or the end."""
    frames: dict[int, np.ndarray] = {}
    shown = packets = 0
    with open_container(media) as container:
        stream = _video_stream(container, media)
        for packet in container.demux(stream):
            packets += packet.size > 0
            if packet.is_corrupt:
                raise DecodeError(media, f"damaged or truncated at frame {shown}")
            for frame in packet.decode():
                if shown in wanted:
                    frames[shown] = frame.to_ndarray(format="rgb24")
                shown += 1
                if len(frames) == len(wanted):
                    return frames, shown
        if packets < stream.frames:
            raise DecodeError(media, f"truncated: {packets} of {stream.frames} frames")
    return frames, shown


def _resize(frame: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))


def _center_crop_pad(frame: np.ndarray, size: int) -> np.ndarray:
    """What torchvision's CenterCrop does: black borders where the frame is small (the extra pixel
    goes right and below), the middle where it is large."""
    height, width = frame.shape[:2]
    pad_y, pad_x = max(size - height, 0), max(size - width, 0)
    sides = ((pad_y // 2, pad_y - pad_y // 2), (pad_x // 2, pad_x - pad_x // 2), (0, 0))
    padded = np.pad(frame, sides)
    top = round((padded.shape[0] - size) / 2)
    left = round((padded.shape[1] - size) / 2)
    return padded[top : top + size, left : left + size]


def _random_resized_crop(
    frames: Sequence[np.ndarray], size: int, rng: random.Random
) -> list[np.ndarray]:
    height, width = frames[0].shape[:2]
    left, top, crop_width, crop_height = _random_crop(width, height, rng)
    flip = rng.random() < 0.5
    rows, columns = slice(top, top + crop_height), slice(left, left + crop_width)
    resized = [_resize(frame[rows, columns], size) for frame in frames]
    return [frame[:, ::-1] for frame in resized] if flip else resized


def _random_crop(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(left, top, width, height) by torchvision's rule: an area and a log-uniform ratio, ten tries,
    then the largest middle part with an allowed ratio."""
    for _ in range(10):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            return left, top, crop_width, crop_height
    crop_width = min(width, max(round(height * RATIO[1]), 1))
    crop_height = min(height, max(round(width / RATIO[0]), 1))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height
