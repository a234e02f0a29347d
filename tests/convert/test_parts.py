"""Public weight files of one part: where each entry lands, what is refused and changes nothing."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.resnet import Bottleneck, ResNet, resnet101
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, BartModel

from unival.convert.parts import PARTS, InitError, initialise
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration

HUGGING_FACE, FAIRSEQ, ALL = 50265, 51201, 59457
State = dict[str, Tensor]
Make = Callable[..., Tensor]


def tiny(**fields: object) -> UnivalForConditionalGeneration:
    torch.manual_seed(1)
    config = {
        "vocab_size": ALL,
        "d_model": 8,
        "ffn_dim": 12,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "num_heads": 2,
        "num_text_positions": 12,
        "image_bucket_size": 4,
        "code_image_size": 16,
        "image_layers": (1, 2, 1),
        "image_channels": (4, 4, 8),
        "video_layers": (1, 2),
        "video_channels": (4, 8),
        "video_cardinality": 2,
        "audio_channels": (4, 8),
    }
    return UnivalForConditionalGeneration(UnivalConfig(**(config | fields)))


@pytest.fixture
def model() -> UnivalForConditionalGeneration:
    return tiny()


def copied(model: UnivalForConditionalGeneration) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(torch.equal(x, other[n]) for n, x in state.items())


def changed(before: State, model: UnivalForConditionalGeneration) -> list[str]:
    return sorted(n for n, x in model.state_dict().items() if not torch.equal(x, before[n]))


# Published layouts, written out by hand: names and shapes of the files' entries.


def bart(rows=FAIRSEQ, d=8, ffn=12, layers=(2, 1), positions=12, make: Make = torch.randn) -> State:
    """fairseq's bart.base/model.pt; the released size is d=768, ffn=3072, layers=(6, 6)."""
    table = make(rows, d)
    state = {}
    for stack, depth in zip(("encoder", "decoder"), layers, strict=True):
        state[f"{stack}.version"] = torch.tensor([3.0])
        state[f"{stack}.embed_tokens.weight"] = table
        state[f"{stack}.embed_positions.weight"] = make(positions, d)
        norms, shapes = [f"{stack}.layernorm_embedding"], {}
        for index in range(depth):
            layer = f"{stack}.layers.{index}"
            attentions = ["self_attn", "encoder_attn"][: 1 + (stack == "decoder")]
            for attention in attentions:
                for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    shapes[f"{layer}.{attention}.{name}"] = (d, d)
            norms += [f"{layer}.{name}_layer_norm" for name in (*attentions, "final")]
            shapes |= {f"{layer}.fc1": (ffn, d), f"{layer}.fc2": (d, ffn)}
        for name, shape in shapes.items():
            state |= {f"{name}.weight": make(*shape), f"{name}.bias": make(shape[0])}
        for name in norms:
            state |= {f"{name}.weight": make(d), f"{name}.bias": make(d)}
    return state


def batch_norm(name: str, width: int, make: Make) -> State:
    entries = ("weight", "bias", "running_mean", "running_var")
    counted = {f"{name}.num_batches_tracked": torch.tensor(7)}
    return {f"{name}.{entry}": make(width) for entry in entries} | counted


