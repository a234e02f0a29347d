"""LoRA and prompt tuning: arithmetic by hand, what is saved, training at every ZeRO stage."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import engine_cases as cases
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file

from unival.config import ConfigError, load_config
from unival.data.sampler import LoaderState
from unival.model.configuration import UnivalConfig
from unival.model.loading import ModelError, fold_adapter
from unival.model.modeling import UnivalForConditionalGeneration
from unival.training.adapters import TARGETS, Adapter, add_adapter, merged_state, save_adapter
from unival.training.checkpoint import Saver, StageFolder, restore
from unival.training.engine import Engine, init_distributed
from unival.training.freezing import describe_trainable, set_modes
from unival.training.trainer import make_model
from unival.vocabulary import Vocabulary

LORA = Adapter("lora", rank=3, alpha=6.0, targets=[*TARGETS])
PROMPT = Adapter("prompt", virtual_tokens=4, init_text="a photo of")


@pytest.fixture(autouse=True)
def _with_peft():
    pytest.importorskip("peft")


def tiny(**fields) -> UnivalForConditionalGeneration:
    torch.manual_seed(0)
    path = cases.ROOT / "configs/model/unival_tiny.yaml"
    config = UnivalConfig.from_yaml(path, **(cases.OVERRIDES | {"audio_channels": None} | fields))
    return UnivalForConditionalGeneration(config).eval()


def filled(adapter: Adapter, vocabulary: Vocabulary, **fields) -> UnivalForConditionalGeneration:
    """A model whose adapter is as after training: nothing of it is zero."""
    model = tiny(**fields)
    add_adapter(model, adapter, vocabulary)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.2)
    return model


def logits(model: torch.nn.Module, medium: str = "image") -> torch.Tensor:
    tensors = dict(cases.noise(medium, 3, 5).tensors)
    del tensors["loss_weight"]
    with torch.no_grad():
        return model(**tensors).logits


def by_hand(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """W + scale * B A of every linear map, one output and input at a time of the rank's sum."""
    plain = {}
    for name, tensor in state.items():
        if name.endswith(".base_layer.weight"):
            path = name.removesuffix("base_layer.weight")
            a = state[f"{path}lora_A.default.weight"].double()
            b = state[f"{path}lora_B.default.weight"].double()
            added = sum(b[:, r, None] * a[None, r, :] for r in range(len(a)))
            plain[f"{path}weight"] = (tensor.double() + scale * added).float()
        elif "lora" not in name:
            plain[name.replace("base_layer.", "")] = tensor
    return plain


@pytest.mark.parametrize("targets", [["q_proj"], list(TARGETS[:4]), list(TARGETS)])
def test_lora_is_in_the_maps_that_it_names_and_nothing_else_is_trained(vocabulary, targets):
    model = tiny(encoder_layers=2)
    plain = {name for name, _ in model.named_parameters()}
    add_adapter(model, replace(LORA, targets=targets), vocabulary)
    wanted = {
        f"{path}.{name}"
        for path in (
            "encoder.layers.0.self_attn",
            "encoder.layers.1.self_attn",
            "decoder.layers.0.self_attn",
            "decoder.layers.0.cross_attn",
        )
        for name in targets
        if name not in ("fc1", "fc2")
    } | {
        f"{stack}.layers.{n}.ffn.{name}"
        for stack, n in (("encoder", 0), ("encoder", 1), ("decoder", 0))
        for name in targets
        if name in ("fc1", "fc2")
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{f}.default.weight" for name in wanted for f in "AB"}
    kept = {
        n.replace("base_layer.", "") for n, p in model.named_parameters() if not p.requires_grad
    }
    assert kept == plain
    assert type(model) is UnivalForConditionalGeneration


def test_lora_begins_as_the_model_and_its_counts_are_by_hand(vocabulary):
    model = tiny()
    before = logits(model)
    add_adapter(model, Adapter("lora", rank=3), vocabulary)
    assert logits(model).equal(before)
    # 3 attentions of 4 maps from 32 to 32: A is 3 x 32, B is 32 x 3.
    row = next(r for r in describe_trainable(model).splitlines() if r.startswith("adapter"))
    assert row.split() == ["adapter", f"{3 * 4 * (3 * 32 + 32 * 3):,}", "0"]


@pytest.mark.parametrize("medium", ["text", "image", "video"])
def test_every_map_computes_with_its_product(vocabulary, medium):
    """The plain model with W + scale * B A gives the same: no map is read past its adapter."""
    model = filled(LORA, vocabulary)
    reference = tiny()
    base = logits(reference, medium)
    reference.load_state_dict(by_hand(model.state_dict(), 2.0))  # alpha / rank = 6 / 3
    expected = logits(reference, medium)
    torch.testing.assert_close(logits(model, medium), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - base).abs().max()) > 0.01


