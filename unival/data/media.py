"""From a record's encoded medium to a tensor: one in this process, or many at once."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unival.data.records import Record, RecordError
from unival.data_gpu import audio, image, video
from unival.data_gpu.audio_graph import LogMelMaker
from unival.data_gpu.errors import DecodeError, Media, require_content
from unival.data_gpu.image_graph import ImageDecoder, Picture, as_bmp
from unival.data_gpu.inspect import inspect_image
from unival.data_gpu.isolation import DecodeWorkers
from unival.data_gpu.limits import Limits
from unival.data_gpu.video_backends import BACKENDS, choose_backend

Box = tuple[float, float, float, float]

IMAGE_TRANSFORMS = ("exact", "pretrain")
RANDOM_VIDEO_TRANSFORMS = ("random_resized_crop", "pretrain", "fine_tuning")
VIDEO_TRANSFORMS = ("exact", "center_crop_pad", *RANDOM_VIDEO_TRANSFORMS)
CLIPS_TO_TIME = 8  # films that the backends are tried on
BOX_TOLERANCE = 1.0  # boxes are written with rounded widths: a pixel too far is no error


@dataclass
class MediaOptions:
    """How media become tensors. Sizes in pixels of a side, rates in Hz.

    image_transform  exact: resized to image_size, whatever the aspect (fine-tuning, evaluation)
                     pretrain: random resize and crop; RandAugment where there is no box
    video_transform  a mode of `decode_clip`: exact, center_crop_pad, random_resized_crop; pretrain
                     and fine_tuning add RandAugment
    video_indices    uniform, or random as the original everywhere
    audio_sample_rate  None keeps a file's own rate, as the released code
    audio_random     a random piece of a longer sound instead of its middle
    audio_hop_size   the model's hop_size: log-mel spectrograms are made beside the step, as the
                     model would make them; None leaves that to the model
    """

    image_size: int = 384
    video_size: int = 224
    video_frames: int = 8
    audio_samples: int = 480_000
    audio_sample_rate: int | None = 48_000
    image_transform: str = "exact"
    video_transform: str = "exact"
    video_indices: str = "uniform"
    audio_random: bool = False
    audio_hop_size: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("image_transform", IMAGE_TRANSFORMS),
            ("video_transform", VIDEO_TRANSFORMS),
            ("video_indices", video.INDICES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; known: {', '.join(known)}")
        if self.audio_hop_size is not None and self.audio_sample_rate is None:
            raise ValueError(
                "audio_hop_size needs an audio_sample_rate: the filter bank is made for it"
            )

    def fixed(self) -> MediaOptions:
        """The same sizes without anything random: for evaluation."""
        shown = self.video_transform
        return replace(
            self,
            image_transform="exact",
            video_transform="exact" if shown in RANDOM_VIDEO_TRANSFORMS else shown,
            video_indices="uniform",
            audio_random=False,
            audio_hop_size=None,
        )


@dataclass
class Loading:
    """How media are decoded while a model trains.

    device         of pictures: auto (the GPU where there is one), gpu or cpu
    threads        of DALI on the CPU, each rank
    workers        decoding processes for films, sounds and unusual pictures, each rank
    prefetch       steps prepared ahead of the one in use
    video_backend  auto (timed on the first clips), pyav, torchcodec or nvdec
    cache_mb       keeps decoded media of transforms without chance
    max_bad_share  of a source's records; training stops above it
    limits         what one medium may cost
    """

    device: str = "auto"
    threads: int = 2
    workers: int = 2
    prefetch: int = 2
    video_backend: str = "auto"
    cache_mb: int = 0
    max_bad_share: float = 0.05
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, known in (
            ("device", ("auto", "gpu", "cpu")),
            ("video_backend", ("auto", *BACKENDS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("threads", "workers", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; at least 1")


class Loaded(NamedTuple):
    """A medium as a tensor, and the record's box in pixels of that tensor.

    image uint8 [3, H, W], or float32 in -1..1 from a MediaLoader; video uint8 [3, F, H, W]; audio
    float32 [L], or [1 + L // hop, mel_bins] where asked for; text uint8 [0].
    """

    tensor: Tensor
    box: Box | None


def load_media(
    record: Record, options: MediaOptions, rng: random.Random, limits: Limits | None = None
) -> Loaded:
    """The record's medium, decoded in this process with Pillow, PyAV and soundfile.

    Raises:
        RecordError: the medium cannot be decoded (field media), or the box lies outside the
            picture (field box).
    """
    limits = limits or Limits()
    try:
        if record.medium == "image":
            picture = image.decode_image(record.media, limits)
            plan, box = plan_image(record, picture.width, picture.height, options, rng)
            return Loaded(torch.from_numpy(image.image_to_array(image.render(picture, plan))), box)
        if record.medium == "video":
            clip = video.decode_clip(
                record.media,
                options.video_frames,
                options.video_size,
                indices=options.video_indices,
                mode=options.video_transform,
                rng=rng,
                limits=limits,
            )
            return Loaded(torch.from_numpy(clip), None)
        if record.medium == "audio":
            piece = rng if options.audio_random else None
            rate = options.audio_sample_rate
            wave = audio.decode_waveform(record.media, options.audio_samples, rate, piece, limits)
            return Loaded(torch.from_numpy(wave), None)
    except DecodeError as error:
        raise RecordError(record.origin, "media", str(error)) from error
    return Loaded(torch.empty(0, dtype=torch.uint8), None)


def plan_image(
    record: Record, width: int, height: int, options: MediaOptions, rng: random.Random
) -> tuple[image.Plan, Box | None]:
    """What is done to a record's picture of width x height, and where its box is after that."""
    size = options.image_size
    box = _box_inside(record, width, height)
    if options.image_transform == "exact":
        plan = image.exact_plan(size)
    elif box is None:
        plan = image.center_crop_plan(width, height, size, rng)
    else:
        plan = image.object_crop_plan(width, height, box, size, rng)
    return plan, None if box is None else image.move_box(box, width, height, plan)


def _box_inside(record: Record, width: int, height: int) -> Box | None:
    if record.box is None:
        return None
    x0, y0, x1, y1 = record.box
    limits = (width + BOX_TOLERANCE, height + BOX_TOLERANCE)
    if x0 >= width or y0 >= height or x1 > limits[0] or y1 > limits[1]:
        problem = f"{record.box} lies outside the picture of {width} x {height} pixels"
        raise RecordError(record.origin, "box", problem)
    return x0, y0, min(x1, float(width)), min(y1, float(height))


class MediaLoader:
    """Decodes the media of many records at once: pictures through DALI, films and sounds in
    processes of their own.

    What it gives depends on record and seed alone: not on what is loaded together, the number of
    workers, or what failed before.

    Args:
        options: sizes and transforms.
        loading: devices, workers, limits.
        device_id: the GPU of this rank.
    """

    def __init__(self, options: MediaOptions, loading: Loading, device_id: int = 0) -> None:
        if loading.device == "gpu" and not torch.cuda.is_available():
            raise ValueError("loading.device=gpu, but torch finds no GPU here; known: auto, cpu")
        self.options, self.loading = options, loading
        self._device_id = device_id
        self._cache = _Cache(loading.cache_mb * 2**20 if options == options.fixed() else 0)
        self._readers = ThreadPoolExecutor(loading.workers, thread_name_prefix="read")
        self._workers: DecodeWorkers | None = None
        self._images: ImageDecoder | None = None
        self._log_mel: LogMelMaker | None = None
        self._video_backend = loading.video_backend

    def __enter__(self) -> MediaLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding processes and threads."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._workers is not None:
            self._workers.close()

    def load(self, records: Sequence[Record], seeds: Sequence[str]) -> list[Loaded | RecordError]:
        """For each record its medium, or the error that says why there is none (the one that
        `load_media` raises). `seeds` are what the transforms of each record draw from."""
        found: list[Loaded | RecordError | None] = [self._cache.get(record) for record in records]
        rows: dict[str, list[int]] = {"image": [], "video": [], "audio": [], "text": []}
        for row, loaded in enumerate(found):
            if loaded is None:
                rows[records[row].medium].append(row)
        if rows["video"] and self._video_backend == "auto":
            clips = [records[row].media for row in rows["video"]]
            self._video_backend = self._choose_backend(clips[:CLIPS_TO_TIME])
        films = [
            (
                row,
                self._clip(
                    self._processes(),
                    records[row].media,
                    self.options,
                    seeds[row],
                    self._video_backend,
                ),
            )
            for row in rows["video"]
        ]
        sounds = [(row, self._waveform(records[row], seeds[row])) for row in rows["audio"]]
        pictures = self._load_images(
            [records[row] for row in rows["image"]], [seeds[row] for row in rows["image"]]
        )
        for row, loaded in zip(rows["image"], pictures, strict=True):
            found[row] = loaded
        for row, future in (*films, *sounds):
            found[row] = _result(records[row], future)
        if self.options.audio_hop_size is not None:
            self._make_log_mel(found, rows["audio"])
        for row in rows["text"]:
            found[row] = Loaded(torch.empty(0, dtype=torch.uint8), None)
        loaded_rows = [loaded for loaded in found if loaded is not None]
        for record, loaded in zip(records, loaded_rows, strict=True):
            self._cache.keep(record, loaded)
        return loaded_rows

    def _clip(
        self, workers: DecodeWorkers, media: Media, options: MediaOptions, seed: str, backend: str
    ) -> Future[np.ndarray]:
        return workers.clip(
            media,
            options.video_frames,
            options.video_size,
            indices=options.video_indices,
            mode=options.video_transform,
            seed=seed,
            backend=backend,
        )

    def _choose_backend(self, clips: Sequence[Media]) -> str:
        """The backend that is quickest on the first clips; it never changes what is decoded by more
        than `read_frames` says."""
        usable = [name for name in BACKENDS if name != "nvdec" or self._device() == "gpu"]
        options = self.options.fixed()
        # One process: with several, what each of them imports for a backend would be timed too.
        with DecodeWorkers(1, self.loading.limits) as worker:

            def decode(media: Media, backend: str) -> None:
                self._clip(worker, media, options, "", backend).result()

            return choose_backend(clips, usable, decode)

    def _waveform(self, record: Record, seed: str) -> Future[np.ndarray]:
        options = self.options
        return self._processes().waveform(
            record.media,
            options.audio_samples,
            options.audio_sample_rate,
            seed=seed if options.audio_random else None,
        )

    def _make_log_mel(self, found: list[Loaded | RecordError | None], rows: list[int]) -> None:
        """Replace the waveforms by their spectrograms."""
        options = self.options
        assert options.audio_hop_size is not None and options.audio_sample_rate is not None
        if self._log_mel is None:
            self._log_mel = LogMelMaker(
                options.audio_sample_rate,
                options.audio_hop_size,
                device=self._device(),
                threads=self.loading.threads,
                device_id=self._device_id,
            )
        waves = {row: loaded for row in rows if isinstance(loaded := found[row], Loaded)}
        spectrograms = self._log_mel.make([wave.tensor.numpy() for wave in waves.values()])
        for row, spectrogram in zip(waves, spectrograms, strict=True):
            found[row] = Loaded(spectrogram, None)

    def _processes(self) -> DecodeWorkers:
        if self._workers is None:
            self._workers = DecodeWorkers(self.loading.workers, self.loading.limits)
        return self._workers

    def _load_images(
        self, records: Sequence[Record], seeds: Sequence[str]
    ) -> list[Loaded | RecordError]:
        found: list[Loaded | RecordError] = []
        pictures: list[Picture] = []
        for record, seed, opened in zip(
            records, seeds, self._readers.map(self._open_image, records), strict=True
        ):
            try:
                if isinstance(opened, DecodeError):
                    raise _record_error(record, opened)
                encoded, width, height = opened
                plan, box = plan_image(record, width, height, self.options, random.Random(seed))
            except RecordError as error:
                found.append(error)
                continue
            pictures.append(Picture(encoded, width, height, plan))
            found.append(Loaded(torch.empty(0), box))  # its pixels follow
        if not pictures:
            return found
        if self._images is None:
            self._images = self._image_decoder()
        decoded = iter(self._images.decode(pictures))
        for row, (record, loaded) in enumerate(zip(records, found, strict=True)):
            if isinstance(loaded, Loaded):
                tensor = next(decoded)
                found[row] = (
                    _record_error(record, tensor)
                    if isinstance(tensor, DecodeError)
                    else Loaded(tensor, loaded.box)
                )
        return found

    def _open_image(self, record: Record) -> tuple[bytes, int, int] | DecodeError:
        """What DALI decodes, with width and height. A picture that it would decode differently from
        Pillow, or not at all, is decoded by Pillow and goes on as a bitmap."""
        media, limits = record.media, self.loading.limits
        try:
            require_content(media, limits)
            encoded = media.read_bytes() if isinstance(media, Path) else media
            info = inspect_image(encoded, limits)
            if info.plain:
                return encoded, info.width, info.height
            pixels = self._processes().picture(encoded).result()
            return as_bmp(pixels), pixels.shape[1], pixels.shape[0]
        except DecodeError as error:
            return error
        except OSError as error:
            return DecodeError(media, str(error))

    def _image_decoder(self) -> ImageDecoder:
        return ImageDecoder(
            self.options.image_size,
            self._device(),
            threads=self.loading.threads,
            device_id=self._device_id,
        )

    def _device(self) -> str:
        if self.loading.device != "auto":
            return self.loading.device
        return "gpu" if torch.cuda.is_available() else "cpu"


def _record_error(record: Record, error: DecodeError) -> RecordError:
    return RecordError(record.origin, "media", str(DecodeError(record.media, error.problem)))


def _result(record: Record, future: Future[np.ndarray]) -> Loaded | RecordError:
    try:
        return Loaded(torch.from_numpy(future.result()), None)
    except DecodeError as error:
        return _record_error(record, error)


class _Cache:
    """Decoded media, least recently used first out."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self._kept: OrderedDict[tuple[str, Box | None], Loaded] = OrderedDict()

    def get(self, record: Record) -> Loaded | None:
        if not self.capacity:
            return None
        key = (record.media_key, record.box)
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep(self, record: Record, loaded: Loaded | RecordError) -> None:
        key = (record.media_key, record.box) if self.capacity else None
        if key is None or key in self._kept or isinstance(loaded, RecordError):
            return
        # A copy: a view would keep the batch that it is a row of.
        self._kept[key] = Loaded(loaded.tensor.clone(), loaded.box)
        self.size += loaded.tensor.nbytes
        while self.size > self.capacity:
            _, dropped = self._kept.popitem(last=False)
            self.size -= dropped.tensor.nbytes