def resnext(layers, planes, groups, make: Make = torch.randn) -> State:
    """resnext-101-kinetics.pth without `module.`; released: 3, 4, 23, 3 and 128 ... 1024 by 32."""
    state = {"conv1.weight": make(64, 3, 7, 7, 7)} | batch_norm("bn1", 64, make)
    width = 64
    for stage, (depth, mid) in enumerate(zip(layers, planes, strict=True), start=1):
        for index in range(depth):
            block = f"layer{stage}.{index}"
            state[f"{block}.conv1.weight"] = make(mid, width, 1, 1, 1)
            state[f"{block}.conv2.weight"] = make(mid, mid // groups, 3, 3, 3)
            state[f"{block}.conv3.weight"] = make(2 * mid, mid, 1, 1, 1)
            for name, channels in (("bn1", mid), ("bn2", mid), ("bn3", 2 * mid)):
                state |= batch_norm(f"{block}.{name}", channels, make)
            if index == 0:
                state[f"{block}.downsample.0.weight"] = make(2 * mid, width, 1, 1, 1)
                state |= batch_norm(f"{block}.downsample.1", 2 * mid, make)
            width = 2 * mid
    return state | {"fc.weight": make(400, width), "fc.bias": make(400)}


def cnn14(channels, make: Make = torch.randn) -> State:
    """Cnn14_mAP=0.431.pth; released: 64, 128, 256, 512, 1024, 2048 channels."""
    stft = "spectrogram_extractor.stft.conv"
    state = {f"{stft}_{part}.weight": make(513, 1, 1024) for part in ("real", "imag")}
    state |= {"logmel_extractor.melW": make(513, 64)} | batch_norm("bn0", 64, make)
    width = 1
    for index, out in enumerate(channels, start=1):
        state[f"conv_block{index}.conv1.weight"] = make(out, width, 3, 3)
        state[f"conv_block{index}.conv2.weight"] = make(out, out, 3, 3)
        for name in ("bn1", "bn2"):
            state |= batch_norm(f"conv_block{index}.{name}", out, make)
        width = out
    for name, rows in (("fc1", width), ("fc_audioset", 527)):
        state |= {f"{name}.weight": make(rows, width), f"{name}.bias": make(rows)}
    return state


def resnet(layers=(1, 2, 1), channels=(4, 4, 8)) -> State:
    """timm's names, with values that tell its entries apart; released: 3, 4, 23, 3 blocks."""
    state = ResNet(Bottleneck, layers=layers, channels=channels, num_classes=5).state_dict()
    values = {n: torch.rand_like(x) for n, x in state.items() if x.is_floating_point()}
    return {n: values.get(n, torch.tensor(7)) for n in state}


def file_of(part: str, path: Path) -> tuple[Path, State]:
    """A small file as it is published, and the entries in it without their wrappers."""
    if part == "text":
        state = bart()
        torch.save({"args": argparse.Namespace(arch="bart_base"), "model": state}, path)
    elif part == "image":
        state = resnet()
        torch.save(state, path)
    elif part == "video":
        state = resnext((1, 2), (4, 8), 2)
        torch.save(
            {
                "epoch": 200,
                "arch": "resnext-101",
                "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
                "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "lr": [0.1]},
            },
            path,
            _use_new_zipfile_serialization=False,
        )
    else:
        state = cnn14((4, 8))
        torch.save({"iteration": 600000, "model": state}, path)
    return path, state


# Where entries land.


def test_entries_of_bart_land_at_their_places(model, tmp_path):
    before = copied(model)
    path, state = file_of("text", tmp_path / "model.pt")
    filled = initialise(model, "text", path)
    places = {
        "encoder.embed_positions": "encoder.text_positions",
        "decoder.embed_positions": "decoder.text_positions",
        "encoder.layernorm_embedding": "encoder.token_norm",
        "decoder.layernorm_embedding": "decoder.token_norm",
    }
    attention, norms = ("q_proj", "k_proj", "v_proj", "out_proj"), ("self_attn", "encoder_attn")
    for layer in ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0"):
        places |= {f"{layer}.self_attn.{x}": f"{layer}.self_attn.{x}" for x in attention}
        places |= {f"{layer}.{fc}": f"{layer}.ffn.{fc}" for fc in ("fc1", "fc2")}
        places[f"{layer}.{norms[0]}_layer_norm"] = f"{layer}.self_attn_norm"
        places[f"{layer}.final_layer_norm"] = f"{layer}.ffn_norm"
    layer = "decoder.layers.0"
    places |= {f"{layer}.encoder_attn.{x}": f"{layer}.cross_attn.{x}" for x in attention}
    places[f"{layer}.{norms[1]}_layer_norm"] = f"{layer}.cross_attn_norm"
    own = model.state_dict()
    wanted = {"encoder.embed_tokens.weight"}
    for theirs, ours in places.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                assert torch.equal(own[f"{ours}.{kind}"], state[f"{theirs}.{kind}"]), ours
                wanted.add(f"{ours}.{kind}")
    assert filled == sorted(wanted) == changed(before, model)


@pytest.mark.parametrize("rows", [HUGGING_FACE, FAIRSEQ])
def test_rows_that_bart_lacks_keep_their_values(model, tmp_path, rows):
    before = copied(model)["encoder.embed_tokens.weight"]
    state = bart(rows)
    torch.save({"model": state}, tmp_path / "model.pt")
    initialise(model, "text", tmp_path / "model.pt")
    table = model.state_dict()["encoder.embed_tokens.weight"]
    assert torch.equal(table[:rows], state["encoder.embed_tokens.weight"])
    assert torch.equal(table[rows:], before[rows:])


@pytest.mark.parametrize("kind", [BartForConditionalGeneration, BartModel])
@pytest.mark.parametrize("layout", ["bin", "saved", "lm_head"])
def test_layouts_of_the_same_bart_give_the_same_model(tmp_path, kind, layout):
    config = BartConfig(
        vocab_size=HUGGING_FACE,
        d_model=8,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=10,  # its table has two rows more, as fairseq's
    )
    other = kind(config)
    fairseq = bart(HUGGING_FACE)
    prefix = "model." if kind is BartForConditionalGeneration else ""
    renamed = {prefix + n: x for n, x in fairseq.items() if not n.endswith(".version")}
    table = renamed[f"{prefix}shared.weight"] = fairseq["encoder.embed_tokens.weight"]
    if prefix:
        renamed |= {"lm_head.weight": table, "final_logits_bias": torch.zeros(1, HUGGING_FACE)}
    other.load_state_dict(renamed)  # strict: these are all of its names
    path = tmp_path / "bart"
    if layout == "bin":
        path.mkdir()
        torch.save(other.state_dict(), path / "pytorch_model.bin")
    elif layout == "saved":
        other.save_pretrained(path)
        assert (path / "model.safetensors").is_file()
    else:
        # Of tensors that share memory safetensors keeps one, under any of its names.
        path = tmp_path / "model.safetensors"
        once = {n: x.clone() for n, x in renamed.items() if x is not table}
        save_file(once | {"lm_head.weight": table}, path)
    torch.save({"model": fairseq}, tmp_path / "model.pt")
    ours, theirs = tiny(), tiny()
    assert initialise(ours, "text", tmp_path / "model.pt") == initialise(theirs, "text", path)
    assert same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("part", ["image", "video", "audio"])
def test_entries_of_an_encoder_land_at_their_places(model, tmp_path, part):
    before = copied(model)
    path, state = file_of(part, tmp_path / "weights.pth")
    filled = initialise(model, part, path)
    own, prefix = model.state_dict(), f"encoder.{part}_encoder."
    assert filled == changed(before, model)
    wanted = [name for name in own if name.startswith(prefix) and not name.endswith(".window")]
    assert filled == sorted(wanted)
    for name in filled:
        theirs = name.removeprefix(prefix).replace("logmel.filters", "logmel_extractor.melW")
        assert torch.equal(own[name], state[theirs]), name


def test_a_model_of_fewer_stages_passes_over_the_later_ones(model, tmp_path):
    state = resnet((1, 2, 1, 3), (4, 4, 8, 8))
    torch.save(state, tmp_path / "resnet.pth")
    initialise(model, "image", tmp_path / "resnet.pth")
    own = model.state_dict()
    name = "layer3.0.bn3.weight"
    assert torch.equal(own[f"encoder.image_encoder.{name}"], state[name])
    assert not any("layer4" in name for name in own)


def test_files_that_do_not_count_batches_are_complete(model, tmp_path):
    state = {n: x for n, x in resnet().items() if not n.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "model.safetensors")
    filled = initialise(model, "image", tmp_path)
    assert len(filled) == len(state) - 2  # the classifier
    assert model.state_dict()["encoder.image_encoder.bn1.num_batches_tracked"] == 0


def test_half_precision_is_cast(model, tmp_path):
    state = {n: x.half() if x.is_floating_point() else x for n, x in cnn14((4, 8)).items()}
    torch.save({"model": state}, tmp_path / "cnn14.pth")
    initialise(model, "audio", tmp_path / "cnn14.pth")
    found = model.state_dict()["encoder.audio_encoder.bn0.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, state["bn0.weight"].float())


@pytest.mark.parametrize(
    ("part", "entries"), [("text", 259), ("image", 624), ("video", 624), ("audio", 78)]
)
def test_files_of_the_published_size_fit_the_released_model(tmp_path, part, entries):
    with torch.device("meta"):
        channels = (64, 128, 256, 512, 1024, 2048)
        model = UnivalForConditionalGeneration(UnivalConfig(audio_channels=channels))
        image = resnet101().state_dict()

    def make(*shape: int) -> Tensor:
        return torch.zeros(1).expand(shape)  # one number in memory and in the file

    state = {
        "text": lambda: bart(FAIRSEQ, 768, 3072, (6, 6), 1026, make),
        "image": lambda: {
            n: make(*x.shape).to(x.dtype) if x.ndim else torch.tensor(7) for n, x in image.items()
        },
        "video": lambda: resnext((3, 4, 23, 3), (128, 256, 512, 1024), 32, make),
        "audio": lambda: cnn14(channels, make),
    }[part]()
    torch.save({"model": state}, tmp_path / "weights.pt")
    assert len(initialise(model, part, tmp_path / "weights.pt")) == entries


# What is refused, leaving the model as it was.


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        (
            "text",
            "decoder.layers.0.encoder_attn.q_proj.bias",
            r"\[3\] in the file, \[8\] in the model \('decoder.layers.0.cross_attn.q_proj.bias'\)",
        ),
        (
            "image",
            "layer2.1.conv2.weight",
            r"\[3\] in the file, \[4, 4, 3, 3\] in the model "
            r"\('encoder.image_encoder.layer2.1.conv2.weight'\)",
        ),
        ("video", "layer2.1.bn1.running_var", r"\[3\] in the file, \[8\] in the model"),
        ("audio", "logmel_extractor.melW", r"\[3\] in the file, \[513, 64\] in the model"),
    ],
)
@pytest.mark.parametrize("damage", ["shape", "dtype", "missing", "unknown"])
def test_a_file_that_does_not_fit_changes_nothing(model, tmp_path, part, entry, message, damage):
    before = copied(model)
    path, state = file_of(part, tmp_path / "weights.pt")
    if damage == "shape":
        state[entry] = torch.zeros(3)
    elif damage == "dtype":
        state[entry] = state[entry].to(torch.int8)
        message = "torch.int8"
    elif damage == "missing":
        del state[entry]
        message = "1 entries of the .* are missing"
    else:
        state[entry := "layer1.7.conv1.weight"] = torch.zeros(3)
        message = f"no entry of the model's {part} part"
    torch.save({"model": state}, path)
    with pytest.raises(InitError, match=message) as refusal:
        initialise(model, part, path)
    assert str(path) in str(refusal.value)
    assert repr(entry) in str(refusal.value)
    assert same(copied(model), before)


