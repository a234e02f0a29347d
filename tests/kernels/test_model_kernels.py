"""The model in miniature with its kernels interpreted, against PyTorch's operators on the CPU."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unival.data.samples import make_samples
from unival.generation.search import SearchOptions, beam_search
from unival.kernels.attention import backward as attention_backward
from unival.kernels.attention import forward as attention_forward
from unival.kernels.triton_tools.launch import Config
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.training.losses import Criterion

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton interprets kernels only where there is no GPU"
)
ROOT = Path(__file__).resolve().parents[2]
Gradients = dict[str, Tensor | None]

SHAPE = dict(
    vocab_size=101, d_model=16, ffn_dim=48, num_heads=1,
    dropout=0.0, encoder_drop_path=0.0, decoder_drop_path=0.0, code_image_size=24,
    encoder_layers=1, decoder_layers=1,
    image_layers=(1, 1, 1, 1), image_channels=(8, 8, 16, 16),
    video_layers=(1, 1, 1, 1), video_channels=(8, 8, 16, 16), video_cardinality=4,
    audio_channels=(4, 4, 8, 8, 16, 16), hop_size=480, audio_dropout=0.0, spec_augment=False,
)  # fmt: skip
MEDIA = {
    "pixel_values": (2, 3, 96, 96),
    "video_values": (2, 3, 4, 64, 64),
    "audio_values": (2, 48000),
}
IDS = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
PREVIOUS = torch.tensor([[0, 11, 12, 13, 14], [0, 21, 22, 1, 1]])
LABELS = torch.tensor([[11, 12, 13, 14, 2], [21, 22, 2, -100, -100]])


def build(backend: str, kernels: str = "auto", **fields: Any) -> UnivalForConditionalGeneration:
    """The same weights for every backend, large enough that every part of the scores matters."""
    chosen = {"attention_backend": backend, "kernel_backend": kernels}
    config = UnivalConfig(**SHAPE | chosen | fields)
    model = UnivalForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        around = 1.0 if name.endswith(("norm.weight", "head_scale")) else 0.0
        parameter.data.normal_(around, 0.3, generator=generator)
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are multiplied sooner than threads have met."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Counter[str]:
    """How often each of attention's Triton kernels ran."""
    counts: Counter[str] = Counter()
    launch = attention_forward.launch

    def counted(kernel: Any, grid: Any, config: Config, *rest: Any, **constants: Any) -> None:
        counts[kernel.__name__] += 1
        launch(kernel, grid, config, *rest, **constants)

    monkeypatch.setattr(attention_forward, "launch", counted)
    monkeypatch.setattr(attention_backward, "launch", counted)
    return counts