def test_the_merged_state_is_a_plain_models(vocabulary):
    model = filled(LORA, vocabulary)
    merged, expected = merged_state(model.state_dict(), LORA), by_hand(model.state_dict(), 2.0)
    assert merged.keys() == expected.keys() == tiny().state_dict().keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    half = merged_state({n: t.bfloat16() for n, t in model.state_dict().items()}, LORA)
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.values())
    prompted = filled(PROMPT, vocabulary).state_dict()
    assert merged_state(prompted, PROMPT) == prompted


@pytest.mark.parametrize("adapter", [LORA, Adapter("lora", rank=2, targets=["v_proj"]), PROMPT])
def test_a_saved_adapter_is_one_of_peft_and_folds(vocabulary, tmp_path, adapter):
    import peft

    model = filled(adapter, vocabulary)
    save_adapter(model.state_dict(), adapter, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    expected = logits(model)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    plain = tiny()
    fold_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - logits(tiny())).abs().max()) > 0.01


def test_lora_of_peft_itself_folds_with_its_own_scale(tmp_path):
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, use_rslora=True, init_lora_weights="gaussian",
        target_modules=["q_proj", "fc2", "image_proj", "position_key"], lora_dropout=0.5,
    )  # fmt: skip
    wrapped = peft.get_peft_model(tiny(), config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.2)
    wrapped.save_pretrained(tmp_path)
    plain = tiny()
    fold_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain), logits(wrapped), rtol=1e-4, atol=1e-5)


def test_lora_that_cannot_be_folded_is_refused_and_changes_nothing(vocabulary, tmp_path):
    save_adapter(filled(LORA, vocabulary).state_dict(), LORA, tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    told, kept = json.loads(config.read_text()), load_file(file)
    model, name = tiny(), "base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(words, weights=kept, **fields):
        config.write_text(json.dumps(told | fields))
        save_file(weights, file)
        with pytest.raises(ModelError, match=words):
            fold_adapter(model, tmp_path)

    refused("use_dora=True cannot be folded", use_dora=True)
    refused("rank_pattern=.* cannot be folded", rank_pattern={"q_proj": 4})
    refused("alora_invocation_tokens", alora_invocation_tokens=[3])
    refused("megatron_config", megatron_config={"x": 1}, megatron_core="antigravity")
    refused("some_later_option='yes'", some_later_option="yes")
    refused("bias='all'", bias="all")
    refused("init_lora_weights='pissa'", init_lora_weights="pissa")
    refused("r='3', lora_alpha=6", r="3")
    refused(r"_proj' is \{'A': \[3, 32\].*wanted \{'A': \[4, 32\]", r=4)
    refused(r"\{'A': \[3, 31\]", kept | {name: torch.zeros(3, 31)})
    refused(r"q_proj' is \{'B': ", {n: t for n, t in kept.items() if n != name})
    foreign = name.replace("encoder.layers.0", "encoder.layers.9")
    refused("'encoder.layers.9.self_attn.q_proj', which is no linear", {foreign: kept[name]})
    norm = "base_model.model.encoder.norm.lora_A.weight"
    refused("'encoder.norm', which is no linear", kept | {norm: torch.zeros(3, 32)})
    refused("'weight' is no factor of LoRA", kept | {"weight": torch.zeros(1)})
    refused("no weights in the adapter", {})
    assert "antigravity" not in sys.modules
    before = tiny().state_dict()
    assert all(tensor.equal(before[n]) for n, tensor in model.state_dict().items())


def test_a_prompt_begins_with_the_words_of_its_text_or_with_words_drawn(vocabulary):
    model = tiny()
    add_adapter(model, replace(PROMPT, virtual_tokens=5), vocabulary)
    table, vectors = model.encoder.embed_tokens.weight, model.encoder.soft_prompt.weight
    words = vocabulary.encode_text(" a photo of")
    assert len(words) == 3
    assert vectors.equal(table[[*words, *words[:2]]])
    assert model.config.num_virtual_tokens == 5
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "encoder.soft_prompt.weight"
    }
    drawn = []
    for _ in range(2):
        model = tiny()
        torch.manual_seed(9)
        add_adapter(model, Adapter("prompt"), vocabulary)
        drawn.append(model.encoder.soft_prompt.weight)
    assert drawn[0].equal(drawn[1])
    assert drawn[0].shape == (20, 32)
    assert torch.cdist(drawn[0], model.encoder.embed_tokens.weight).min(dim=1).values.max() < 1e-3
    assert len(drawn[0].unique(dim=0)) > 15


