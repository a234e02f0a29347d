"""Compiled parts give the losses and gradients of the model that is not compiled."""

from __future__ import annotations

import copy
import shutil
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from unival.model.batchnorm import set_batchnorm_statistics
from unival.model.compiling import compile_parts, compiled_parts
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.norm import LayerNorm
from unival.model.transformer import Attention

IDS = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
TARGET = torch.tensor([[11, 12, 13, 2], [21, 2, -100, -100]])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny_model(**fields: object) -> UnivalForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "d_model": 32, "ffn_dim": 64, "num_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_drop_path": 0.0}
    still = {"decoder_drop_path": 0.0, "dropout": 0.0, "audio_dropout": 0.0, "spec_augment": False}
    media = {"image_layers": (1, 1), "image_channels": (8, 8), "video_layers": None}
    config = UnivalConfig(**(sizes | layers | still | media | fields))
    return UnivalForConditionalGeneration(config).train()


class ExactNorm(nn.LayerNorm):
    """The model's layer norm by torch, which takes float64; for models without dropout."""

    def of_gelu(self, x: Tensor) -> Tensor:
        return self(F.gelu(x))

    def of_sum(self, residual: Tensor, branch: Tensor, *_: float) -> tuple[Tensor, Tensor]:
        return residual + branch, self(residual + branch)


def exactly(model: UnivalForConditionalGeneration) -> UnivalForConditionalGeneration:
    """A copy in float64 without the kernels."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if isinstance(module, LayerNorm):
            module.__class__ = ExactNorm
        elif isinstance(module, Attention):
            module.backend = "eager"
    return exact


def loss_and_gradients(
    model: UnivalForConditionalGeneration, media: dict[str, Tensor]
) -> dict[str, Tensor]:
    """By name, the loss included; running statistics are as before."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    dtype = model.encoder.embed_tokens.weight.dtype
    media = {name: values.to(dtype) for name, values in media.items()}
    # Logits, because the kernel of the loss takes no float64.
    loss = model(input_ids=IDS, labels=TARGET, **media).logits.double().log_softmax(-1)
    loss = -loss.gather(-1, TARGET.clamp(min=0)[..., None]).squeeze(-1)[TARGET >= 0].mean()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.load_state_dict(state, strict=False)
    return {"loss": loss.detach(), **found}


def assert_as_exact_as_eager(
    compiled: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    assert compiled.keys() == eager.keys() and len(eager) > 50
    for name, value in compiled.items():
        error = (value - exact[name]).abs().max()
        allowed = 3 * (eager[name] - exact[name]).abs().max() + 1e-6 * (1 + exact[name].abs().max())
        assert error <= allowed, (name, float(error), float(allowed))


def compiled_by(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


MEDIA = {
    "image": ({}, {"pixel_values": torch.rand(2, 3, 32, 32)}),
    "video": (
        {
            "image_layers": None,
            "video_layers": (1,),
            "video_channels": (8,),
            "video_cardinality": 4,
        },
        {"video_values": torch.rand(2, 3, 2, 16, 16)},
    ),
    "audio": (
        {"image_layers": None, "audio_channels": (4,) * 6, "hop_size": 480},
        {"audio_values": torch.rand(2, 48000) - 0.5},
    ),
    "text": ({"encoder_layers": 2, "decoder_layers": 2}, {}),
}


@pytest.mark.parametrize(
    ("medium", "statistics", "recompute"),
    [
        ("image", "local", False),
        pytest.param("image", "folded", True, marks=pytest.mark.slow),
        ("video", "folded", False),
        pytest.param("audio", "local", False, marks=pytest.mark.slow),
        pytest.param("text", "local", True, marks=pytest.mark.slow),
    ],
)
def test_the_parts_are_captured_whole_and_compute_the_same(
    medium, statistics, recompute, monkeypatch
):
    fields, values = MEDIA[medium]
    model = tiny_model(**fields)
    set_batchnorm_statistics(model, statistics)
    model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = recompute
    exact = loss_and_gradients(exactly(model), values)
    eager = loss_and_gradients(model, values)
    keys = list(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled_by(monkeypatch, counter)
    compile_parts(model, "default")
    assert list(model.state_dict()) == keys
    assert_as_exact_as_eager(loss_and_gradients(model, values), eager, exact)
    # A graph for each part that ran: none was broken into pieces.
    assert counter.frame_count == len(compiled_parts(model)) - (medium == "text")


def test_layers_do_not_use_up_each_others_compilations(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    compiled_by(monkeypatch, counter)
    model = tiny_model(encoder_layers=9, encoder_drop_path=0.1, image_layers=None)
    compile_parts(model, "default")
    loss_and_gradients(model, {})
    assert counter.frame_count == 10  # more than the 8 that torch keeps of a function
    loss_and_gradients(model, {})
    assert counter.frame_count == 10


def test_the_parts_are_the_media_encoders_and_the_layers():
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    model = tiny_model(**layers, video_layers=(1,), video_channels=(8,), video_cardinality=4)
    parts = compiled_parts(model)
    names = [name for name, module in model.named_modules() if module in parts]
    media = ["encoder.image_encoder", "encoder.video_encoder"]
    assert names == [*media, *(f"{s}coder.layers.{i}" for s in ("en", "de") for i in range(2))]


def test_off_compiles_nothing_and_other_words_are_refused():
    model = tiny_model()
    compile_parts(model, "off")
    assert all(module._compiled_call_impl is None for module in model.modules())
    with pytest.raises(ValueError, match=r"'max'.*off, default, cuda_graphs"):
        compile_parts(model, "max")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a model on the CPU may still be moved")
def test_cuda_graphs_are_refused_where_there_is_no_cuda_device():
    with pytest.raises(ValueError, match="on cpu without a CUDA device"):
        compile_parts(tiny_model(), "cuda_graphs")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs g++")
def test_what_inductor_makes_is_as_exact_as_eager():
    model = tiny_model()
    values = MEDIA["image"][1]
    exact = loss_and_gradients(exactly(model), values)
    eager = loss_and_gradients(model, values)
    compile_parts(model, "default")
    assert_as_exact_as_eager(loss_and_gradients(model, values), eager, exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_give_the_same_losses_step_after_step():
    model = tiny_model().cuda()
    eager = copy.deepcopy(model)
    compile_parts(model, "cuda_graphs")
    batch = {"input_ids": IDS.cuda(), "labels": TARGET.cuda()}
    for step in range(5):  # the first are recorded, the others replayed
        pixels = torch.rand(2, 3, 64, 64, device="cuda") + step
        losses = []
        for one in (model, eager):
            one.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            loss = one(**batch, pixel_values=pixels).loss
            loss.backward()
            losses.append(float(loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
            if b.grad is not None:
                scale = float(b.grad.abs().max())
                torch.testing.assert_close(
                    a.grad, b.grad, rtol=0, atol=1e-3 * scale + 1e-5, msg=name
                )
