"""Batches of pictures without files."""

from __future__ import annotations

import torch

from metatpt.types import Batch

NAMES = ["cat", "golden_retriever", "person practicing tai chi and other slow martial arts", "hand-held computer", "ox"]


def make_batch(size: int, resolution: int, seed: int = 0, first_index: int = 0) -> Batch:
    """Smooth random pictures of various aspect ratios; view 0 is the canvas' centre, resized."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(size, 3, 8, 8, generator=generator)
    canvas = torch.nn.functional.interpolate(coarse, size=(2 * resolution,) * 2, mode="bicubic").clamp(0, 1)
    image = torch.nn.functional.avg_pool2d(canvas, 2)
    aspect = torch.exp(torch.rand(size, generator=generator) - 0.5)
    label = torch.randint(0, len(NAMES), (size,), generator=generator)
    index = torch.arange(first_index, first_index + size)
    return Batch(
        image, (canvas * 255).byte(), aspect, label, index, [f"{i}.png" for i in index.tolist()], [None] * size
    )