def test_a_prompt_is_trained_on_but_not_replaced_and_lora_is_put_in_once(vocabulary):
    model = filled(PROMPT, vocabulary)
    kept = model.encoder.soft_prompt.weight.clone()
    add_adapter(model, replace(PROMPT, init_text=None), vocabulary)
    assert model.encoder.soft_prompt.weight.equal(kept)
    for other in (PROMPT, replace(PROMPT, init_text=None, virtual_tokens=5)):
        with pytest.raises(ValueError, match=r"adapter.virtual_tokens=.*soft prompt of 4 already"):
            add_adapter(model, other, vocabulary)
    model = filled(LORA, vocabulary)
    with pytest.raises(ValueError, match="has LoRA in its linear maps already"):
        add_adapter(model, LORA, vocabulary)
    with pytest.raises(ValueError, match=r"\[1024, 32\]; wanted \[n, 32\] with n from 1 to 1023"):
        add_adapter(tiny(), Adapter("prompt", virtual_tokens=1024), vocabulary)


def test_without_peft_the_error_says_what_to_install(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'unival\[peft\]'"):
        add_adapter(tiny(), LORA, vocabulary)
    with pytest.raises(ImportError, match=r"pip install 'unival\[peft\]'"):
        save_adapter({}, LORA, "unused")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "ia3"}, "adapter.kind='ia3'; known: lora, prompt"),
        ({"kind": "lora", "rank": 0}, "adapter.rank=0; wanted at least 1"),
        ({"kind": "lora", "alpha": 0.0}, "adapter.alpha=0.0"),
        ({"kind": "lora", "alpha": float("nan")}, "adapter.alpha=nan"),
        ({"kind": "lora", "dropout": 1.0}, "adapter.dropout=1.0"),
        ({"kind": "lora", "targets": []}, "adapter.targets=[]; wanted some of q_proj"),
        ({"kind": "lora", "targets": ["query"]}, "adapter.targets=['query']"),
        ({"kind": "lora", "init_text": "a"}, "adapter.init_text is of kind prompt alone"),
        ({"kind": "prompt", "virtual_tokens": 0}, "adapter.virtual_tokens=0"),
        ({"kind": "prompt", "init_text": " "}, "adapter.init_text=' ' has no text"),
    ],
)
def test_options_that_cannot_be_are_named(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Adapter(**fields)


@dataclass
class Holder:
    adapter: Adapter | None = None


def test_options_come_from_a_config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("adapter: {kind: lora, rank: 2, targets: [fc1]}")
    assert load_config(Holder, path).adapter == Adapter("lora", rank=2, targets=["fc1"])
    path.write_text("adapter: {rank: 2}")
    with pytest.raises(ConfigError, match=r"adapter\.kind"):
        load_config(Holder, path)
    path.write_text("adapter: {kind: lora, rank: 0}")
    with pytest.raises(ValueError, match=r"adapter\.rank=0"):
        load_config(Holder, path)


def test_with_the_base_at_rest_only_loras_dropout_is_left(vocabulary):
    rates = {"dropout": 0.3, "encoder_drop_path": 0.3, "decoder_drop_path": 0.3}
    model = filled(LORA, vocabulary, **rates)
    set_modes(model, frozen_in_eval=True)
    names = {name for name, module in model.named_modules() if module.training}
    assert "encoder.layers.0.self_attn.q_proj.lora_A.default" in names
    assert not [name for name in names if name.endswith(("base_layer", "norm", "_encoder"))]
    resting = model.encoder(torch.tensor([[0, 5, 2]])).last_hidden_state
    assert resting.equal(model.encoder(torch.tensor([[0, 5, 2]])).last_hidden_state)
    dropped = filled(replace(LORA, dropout=0.5), vocabulary, **rates)
    set_modes(dropped, frozen_in_eval=True)
    first, second = (dropped.encoder(torch.tensor([[0, 5, 2]])).last_hidden_state for _ in "12")
    assert not first.equal(second)


@pytest.mark.parametrize("adapter", [LORA, PROMPT], ids=["lora", "prompt"])
def test_recomputed_layers_give_the_adapter_the_same_gradients(vocabulary, adapter):
    """The first layer's input has no gradient under LoRA, and a prompt's layers have no weights."""
    found = []
    for recompute in (False, True):
        model = filled(adapter, vocabulary).train()
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = recompute
        model(torch.tensor([[0, 5, 6, 2]]), labels=torch.tensor([[7, 8, 2]])).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    first, second = found
    assert all(float(gradient.abs().max()) > 0 for gradient in first.values())
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, msg=name)


