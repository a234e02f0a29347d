"""Original UnIVAL and OFA checkpoints: names, shapes and the config they imply.

One table of renamings serves both directions. What is left behind on the way in is listed in
DROPPED, each with its reason, so that a test can account for every parameter.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration


class CheckpointError(ValueError):
    """A checkpoint that is not of this architecture, or not safe to open."""


# (original, ours): regular expressions with the same groups in both directions.
RENAMED = [
    (r"encoder\.embed_tokens\.", "encoder.embed_tokens."),
    (r"encoder\.embed_images\.", "encoder.image_encoder."),
    (r"encoder\.embed_videos\.", "encoder.video_encoder."),
    (r"encoder\.embed_audios\.logmel_extractor\.melW$", "encoder.audio_encoder.logmel.filters"),
    (r"encoder\.embed_audios\.", "encoder.audio_encoder."),
    (r"encoder\.embed_image_positions\.", "encoder.image_positions."),
    (r"encoder\.embed_video_positions\.", "encoder.video_positions."),
    (r"encoder\.embed_audio_positions\.", "encoder.audio_positions."),
    (r"encoder\.patch_layernorm_embedding\.", "encoder.patch_norm."),
    (r"encoder\.pos_q_linear\.", "encoder.position_query."),
    (r"encoder\.pos_k_linear\.", "encoder.position_key."),
    (r"decoder\.embed_image_positions\.", "decoder.image_positions."),
    (r"decoder\.code_layernorm_embedding\.", "decoder.code_norm."),
    (r"decoder\.(self|cross)_pos_q_linear\.", r"decoder.\1_position_query."),
    (r"decoder\.(self|cross)_pos_k_linear\.", r"decoder.\1_position_key."),
    (r"(encoder|decoder)\.embed_positions\.", r"\1.text_positions."),
    (r"(encoder|decoder)\.layernorm_embedding\.", r"\1.token_norm."),
    (r"(encoder|decoder)\.pos_ln\.", r"\1.text_position_norm."),
    (r"(encoder|decoder)\.image_pos_ln\.", r"\1.grid_position_norm."),
    (r"(encoder|decoder)\.layer_norm\.", r"\1.norm."),
    (r"(encoder|decoder)\.token_rel_pos_table_list\.", r"\1.relative.text."),
    (r"(encoder|decoder)\.image_rel_pos_table_list\.", r"\1.relative.image."),
    (r"(encoder|decoder)\.layers\.(\d+)\.self_attn\.c_attn$", r"\1.layers.\2.self_attn.head_scale"),
    (r"decoder\.layers\.(\d+)\.encoder_attn\.c_attn$", r"decoder.layers.\1.cross_attn.head_scale"),
    (r"decoder\.layers\.(\d+)\.encoder_attn\.", r"decoder.layers.\1.cross_attn."),
    (r"decoder\.layers\.(\d+)\.encoder_attn_layer_norm\.", r"decoder.layers.\1.cross_attn_norm."),
    (r"decoder\.layers\.(\d+)\.cross_attn_ln\.", r"decoder.layers.\1.cross_attn_post_norm."),
    (r"encoder\.layers\.(\d+)\.attn_ln\.", r"encoder.layers.\1.self_attn_post_norm."),
    (r"decoder\.layers\.(\d+)\.self_attn_ln\.", r"decoder.layers.\1.self_attn_post_norm."),
    (
        r"(encoder|decoder)\.layers\.(\d+)\.self_attn_layer_norm\.",
        r"\1.layers.\2.self_attn_norm.",
    ),
    (r"(encoder|decoder)\.layers\.(\d+)\.final_layer_norm\.", r"\1.layers.\2.ffn_norm."),
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn_layernorm\.", r"\1.layers.\2.ffn.norm."),
    (r"(encoder|decoder)\.layers\.(\d+)\.(fc[12])\.", r"\1.layers.\2.ffn.\3."),
    (r"(encoder|decoder)\.layers\.(\d+)\.w_resid$", r"\1.layers.\2.ffn.residual_scale"),
    (r"(encoder)\.(type_embedding|image_proj|video_proj|audio_proj)\.", r"\1.\2."),
    (r"(encoder|decoder)\.layers\.(\d+)\.self_attn\.(\w+_proj)\.", r"\1.layers.\2.self_attn.\3."),
]

DROPPED = {
    r"(encoder|decoder)\.version$": "fairseq's format number",
    r"(encoder|decoder)\.(token|image)_rp_bucket$": "computed from the offsets",
    r"decoder\.image_position_idx$": "computed from code_image_size",
    r"decoder\.(embed_tokens|output_projection)\.weight$": "tied to encoder.embed_tokens.weight",
    r"encoder\.embed_images\.fc\.(weight|bias)$": "ImageNet classifier, never used",
    r"encoder\.embed_audios\.spectrogram_extractor\.": "the Fourier transform as a convolution",
    r"encoder\.embed_audios\.(fc1|fc_audioset)\.": "AudioSet classifier, never used",
}


def drop_reason(name: str) -> str | None:
    """Why an original entry has no counterpart here; None where it has one."""
    return next((why for pattern, why in DROPPED.items() if re.match(pattern, name)), None)


def to_ours(name: str) -> str:
    """Our name of an original entry. Raises CheckpointError for a name the original never has."""
    for pattern, ours in RENAMED:
        if re.match(pattern, name):
            return re.sub("^" + pattern, ours, name)
    raise CheckpointError(f"{name!r} is no entry of a UnIVAL or OFA checkpoint")


def to_original(names: Iterable[str]) -> dict[str, str]:
    """Original name of each of our state_dict names; our own computed buffers are left out."""
    found = {}
    for name in names:
        if name.endswith((".text_bucket", "logmel.window")):
            continue
        found[name] = _original_name(name)
    return found


def _original_name(name: str) -> str:
    for pattern, ours in RENAMED:
        groups = iter(re.findall(r"\([^)]*\)", pattern))
        reverse = re.sub(r"\\\d", lambda _: next(groups), re.escape(ours).replace(r"\\", "\\"))  # noqa: B023
        if (found := re.match(reverse, name)) is None:
            continue
        rest = name[found.end() :]
        template = re.sub(r"\([^)]*\)", "{}", pattern.rstrip("$")).replace("\\.", ".")
        candidate = template.format(*found.groups()) + rest
        if to_ours(candidate) == name:
            return candidate
    raise CheckpointError(f"{name!r} has no counterpart in the original")


def infer_config(state: Mapping[str, Tensor], **overrides: Any) -> UnivalConfig:
    """The config that an original state_dict implies.

    Shapes tell everything but hop_size, dropout, drop-path, sample_patch_num and
    attn_scale_factor: pass those as overrides where they differ from the released values.
    """

    def depth(pattern: str) -> int:
        found = [re.match(pattern, name) for name in state]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise CheckpointError(f"no {name!r}: this is no UnIVAL or OFA checkpoint")
        return state[name].shape

    def stages(prefix: str) -> list[int] | None:
        counts = [depth(rf"{prefix}\.layer{stage}\.(\d+)\.") for stage in range(1, 5)]
        return [count for count in counts if count] or None

    def widths(prefix: str, layers: list[int] | None, conv: str) -> list[int]:
        names = range(1, 1 + len(layers or ()))
        return [shape(f"{prefix}.layer{stage}.0.{conv}.weight")[0] for stage in names]

    vocab_size, d_model = shape("encoder.embed_tokens.weight")
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "ffn_dim": shape("encoder.layers.0.fc1.weight")[0],
        "encoder_layers": depth(r"encoder\.layers\.(\d+)\."),
        "decoder_layers": depth(r"decoder\.layers\.(\d+)\."),
        "num_heads": shape("encoder.layers.0.self_attn.c_attn")[0],
        "num_text_positions": shape("encoder.embed_positions.weight")[0],
        "token_bucket_size": (shape("encoder.token_rel_pos_table_list.0.weight")[0] + 1) // 2,
        "scale_resids": "encoder.layers.0.w_resid" in state,
    }
    for medium in ("image", "video"):
        prefix = f"encoder.embed_{medium}s"
        layers = stages(prefix)
        fields[f"{medium}_layers"] = layers
        if layers:
            fields[f"{medium}_channels"] = widths(prefix, layers, "conv1")
    if fields["video_layers"]:
        first = shape("encoder.embed_videos.layer1.0.conv2.weight")
        fields["video_cardinality"] = first[0] // first[1]
    blocks = depth(r"encoder\.embed_audios\.conv_block(\d+)\.") - 1
    if blocks > 0:
        fields["audio_channels"] = [
            shape(f"encoder.embed_audios.conv_block{k}.conv1.weight")[0]
            for k in range(1, blocks + 1)
        ]
    if "decoder.image_position_idx" in state:
        cells = state["decoder.image_position_idx"].numel() - 1 - 769
        fields["code_image_size"] = 8 * round(cells**0.5)
    return UnivalConfig(**(fields | overrides))


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original entries under our names, in float32; see DROPPED for what stays behind."""
    return {
        to_ours(name): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if drop_reason(name) is None
    }


