"""Public pretrained weights of one part: BART-base, timm's ResNet, 3-D ResNeXt, PANNs' CNN14.

What a model of stage 1 starts from (text and image), and what later stages add (video, audio). The
names are those of the original inside its own checkpoints, so RENAMED translates them as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unival.convert.original import ALLOWED_GLOBALS, drop_reason, to_original
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration

PARTS = ("text", "image", "video", "audio")

# Rows of BART-base in Hugging Face's files and in fairseq's. fairseq padded its dictionary with
# unused words before <mask>, Hugging Face cut the table: the first 50,265 rows of both agree. The
# released model started from all 51,201 by position: 936 image codes began as those words and
# <mask>.
BART_ROWS = (50265, 51201)
EMBEDDING = "encoder.embed_tokens.weight"
# BART shares one table; a file may hold it under any of these names.
TIED = (
    EMBEDDING,
    "decoder.embed_tokens.weight",
    "decoder.output_projection.weight",  # fairseq
    "shared.weight",  # Hugging Face
    "lm_head.weight",  # Hugging Face
)
# What BART has. The other entries of encoder and decoder (types, positions of media, relative
# tables, norms behind attention and inside the feed-forward block, head scales, last norms) are
# not in it and keep their values.
BART = re.compile(
    r"encoder\.embed_tokens\.weight"
    r"|(encoder|decoder)\.(embed_positions\.weight|layernorm_embedding\.(weight|bias))"
    r"|(encoder|decoder)\.layers\.\d+\.("
    r"(self|encoder)_attn\.(q|k|v|out)_proj|fc1|fc2|(self_attn|encoder_attn|final)_layer_norm"
    r")\.(weight|bias)"
)
# Entries without a counterpart that a UnIVAL checkpoint never has; DROPPED lists the others.
UNUSED = {
    "text": r"final_logits_bias$",  # zeros, in Hugging Face's files
    "video": r"fc\.",  # Kinetics classifier
}
# safetensors first: it is the one that transformers prefers.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# Keys that checkpoints keep their weights under, beside options and optimizer.
WRAPPERS = ("model", "state_dict")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class InitError(ValueError):
    """Weights that do not fit the model; the message names the file and the entry."""


def initialise(model: UnivalForConditionalGeneration, part: str, path: str | Path) -> list[str]:
    """Copy the weights of one part into the model; all is checked before anything is copied.

    text   BART-base, fairseq's `model.pt` or Hugging Face's layout. Rows of the vocabulary and of
           the text positions are copied by position, so the model's vocabulary must be in BART's
           order; rows that the file lacks keep their values
    image  timm's or torchvision's resnet101; later stages than the model has are passed over
    video  3-D ResNeXt-101 of Kinetics
    audio  CNN14 of PANNs, its filter bank included

    Args:
        path: .pt, .pth, .bin or .safetensors, or a folder with one of HUB_FILES.

    Returns:
        Sorted state_dict names of the model's entries that were set.

    Raises:
        InitError: an unknown part or one that the model lacks, a file that is missing, damaged or
            holds objects, an entry that is unknown, missing or of another shape.
    """
    if part not in PARTS:
        raise InitError(f"part {part!r} is unknown; the parts are {', '.join(PARTS)}")
    own = model.state_dict()
    places = _places(own, part)
    if not places:
        raise InitError(
            f"{path}: the model has no {part} encoder for these weights; set {part}_layers "
            "(audio: audio_channels) in its config"
        )
    file = _weight_file(Path(path))
    found = _matched(_read(file), places, part, model.config, file)
    for name, (entry, tensor) in found.items():
        _check(file, entry, tensor, name, own[name], name == places.get(EMBEDDING))
    missing = [
        (entry, name)
        for entry, name in places.items()
        # Files of old PyTorch versions do not count batches.
        if name not in found and not name.endswith("num_batches_tracked")
    ]
    if missing:
        entry, name = missing[0]
        raise InitError(
            f"{file}: {len(missing)} entries of the {part} part are missing, first {entry!r} "
            f"({name!r} in the model)"
        )
    with torch.no_grad():
        for name, (_, tensor) in found.items():
            # Only the vocabulary has fewer rows in a file than in the model.
            target = own[name][: len(tensor)] if tensor.ndim else own[name]
            target.copy_(tensor)
    return sorted(found)


def _prefix(part: str) -> str:
    """What the original puts before a file's names; text sits at the root."""
    return "" if part == "text" else f"encoder.embed_{part}s."