def loss_and_gradients(
    model: UnivalForConditionalGeneration, inputs: dict[str, Tensor], backend: str
) -> tuple[float, Gradients]:
    """As a training step makes them; random patches are those of Python's seed 3."""
    random.seed(3)
    model.train()
    out = model(input_ids=IDS, decoder_input_ids=PREVIOUS, output_logits=False, **inputs)
    embedding = model.get_input_embeddings().weight
    sums = Criterion().of_states(out.decoder_last_hidden_state, embedding, LABELS, backend=backend)
    assert sums.tokens == 8
    loss = sums.loss / sums.tokens
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found: Gradients, wanted: Gradients) -> None:
    """A relative error of 1e-4 in every parameter; of the whole gradient 1e-6 where a parameter's
    is zero but for rounding, as that of the keys' bias, to which a softmax is blind."""
    whole = torch.stack([g.norm() for g in wanted.values() if g is not None]).norm()
    assert found.keys() == wanted.keys() and whole > 0.1
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None, name
            continue
        error = (found[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-6 * whole, f"{name}: {error:.2e}"


TWO = {"d_model": 32, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
BATCHES: dict[str, tuple[str | None, dict[str, Any], dict[str, Tensor]]] = {
    # medium, config, further inputs. Every second row is padded text.
    "text": (None, {}, {}),
    # Two heads; two layers that share the positions, whose gradient is the sum of theirs.
    "image and text": ("pixel_values", TWO, {}),
    "video and text": ("video_values", {}, {}),
    "sound and text": ("audio_values", {}, {}),
    # Own positions and codes in every row: the kernel of positions writes, and does not sum.
    "random patches": ("pixel_values", {"sample_patch_num": 4}, {}),
    # Rows of the decoder with text, and with image codes behind the start slot.
    "image codes": (None, {}, {"code_mask": torch.tensor([True, False])}),
    # One image for both rows, hidden from the first: padding before text that is none.
    "a shared and hidden image": (
        "pixel_values",
        {},
        {"media_index": torch.tensor([0, 0]), "patch_mask": torch.tensor([False, True])},
    ),
}


def batch(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    medium, fields, inputs = BATCHES[name]
    if medium is None:
        return fields, inputs
    values = torch.randn(MEDIA[medium], generator=torch.Generator().manual_seed(2))
    return fields, inputs | {medium: values[:1] if "media_index" in inputs else values}


@pytest.mark.parametrize("name", BATCHES)
def test_interpreted_kernels_give_the_loss_and_gradients_of_the_cpu_path(
    launched: Counter[str], name: str
) -> None:
    fields, inputs = batch(name)
    wanted_loss, wanted = loss_and_gradients(build("auto", **fields), inputs, "auto")
    assert not launched
    model = build("triton", "triton", **fields)
    loss, found = loss_and_gradients(model, inputs, "triton")
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_same_gradients(found, wanted)
    # Self-attention in both stacks and cross attention; position terms of queries and of keys.
    attentions = 3 * fields.get("encoder_layers", 1)
    assert launched == {
        "attention_forward_kernel": attentions, "attention_rowdot_kernel": attentions,
        "attention_keys_kernel": attentions, "attention_queries_kernel": attentions,
        "attention_bias_kernel": 2 * attentions,
    }  # fmt: skip
    # What the loss reaches only through the kernels' gradients.
    for part in (
        "encoder.relative.text.0.weight", "encoder.position_query.weight",
        "decoder.relative.text.0.weight", "decoder.self_position_key.weight",
        "decoder.cross_position_query.weight", "decoder.layers.0.cross_attn.head_scale",
    ):  # fmt: skip
        assert found[part].any(), part

    def reached(rows: Tensor | None) -> bool:
        return rows is not None and bool(rows.any())

    image = found["encoder.relative.image.0.weight"]
    assert reached(image) == (BATCHES[name][0] is not None)
    codes = found["decoder.relative.image.0.weight"]  # the last but one row: keys at the start slot
    assert reached(None if codes is None else codes[-2]) == (name == "image codes")


def test_eager_gives_the_loss_and_gradients_of_the_cpu_path() -> None:
    for name in ("image and text", "random patches", "image codes"):
        fields, inputs = batch(name)
        wanted_loss, wanted = loss_and_gradients(build("auto", **fields), inputs, "auto")
        loss, found = loss_and_gradients(build("eager", **fields), inputs, "auto")
        assert loss == pytest.approx(wanted_loss, rel=1e-6), name
        assert_same_gradients(found, wanted)


def test_other_random_patches_give_another_loss(device: torch.device) -> None:
    """What the test above would not see if the seed of Python did not choose the patches."""
    fields, inputs = batch("random patches")
    model = build("auto", **fields).eval()
    losses = set()
    for seed in range(3):
        random.seed(seed)
        with torch.no_grad():
            out = model(input_ids=IDS, decoder_input_ids=PREVIOUS, labels=LABELS, **inputs)
        losses.add(round(float(out.loss), 6))
    assert len(losses) == 3


@pytest.mark.parametrize("name", ["image and text", "random patches", "image codes"])
def test_cached_decoding_equals_the_cpu_path(launched: Counter[str], name: str) -> None:
    """The kernel of one query against keys that grow; own cross positions in random patches."""
    fields, inputs = batch(name)
    code_mask = inputs.pop("code_mask", None) if name == "image codes" else None
    steps = []
    for backend in ("auto", "triton"):
        model = build(backend, backend, **fields).eval()
        random.seed(3)
        cache, logits = None, []
        with torch.inference_mode():
            encoder = model.encoder(IDS, **inputs)
            for t in range(3):
                out = model(
                    encoder_outputs=encoder, decoder_input_ids=PREVIOUS[:, t : t + 1],
                    past_key_values=cache, use_cache=True, code_mask=code_mask,
                )  # fmt: skip
                cache = out.past_key_values
                logits.append(out.logits)
        steps.append(torch.cat(logits, 1))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-4)
    # Three tokens through self- and cross attention; the encoder once.
    layers = fields.get("encoder_layers", 1)
    assert launched == {
        "attention_decode_kernel": 6 * layers, "attention_forward_kernel": layers,
    }  # fmt: skip


def test_beam_search_finds_the_same_hypotheses(launched: Counter[str]) -> None:
    """Keys reordered between steps."""
    fields, inputs = batch("random patches")
    found = []
    for backend in ("auto", "triton"):
        model = build(backend, backend, **fields).eval()
        random.seed(3)
        with torch.inference_mode():
            encoder = model.encoder(IDS, **inputs)
        found.append(beam_search(model, encoder, SearchOptions(beam_size=2, max_length=2)))
    for theirs, ours in zip(*found, strict=True):
        assert [h.tokens for h in ours] == [h.tokens for h in theirs]
        assert [h.score for h in ours] == pytest.approx([h.score for h in theirs], rel=1e-4)
    assert launched["attention_decode_kernel"] == 6  # three steps, self- and cross attention


def test_probabilities_reproduce_the_cross_attention(device: torch.device) -> None:
    """They sum to 1 over keys that are not padding, and are 0 elsewhere."""
    fields, inputs = batch("image and text")
    model = build("triton", **fields).eval()
    seen: list[tuple[Any, tuple, dict, Tensor]] = []
    hooks = [
        layer.cross_attn.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((module, args, kwargs, output)),
            with_kwargs=True,
        )
        for layer in model.decoder.layers
    ]
    with torch.no_grad():
        out = model(input_ids=IDS, decoder_input_ids=PREVIOUS, output_attentions=True, **inputs)
        for hook in hooks:
            hook.remove()
        hidden = out.encoder_padding_mask
        assert hidden[1, -2:].all() and hidden.sum() == 2
        for probabilities, (module, (_, keys_values, *_), _, attended) in zip(
            out.cross_attentions, seen, strict=True
        ):
            assert probabilities.shape == (2, 2, 5, 9 + 5)
            assert not probabilities[hidden[:, None, None].expand_as(probabilities)].any()
            torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, 5))
            assert probabilities.std(-1).min() > 1e-3  # not uniform
            heads = probabilities @ keys_values[1] * module.head_scale[:, None, None]
            again = module.out_proj(heads.transpose(1, 2).flatten(2))
            torch.testing.assert_close(again, attended, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", ["attention_backend", "kernel_backend"])
def test_an_unknown_backend_names_the_known_ones(field: str) -> None:
    model = UnivalForConditionalGeneration(UnivalConfig(**SHAPE, **{field: "cuda"}))
    known = {
        "attention_backend": "attention: backend='cuda'; known: auto, sdpa, triton, flash_attn",
        "kernel_backend": "layer_norm: backend='cuda'; known: auto, torch, triton",
    }
    with pytest.raises(ValueError, match=known[field]):
        model(input_ids=IDS, decoder_input_ids=PREVIOUS)


STEP = """
import json, sys
from unival.config import load_config
from unival.kernels.attention import forward
from unival.training.batches import BatchMaker
from unival.training.engine import Engine, init_distributed
from unival.training.options import Run
from unival.training.trainer import make_model
from unival.vocabulary import Vocabulary

launch, count = forward.launch, 0

def counted(*args, **kwargs):
    global count
    count += 1
    launch(*args, **kwargs)

forward.launch = counted
config, overrides = sys.argv[1], sys.argv[2:]
world = init_distributed()
for backend in ("auto", "triton"):
    before = count
    run = load_config(
        Run, config, [*overrides, f"model.overrides.attention_backend={backend}"]
    )
    stage = run.stages[0]
    engine = Engine(make_model(run, stage, None), run, stage, world)
    batches = BatchMaker(run, stage, Vocabulary(run.text_order), 0, 1).step(0)
    result = engine.step(batches, 1)
    print("RESULT", json.dumps({
        "backend": backend, "loss": result.loss, "grad_norm": result.grad_norm,
        "tasks": result.task_nll, "samples": result.samples, "launches": count - before,
    }))
"""


@pytest.fixture
def demo_data(tmp_path: Path) -> Iterator[Path]:
    make_samples(ROOT / "samples", tmp_path / "data")
    yield tmp_path / "data"


def test_a_step_of_the_demo_is_the_same_with_interpreted_attention(demo_data: Path) -> None:
    """The first stage of configs/pretrain/demo.yaml, with one row: two examples of one image."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = [
        f"sources.ground.path={demo_data / 'vision_language_ground.tsv'}",
        "stages.0.micro_batches.0.mixture=[{source: ground, rows: 1}]",
        f"negatives={demo_data / 'negative_sample'}",
        f"output={demo_data / 'run'}",
    ]
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(ROOT / "configs/pretrain/demo.yaml"), *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    auto, triton = (json.loads(line.removeprefix("RESULT")) for line in lines)
    assert (auto["launches"], triton["launches"]) == (0, 6)  # two layers: self, self and cross
    assert triton["samples"] == auto["samples"] == 2
    assert triton["loss"] == pytest.approx(auto["loss"], rel=1e-6)
    assert triton["grad_norm"] == pytest.approx(auto["grad_norm"], rel=1e-4)
    assert auto["grad_norm"] > 0.1 and len(auto["tasks"]) == 2
    assert triton["tasks"] == pytest.approx(auto["tasks"], rel=1e-5)