def refusal_of_text(model: UnivalForConditionalGeneration, state: State, path: Path) -> str:
    before = copied(model)
    torch.save(state, path)
    with pytest.raises(InitError) as refusal:
        initialise(model, "text", path)
    assert same(copied(model), before)
    return str(refusal.value)


def test_another_vocabulary_than_barts_is_refused(model, tmp_path):
    # Its rows would mean other words here.
    said = refusal_of_text(model, bart(50002), tmp_path / "model.pt")
    assert "'encoder.embed_tokens.weight' is [50002, 8] in the file, [59457, 8] in the" in said
    assert "wanted 50265 or 51201 rows" in said


def test_a_model_with_fewer_symbols_than_bart_is_refused(tmp_path):
    said = refusal_of_text(tiny(vocab_size=51000), bart(), tmp_path / "model.pt")
    assert "[51201, 8] in the file, [51000, 8] in the model" in said


def test_an_embedding_without_dimensions_is_refused(model, tmp_path):
    state = bart() | {"encoder.embed_tokens.weight": torch.tensor(1.0)}
    del state["decoder.embed_tokens.weight"]
    assert "is [] in the file" in refusal_of_text(model, state, tmp_path / "model.pt")


def test_an_untied_output_is_refused(model, tmp_path):
    state = bart()
    state["decoder.output_projection.weight"] = 2 * state["encoder.embed_tokens.weight"]
    said = refusal_of_text(model, state, tmp_path / "model.pt")
    assert "'decoder.output_projection.weight' [51201, 8] differ" in said


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_a_sparse_entry_is_refused(model, tmp_path):
    state = bart()
    state["encoder.layers.0.fc1.weight"] = state["encoder.layers.0.fc1.weight"].to_sparse()
    said = refusal_of_text(model, state, tmp_path / "model.pt")
    assert "'encoder.layers.0.fc1.weight' holds no plain values" in said


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return (subprocess.call, (["touch", self.marker],))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("place", ["entry", "beside"])
def test_a_file_that_would_run_code_is_refused_unrun(model, tmp_path, part, place):
    before = copied(model)
    marker = tmp_path / "ran"
    path, state = file_of(part, tmp_path / "weights.pt")
    evil = Malicious(marker)
    content = {"model": state | {"bn1.weight": evil}} if place == "entry" else {"model": state}
    torch.save(content | {"optimizer": evil} if place == "beside" else content, path)
    with pytest.raises(InitError, match=r"weights\.pt: refused"):
        initialise(model, part, path)
    assert not marker.exists()
    assert same(copied(model), before)


