"""Pictures in batches through DALI: the same plans on a GPU and on a CPU.

One argument, `device`, chooses. Nothing in the graph draws: the plans come in with the pictures, so
that the random stream is the sampler's on either device, and a graph that died is built again with
nothing lost but time.

On a CPU, DALI decodes and normalizes; between these, resizing is torch's and RandAugment Pillow's,
because DALI's own resizing and warping take 13 and 2 times as long there (benchmarks/NOTES.md).
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image
from torch import Tensor

from unival.data_gpu.errors import DecodeError
from unival.data_gpu.image import (
    ENHANCE,
    FILL,
    OPERATIONS,
    OPERATIONS_PER_IMAGE,
    Operation,
    Plan,
    affine,
    augment,
)
from unival.data_gpu.resize import resize

log = logging.getLogger(__name__)
DEVICES = ("cpu", "gpu")
HALF = 127.5  # (x - 127.5) / 127.5 brings 0..255 to -1..1
NOTHING, AUTO_CONTRAST, EQUALIZE, BRIGHTNESS, SHARPNESS, MOVE = range(6)
COLOUR_CODES = {
    "identity": NOTHING,
    "auto_contrast": AUTO_CONTRAST,
    "equalize": EQUALIZE,
    "brightness": BRIGHTNESS,
    "sharpness": SHARPNESS,
}
# Sharpness s blends a picture with its smoothed self: s * x + (1 - s) * smooth(x), one filter.
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
SHARPEN = (1 - ENHANCE) * SMOOTH + ENHANCE * np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)


def image_graph(size: int, device: str, batch_size: int, threads: int, device_id: int) -> Pipeline:
    """The graph from encoded pictures to float32 [3, size, size] in -1..1, not yet built.

    Args:
        size: pixels of a side.
        device: `gpu` decodes on the GPU (`mixed`) and stays there; `cpu` needs no GPU.
        batch_size: pictures at most in one run.
        threads: of DALI.
        device_id: the GPU; -1 makes a graph that can be looked at (`serialize`) without one.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r}; known: {', '.join(DEVICES)}")
    options = {
        "batch_size": batch_size,
        "num_threads": threads,
        "device_id": device_id if device == "gpu" and device_id >= 0 else None,
        "prefetch_queue_depth": 1,  # the caller prepares the next batch while this one is used
    }
    return (_gpu_graph if device == "gpu" else _cpu_graph)(size, threads, **options)


@pipeline_def
def _cpu_graph(size: int, threads: int) -> DataNode:
    images = _decode("cpu")
    plans = fn.external_source(name="plan", dtype=types.INT32, ndim=1)
    images = fn.python_function(images, plans, function=_Renderer(threads), batch_processing=True)
    images = fn.reinterpret(images, layout="HWC", shape=[size, size, 3])
    return _normalize(images)


@pipeline_def(enable_conditionals=True)
def _gpu_graph(size: int, threads: int) -> DataNode:
    return native_graph(size, "mixed")


def native_graph(size: int, decoder: str) -> DataNode:
    """The graph of DALI's operators alone, behind a `mixed` decoder or (to test it) a `cpu` one."""
    images = fn.resize(
        _decode(decoder),
        size=[size, size],
        interp_type=types.INTERP_CUBIC,
        roi_start=fn.external_source(name="roi_start", dtype=types.FLOAT, ndim=1),
        roi_end=fn.external_source(name="roi_end", dtype=types.FLOAT, ndim=1),
    )
    for slot in range(OPERATIONS_PER_IMAGE):
        code = fn.external_source(name=f"code{slot}", dtype=types.INT32, ndim=0)
        matrix = fn.external_source(name=f"matrix{slot}", dtype=types.FLOAT, ndim=2)
        images = _operation(images, code, matrix)
    return _normalize(images)


def _decode(decoder: str) -> DataNode:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(
        encoded, device=decoder, output_type=types.RGB, adjust_orientation=False
    )


def _normalize(images: DataNode) -> DataNode:
    return fn.crop_mirror_normalize(
        images, dtype=types.FLOAT, output_layout="CHW", mean=[HALF] * 3, std=[HALF] * 3
    )


def _operation(images: DataNode, code: DataNode, matrix: DataNode) -> DataNode:
    """One operation of RandAugment, another for each picture."""
    if code == AUTO_CONTRAST:
        low = fn.reductions.min(images, axes=[0, 1], keep_dims=True)
        span = fn.reductions.max(images, axes=[0, 1], keep_dims=True) - low
        # One value alone stays what it is, as in Pillow.
        flat = fn.cast(span == 0, dtype=types.FLOAT)
        scale = 255.0 * (1.0 - flat) / math.max(span, 1) + flat
        images = fn.cast_like((images - low) * scale + low * flat, images)
    elif code == EQUALIZE:
        images = fn.equalize(images)
    elif code == BRIGHTNESS:
        images = fn.brightness(images, brightness=ENHANCE)
    elif code == SHARPNESS:
        images = fn.filter(images, types.Constant(SHARPEN, device="cpu"))
    elif code == MOVE:
        images = fn.warp_affine(
            images, matrix=matrix, fill_value=FILL, interp_type=types.INTERP_LINEAR
        )
    return images


class _Renderer:
    """Follows plans on a CPU: torch resizes (exactly Pillow's bicubic), Pillow augments."""

    def __init__(self, threads: int) -> None:
        self.threads = ThreadPoolExecutor(threads)

    def __call__(self, images: list[np.ndarray], plans: list[np.ndarray]) -> list[np.ndarray]:
        return list(self.threads.map(_render, images, plans))


