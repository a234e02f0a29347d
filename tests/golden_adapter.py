"""Runs this project on the golden cases recorded from the original code.

The weights are generated from the original's parameter names and go through `unival.convert`, so
that a wrong name in the converter fails as surely as a wrong formula in the model.
"""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unival.convert.original import load_original, to_original
from unival.generation.constraints import RangeConstraint, Trie, TrieConstraint
from unival.generation.search import SearchOptions, beam_search
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.positions import code_positions, grid_buckets, text_buckets
from unival.training.losses import Criterion, states_at
from unival.vocabulary import EOS, IGNORE, PAD

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
sys.path.insert(0, str(GOLDEN))

INPUT_NAMES = {
    "patch_images": "pixel_values",
    "patch_videos": "video_values",
    "patch_audios": "audio_values",
    "patch_masks": "patch_mask",
    "code_masks": "code_mask",
}


def model_config(config: dict[str, Any]) -> UnivalConfig:
    """Our config from the original's options."""
    audio = (64, 128, 256, 512, 1024, 2048) if config.get("audio_encoder_name") else None
    return UnivalConfig(
        vocab_size=config["vocab"]["size"],
        d_model=config["encoder_embed_dim"],
        ffn_dim=config["encoder_ffn_embed_dim"],
        encoder_layers=config["encoder_layers"],
        decoder_layers=config["decoder_layers"],
        num_heads=config["encoder_attention_heads"],
        num_text_positions=config["max_source_positions"] + 2,
        token_bucket_size=config["token_bucket_size"],
        image_bucket_size=config["image_bucket_size"],
        code_image_size=config["code_image_size"],
        attn_scale_factor=config["attn_scale_factor"],
        scale_resids=config["scale_resids"],
        sample_patch_num=config.get("sample_patch_num"),
        image_layers=config["image_layers"],
        video_layers=config.get("video_layers"),
        audio_channels=audio,
        hop_size=config.get("hop_size", 480),
        mel_bins=config.get("mel_bins", 64),
        dropout=0.0,
        encoder_drop_path=0.0,
        decoder_drop_path=0.0,
    )


@functools.lru_cache(maxsize=2)
def load(text: str) -> UnivalForConditionalGeneration:
    """The model of a config (as JSON text), with generated weights; two are kept."""
    from weights import make_weight

    config = model_config(json.loads(text))
    with torch.device("meta"):
        shapes = UnivalForConditionalGeneration(config).state_dict()
    names = {
        to_original([name])[name]: t.shape for name, t in shapes.items() if to_original([name])
    }
    embedding = names["encoder.embed_tokens.weight"]
    names |= {f"decoder.{n}.weight": embedding for n in ("embed_tokens", "output_projection")}
    state = {}
    for name, shape in names.items():
        value = make_weight(name, shape)
        if value is not None:
            state[name] = torch.from_numpy(value)
    return load_original(state, config).eval()