def test_files_without_weights_are_named(model, tmp_path):
    with pytest.raises(InitError, match=r"absent\.pt: no such file"):
        initialise(model, "text", tmp_path / "absent.pt")
    with pytest.raises(InitError, match=r"holds no model\.safetensors or pytorch_model\.bin"):
        initialise(model, "text", tmp_path)
    for name in ("model.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 truncated")
        with pytest.raises(InitError, match=rf"{name}: .*damaged"):
            initialise(model, "text", tmp_path / name)
    for content in ([torch.zeros(1)], {}, {"model": {}}):
        torch.save(content, tmp_path / "empty.pt")
        with pytest.raises(InitError, match=r"empty\.pt: no state_dict"):
            initialise(model, "text", tmp_path / "empty.pt")
    torch.save({"conv1.weight": 3}, tmp_path / "number.pt")
    with pytest.raises(InitError, match=r"number\.pt: 'conv1\.weight' is no tensor but int"):
        initialise(model, "image", tmp_path / "number.pt")


def test_unknown_parts_are_told_the_known_ones(model, tmp_path):
    before = copied(model)
    with pytest.raises(InitError, match="'speech' is unknown; the parts are text, image, video, a"):
        initialise(model, "speech", tmp_path)
    assert same(copied(model), before)


@pytest.mark.parametrize("part", ["image", "video", "audio"])
def test_a_part_that_the_model_lacks_is_refused(tmp_path, part):
    model = tiny(image_layers=None, video_layers=None, audio_channels=None)
    path, _ = file_of(part, tmp_path / "weights.pth")
    with pytest.raises(InitError, match=rf"weights\.pth: the model has no {part} encoder"):
        initialise(model, part, path)
