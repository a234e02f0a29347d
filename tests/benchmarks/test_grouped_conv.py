"""benchmarks/grouped_conv.py: all forms are the same convolution."""

from __future__ import annotations

import pytest
import torch
from scripts import load_script

from unival.model.configuration import UnivalConfig
from unival.model.convolution import Conv3d

bench = load_script("grouped_conv")


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_all_forms_agree_in_float64(frames: int, stride: int) -> None:
    torch.manual_seed(0)
    module = Conv3d(12, 8, 3, stride, 1, groups=4, bias=False).double()
    x = torch.randn(2, 12, frames, 5, 6, dtype=torch.float64)
    # By hand: group 3, first output channel 6, at the origin, which sees one side of the padding.
    seen, weight = x[1, 9:12, :2, :2, :2], module.weight.detach()[6]
    value = float((seen * weight[:, 1 : 1 + seen.shape[1], 1:, 1:]).sum())
    for name, (form, layout) in bench.FORMS.items():
        y = form(x.contiguous(memory_format=layout), module).detach()
        assert y.shape == (2, 8, -(-frames // stride), -(-5 // stride), 3 * (3 - stride)), name
        assert float(y[1, 6, 0, 0, 0]) == pytest.approx(value, abs=1e-12), name
        torch.testing.assert_close(y, bench.conv3d(x, module).detach(), rtol=1e-12, atol=1e-12)


def test_a_form_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Conv3d(8, 8, 3, 1, 1, groups=4, bias=False), torch.randn(1, 8, 2, 4, 4)
    assert bench.measure(x, module, 1).keys() == bench.FORMS.keys()
    wrong = (lambda x, module: 2 * bench.conv3d(x, module), torch.contiguous_format)
    monkeypatch.setitem(bench.FORMS, "twice", wrong)
    with pytest.raises(ArithmeticError, match=r"twice differs from conv3d at \[1, 8, 2, 4, 4\]"):
        bench.measure(x, module, 1)


def test_all_convolutions_of_an_encoder_are_found_and_summed() -> None:
    shape = UnivalConfig(video_layers=[1, 2], video_channels=[32, 64], video_cardinality=8)
    found = bench.shapes(shape, (3, 4, 32, 32))
    # The pooling leaves 2 frames of 8 x 8, the stride of the second stage 1 of 4 x 4.
    assert {key: count for key, (count, _) in found.items()} == {
        ((32, 2, 8, 8), (1, 1, 1)): 1,
        ((64, 2, 8, 8), (2, 2, 2)): 1,
        ((64, 1, 4, 4), (1, 1, 1)): 1,
    }
    seconds = {name: (0.001 * (place + 1), 0.002) for place, name in enumerate(bench.FORMS)}
    lines = bench.table({"a": seconds, "b": seconds}, {"a": 3, "b": 1})
    assert lines[2].split(" | ")[1:3] == ["1.0 + 2.0", "2.0 + 2.0"]
    # 4 calls of 3, 4, 5, 6, 7 and 8 ms.
    assert lines[-1] == "| all 4 | 12 | 16 | 20 | 24 | 28 | 32 |"
