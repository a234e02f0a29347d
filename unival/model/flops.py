"""Floating-point operations of a model's forward pass, from its config and its shapes.

Counted: convolutions, linear maps, the two products of attention and the mel filter bank, 2 for
every multiply-add. Attention is counted as it is computed: the scores are products of twice the
head's width (content and position in one), and causal scores are not halved. Padding counts as any
other token.

Ignored: norms, activations, softmax, dropout, pooling, biases, embeddings, relative biases, the
Fourier transform of sounds, the softmax of the loss, the optimizer.

A backward pass is counted as twice the forward pass. That is a little too much where the input
needs no gradient (the first convolution of an encoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from unival.model.audio_encoder import N_FFT
from unival.model.configuration import UnivalConfig

BACKWARD = 2  # times the forward pass
STEM = 64  # channels after the first convolution of the image and the video encoder


def linear(rows: int, width: int, out: int) -> int:
    """A map of `rows` vectors from `width` to `out`."""
    return 2 * rows * width * out


def conv(
    channels: int,
    out: int,
    kernel: int,
    shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[int, list[int]]:
    """A convolution of one sample, padded by kernel // 2: its operations and its output's shape.

    One frame meets one weight in time: the rest see padding alone.
    """
    strides = [stride] * len(shape) if isinstance(stride, int) else stride
    axes = len(shape) - 1 if len(shape) == 3 and shape[0] == 1 else len(shape)
    shape = [(n + 2 * (kernel // 2) - kernel) // s + 1 for n, s in zip(shape, strides, strict=True)]
    return 2 * prod(shape) * out * (channels // groups) * kernel**axes, shape


def _bottlenecks(
    layers: Sequence[int],
    channels: Sequence[int],
    expansion: int,
    groups: int,
    always_project: bool,
    shape: list[int],
) -> tuple[int, list[int], int]:
    """Stages of 1-3-1 bottlenecks of one sample: operations, output shape and channels."""
    total, width = 0, STEM
    for stage, (depth, planes) in enumerate(zip(layers, channels, strict=False)):
        for block in range(depth):
            stride = 2 if stage and block == 0 else 1
            out = planes * expansion
            if block == 0 and (always_project or stride != 1 or width != out):
                total += conv(width, out, 1, shape, stride)[0]
            total += conv(width, planes, 1, shape)[0]
            count, shape = conv(planes, planes, 3, shape, stride, groups)
            total += count + conv(planes, out, 1, shape)[0]
            width = out
    return total, shape, width


def image_encoder(config: UnivalConfig, size: tuple[int, int]) -> tuple[int, int, int]:
    """ResNet on a picture of (height, width): operations, tokens and channels."""
    stem, shape = conv(3, STEM, 7, size, 2)
    shape = conv(1, 1, 3, shape, 2)[1]  # the pooling
    layers = config.image_layers
    total, shape, width = _bottlenecks(layers, config.image_channels, 4, 1, False, shape)
    return stem + total, prod(shape), width


def video_encoder(config: UnivalConfig, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """3-D ResNeXt on a clip of (frames, height, width): operations, tokens and channels."""
    stem, shape = conv(3, STEM, 7, size, (1, 2, 2))
    shape = conv(1, 1, 3, shape, 2)[1]  # the pooling
    layers, groups = config.video_layers, config.video_cardinality
    total, shape, width = _bottlenecks(layers, config.video_channels, 2, groups, True, shape)
    return stem + total, prod(shape), width


def audio_encoder(config: UnivalConfig, samples: int) -> tuple[int, int, int]:
    """Mel filters and CNN14 on a sound: operations, tokens and channels."""
    shape = [1 + samples // config.hop_size, config.mel_bins]
    total, width = linear(shape[0], N_FFT // 2 + 1, config.mel_bins), 1
    for index, out in enumerate(config.audio_channels):
        total += conv(width, out, 3, shape)[0] + conv(out, out, 3, shape)[0]
        if index + 1 < len(config.audio_channels):
            shape = [n // 2 for n in shape]
        width = out
    return total, prod(shape), width


def attention(config: UnivalConfig, batch: int, queries: int, keys: int) -> int:
    """One attention block with its four maps."""
    width = config.d_model
    maps = 2 * linear(batch * queries, width, width) + 2 * linear(batch * keys, width, width)
    scores = 2 * batch * queries * keys * 2 * width
    return maps + scores + 2 * batch * queries * keys * width


def feed_forward(config: UnivalConfig, rows: int) -> int:
    """The two maps of a feed-forward block."""
    return 2 * linear(rows, config.d_model, config.ffn_dim)


def lm_encoder(
    config: UnivalConfig, batch: int, text: int, tokens: int = 0, channels: int = 0
) -> tuple[int, int]:
    """Projection of a medium's tokens and the transformer encoder: operations, encoder length.

    `tokens` of `channels` come from the medium's encoder; with sample_patch_num only that many are
    kept, and the positions differ between rows.
    """
    width, kept = config.d_model, tokens
    if config.sample_patch_num is not None:
        kept = min(tokens, config.sample_patch_num)
    length = kept + text
    total = linear(batch * kept, channels, width)
    total += 2 * linear((batch if kept < tokens else 1) * length, width, width)  # positions
    layer = attention(config, batch, length, length) + feed_forward(config, batch * length)
    return total + config.encoder_layers * layer, length


def lm_decoder(
    config: UnivalConfig, batch: int, target: int, length: int, position_rows: int = 1
) -> int:
    """The transformer decoder over an encoder output of `length`.

    `position_rows` is 1 where all rows of the batch share the encoder's positions.
    """
    width = config.d_model
    positions = linear(3 * target + position_rows * length, width, width)
    layer = attention(config, batch, target, target) + attention(config, batch, target, length)
    layer += feed_forward(config, batch * target)
    return positions + config.decoder_layers * layer


def head(config: UnivalConfig, tokens: int) -> int:
    """Logits of `tokens` decoder states over the whole vocabulary."""
    return linear(tokens, config.d_model, config.vocab_size)


def forward(
    config: UnivalConfig,
    medium: str,
    size: tuple[int, ...],
    batch: int,
    text: int,
    target: int,
) -> dict[str, int]:
    """Operations of each part of a forward pass over one micro-batch.

    Args:
        config: the model.
        medium: image, video, audio or text.
        size: (height, width), (frames, height, width), (samples,), or () for text.
        batch: rows, each with a medium of its own.
        text: tokens of the encoder's text in a row.
        target: tokens of the decoder in a row, all of which count in the loss.
    """
    found: dict[str, int] = {}
    tokens = channels = 0
    if medium == "image":
        found["image_encoder"], tokens, channels = image_encoder(config, (size[0], size[1]))
    elif medium == "video":
        found["video_encoder"], tokens, channels = video_encoder(config, (size[0], *size[1:3]))
    elif medium == "audio":
        found["audio_encoder"], tokens, channels = audio_encoder(config, size[0])
    found = {name: count * batch for name, count in found.items()}
    found["lm_encoder"], length = lm_encoder(config, batch, text, tokens, channels)
    rows = batch if length < tokens + text else 1
    found["lm_decoder"] = lm_decoder(config, batch, target, length, rows)
    found["loss"] = head(config, batch * target)
    return found