def load_original(
    state: Mapping[str, Tensor], config: UnivalConfig | None = None
) -> UnivalForConditionalGeneration:
    """A model with the weights of an original state_dict.

    Raises:
        CheckpointError: unknown entries, missing parameters, or another shape than `config` says.
    """
    config = infer_config(state) if config is None else config
    model = UnivalForConditionalGeneration(config)
    converted = convert_state_dict(state)
    own = model.state_dict()
    for name, tensor in converted.items():
        if name not in own:
            raise CheckpointError(f"{name!r} does not fit the config: the model has no such entry")
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name!r} is {list(tensor.shape)} in the checkpoint, "
                f"{list(own[name].shape)} in the model"
            )
    computed = (".text_bucket", "logmel.window", "logmel.filters", "num_batches_tracked")
    missing = [name for name in own if name not in converted and not name.endswith(computed)]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {len(missing)} entries, first {missing[0]!r}")
    model.load_state_dict(converted, strict=False)
    return model


# fairseq stores its options beside the weights; nothing else may be unpickled.
ALLOWED_GLOBALS = [argparse.Namespace]


def read_original(path: str | Path) -> dict[str, Tensor]:
    """The state_dict inside an original .pt file, opened without running code from it.

    Raises:
        CheckpointError: the file is missing, is no checkpoint, or holds objects off the allow-list.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors, plain containers and option namespaces, "
            f"or it is damaged ({str(error).splitlines()[0]})"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: no state_dict under the key 'model'")
    return content
