"""Values the original code printed for a reimplementation: losses, buckets, token counts, and the
whole model on weights and inputs that a formula makes."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from unival.convert.original import load_original, to_original
from unival.kernels.linear_cross_entropy.reference import cross_entropy_sums
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.positions import (
    audio_positions,
    grid_buckets,
    image_positions,
    num_grid_buckets,
    text_buckets,
    video_positions,
)
from unival.training.losses import Criterion

CPU = torch.device("cpu")
TARGET = [0, 5, 7, 11, 3]
TRIE = [[0, 1], [5, 6, 7], [7], [0, 2, 4, 11], [3, 9]]

LOSSES = [  # options, target, trie masks, loss, nll, tokens
    ({}, TARGET, None, 21.736133549, 21.736133549, 5),
    ({"label_smoothing": 0.1}, TARGET, None, 21.532545109, 21.736133549, 5),
    (
        {"label_smoothing": 0.1, "drop_worst_ratio": 0.4},
        TARGET,
        None,
        9.155588143,
        8.820083762,
        3,
    ),
    (
        {"label_smoothing": 0.1, "constraint_range": (6, 10)},
        [0, 6, 7, 9, 3],
        None,
        14.385914911,
        13.826213397,
        5,
    ),
    ({"label_smoothing": 0.1}, TARGET, TRIE, 10.084046139, 10.621632483, 5),
    ({"label_smoothing": 0.1, "log_end": 0.75}, TARGET, None, 21.252024317, 21.736133549, 5),
    ({"log_end": 0.5}, TARGET, None, 21.476994577, 21.736133549, 5),
    ({"label_smoothing": 0.1, "log_end": 0.75}, TARGET, TRIE, 7.034404676, 10.621632483, 5),
    (
        {"label_smoothing": 0.1, "log_end": 0.75, "drop_worst_ratio": 0.4},
        TARGET,
        None,
        8.897012324,
        8.820083762,
        3,
    ),
]


def loss_logits() -> torch.Tensor:
    rows, classes = torch.arange(5.0, dtype=torch.float64), torch.arange(12.0, dtype=torch.float64)
    return 3.0 * torch.sin(0.7 * rows[:, None] + 1.3 * classes)


def assert_sums(sums, loss: float, nll: float, tokens: int) -> None:
    assert sums.loss.item() == pytest.approx(loss, abs=1e-8)
    assert sums.nll.item() == pytest.approx(nll, abs=1e-8)
    assert sums.tokens == tokens


@pytest.mark.parametrize(("options", "target", "trie", "loss", "nll", "tokens"), LOSSES)
def test_losses(options, target, trie, loss, nll, tokens):
    allowed = None
    if trie is not None:
        allowed = torch.zeros(5, 12, dtype=torch.bool)
        for row, ids in enumerate(trie):
            allowed[row, ids] = True
    ids = torch.tensor(target)
    assert_sums(
        Criterion(**options)(loss_logits(), ids[None], allowed=allowed, update=1), loss, nll, tokens
    )
    assert_sums(
        cross_entropy_sums(loss_logits(), ids, allowed=allowed, **options), loss, nll, tokens
    )


def test_loss_with_answer_confidence():
    compute = Criterion(label_smoothing=0.1)
    weight = torch.tensor([0.5])
    sums = compute(loss_logits(), torch.tensor([TARGET]), weight=weight)
    assert_sums(sums, 10.766272555, 10.868066775, 5)


def test_loss_with_rdrop():
    logits = loss_logits()[:4]
    logits = torch.cat([logits, torch.log_softmax(0.5 * logits, dim=-1)])
    target = torch.tensor([TARGET[:4], TARGET[:4]])
    sums = Criterion(label_smoothing=0.1, rdrop_alpha=1.0)(logits, target)
    assert_sums(sums, 32.484103648, 32.468451625, 8)


def test_text_buckets():
    expected = {0: 255, 1: 256, 128: 383, 129: 384, 130: 384, 131: 385, 135: 387, 150: 393}
    expected |= {200: 411, 256: 426, 300: 436, 400: 453, 512: 468, 700: 487}
    expected |= {1000: 509, 1022: 510, 1023: 510}
    buckets = text_buckets(256, 1024)
    for offset, bucket in expected.items():
        assert buckets[1023 + offset] == bucket
        assert buckets[1023 - offset] == 510 - bucket


def test_grid_buckets():
    ids = torch.arange(1765)
    table = grid_buckets(ids, ids, 42)
    assert num_grid_buckets(42) == 6892
    cells = [table[pair].item() for pair in [(1, 1), (1, 2), (2, 1), (1, 43), (43, 1)]]
    assert cells == [3444, 3443, 3445, 3361, 3527]
    assert (table[0, 1:] == 6889).all()
    assert (table[1:, 0] == 6890).all()
    assert table[0, 0] == 6891


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [
        (224, 224, 49),
        (256, 256, 64),
        (384, 384, 144),
        (480, 480, 225),
        (512, 512, 256),
        (341, 512, 176),
    ],
)
def test_image_tokens(height, width, tokens):
    positions = image_positions(math.ceil(height / 32), math.ceil(width / 32), 42, CPU)
    assert positions.numel() == tokens == positions.unique().numel()


@pytest.mark.parametrize(
    ("frames", "size", "tokens"),
    [(4, 224, 49), (8, 224, 49), (16, 224, 49), (16, 384, 144), (32, 224, 98), (32, 384, 288)],
)
def test_video_tokens(frames, size, tokens):
    side = math.ceil(size / 32)
    positions = video_positions(math.ceil(frames / 16), side, side, 42, CPU)
    assert positions.numel() == tokens
    assert positions.unique().numel() == side * side  # every frame has the same positions


@pytest.mark.parametrize(
    ("samples", "hop", "tokens"),
    [
        (480_000, 200, 150),
        (480_000, 320, 92),
        (480_000, 480, 62),
        (320_000, 200, 100),
        (441_000, 200, 136),
    ],
)
def test_audio_tokens(samples, hop, tokens):
    count = (1 + samples // hop) // 32 * 2  # two frequency cells a time step
    positions = audio_positions(count, 42, CPU)
    assert positions.numel() == tokens == positions.unique().numel()


def weight(name: str, shape: torch.Size) -> torch.Tensor:
    """The formula's value of one entry, by its original name."""
    index = torch.arange(math.prod(shape), dtype=torch.int64)
    angle = 0.1 * (index % 997).double() + 1.7 * (index // 997 % 991).double()
    wave = torch.sin(angle + 0.01 * (zlib.crc32(name.encode()) % 1000)).view(shape)
    if len(shape) == 1:
        if name.endswith(("bias", "running_mean")):
            return 0.05 * wave
        return 1.0 + 0.1 * wave
    if any(medium in name for medium in ("embed_images", "embed_videos", "embed_audios")):
        return wave / math.sqrt(math.prod(shape[1:]))
    # The token table has its scale from its last name, decoder.output_projection.weight.
    if name != "encoder.embed_tokens.weight" and ("embed" in name or "rel_pos_table" in name):
        return 0.2 * wave
    return wave / math.sqrt(shape[1])


@pytest.fixture(scope="module")
def filled() -> UnivalForConditionalGeneration:
    config = UnivalConfig(audio_channels=(64, 128, 256, 512, 1024, 2048))
    with torch.device("meta"):
        entries = UnivalForConditionalGeneration(config).state_dict()
    original = to_original(entries)
    state = {
        original[name]: weight(original[name], entry.shape).float()
        for name, entry in entries.items()
        if name in original and entry.is_floating_point() and "logmel" not in name
    }
    return load_original(state, config).eval()


def media(medium: str) -> dict[str, torch.Tensor]:
    """The inputs of a medium, two rows, under the model's argument name."""
    row = torch.arange(2.0, dtype=torch.float64)

    def grid(side: int) -> torch.Tensor:
        cells = torch.arange(float(side), dtype=torch.float64)
        return 0.05 * cells + 0.07 * cells[:, None]

    channel = torch.arange(3.0, dtype=torch.float64)
    rows = row[:, None] * 0.5 + channel
    if medium == "image":
        return {"pixel_values": torch.sin(grid(384) + rows[..., None, None]).float()}
    if medium == "video":
        time = 0.3 * torch.arange(8.0, dtype=torch.float64)[:, None, None]
        return {"video_values": torch.sin(grid(224) + time + rows[..., None, None, None]).float()}
    if medium == "audio":
        seconds = torch.arange(480_000.0, dtype=torch.float64) / 48_000
        tones = torch.tensor([[440.0], [1000.0]], dtype=torch.float64)
        return {"audio_values": (0.1 * torch.sin(2 * math.pi * tones * seconds)).float()}
    return {}


SOURCE = [[0, 99, 473, 5, 1000, 4000, 116, 2], [0, 2085, 117, 30000, 2, 1, 1, 1]]
PREVIOUS = [[0, 10, 20, 30, 50264, 58457], [0, 4420, 50265, 59456, 1, 1]]

MEDIA = {  # the feature map: shape, mean, deviation, elements 0, 1, 2, n // 2 and n - 1
    "image": (
        (2, 2048, 12, 12),
        (1.090830, 1.345440, 1.34303, 1.54223, 1.58117, 1.34555, 0.04889),
    ),
    "video": (
        (2, 2048, 1, 7, 7),
        (0.428655, 0.411335, 0.24906, 0.21916, 0.21027, 0.24912, 0.34479),
    ),
    "audio": (
        (2, 2048, 75, 2),
        (71.664991, 88.655678, 108.63962, 106.14711, 176.13061, 100.99032, 0.00000),
    ),
}
OUTPUTS = {  # encoder output (tokens first), positions, logits of row 0, of row 1 (first four)
    "image": (
        (0.007577, 1.004686, 0.22182, 0.62089, -1.49710, 0.47386, -0.00888),
        (0.000698, 1.003004, -1.43974, -1.44442, -1.43435, -1.43974, 1.49340),
        (0.000006, 2.540077, 2.48226, -1.18025, 0.62881, 2.67285, 0.68981),
        (0.000053, 2.374079, 2.49247, -1.18604, 0.63504, -0.43824, 6.16034),
    ),
    "video": (
        (0.010912, 1.005105, -0.38079, 1.93897, -1.57800, 0.07429, 0.00013),
        (-0.001312, 1.001665, 1.47636, 1.47936, 1.46710, 1.47636, 1.49340),
        (0.000003, 2.598445, 2.48759, -1.19363, 0.62740, 2.70150, 0.62179),
        (0.000050, 2.371401, 2.49814, -1.19964, 0.63364, -0.47395, 6.12306),
    ),
    "audio": (
        (0.005834, 1.004694, 2.80159, -0.17391, -1.08284, 2.79732, 0.19758),
        (0.000170, 1.002686, 1.41451, 1.32877, 1.23132, 1.41451, 1.49340),
        (0.000000, 2.583223, 2.54648, -1.17291, 0.58784, 2.62677, 0.66885),
        (0.000050, 2.356942, 2.54748, -1.17915, 0.57608, -0.45385, 6.20414),
    ),
    "text": (
        (0.036272, 1.006691, 0.11049, 1.89440, -0.29450, 0.29584, 0.34255),
        (0.003805, 1.003285, 0.43990, 0.56537, 0.68751, 0.43990, 1.49340),
        (0.000063, 2.746507, 2.94844, -1.48346, 0.51772, 3.02122, 0.57668),
        (0.000110, 2.555902, 2.93650, -1.51261, 0.51833, -0.42006, 7.18648),
    ),
}
CODES = [  # decoder inputs, rows of image codes, the logits
    (
        torch.tensor(PREVIOUS).clamp(min=2).tolist(),
        [True, True],
        (0.000048, 2.429719, -0.15937, -1.59244, 3.66853, -0.17326, -2.72774),
    ),
    (
        [[0, 5, 6, 7], [0, 50265, 50266, 50267]],
        [False, True],
        (0.000148, 2.478008, 2.94844, -1.48346, 0.51772, 3.03187, -0.97532),
    ),
]


def assert_printed(tensor: torch.Tensor, printed: tuple[float, ...]) -> None:
    """Mean, deviation and five elements, to a thousandth; printed values end at five decimals."""
    flat = tensor.double().flatten()
    chosen = flat[[0, 1, 2, flat.numel() // 2, -1]]
    found = [flat.mean().item(), flat.std().item(), *chosen.tolist()]
    assert found == pytest.approx(printed, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("medium", MEDIA)
def test_feature_maps(filled, medium):
    shape, printed = MEDIA[medium]
    found = getattr(filled.encoder, f"{medium}_encoder")(*media(medium).values())
    assert found.shape == shape
    assert_printed(found.contiguous(), printed)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("medium", OUTPUTS)
def test_model(filled, medium):
    encoded = filled.encoder(torch.tensor(SOURCE), **media(medium))
    out = filled(decoder_input_ids=torch.tensor(PREVIOUS), encoder_outputs=encoded)
    states, positions, first, second = OUTPUTS[medium]
    # Printed as [tokens, rows, width].
    assert_printed(encoded.last_hidden_state.transpose(0, 1), states)
    assert_printed(encoded.position_embeddings.expand(2, -1, -1), positions)
    assert_printed(out.logits[0], first)
    assert_printed(out.logits[1, :4], second)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(("previous", "code_mask", "printed"), CODES)
def test_image_codes(filled, previous, code_mask, printed):
    out = filled(
        torch.tensor(SOURCE),
        decoder_input_ids=torch.tensor(previous),
        code_mask=torch.tensor(code_mask),
    )
    assert_printed(out.logits, printed)
