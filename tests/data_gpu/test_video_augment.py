"""RandAugment of clips against torchvision's, on the same frames."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from unival.data_gpu import video_augment
from unival.data_gpu.video_augment import OPERATIONS, SIGNED, Operation, apply_operation

TORCHVISION = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
}


def frames(height, width):
    """A smooth one, a noisy one with a narrow range, one of a single value in two channels."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(30, 200, (height, width, 3), dtype=np.uint8)
    flat = np.full((height, width, 3), 77, np.uint8)
    flat[..., 2] = noise[..., 2]
    return [smooth, noise, flat]


def test_the_operations_are_torchvisions_with_their_signs():
    space = RandAugment()._augmentation_space(31, (100, 200))
    assert sorted(TORCHVISION[name] for name in OPERATIONS) == sorted(space)
    assert {TORCHVISION[name] for name in SIGNED} == {n for n, (_, s) in space.items() if s}
    # Its defaults: two operations, magnitude 9 of 31 bins, nearest pixels, black.
    default = RandAugment()
    assert (default.num_ops, default.magnitude, default.num_magnitude_bins) == (2, 9, 31)
    assert (default.interpolation, default.fill) == (InterpolationMode.NEAREST, None)


# 180 x 320 and 336 x 596 are frames of films, 224 x 224 a clip after its crop, 37 x 61 is odd.
@pytest.mark.parametrize("size", [(180, 320), (224, 224), (37, 61), (336, 596)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_torchvisions(name, size):
    clip = frames(*size)
    tensor = torch.from_numpy(np.stack(clip)).permute(0, 3, 1, 2)
    magnitudes, _ = RandAugment()._augmentation_space(31, size)[TORCHVISION[name]]
    magnitude = float(magnitudes[9]) if magnitudes.ndim else 0.0
    for sign in (1, -1) if name in SIGNED else (1,):
        wanted = _apply_op(
            tensor, TORCHVISION[name], sign * magnitude, InterpolationMode.NEAREST, None
        )
        made = np.stack(apply_operation(clip, Operation(name, sign))).transpose(0, 3, 1, 2)
        differ = (made != wanted.numpy()).any(axis=1).mean()
        if name == "rotate":
            # torchvision computes places in float32: one that falls halfway between two pixels
            # may be seen at either, which happens to one or two pixels of a frame.
            assert differ < 5e-5
        elif name == "contrast":
            # The mean of a frame is summed in float32 there: a value at the edge of two whole
            # numbers may fall on the other side.
            assert np.abs(made.astype(int) - wanted.numpy()).max() <= 1
            assert differ < 0.01
        else:
            assert differ == 0


def test_draws_are_even_and_half_of_the_signed_ones_negative():
    rng = random.Random(0)
    drawn = [operation for _ in range(7000) for operation in video_augment.draw_operations(rng)]
    assert len(drawn) == 2 * 7000
    names = Counter(name for name, _ in drawn)
    assert all(abs(names[name] - 1000) < 130 for name in OPERATIONS)  # four standard deviations
    for name in OPERATIONS:
        negative = sum(sign == -1 for drawn_name, sign in drawn if drawn_name == name)
        assert abs(negative - names[name] / 2) < 70 if name in SIGNED else negative == 0


def test_both_operations_are_done_in_the_drawn_order(monkeypatch):
    drawn = [Operation("rotate", 1), Operation("translate_x", -1)]
    monkeypatch.setattr(video_augment, "draw_operations", lambda rng: drawn)
    clip = frames(40, 60)
    made = video_augment.rand_augment(clip, random.Random(0))
    wanted = apply_operation(apply_operation(clip, drawn[0]), drawn[1])
    other = apply_operation(apply_operation(clip, drawn[1]), drawn[0])
    assert np.array_equal(made, wanted)
    assert not np.array_equal(wanted, other)
