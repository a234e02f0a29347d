"""What is not trained, by names that configs use, and how it behaves while the rest is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from unival.model.modeling import UnivalForConditionalGeneration

MEDIA = ("image", "video", "audio")
_CONNECTIONS = r"encoder\.(image|video|audio)_proj\."
_MEDIA_ENCODERS = r"encoder\.(image|video|audio)_encoder\."
_GRID_POSITIONS = r"encoder\.(image|video|audio)_positions\."
_ADAPTER = r".*\.lora_[AB]\.|encoder\.soft_prompt\."

# Each rule freezes the parameters whose names match from their beginning.
RULES = {
    # The shared matrix: input embeddings of both stacks and the output projection.
    "embeddings": r"encoder\.embed_tokens\.",
    "image_encoder": r"encoder\.image_encoder\.",
    "video_encoder": r"encoder\.video_encoder\.",
    "audio_encoder": r"encoder\.audio_encoder\.",
    "media_encoders": _MEDIA_ENCODERS,
    # The language model's encoder with its embeddings, without what belongs to the media.
    "encoder": r"encoder\.(?!(image|video|audio)_(encoder|proj|positions)\.)",
    "decoder": r"decoder\.|encoder\.embed_tokens\.",
    # Table 16: only the maps from the media encoders to the language model are trained ...
    "all_but_connections": rf"(?!{_CONNECTIONS})",
    # ... with the position tables of the media, as the released runs of it did.
    "all_but_connections_and_positions": rf"(?!{_CONNECTIONS}|{_GRID_POSITIONS})",
    # LoRA's factors or the soft prompt.
    "all_but_adapter": rf"(?!{_ADAPTER})",
}

# The parts that a model's parameters are counted by: each goes to the first that matches.
PARTS = {
    "adapter": _ADAPTER,
    "image encoder": r"encoder\.image_encoder\.",
    "video encoder": r"encoder\.video_encoder\.",
    "audio encoder": r"encoder\.audio_encoder\.",
    "projections": _CONNECTIONS,
    "media positions": _GRID_POSITIONS,
    "embeddings": r"encoder\.embed_tokens\.",
    "encoder": r"encoder\.",
    "decoder": r"decoder\.",
}


def freeze(
    model: UnivalForConditionalGeneration, rules: Sequence[str], shown: Sequence[str]
) -> dict[str, int]:
    """Stop gradients of what the rules name and of media that a stage does not show.

    Args:
        rules: keys of RULES.
        shown: media of the stage; another medium's encoder, projection and positions would get no
            gradient, but decay and optimizer state.

    Returns:
        Counts of trained and of frozen parameters: {"trained": n, "frozen": m}.

    Raises:
        ValueError: an unknown rule, or nothing is left to train.
    """
    for rule in rules:
        if rule not in RULES:
            raise ValueError(f"freeze: unknown rule {rule!r}; known: {', '.join(RULES)}")
    absent = [rf"encoder\.{m}_(encoder|proj|positions)\." for m in MEDIA if m not in shown]
    patterns = [*(RULES[rule] for rule in rules), *absent]
    counts = {"trained": 0, "frozen": 0}
    for name, parameter in model.named_parameters():
        if any(re.match(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
        counts["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    if not counts["trained"]:
        raise ValueError(f"freeze: {', '.join(rules)} leave nothing to train")
    return counts


def set_modes(model: nn.Module, frozen_in_eval: bool) -> None:
    """Put a model into training mode, and what is frozen into evaluation mode if asked to.

    In evaluation mode batch norm keeps its running statistics and norms by them, and there is no
    dropout, stochastic depth or masking of spectrograms. A module is frozen that has parameters, of
    which none is trained; what lies inside it, and has none, follows it. The released runs left
    everything in training mode.
    """
    model.train()
    if frozen_in_eval and _rest(model) is False:
        model.eval()


def _rest(module: nn.Module) -> bool | None:
    """Put what is frozen inside a module into evaluation mode.

    Returns:
        Whether anything in the module is trained; None where it has no parameters.
    """
    inside = [(child, _rest(child)) for child in module.children()]
    found = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
    found += [trained for _, trained in inside if trained is not None]
    if any(found):
        for child, trained in inside:
            if trained is False:
                child.eval()
    return any(found) if found else None


def describe_trainable(model: nn.Module) -> str:
    """A table of how many parameters of each part of a model are trained and frozen.

    To be asked before ZeRO 3 takes the parameters apart.
    """
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = next(part for part, pattern in PARTS.items() if re.match(pattern, name))
        counts[part][0 if parameter.requires_grad else 1] += parameter.numel()
    trained, frozen = (sum(column) for column in zip(*counts.values(), strict=True))
    rows = [(part, *found) for part, found in counts.items() if sum(found)]
    lines = [f"{part:<16}{a:>14,}{b:>14,}" for part, a, b in [*rows, ("total", trained, frozen)]]
    share = 100 * trained / max(trained + frozen, 1)
    return "\n".join(
        [f"{'':<16}{'trained':>14}{'frozen':>14}", *lines, f"{share:.3f} % are trained"]
    )
