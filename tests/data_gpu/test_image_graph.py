"""DALI's graphs of pictures against Pillow, and what happens when a picture breaks one."""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import pipeline_def
from PIL import Image

from unival.data_gpu import image
from unival.data_gpu.errors import DecodeError
from unival.data_gpu.image_graph import (
    ImageDecoder,
    Picture,
    as_bmp,
    image_graph,
    native_graph,
    native_inputs,
)

SAMPLES = sorted((Path(__file__).parents[2] / "samples" / "images").glob("*.jpg"))
# DALI's operators against Pillow, mean difference of a picture in levels of 255. Resizing of a
# region rounds differently (0.2); DALI rounds where Pillow cuts (brightness, sharpness, contrast);
# warping blends the border with the fill; equalize follows OpenCV's table, not Pillow's.
NATIVE_BOUNDS = {
    "identity": 0.4,
    "auto_contrast": 1.2,
    "equalize": 15.0,
    "brightness": 0.9,
    "sharpness": 1.1,
    "shear_x": 0.9,
    "shear_y": 0.9,
    "translate_x": 0.4,
    "translate_y": 0.4,
    "rotate": 1.0,
}


def decoded(path):
    return Image.open(path).convert("RGB")


def levels(tensor):
    """float32 [3, H, W] in -1..1 as levels [H, W, 3]."""
    return (np.asarray(tensor.cpu()).transpose(1, 2, 0).astype(np.float64) + 1) * 127.5


def difference(tensor, picture):
    return np.abs(levels(tensor) - np.asarray(picture, dtype=np.float64))


def picture(path, plan_of_size):
    width, height = decoded(path).size
    return Picture(path.read_bytes(), width, height, plan_of_size(width, height))


@pytest.mark.parametrize("size", [96, 384])
def test_the_cpu_graph_resizes_and_crops_as_pillow_does(size):
    decoder = ImageDecoder(size, "cpu", batch_size=7)  # five runs, the last one of two
    pictures = [
        picture(
            path,
            lambda w, h, n=n: (
                image.exact_plan(size)
                if n % 2
                else image.center_crop_plan(w, h, size, random.Random(n))._replace(operations=())
            ),
        )
        for n, path in enumerate(SAMPLES)
    ]
    for path, given, tensor in zip(SAMPLES, pictures, decoder.decode(pictures), strict=True):
        assert tensor.shape == (3, size, size)
        assert tensor.dtype == torch.float32
        found = difference(tensor, image.render(decoded(path), given.plan))
        assert found.max() <= 3, path  # bicubic overshoot of two decoders that differ by one
        assert found.mean() < 0.05, path


@pytest.mark.parametrize("name", image.OPERATIONS)
def test_the_cpu_graph_augments_as_pillow_does(name):
    plan = image.exact_plan(96)._replace(
        operations=(image.Operation(name, -1), image.Operation("translate_x", 1))
    )
    pictures = [picture(path, lambda w, h: plan) for path in SAMPLES[:6]]
    for path, tensor in zip(SAMPLES, ImageDecoder(96, "cpu").decode(pictures), strict=False):
        assert difference(tensor, image.render(decoded(path), plan)).mean() < 0.1


@pipeline_def(enable_conditionals=True)
def native_on_cpu(size):
    return native_graph(size, "cpu")


