"""How fast media become tensors, beside what people use otherwise, on the same files in one run.

    python benchmarks/decoding.py --out runs/decoding
    python benchmarks/decoding.py --only images memory --rounds 5

images  the training pipeline of pre-training (random resize, crop, RandAugment, normalize) at 384
        pixels: this project's loader, a PyTorch DataLoader over Pillow and torchvision with two
        workers, the same with torchvision's decoder and resize, and torchcodec's decoder in it. All
        follow the same plans, so that they do the same work.
clips   8 and 16 frames of films of 15 seconds (H.264, a key frame every 50 frames, 596 x 336), by
        keyframe seeking (PyAV), torchcodec, DALI where its CPU decoder knows the codec, and by
        decoding everything; then the same from films that `unival data reencode` made of them at a
        short side of 224: H.264 with short groups, or JPEG at 3 frames a second.
sounds  10 seconds of each file, by format.
memory  resident memory while one loader gives 20,000 samples of all media.

The loaders take turns, so that what else the machine does meets all of them; a rate is the median
of the rounds. `per core` divides by the processor time of this process and its children. Where the
rounds of a loader spread by more than 10 %, the line says so.

Needs the sample media of this repository. Writes decoding.csv and decoding.png.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import soundfile
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF
from train_step import describe_machine

from unival.data.batch import MEDIUM_KEYS, collate
from unival.data.media import Loading, MediaLoader, MediaOptions
from unival.data.records import Origin, Record
from unival.data_gpu import image
from unival.data_gpu.audio import decode_waveform
from unival.data_gpu.limits import Limits
from unival.data_gpu.resize import resize
from unival.data_gpu.video import decode_clip, frame_indices, probe_video
from unival.data_gpu.video_backends import BackendError, nvdec_graph, require_backend
from unival.tasks.base import Example

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("images", "clips", "sounds", "memory")
SIZE, BATCH = 384, 32
CLIP_SIZE, CLIP_SECONDS, CLIP_RATE, CLIP_GOP = 224, 15, 25, 50
SPREAD = 0.10
PIXELS = MEDIUM_KEYS["image"]
EXAMPLES = [(Example([0, 2], [0], [2]), row) for row in range(BATCH)]  # text costs nothing here


@dataclass
class Row:
    """One loader in one setting."""

    section: str
    setting: str
    loader: str
    unit: str
    samples: int
    rounds: int
    rate: float
    rate_per_core: float
    spread: float


def cpu_seconds() -> float:
    """Processor time of this process, its children, and those that have ended."""
    times = [psutil.Process().cpu_times()]
    own = times[0].user + times[0].system + times[0].children_user + times[0].children_system
    for child in psutil.Process().children(recursive=True):
        try:
            found = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        own += found.user + found.system
    return own


def take_turns(
    section: str, setting: str, unit: str, rounds: int, loaders: dict[str, Callable[[], int]]
) -> list[Row]:
    """Each loader once to warm up, then in turn; a loader says how many samples it gave."""
    seconds: dict[str, list[tuple[float, float, int]]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, load in loaders.items():
            gc.collect()
            wall, cpu = time.perf_counter(), cpu_seconds()
            count = load()
            if number:
                spent = time.perf_counter() - wall, cpu_seconds() - cpu, count
                seconds[name].append(spent)
    rows = []
    for name, found in seconds.items():
        rates = [count / wall for wall, _, count in found]
        per_core = [count / max(cpu, 1e-9) for _, cpu, count in found]
        median = statistics.median(rates)
        rows.append(
            Row(
                section,
                setting,
                name,
                unit,
                found[0][2],
                rounds,
                median,
                statistics.median(per_core),
                (max(rates) - min(rates)) / median,
            )
        )
        noisy = f"  spread {rows[-1].spread:.0%}: unreliable" if rows[-1].spread > SPREAD else ""
        print(
            f"{section:<8}{setting:<22}{name:<30}{median:>9.1f} {unit}/s"
            f"{rows[-1].rate_per_core:>9.1f} per core{noisy}",
            flush=True,
        )
    return rows


def record(medium: str, media: bytes | Path, row: int) -> Record:
    kind = {"image": "caption", "video": "video_caption", "audio": "audio_caption"}[medium]
    return Record(str(row), kind, media, Origin("benchmark", row), captions=("x",))


def photos(count: int) -> list[bytes]:
    files = sorted((ROOT / "samples" / "images").glob("*.jpg"))
    return [files[number % len(files)].read_bytes() for number in range(count)]


class Photos(Dataset):
    """What a DataLoader worker does to one photo: decode, then follow the plan."""

    def __init__(self, encoded: Sequence[bytes], decoder: str) -> None:
        self.encoded, self.decoder = encoded, decoder

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.set_num_threads(1)
        data, rng = self.encoded[index], random.Random(f"{index}")
        if self.decoder == "pil":
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            plan = image.center_crop_plan(picture.width, picture.height, SIZE, rng)
            picture = TF.resize(picture, [plan.height, plan.width], TF.InterpolationMode.BICUBIC)
            cropped = TF.crop(picture, plan.top, plan.left, SIZE, SIZE)
        else:
            pixels = _decode(data, self.decoder)
            plan = image.center_crop_plan(pixels.shape[2], pixels.shape[1], SIZE, rng)
            pixels = TF.resize(
                pixels, [plan.height, plan.width], TF.InterpolationMode.BICUBIC, antialias=True
            )
            pixels = TF.crop(pixels, plan.top, plan.left, SIZE, SIZE)
            if not plan.operations:
                return TF.normalize(pixels.float() / 255, [0.5] * 3, [0.5] * 3)
            cropped = TF.to_pil_image(pixels)
        cropped = image.augment(cropped, plan.operations)
        return TF.normalize(TF.to_tensor(cropped), [0.5] * 3, [0.5] * 3)


def _decode(data: bytes, decoder: str) -> torch.Tensor:
    """uint8 [3, H, W]."""
    if decoder == "torchcodec":
        from torchcodec.decoders import VideoDecoder

        return VideoDecoder(data, num_ffmpeg_threads=1)[0]
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB)


def torchcodec_works() -> bool:
    try:
        require_backend("torchcodec")
    except BackendError as error:
        print(f"torchcodec is left out: {error}", flush=True)
        return False
    return True


def images(rounds: int, workers: int) -> list[Row]:
    encoded = photos(20 * BATCH)
    records = [record("image", data, row) for row, data in enumerate(encoded)]
    seeds = [f"{row}" for row in range(len(records))]
    options = MediaOptions(image_size=SIZE, image_transform="pretrain")
    loader = MediaLoader(options, Loading(device="cpu", threads=workers, workers=workers))

    def ours() -> int:
        count = 0
        for start in range(0, len(records), BATCH):
            part = slice(start, start + BATCH)
            loaded = loader.load(records[part], seeds[part])
            count += len(collate(EXAMPLES, [found.tensor for found in loaded], "image")[PIXELS])
        return count

    def data_loader(decoder: str) -> Callable[[], int]:
        data = Photos(encoded, decoder)
        return lambda: sum(
            len(batch) for batch in DataLoader(data, batch_size=BATCH, num_workers=workers)
        )

    loaders = {
        "unival (DALI)": ours,
        "DataLoader PIL+torchvision": data_loader("pil"),
        "DataLoader torchvision.io": data_loader("torchvision.io"),
    }
    if torchcodec_works():
        loaders["DataLoader torchcodec"] = data_loader("torchcodec")
    rows = take_turns("images", f"{workers} workers", "image", rounds, loaders)
    loader.close()
    ratio = rows[0].rate / rows[1].rate
    print(f"images: {ratio:.2f} times DataLoader PIL+torchvision (wanted: 1.5)", flush=True)
    return rows


def make_film(path: Path, seed: int) -> None:
    """A pan over a photo with a little noise: 15 seconds that compress like a camera's."""
    rng = np.random.default_rng(seed)
    files = sorted((ROOT / "samples" / "images").glob("*.jpg"))
    photo = Image.open(files[seed % len(files)]).convert("RGB").resize((900, 640))
    pixels = np.asarray(photo, dtype=np.int16)
    noise = rng.normal(0, 4, (336 + 32, 596 + 32, 3)).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP_RATE)
        stream.width, stream.height, stream.pix_fmt = 596, 336, "yuv420p"
        stream.gop_size = CLIP_GOP
        stream.options = {"preset": "veryfast", "crf": "23"}
        for number in range(CLIP_SECONDS * CLIP_RATE):
            angle = number / (CLIP_SECONDS * CLIP_RATE) * 2 * np.pi
            x, y = int(150 + 150 * np.cos(angle)), int(150 + 150 * np.sin(angle))
            shift = rng.integers(0, 32, 2)
            grain = noise[shift[0] : shift[0] + 336, shift[1] : shift[1] + 596]
            frame = np.clip(pixels[y : y + 336, x : x + 596] + grain, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def decode_everything(path: Path, frames: int) -> np.ndarray:
    """What a loader without seeking does: all frames in memory, then the wanted ones."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = np.linspace(0, len(decoded), frames, endpoint=False).astype(int)
    return np.stack(
        [
            np.asarray(Image.fromarray(decoded[n]).resize((CLIP_SIZE, CLIP_SIZE), Image.BICUBIC))
            for n in chosen
        ]
    )


def over(paths: Sequence[Path], load: Callable[[Path], Any]) -> Callable[[], int]:
    def run() -> int:
        for path in paths:
            load(path)
        return len(paths)

    return run


def ours(frames: int, backend: str) -> Callable[[Path], Any]:
    return lambda path: decode_clip(path, frames, CLIP_SIZE, backend=backend)


def dali(frames: int) -> Callable[[Path], Any]:
    """DALI's CPU decoder, which knows the codec of re-encoded films."""
    graph = nvdec_graph("cpu", -1)
    graph.build()
    counts: dict[Path, int] = {}

    def load(path: Path) -> np.ndarray:
        if path not in counts:
            counts[path] = probe_video(path, Limits()).frames
        chosen = frame_indices(frames, counts[path], "uniform", random.Random(0))
        graph.feed_input("encoded", [np.fromfile(path, dtype=np.uint8)])
        graph.feed_input("frames", [np.array(chosen, dtype=np.int32)])
        (clip,) = graph.run()
        return resize(np.asarray(clip.at(0)), CLIP_SIZE, CLIP_SIZE)

    return load


def clips(rounds: int, folder: Path) -> list[Row]:
    films = []
    for seed in range(4):
        films.append(folder / f"film{seed}.mp4")
        make_film(films[-1], seed)
    again = {
        "H.264, short GOP": reencoded(films, folder / "gop", []),
        "JPEG frames": reencoded(films, folder / "jpeg", ["--frames", "jpeg", "--fps", "3"]),
    }
    rows = []
    for frames in (8, 16):
        loaders = {
            "everything (PyAV)": over(films, lambda path, n=frames: decode_everything(path, n)),
            "PyAV, seeking": over(films, ours(frames, "pyav")),
        }
        if torchcodec_works():
            loaders["torchcodec"] = over(films, ours(frames, "torchcodec"))
        for name, paths in again.items():
            loaders[f"PyAV, {name}"] = over(paths, ours(frames, "pyav"))
        loaders["DALI (CPU), JPEG frames"] = over(again["JPEG frames"], dali(frames))
        found = take_turns("clips", f"{frames} frames of {CLIP_SECONDS} s", "clip", rounds, loaders)
        rows += found
        rates = {row.loader: row.rate for row in found}
        everything = rates["everything (PyAV)"]
        best = max(rates["PyAV, seeking"], rates.get("torchcodec", 0.0))
        again_best = max(rate for name, rate in rates.items() if "JPEG frames" in name)
        print(
            f"clips: seeking {best / everything:.1f} times decoding everything (wanted: 3); "
            f"re-encoded {again_best / everything:.1f} times decoding everything and "
            f"{again_best / best:.1f} times seeking in the source (wanted: 10)",
            flush=True,
        )
    return rows


def reencoded(films: Sequence[Path], out: Path, options: list[str]) -> list[Path]:
    """The films as `unival data reencode` makes them at the size of a clip."""
    from unival.cli import main

    arguments = [*map(str, films), "--out", str(out), "--size", str(CLIP_SIZE), *options]
    if main(["data", "reencode", *arguments]):
        raise RuntimeError(f"unival data reencode {' '.join(arguments)} failed")
    return sorted(path for path in out.rglob("film*") if path.suffix in (".mp4", ".avi"))


def sounds(rounds: int, folder: Path) -> list[Row]:
    files = sorted((ROOT / "samples" / "audio").glob("*.ogg"))[:8]
    loaders = {}
    for form, options in {
        "wav": {},
        "flac": {},
        "ogg": {"format": "OGG", "subtype": "VORBIS"},
        "mp3": {},
    }.items():
        paths = []
        for number, file in enumerate(files):
            samples, rate = soundfile.read(file, dtype="float32")
            long = np.concatenate([samples] * (1 + 20 * rate // len(samples)))[: 20 * rate]
            paths.append(folder / f"sound{number}.{form}")
            soundfile.write(paths[-1], long, rate, **options)
        loaders[form] = over(paths, lambda path: decode_waveform(path, 480_000, 48_000))
    return take_turns("sounds", "10 of 20 s, 48 kHz", "file", rounds, loaders)


def memory(samples: int) -> list[Row]:
    """Resident memory of this process and its decoding processes over many samples."""
    options = MediaOptions(
        image_size=64,
        image_transform="pretrain",
        video_size=32,
        video_frames=2,
        audio_samples=4_800,
        video_indices="random",
        audio_random=True,
    )
    files = {
        medium: sorted((ROOT / "samples" / folder).iterdir())
        for medium, folder in (("image", "images"), ("video", "video"), ("audio", "audio"))
    }
    # In every ten: eight pictures, a clip and a sound.
    media = ["image"] * 8 + ["video", "audio"]
    held, began = [], time.perf_counter()
    with MediaLoader(options, Loading(device="cpu", video_backend="pyav")) as loader:
        for start in range(0, samples, 100):
            chosen = [media[row % 10] for row in range(start, start + 100)]
            records = [
                record(medium, files[medium][row % len(files[medium])], row)
                for row, medium in enumerate(chosen, start)
            ]
            loader.load(records, [f"{row.id}" for row in records])
            if (start + 100) % 500 == 0:
                held.append(_resident())
    seconds = time.perf_counter() - began
    settled = held[len(held) // 10 :]  # allocators and processes have started by then
    middle = (max(settled) + min(settled)) / 2
    spread = (max(settled) - min(settled)) / 2 / middle
    print(
        f"memory: {min(settled) / 2**20:.0f} to {max(settled) / 2**20:.0f} MiB over {samples} "
        f"samples after the first {samples // 10}: within {spread:.1%} (wanted: 5 %)",
        flush=True,
    )
    rate = samples / seconds
    return [Row("memory", "±share of MiB", "unival", "sample", samples, 1, rate, rate, spread)]


def _resident() -> int:
    process = psutil.Process()
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))


def draw(rows: Sequence[Row], path: Path, machine: dict[str, Any]) -> None:
    """Bars of the rates, a panel for each section and setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.section != "memory":
            groups.setdefault((row.section, row.setting), []).append(row)
    if not groups:
        return
    figure = Figure(figsize=(9, 2.2 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(len(groups), 1))
    for axis, ((section, setting), found) in zip(axes, groups.items(), strict=True):
        bars = axis.barh([row.loader for row in found], [row.rate for row in found])
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel(f"{found[0].unit}s a second")
        axis.set_title(f"{section}: {setting}")
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}")
    figure.savefig(path, dpi=110)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/decoding"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each loader (3)")
    parser.add_argument("--workers", type=int, default=2, help="of the image loaders (2)")
    parser.add_argument("--samples", type=int, default=20_000, help="of the memory section")
    args = parser.parse_args(argv)
    for name, least in (("rounds", 1), ("workers", 1), ("samples", 1000)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return args


def run(args: argparse.Namespace, folder: Path) -> Iterator[list[Row]]:
    if "images" in args.only:
        yield images(args.rounds, args.workers)
    if "clips" in args.only:
        yield clips(args.rounds, folder)
    if "sounds" in args.only:
        yield sounds(args.rounds, folder)
    if "memory" in args.only:
        yield memory(args.samples)


def main() -> int:
    """Measure, print, write the CSV and the plot."""
    args = parse(sys.argv[1:])
    torch.set_num_threads(1)  # the loaders bring their own threads
    machine = describe_machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for found in run(args, Path(folder)) for row in found]
    with (args.out / "decoding.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *machine])
        writer.writeheader()
        writer.writerows(asdict(row) | machine for row in rows)
    draw(rows, args.out / "decoding.png", machine)
    print(f"{args.out / 'decoding.csv'} and decoding.png; load at the end {os.getloadavg()[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
