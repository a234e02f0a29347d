"""Resizing in torch: exactly Pillow's antialiased bicubic (one level of 255 apart at most), in a
quarter of its time (benchmarks/NOTES.md)."""

from __future__ import annotations

import numpy as np


def resize(images: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [N, height, width, 3] of N pictures uint8 [N, H, W, 3]."""
    # Decoding processes that see no films need no torch: it takes a second and 280 MB in each.
    import torch
    from torch.nn.functional import interpolate

    if images.shape[1:3] == (height, width):
        return images
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    resized = interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).numpy()
