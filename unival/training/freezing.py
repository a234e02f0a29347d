"""What is not trained, by names that configs use."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unival.model.modeling import UnivalForConditionalGeneration

MEDIA = ("image", "video", "audio")
_CONNECTIONS = r"encoder\.(image|video|audio)_proj\."
_MEDIA_ENCODERS = r"encoder\.(image|video|audio)_encoder\."
_GRID_POSITIONS = r"encoder\.(image|video|audio)_positions\."

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
