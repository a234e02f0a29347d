"""Operations of a step beside torch's own count, and the peaks of chips by their names."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unival.data.batch import collate
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks.base import Example
from unival.training.batches import Batch
from unival.training.throughput import FORMULA, peak_flops, step_flops

ROOT = Path(__file__).parents[2]
SHAPES = {"image": (3, 96, 64), "video": (3, 8, 64, 96), "audio": (48000,)}


def config_of(**changed):
    return UnivalConfig.from_yaml(ROOT / "configs" / "model" / "unival_tiny.yaml", **changed)


def batch_of(medium, rows, text=7, target=5):
    """`rows`: for every example the index of its medium. One row is shorter than the others."""
    examples = [
        (Example([4] * (text - number % 2), [5] * target, [6] * target), index)
        for number, index in enumerate(rows)
    ]
    count = max(rows) + 1
    media = [] if medium == "text" else [torch.randn(SHAPES[medium]) for _ in range(count)]
    return Batch(collate(examples, media, medium), ["vqa"] * len(rows), 1.0, medium)


def counted(config, batch):
    """Operations of a forward pass, logits included, as torch counts those it runs."""
    model = UnivalForConditionalGeneration(config).eval()
    tensors = {n: t for n, t in batch.tensors.items() if n not in ("labels", "loss_weight")}
    if batch.medium == "text":
        del tensors["media_index"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**tensors)
    return counter.get_total_flops()


@pytest.mark.parametrize("medium", ["text", *SHAPES])
@pytest.mark.parametrize("patches", [None, 2])
def test_media_that_rows_share_are_counted_once(medium, patches):
    config = config_of(sample_patch_num=patches)
    batch = batch_of(medium, [0, 0, 1, 1, 1])
    expected = 3 * counted(config, batch)
    assert step_flops(config, [batch]) == pytest.approx(expected, rel=0.02)


def test_another_row_of_a_shared_picture_costs_what_its_text_does():
    config = config_of()
    two, three, apart = (
        step_flops(config, [batch_of("image", rows)]) for rows in ([0, 0], [0, 0, 0], [0, 1])
    )
    # By hand: rows share positions, so a row more is a half of what two rows cost besides them.
    width, layers = config.d_model, (config.encoder_layers, config.decoder_layers)
    tokens = 3 * 2  # 96 x 64 at stride 32
    length, target = tokens + 7, 5

    def attention(queries, keys):
        maps = 4 * width * width * (queries + keys)
        return maps + 6 * queries * keys * width

    row = 2 * tokens * config.image_channels[-1] * 4 * width
    row += layers[0] * (attention(length, length) + 4 * length * width * config.ffn_dim)
    row += layers[1] * (attention(target, target) + attention(target, length))
    row += layers[1] * 4 * target * width * config.ffn_dim
    row += 2 * target * width * config.vocab_size
    assert three - two == 3 * row
    assert apart > two


def test_micro_batches_add_up_and_no_batches_are_nothing():
    config = config_of()
    image, text = batch_of("image", [0]), batch_of("text", [0, 0], text=3)
    each = [step_flops(config, [batch]) for batch in (image, text)]
    assert step_flops(config, [image, text, text]) == each[0] + 2 * each[1]
    assert step_flops(config, []) == 0
    assert isinstance(each[0], int)


def test_padding_counts_as_tokens():
    config = config_of()
    full, padded = batch_of("text", [0, 0]), batch_of("text", [0, 0])
    full.tensors["input_ids"][:] = 4
    assert (padded.tensors["input_ids"] != 4).any()
    assert step_flops(config, [full]) == step_flops(config, [padded])


def test_the_formula_says_how_it_is_counted():
    for words in ("flops.py", "times 3", "1 + BACKWARD", "padding", "dense peak", "precision"):
        assert words in FORMULA


def chip(monkeypatch, name, multiprocessors):
    found = SimpleNamespace(name=name, multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    kinds = ("bf16", "fp16", "fp32")
    return [peak_flops(torch.device("cuda", 0), precision) for precision in kinds]


# Names as CUDA gives them; dense peaks in TFLOP/s of the vendor's data sheets.
@pytest.mark.parametrize(
    ("name", "multiprocessors", "half", "single"),
    [
        ("NVIDIA A100-SXM4-80GB", 108, 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 108, 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 108, 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 132, 989, 67),
        ("NVIDIA H200", 132, 989, 67),
        ("NVIDIA B200", 148, 2250, 80),
    ],
)
def test_known_chips(monkeypatch, name, multiprocessors, half, single):
    peaks = [half * 1e12, half * 1e12, single * 1e12]
    assert chip(monkeypatch, name, multiprocessors) == pytest.approx(peaks)


@pytest.mark.parametrize(
    ("name", "multiprocessors"),
    [
        ("NVIDIA H100 PCIe", 114),
        ("NVIDIA H100 NVL", 132),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 14),
        ("NVIDIA H1000", 132),
        ("NVIDIA GeForce RTX 4090", 128),
        ("Tesla V100-SXM2-16GB", 80),
    ],
)
def test_no_peak_is_made_up_for_other_chips_and_parts_of_chips(monkeypatch, name, multiprocessors):
    assert chip(monkeypatch, name, multiprocessors) == [None, None, None]


def test_a_cpu_has_no_peak_and_a_precision_must_be_known():
    assert peak_flops(torch.device("cpu"), "bf16") is None
    with pytest.raises(ValueError, match="precision 'int8'; known are fp32, bf16 and fp16"):
        peak_flops(torch.device("cpu"), "int8")
