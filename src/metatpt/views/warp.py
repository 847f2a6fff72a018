"""Views out of a picture, on its device, in one call."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = Literal["zeros", "border", "reflection"]


def warp(canvas: Tensor, matrices: Tensor, size: int, padding: Padding = "reflection") -> Tensor:
    """Sample views bilinearly.

    Convention:
        Matrices as in :mod:`metatpt.views.geometry`: normalised (x, y), ``align_corners=False``. At scale 1, and a
        canvas of twice the size, the bilinear sample is the exact average of 2 x 2 canvas pixels.

    Args:
        canvas: ``[B, 3, S, S]`` uint8, or floating point in [0, 1].
        matrices: ``[B, V, 2, 3]`` float32 or float64.
        size: Side R of the views, in pixels.
        padding: What lies outside of the picture.

    Returns:
        ``[B, V, 3, R, R]`` in [0, 1], of the dtype of `matrices`; NaN where a matrix is not finite.

    Raises:
        ValueError: Shapes that do not go together.
    """
    if canvas.ndim != 4 or matrices.ndim != 4 or matrices.shape[2:] != (2, 3) or len(canvas) != len(matrices):
        raise ValueError(
            f"Expected canvas of shape [B, 3, S, S] and matrices of shape [B, V, 2, 3], got {list(canvas.shape)} and "
            f"{list(matrices.shape)}"
        )
    pixels = canvas.to(matrices.dtype)
    if not canvas.is_floating_point():
        pixels = pixels / 255
    n_views = matrices.shape[1]
    centre = (torch.arange(size, dtype=matrices.dtype, device=matrices.device) * 2 + 1) / size - 1
    # x' = a x + b y + tx, written out: a matrix product would run in the precision of autocast.
    # The backward pass of grid_sample crashes on a grid that is not finite, and its forward pass may hide it.
    broken = ~matrices.isfinite().all(-1).all(-1)
    matrices = matrices.masked_fill(broken[..., None, None], 0)
    a, b, shift = matrices[..., None, None].unbind(3)
    grid = a * centre + b * centre[:, None] + shift  # [B, V, 2, R, R]
    # The views of a picture stand below each other in one grid, so that the canvas is not repeated.
    grid = grid.permute(0, 1, 3, 4, 2).flatten(1, 2)
    sampled: Tensor = F.grid_sample(pixels, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    views = sampled.reshape(len(sampled), canvas.shape[1], n_views, size, size).transpose(1, 2)
    return views.masked_fill(broken[..., None, None, None], torch.nan)