def model_inputs(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Arrays of a case under our argument names."""
    found = {
        INPUT_NAMES[name]: torch.from_numpy(array)
        for name, array in inputs.items()
        if name in INPUT_NAMES
    }
    if "src_tokens" in inputs:
        found["input_ids"] = torch.from_numpy(inputs["src_tokens"])
    return found


def features(model: UnivalForConditionalGeneration, case: dict, inputs: dict) -> dict[str, Any]:
    medium = case["modality"]
    values = torch.from_numpy(inputs[f"patch_{medium}s"])
    encoder = model.encoder
    result: dict[str, Any] = {}
    raw_map = getattr(encoder, f"{medium}_encoder")(values)
    raw, positions, _ = encoder.media_features(medium, values)
    # OFA's recording stops before the projection.
    projected = raw if case["model"] == "ofa" else getattr(encoder, f"{medium}_proj")(raw)
    if medium == "audio":
        result["logmel"] = encoder.audio_encoder.logmel(values)
    result |= {
        "raw": raw,
        "raw_shape": np.array(raw_map.shape),
        "projected": projected,
        "position_ids": positions.expand(raw.shape[0], -1),
        "num_tokens": np.array(raw.shape[1]),
        "token_moments": torch.stack([projected.mean(), projected.std(), projected.norm()]),
    }
    return result


def forward(model: UnivalForConditionalGeneration, inputs: dict) -> dict[str, Any]:
    previous = torch.from_numpy(inputs["prev_output_tokens"])
    out = model(
        **model_inputs(inputs),
        decoder_input_ids=previous,
        output_hidden_states=True,
        output_attentions=True,
    )
    hidden, padded = out.encoder_padding_mask[..., None], (previous == PAD)[..., None]
    attention = out.cross_attentions[-1].mean(1).masked_fill(padded, 0.0)
    result = {
        "encoder_out": out.encoder_last_hidden_state.masked_fill(hidden, 0.0),
        "encoder_padding_mask": out.encoder_padding_mask,
        "logits": out.logits.masked_fill(padded, 0.0),
        "cross_attention_mean_last_layer": attention,
    }
    for index, state in enumerate(out.encoder_hidden_states):
        result[f"encoder_states.{index}"] = state.masked_fill(hidden, 0.0)
    for index, state in enumerate(out.decoder_hidden_states):
        result[f"decoder_states.{index}"] = state.masked_fill(padded, 0.0)
    return result


def criterion(options: dict[str, Any]) -> tuple[Criterion, int]:
    """Our criterion and the update number of a case. drop_best_* is inert in the original."""
    bounds = options.get("constraint_range")
    return Criterion(
        label_smoothing=options["label_smoothing"],
        log_end=options.get("log_end") if options["name"] == "el" else None,
        drop_worst_ratio=options.get("drop_worst_ratio", 0.0),
        drop_worst_after=options.get("drop_worst_after", 0),
        constraint_range=tuple(int(x) for x in bounds.split(",")) if bounds else None,
        ignore_prefix_size=options.get("ignore_prefix_size", 0),
        ignore_eos=options.get("ignore_eos", False),
        rdrop_alpha=options.get("reg_alpha", 0.0) if options.get("use_rdrop") else 0.0,
    ), options.get("update_num", 0)


def loss(model: UnivalForConditionalGeneration | None, case: dict, inputs: dict) -> dict[str, Any]:
    compute, update = criterion(case["criterion"])
    target = torch.from_numpy(inputs["target"]).masked_fill(
        torch.from_numpy(inputs["target"]) == PAD, IGNORE
    )
    sentences = target.shape[0]
    leaf = allowed = None
    if model is None:
        leaf = torch.from_numpy(inputs["logits_in"]).requires_grad_()
        if compute.rdrop_alpha and leaf.shape[0] == 2 * target.shape[0]:
            target = torch.cat([target, target])
        logits = states_at(leaf, compute.counted(target))
    else:
        for parameter in model.parameters():
            parameter.grad = None
        training = bool(case.get("train_mode"))
        model.train(training)
        previous = torch.from_numpy(inputs["prev_output_tokens"])
        with exact_maps(model) if training else nullcontext():
            out = model(**model_inputs(inputs), decoder_input_ids=previous, output_logits=False)
        model.eval()
    if "constraint_masks" in inputs:
        allowed = torch.from_numpy(inputs["constraint_masks"])
    if model is None:
        chosen = None if allowed is None else allowed[compute.counted(target)]
        sums = compute(logits, target, allowed=chosen, update=update)
    else:
        sums = compute.of_states(
            out.decoder_last_hidden_state,
            model.get_input_embeddings().weight,
            target,
            allowed=allowed,
            update=update,
        )
    sums.loss.backward()
    count = sums.tokens
    if case["criterion"].get("sentence_avg"):
        count = sentences
    result: dict[str, Any] = {
        "loss": sums.loss,
        "nll_loss": sums.nll,
        "sample_size": np.array(count),
    }
    if leaf is not None:
        return result | {"logits_grad": leaf.grad}
    result |= gradients(model, case)
    model.float()
    return result


@contextmanager
def exact_maps(model: UnivalForConditionalGeneration) -> Iterator[None]:
    """The image encoder in float64.

    With statistics of the batch, a recorded picture gives a map with 1.5e-8 before a ReLU. Of such
    a value rounding decides the sign, and with it gradients to far more than their tolerance: in
    float32 another order of a sum, as on another number of threads, fails or passes by luck.
    """
    encoder = model.encoder.image_encoder
    casts = (
        encoder.register_forward_pre_hook(lambda _, given: (given[0].double(),)),
        encoder.register_forward_hook(lambda _, __, found: found.float()),
    )
    encoder.double()
    try:
        yield
    finally:
        for cast in casts:
            cast.remove()


def gradients(model: UnivalForConditionalGeneration, case: dict) -> dict[str, Any]:
    """Gradients and updated buffers under the original's names."""
    original = to_original(model.state_dict())
    named = {original[n]: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # In float64: torch's float32 norm of a channels-last gradient is off by more than allowed.
    named = {name: gradient.double() for name, gradient in named.items()}
    norms = torch.stack([g.norm() for g in named.values()])
    result: dict[str, Any] = {
        "grad_norm_total": norms.norm(),
        "n_params_with_grad": np.array(len(named)),
    }
    for name in case["grads"]:
        flat = named[name].flatten()
        result[f"grad_norm/{name}"] = flat.norm()
        result[f"grad_head/{name}"] = flat[:: max(1, flat.numel() // 16)][:16]
    buffers = {original[n]: b for n, b in model.named_buffers() if n in original}
    for name in case.get("train_mode") or ():
        result[f"after/{name}"] = buffers[name].clone()
    return result


def generate(model: UnivalForConditionalGeneration, case: dict, inputs: dict) -> dict[str, Any]:
    options = dict(case["generation"])
    search = SearchOptions(
        beam_size=options.get("beam_size", 5),
        max_length=options.get("max_len_b", 200),
        min_length=options.get("min_len", 1),
        normalize_scores=options.get("normalize_scores", True),
        length_penalty=options.get("len_penalty", 1.0),
        unknown_penalty=options.get("unk_penalty", 0.0),
        temperature=options.get("temperature", 1.0),
        no_repeat_ngram_size=options.get("no_repeat_ngram_size", 0),
    )
    prefix = inputs.get("prefix_tokens")
    prefix = None if prefix is None else torch.from_numpy(prefix)
    rows = inputs["src_tokens"].shape[0]
    constraints: list[Any] = []
    if "trie" in case:
        trie = Trie()
        for answer in case["trie"]:
            trie.insert([0, *answer, EOS])
        lengths = [0] * rows if prefix is None else (prefix != PAD).sum(1).tolist()
        constraints.append(TrieConstraint(trie, lengths, search.beam_size))
    if options.get("constraint_range"):
        constraints.append(
            RangeConstraint(*(int(x) for x in options["constraint_range"].split(",")))
        )
    found = beam_search(model, model.encoder(**model_inputs(inputs)), search, constraints, prefix)
    width = max(len(h.tokens) for hypotheses in found for h in hypotheses)
    shape = case["tensors"]["tokens"]["shape"]
    tokens = np.full((rows, shape[1], max(width, shape[2])), -1)
    positional = np.zeros(tokens.shape)
    scores = np.zeros(tokens.shape[:2])
    for row, hypotheses in enumerate(found):
        for rank, hypothesis in enumerate(hypotheses):
            tokens[row, rank, : len(hypothesis.tokens)] = hypothesis.tokens
            positional[row, rank, : len(hypothesis.tokens)] = hypothesis.positional_scores
            scores[row, rank] = hypothesis.score
    return {
        "tokens": tokens,
        "scores": scores,
        "positional_scores": positional,
        "n_hypotheses": np.array([len(hypotheses) for hypotheses in found]),
    }


def tables(case: dict, config: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    longest = config["max_source_positions"]
    for size in case["token_bucket_sizes"]:
        by_offset = text_buckets(size, longest)
        index = torch.arange(longest)
        table = by_offset[index[:, None] - index[None, :] + longest - 1]
        result[f"token_bucket_by_relative_position/{size}"] = by_offset
        result[f"token_bucket_sum/{size}"] = table.sum()
    for size in case["image_bucket_sizes"]:
        ids = torch.arange(size * size + 1)
        table = grid_buckets(ids, ids, size)
        chosen = ids[:: size + 2] if f"image_bucket_idx/{size}" in case["tensors"] else ids
        chosen = chosen[: case["tensors"][f"image_bucket_idx/{size}"]["shape"][0]]
        result |= {
            f"image_bucket_shape/{size}": np.array(table.shape),
            f"image_bucket_sum/{size}": table.sum(),
            f"image_bucket_corner/{size}": table[:12, :12],
            f"image_bucket_idx/{size}": chosen,
            f"image_bucket_sub/{size}": table[chosen][:, chosen],
        }
    code_size, grid = config["code_image_size"], config["image_bucket_size"]
    length = 1 + (code_size // 8) ** 2 + 769
    result["decoder_image_position_idx"] = code_positions(
        length, code_size, grid, torch.device("cpu")
    )
    return result


def run(case: dict, config: dict[str, Any] | None, inputs: dict) -> dict[str, Any] | None:
    """One case; None skips it (switches that no published run turns on)."""
    if case.get("optional"):
        return None
    torch.manual_seed(0)
    if "python_random_seed" in case:
        random.seed(case["python_random_seed"])
    with torch.set_grad_enabled(case["run"] == "loss"):
        if case["run"] == "tables":
            result = tables(case, config)
        else:
            model = None if config is None else load(json.dumps(config, sort_keys=True))
            if case["run"] == "features":
                result = features(model, case, inputs)
            elif case["run"] == "forward":
                result = forward(model, inputs)
            elif case["run"] == "loss":
                result = loss(model, case, inputs)
                if case.get("train_mode"):
                    load.cache_clear()  # batch norm has changed the cached model's statistics
            else:
                result = generate(model, case, inputs)
    return {
        name: value.detach().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in result.items()
        if name in case["tensors"]
    }
