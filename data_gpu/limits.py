"""What one medium may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Limits:
    """Caps on one medium; what is beyond them is refused, by its header where that is possible.

    bytes           of the encoded medium
    pixels          of a picture; its header may claim far more than the file can hold
    frame_pixels    of a frame of a film (all frames of a clip are held at once)
    frames          of a film
    seconds         length of a film or a sound
    channels        of a sound
    decode_seconds  time to decode one medium; a decoding process that takes longer is ended
    decode_bytes    memory that a decoding process may use for one medium
    """

    bytes: int = 1 << 30
    pixels: int = 100_000_000
    frame_pixels: int = 4096 * 2304
    frames: int = 250_000
    seconds: float = 4 * 3600.0
    channels: int = 32
    decode_seconds: float = 10.0
    decode_bytes: int = 2 << 30