def build(adapter: Adapter, run) -> Engine:
    """An engine of a model with an adapter."""
    stage, world = run.stages[0], init_distributed()
    model = make_model(run, stage, None)
    torch.manual_seed(run.seed)
    add_adapter(model, adapter, Vocabulary("gpt2"))
    return Engine(model, run, stage, world)


def train(adapter: Adapter, run, steps: int):
    engine = build(adapter, run)
    return cases.steps_on(engine, 1, steps), cases.state_of(engine)


def save_and_go_on(adapter: Adapter, run):
    """Two steps, a checkpoint, another step; and the last again from the checkpoint."""
    engine = build(adapter, run)
    place = StageFolder(Path(run.output), run.stages[0].name)
    place.clear_unfinished()
    saver = Saver(engine, place, Vocabulary("gpt2"), 2, 1)
    cases.steps_on(engine, 1, 2)
    saver.save(2, LoaderState(run.seed, {"qa": 8}))
    saver.wait()
    cases.steps_on(engine, 3, 1)
    again = build(adapter, run)
    for piece in again.pieces:
        piece.master.fill_(7.0)
    restore(again, place, Saver(again, place, Vocabulary("gpt2"), 2, 1))
    cases.steps_on(again, 3, 1)
    return cases.state_of(engine), cases.state_of(again)


def adapter_run(folder: Path, zero: int):
    fields = {"freeze": ["all_but_adapter"]}
    return cases.stage_zero(cases.small_run(folder, fields), zero)


@pytest.fixture(scope="module")
def plain_training():
    """Losses and adapters of three steps in plain PyTorch, by kind."""
    return {adapter.kind: _train_by_hand(adapter) for adapter in (LORA, PROMPT)}


def _train_by_hand(adapter: Adapter):
    run = adapter_run(Path("unused"), 0)
    model = make_model(run, run.stages[0], None)
    torch.manual_seed(run.seed)
    add_adapter(model, adapter, Vocabulary("gpt2"))
    model.eval()  # no dropout in this model, and batch norm by its running statistics
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), eps=run.optimizer.eps, weight_decay=0.01)
    losses = []
    for step, rate in enumerate([0.5, 1.0, 0.5], start=1):  # warm-up to step 2, 0 after step 4
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        total = 0.0
        for batch in cases.rows_of_step(step):
            tensors = dict(batch.tensors)
            labels = tensors.pop("labels")
            del tensors["loss_weight"]
            found = model(**tensors).logits
            total += batch.weight * torch.nn.functional.cross_entropy(
                found.flatten(0, 1), labels.flatten()
            )
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(float(total.detach()))
    return losses, {f"master/{name}": p.detach().flatten() for name, p in trained.items()}


def assert_trained(state, expected):
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(state[name], values, rtol=1e-4, atol=1e-6, msg=name)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("adapter", "zero", "world"),
    [
        slow(LORA, 0, 1),
        slow(LORA, 2, 2),
        slow(LORA, 3, 1),
        slow(PROMPT, 0, 1),
        slow(PROMPT, 2, 2),
        slow(PROMPT, 3, 2),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_an_adapter_trains_as_in_plain_pytorch(tmp_path, plain_training, adapter, zero, world):
    losses, expected = plain_training[adapter.kind]
    found = on_ranks(tmp_path, world, train, adapter, adapter_run(tmp_path, zero), 3)
    for results, _ in found:
        assert [r.loss for r in results] == pytest.approx(losses, rel=1e-5)
    assert_trained(cases.whole([state for _, state in found]), expected)


@pytest.mark.parametrize(
    ("adapter", "zero"), [(LORA, 3), (PROMPT, 1), slow(LORA, 1), slow(PROMPT, 3)],
    ids=lambda value: getattr(value, "kind", value),
)  # fmt: skip
def test_training_goes_on_from_a_checkpoint(tmp_path, plain_training, adapter, zero):
    run = adapter_run(tmp_path, zero)
    ((whole, resumed),) = on_ranks(tmp_path, 1, save_and_go_on, adapter, run)
    assert_trained(cases.whole([whole]), plain_training[adapter.kind][1])
    assert whole.keys() == resumed.keys()
    for name, ((_, values),) in whole.items():
        assert values.equal(resumed[name][0][1]), name