def _render(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    plan = _plan_of_numbers(numbers.tolist())
    pixels = resize(image[None], plan.width, plan.height)[0]
    rows, columns = slice(plan.top, plan.top + plan.size), slice(plan.left, plan.left + plan.size)
    cropped = np.ascontiguousarray(pixels[rows, columns])
    if not plan.operations:
        return cropped
    return np.asarray(augment(Image.fromarray(cropped), plan.operations))


def _numbers_of_plan(plan: Plan) -> list[int]:
    """A plan as int32: geometry, then index and sign of each operation."""
    operations = [n for name, sign in plan.operations for n in (OPERATIONS.index(name), sign)]
    return [*plan[:5], *operations]


def _plan_of_numbers(numbers: list[int]) -> Plan:
    width, height, left, top, size, *rest = numbers
    pairs = zip(rest[::2], rest[1::2], strict=True)
    operations = tuple(Operation(OPERATIONS[index], sign) for index, sign in pairs)
    return Plan(width, height, left, top, size, operations)


def native_inputs(plan: Plan, width: int, height: int) -> dict[str, np.ndarray]:
    """What `native_graph` needs to follow a plan on a picture of width x height."""
    x, y = width / plan.width, height / plan.height
    inputs = {
        "roi_start": np.array([plan.top * y, plan.left * x], dtype=np.float32),
        "roi_end": np.array(
            [(plan.top + plan.size) * y, (plan.left + plan.size) * x], dtype=np.float32
        ),
    }
    for slot in range(OPERATIONS_PER_IMAGE):
        chosen = plan.operations[slot] if slot < len(plan.operations) else Operation("identity", 1)
        code = COLOUR_CODES.get(chosen.name, MOVE)
        matrix = affine(chosen, plan.size, plan.size) if code == MOVE else (1, 0, 0, 0, 1, 0)
        inputs[f"code{slot}"] = np.array(code, dtype=np.int32)
        inputs[f"matrix{slot}"] = np.array(matrix, dtype=np.float32).reshape(2, 3)
    return inputs


class Picture:
    """An encoded picture, its size by its header, and what is to be made of it."""

    def __init__(self, encoded: bytes, width: int, height: int, plan: Plan) -> None:
        self.encoded, self.width, self.height, self.plan = encoded, width, height, plan


class ImageDecoder:
    """Decodes batches of pictures to float32 [3, size, size] in -1..1 on its device.

    What goes in should have passed `inspect.inspect_image`. Where a picture fails all the same,
    DALI gives up the batch and the graph: the graph is built again and the batch run picture by
    picture, so that each of the others is decoded once and the one that fails is known.

    Args:
        size: pixels of a side.
        device: cpu or gpu.
        batch_size: pictures in one run of the graph; more are decoded in several runs.
        threads: of DALI on the CPU.
        device_id: the GPU.
    """

    def __init__(
        self, size: int, device: str, batch_size: int = 64, threads: int = 2, device_id: int = 0
    ) -> None:
        self.size, self.device = size, device
        self.batch_size, self.threads, self.device_id = batch_size, threads, device_id
        self.rebuilt = 0
        self._pipeline = self._build()

    def _build(self) -> Pipeline:
        pipeline = image_graph(
            self.size, self.device, self.batch_size, self.threads, self.device_id
        )
        pipeline.build()
        return pipeline

    def decode(self, pictures: Sequence[Picture]) -> list[Tensor | DecodeError]:
        """A tensor for each picture, or why there is none.

        Tensors of one run are views of one batch, so that `data.batch.collate` need not copy them.
        """
        decoded: list[Tensor | DecodeError] = []
        for start in range(0, len(pictures), self.batch_size):
            part = pictures[start : start + self.batch_size]
            try:
                decoded += self._run(part)
            except RuntimeError as error:
                self._rebuild(error)
                decoded += [self._decode_alone(picture) for picture in part]
        return decoded

    def _decode_alone(self, picture: Picture) -> Tensor | DecodeError:
        try:
            return self._run([picture])[0]
        except RuntimeError as error:
            self._rebuild(error)
            return DecodeError(picture.encoded, f"DALI cannot decode it: {_short(error)}")

    def _rebuild(self, error: RuntimeError) -> None:
        self.rebuilt += 1
        log.warning("the graph of pictures failed and is built again: %s", _short(error))
        self._pipeline = self._build()

    def _run(self, pictures: Sequence[Picture]) -> list[Tensor]:
        encoded = [np.frombuffer(picture.encoded, dtype=np.uint8) for picture in pictures]
        self._pipeline.feed_input("encoded", encoded)
        if self.device == "cpu":
            plans = [np.array(_numbers_of_plan(p.plan), dtype=np.int32) for p in pictures]
            self._pipeline.feed_input("plan", plans)
        else:
            inputs = [native_inputs(p.plan, p.width, p.height) for p in pictures]
            for name in inputs[0]:
                self._pipeline.feed_input(name, [values[name] for values in inputs])
        (output,) = self._pipeline.run()
        batch = torch.from_dlpack(output.as_tensor())  # its memory is ours as long as we hold it
        if batch.is_cuda:
            # DALI orders the reuse of memory on its own stream: copy before it is given back.
            batch = batch.clone()
            torch.cuda.current_stream(batch.device).synchronize()
        return list(batch)


def _short(error: RuntimeError) -> str:
    """What DALI says went wrong, without the place in the graph and the stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    starts = [number + 1 for number, line in enumerate(lines) if line.startswith("encountered:")]
    said = lines[starts[0] :] if starts else lines
    return " ".join(line for line in said[:2] if not line.startswith("Current pipeline"))[:300]


def as_bmp(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as an encoded picture that DALI reads: for formats that it does not."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()
