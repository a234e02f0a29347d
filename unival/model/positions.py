"""Where tokens are: grid cells of the media, and the buckets of the relative position tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def text_buckets(bucket_size: int, max_positions: int) -> Tensor:
    """Bucket of each text offset (query minus key), released bucket formula.

    Offsets up to bucket_size / 2 have a bucket each, larger ones share logarithmic buckets.

    Returns:
        int64 [2 * max_positions - 1]; entry r + max_positions - 1 is the bucket of offset r, from 0
        to 2 * bucket_size - 2.
    """
    half = bucket_size // 2
    offset = torch.arange(-(max_positions - 1), max_positions, dtype=torch.int64)
    distance = offset.abs().clamp(min=half - 1)
    # float32, as the released tables were built: the largest offset sits on a ceil boundary.
    ratio = torch.log(distance / half) / math.log((max_positions - 1) / half)
    logarithmic = torch.ceil(ratio * (half - 1)).to(torch.int64) + half
    bucket = torch.where(distance <= half, offset, logarithmic * offset.sign())
    return bucket + bucket_size - 1


def num_grid_buckets(grid: int) -> int:
    """Rows of a grid relative-position table: every (dy, dx), then three for the BOS slot."""
    return (2 * grid - 1) ** 2 + 3


def offset_buckets(dy: Tensor, dx: Tensor, grid: int) -> Tensor:
    """Bucket of a row and column offset, query minus key, between cells of the grid."""
    return (2 * grid - 1) * (dy + grid - 1) + dx + grid - 1


def slot_buckets(grid: int) -> range:
    """Buckets of the BOS slot: as query, as key, as both."""
    return range(num_grid_buckets(grid) - 3, num_grid_buckets(grid))


def grid_buckets(query: Tensor, key: Tensor, grid: int) -> Tensor:
    """Bucket of the 2-D offset between grid positions.

    Args:
        query: int64 [..., S] grid position ids (grid * y + x + 1; 0 is the BOS of image codes).
        key: int64 [..., T].
        grid: side of the grid (image_bucket_size).

    Returns:
        int64 [..., S, T].
    """
    q, k = query.unsqueeze(-1), key.unsqueeze(-2)
    (query_row, query_column), (key_row, key_column) = grid_cells(q, grid), grid_cells(k, grid)
    bucket = offset_buckets(query_row - key_row, query_column - key_column, grid)
    as_query, as_key, as_both = slot_buckets(grid)
    bucket = torch.where(q == 0, as_query, bucket)
    bucket = torch.where(k == 0, as_key, bucket)
    return torch.where((q == 0) & (k == 0), as_both, bucket)


def image_positions(height: int, width: int, grid: int, device: torch.device) -> Tensor:
    """Grid position ids of a feature map in row-major order: int64 [height * width]."""
    if height > grid or width > grid:
        raise ValueError(
            f"a feature map of {height} x {width} does not fit the {grid} x {grid} position grid"
        )
    rows = torch.arange(height, device=device).unsqueeze(1)
    columns = torch.arange(width, device=device)
    return (grid * rows + columns + 1).flatten()


def video_positions(
    frames: int, height: int, width: int, grid: int, device: torch.device
) -> Tensor:
    """Grid position ids of a clip, frame-major. Every frame uses the same cells: UnIVAL has no
    temporal position."""
    return image_positions(height, width, grid, device).repeat(frames)


def audio_side(tokens: int) -> int:
    """Side of the square that audio tokens are folded into."""
    return math.ceil(math.sqrt(tokens))


def audio_positions(tokens: int, grid: int, device: torch.device) -> Tensor:
    """Grid position ids of audio tokens, folded into a square in reading order.

    The fold has nothing to do with time and frequency; the released model was trained with it.
    """
    side = audio_side(tokens)
    if side > grid:
        raise ValueError(f"{tokens} audio tokens do not fit the {grid} x {grid} position grid")
    index = torch.arange(tokens, device=device)
    return grid * index.div(side, rounding_mode="floor") + index.remainder(side) + 1


def grid_cells(ids: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Row and column of grid position ids; id 0, the start slot, gives row -1."""
    return (ids - 1).div(grid, rounding_mode="floor"), (ids - 1).remainder(grid)


def code_positions(length: int, code_image_size: int, grid: int, device: torch.device) -> Tensor:
    """Grid position ids of the image-code decoder: BOS, the cells of the image, then id 1024.

    Code k is the decoder's input at position k + 1, so it sits at its own cell.

    Returns:
        int64 [length]; length is at most 1 + cells + 769, what the released buffer holds.
    """
    side = code_image_size // 8
    cells = image_positions(side, side, grid, device)
    limit = 1 + side * side + 769
    if length > limit:
        raise ValueError(f"{length} decoder positions of image codes; at most {limit} exist")
    tail = torch.full((limit - 1 - side * side,), 1024, dtype=torch.int64, device=device)
    return torch.cat([torch.zeros(1, dtype=torch.int64, device=device), cells, tail])[:length]
