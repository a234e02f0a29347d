"""Layers whose backward pass makes their activations again, and what layers keep otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from unival.kernels.attention.relative import RelativeBias
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.norm import LayerNorm
from unival.model.transformer import EncoderLayer, PositionTerms, run_layer

IDS = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
TARGET = torch.tensor([[11, 12, 13, 2], [21, 2, -100, -100]])


def small_model() -> UnivalForConditionalGeneration:
    torch.manual_seed(0)
    config = UnivalConfig(
        vocab_size=101,
        d_model=32,
        ffn_dim=64,
        encoder_layers=2,
        decoder_layers=2,
        num_heads=2,
        image_layers=(1, 1, 1, 1),
        image_channels=(8, 8, 16, 16),
        video_layers=None,
    )
    return UnivalForConditionalGeneration(config).train()


def test_recomputed_layers_give_the_same_gradients_under_dropout() -> None:
    model, pixels = small_model(), torch.randn(2, 3, 64, 64)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = []
    for recompute in (False, True):
        model.load_state_dict(state, strict=False)
        model.zero_grad()
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = recompute
        torch.manual_seed(3)
        out = model(input_ids=IDS, pixel_values=pixels, labels=TARGET, output_logits=False)
        out.loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 100
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


def kept_for_backward(recompute: bool) -> int:
    """Bytes that an encoder layer of unival_base keeps: 8 samples of 1,044 tokens, bf16, a GPU.

    Fake tensors: nothing runs. Parameters do not count. Selective recomputation stores what it
    keeps of attention (output, output before head scaling, statistics) where hooks do not look.
    """
    batch, length = 8, 1044
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            config = UnivalConfig()
            layer, norm = EncoderLayer(config, 0.1).train(), LayerNorm(768, config).train()
            x = torch.empty(batch, length, 768, requires_grad=True)
            heads = [torch.empty(1, length, 12, 64, requires_grad=True) for _ in range(2)]
            positions = PositionTerms(*(h.transpose(1, 2) for h in heads))
            codes = torch.empty(1, length, dtype=torch.int32)
            relative = RelativeBias(torch.empty(12, 4008, requires_grad=True), codes, codes)
            padding = torch.zeros(batch, length, dtype=torch.bool)
            own = {p.untyped_storage()._cdata for m in (layer, norm) for p in m.parameters()}
            kept: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage.nbytes()
                return tensor

            normed = layer.self_attn_norm(x)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                run_layer(layer, recompute, x, normed, norm, positions, relative, padding)
    finally:
        torch.set_default_dtype(torch.float32)
    attention = 2 * batch * length * 768 * 2 + 2 * batch * 12 * length * 4 if recompute else 0
    return sum(kept.values()) + attention


# Whoever keeps scores, probabilities (float32 and bf16) and the activations of the same layer:
# softmax's float32 output and the bf16 copy that multiplies the values are 627 MB of it.
EAGER = 8 * 12 * 1044 * 1044 * (4 + 2)


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_layers_keep_no_scores_and_with_recomputation_little_else() -> None:
    plain, recomputed = kept_for_backward(False), kept_for_backward(True)
    assert plain < 0.4 * EAGER
    assert recomputed < 0.1 * EAGER