def _places(own: Mapping[str, Tensor], part: str) -> dict[str, str]:
    """The part's entries in the model: name in a file of fairseq's or the encoder's layout, ours.

    Empty where the model lacks the part.
    """
    if part == "text":
        names = to_original(name for name in own if not re.match(r"encoder\.\w+_encoder\.", name))
        return {theirs: ours for ours, theirs in names.items() if BART.fullmatch(theirs)}
    names = to_original(name for name in own if name.startswith(f"encoder.{part}_encoder."))
    return {theirs.removeprefix(_prefix(part)): ours for ours, theirs in names.items()}


def _matched(
    state: Mapping[str, Tensor],
    places: Mapping[str, str],
    part: str,
    config: UnivalConfig,
    file: Path,
) -> dict[str, tuple[str, Tensor]]:
    """By our name, the file's entry and its tensor. Raises InitError for an unknown entry."""
    found: dict[str, tuple[str, Tensor]] = {}
    for entry, tensor in state.items():
        name = entry
        if part == "text":
            name = entry.removeprefix("model.")
            name = EMBEDDING if name in TIED else name
        if _passed_over(name, part, config):
            continue
        if name not in places:
            raise InitError(f"{file}: {entry!r} is no entry of the model's {part} part")
        ours = places[name]
        if ours in found:
            other, held = found[ours]
            if held.dtype != tensor.dtype or not torch.equal(held, tensor):
                raise InitError(
                    f"{file}: {other!r} {list(held.shape)} and {entry!r} {list(tensor.shape)} "
                    f"differ; the model has one {ours!r} for both"
                )
        found.setdefault(ours, (entry, tensor))
    return found


def _passed_over(name: str, part: str, config: UnivalConfig) -> bool:
    """Whether an entry of a file is one that this model has no use for."""
    if drop_reason(_prefix(part) + name) is not None:
        return True
    if part in UNUSED and re.match(UNUSED[part], name):
        return True
    stages = {"image": config.image_layers, "video": config.video_layers}.get(part)
    stage = re.match(r"layer(\d)\.", name)
    return stages is not None and stage is not None and len(stages) < int(stage[1]) <= 4


def _check(file: Path, entry: str, tensor: Tensor, name: str, own: Tensor, table: bool) -> None:
    """Refuse a tensor that cannot be copied; of the vocabulary (`table`) a file has fewer rows."""
    fits, wanted = tensor.shape == own.shape, ""
    if table:
        room = [torch.Size([count, *own.shape[1:]]) for count in BART_ROWS if count <= len(own)]
        fits = tensor.shape in room
        wanted = f"; wanted {' or '.join(map(str, BART_ROWS))} rows of BART-base, and room for them"
    if not fits:
        raise InitError(
            f"{file}: {entry!r} is {list(tensor.shape)} in the file, {list(own.shape)} in the "
            f"model ({name!r}){wanted}"
        )
    if tensor.dtype != own.dtype and not {tensor.dtype, own.dtype} <= set(FLOATS):
        raise InitError(
            f"{file}: {entry!r} {list(tensor.shape)} holds {tensor.dtype}, the model's {name!r} "
            f"{list(own.shape)} {own.dtype}"
        )


def _weight_file(path: Path) -> Path:
    """The file itself, or the one that a folder in Hugging Face's layout holds."""
    if path.is_dir():
        held = [path / name for name in HUB_FILES if (path / name).is_file()]
        if not held:
            raise InitError(f"{path}: the folder holds no {' or '.join(HUB_FILES)}")
        return held[0]
    if not path.is_file():
        raise InitError(f"{path}: no such file")
    return path


def _read(file: Path) -> dict[str, Tensor]:
    """The state_dict in a file, opened without running code from it, without `module.` prefixes."""
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            with torch.serialization.safe_globals(ALLOWED_GLOBALS):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InitError(f"{file}: damaged: {str(error).splitlines()[0]}") from error
    except Exception as error:
        raise InitError(
            f"{file}: refused: it holds more than tensors, plain containers and option namespaces, "
            f"or it is damaged ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
    if isinstance(content, dict):
        wrapped = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
        content = wrapped[0] if wrapped else content
    if not isinstance(content, dict) or not content:
        raise InitError(f"{file}: no state_dict, neither bare nor under {' or '.join(WRAPPERS)}")
    for entry, value in content.items():
        if not isinstance(entry, str) or not isinstance(value, Tensor):
            raise InitError(f"{file}: {entry!r} is no tensor but {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta:
            raise InitError(f"{file}: {entry!r} holds no plain values ({value.layout})")
    # Files saved from DataParallel have it before every name.
    prefix = "module." if all(entry.startswith("module.") for entry in content) else ""
    return {entry.removeprefix(prefix): tensor for entry, tensor in content.items()}