def test_dalis_own_operators_follow_the_same_plans():
    """What runs on a GPU, here with DALI's CPU variants of the same operators."""
    pipeline = native_on_cpu(
        size=96, batch_size=len(SAMPLES), num_threads=2, device_id=None, prefetch_queue_depth=1
    )
    pipeline.build()
    for name, sign in itertools.product(image.OPERATIONS, (1, -1)):
        chosen = (image.Operation(name, sign),)
        pictures = []
        for number, path in enumerate(SAMPLES):
            width, height = decoded(path).size
            plan = image.center_crop_plan(width, height, 96, random.Random(number))
            plan = plan._replace(operations=chosen)
            pictures.append(Picture(path.read_bytes(), width, height, plan))
        inputs = [native_inputs(p.plan, p.width, p.height) for p in pictures]
        encoded = [np.frombuffer(p.encoded, dtype=np.uint8) for p in pictures]
        pipeline.feed_input("encoded", encoded)
        for key in inputs[0]:
            pipeline.feed_input(key, [values[key] for values in inputs])
        (output,) = pipeline.run()
        tensors = torch.from_dlpack(output.as_tensor()).clone()
        means = [
            difference(tensor, image.render(decoded(path), given.plan)).mean()
            for tensor, path, given in zip(tensors, SAMPLES, pictures, strict=True)
        ]
        assert max(means) < NATIVE_BOUNDS[name], name


def test_the_gpu_graph_is_wired_without_a_gpu():
    text = image_graph(384, "gpu", 8, 2, device_id=-1).serialize()
    names = {name.decode() for name in re.findall(rb"[A-Za-z_0-9]{3,}", text)}
    assert {"mixed", "gpu", "encoded", "roi_start", "code0", "matrix1"} <= names
    for operator in ("Resize", "Equalize", "Brightness", "Filter", "WarpAffine"):
        assert any(operator.lower() in name.lower() for name in names), operator
    assert b"Python" not in text  # nothing leaves the GPU on its way


@pytest.mark.gpu
def test_the_gpu_graph_gives_what_the_cpu_graph_gives():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    pictures = [
        picture(path, lambda w, h, n=n: image.center_crop_plan(w, h, 384, random.Random(n)))
        for n, path in enumerate(SAMPLES)
    ]
    pairs = zip(
        ImageDecoder(384, "cpu").decode(pictures),
        ImageDecoder(384, "gpu").decode(pictures),
        pictures,
        strict=True,
    )
    for on_cpu, on_gpu, given in pairs:
        names = {operation.name for operation in given.plan.operations}
        bound = sum(NATIVE_BOUNDS[name] for name in names) + 2.0  # nvJPEG is not libjpeg
        assert difference(on_gpu, levels(on_cpu)).mean() < bound, names


def test_one_bad_picture_costs_itself_and_no_other():
    decoder = ImageDecoder(32, "cpu", batch_size=8)
    good = [picture(path, lambda w, h: image.exact_plan(32)) for path in SAMPLES[:8]]
    alone = decoder.decode(good)
    bad = Picture(b"\xff\xd8 no picture", 8, 8, image.exact_plan(32))
    mixed = decoder.decode([*good[:3], bad, *good[3:6], bad, good[6], good[7]])
    assert [isinstance(found, DecodeError) for found in mixed] == [
        *(False,) * 3, True, *(False,) * 3, True, False, False
    ]  # fmt: skip
    assert "DALI" in str(mixed[3])
    kept = [found for found in mixed if not isinstance(found, DecodeError)]
    assert all(torch.equal(a, b) for a, b in zip(kept, alone, strict=True))
    assert decoder.rebuilt >= 2
    assert all(torch.equal(a, b) for a, b in zip(decoder.decode(good), alone, strict=True))


def test_results_survive_the_next_run():
    decoder = ImageDecoder(32, "cpu", batch_size=1)
    first, second = (picture(path, lambda w, h: image.exact_plan(32)) for path in SAMPLES[:2])
    kept = decoder.decode([first])[0]
    copy = kept.clone()
    decoder.decode([second])
    assert torch.equal(kept, copy)


def test_no_pictures_are_no_work():
    assert ImageDecoder(32, "cpu").decode([]) == []


def test_a_bitmap_keeps_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    given = Picture(as_bmp(pixels), 16, 16, image.exact_plan(16))
    (tensor,) = ImageDecoder(16, "cpu").decode([given])
    assert np.array_equal(levels(tensor).round(), pixels)


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="known: cpu, gpu"):
        image_graph(32, "tpu", 8, 2, 0)
