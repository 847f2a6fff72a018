"""Where views start: random resized crops with flips, or transforms drawn within the bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from metatpt.rng import sample_generator
from metatpt.timing import timed

from .geometry import N_PARAMETERS, ViewBounds

Init = Literal["crop", "affine"]

_INSIDE = 0.9  # every start lies within this share of its bound, where tanh still has a slope
_AREA = (0.08, 1.0)  # of random resized crops, share of the picture (TPT; torchvision's default)
_RATIO = (3 / 4, 4 / 3)  # width / height, likewise
_TRIES = 10  # crops drawn until one fits into the picture, likewise


@timed("views")
def sample_views(
    init: Init,
    bounds: ViewBounds,
    n_views: int,
    aspect: Tensor,
    index: Sequence[int],
    seed: int,
    spread: float = 0.5,
    epoch: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Raw parameters of the starting views of each sample, from (seed, epoch, index) alone.

    Args:
        init: ``"crop"``: torchvision's random resized crop (area 0.08 to 1, aspect 3/4 to 4/3) as affine transforms;
            ``"affine"``: each parameter uniform within `spread` times its bound. Half of the views are mirrored.
        bounds: See :class:`ViewBounds`.
        n_views: Number V of views.
        aspect: ``[B]``: width / height of each picture.
        index: B numbers of samples in their split.
        seed: Seed of the run.
        spread: For ``"affine"``, in (0, 0.9].
        epoch: Their epochs of training; outside training 0, the default.

    Returns:
        Raw parameters ``[B, V, 6]`` (before tanh, float32) and flips ``[B, V]`` (bool), on the device of `aspect`.
    """
    epochs = [0] * len(index) if epoch is None else epoch
    drawn = [
        _crops(generator, n_views, ratio) if init == "crop" else _uniform(generator, n_views, bounds, spread)
        for generator, ratio in zip(
            (sample_generator(seed, number, "views", when) for number, when in zip(index, epochs, strict=True)),
            aspect.tolist(),
            strict=True,
        )
    ]
    parameters = torch.stack([each for each, _ in drawn])
    share = (parameters / bounds.tensor(parameters)).clamp(-_INSIDE, _INSIDE)
    flip = torch.stack([each for _, each in drawn])
    return torch.atanh(share).float().to(aspect.device), flip.to(aspect.device)


def clamp_start(raw: Tensor) -> Tensor:
    """Raw parameters moved to where starting views may lie."""
    limit = math.atanh(_INSIDE)
    return raw.clamp(-limit, limit)


def _uniform(generator: torch.Generator, n_views: int, bounds: ViewBounds, spread: float) -> tuple[Tensor, Tensor]:
    share = torch.rand(n_views, N_PARAMETERS, generator=generator, dtype=torch.float64) * 2 - 1
    flip = torch.rand(n_views, generator=generator, dtype=torch.float64) < 0.5
    return share * spread * bounds.tensor(share), flip


def _crops(generator: torch.Generator, n_views: int, aspect: float) -> tuple[Tensor, Tensor]:
    """Torchvision's ``RandomResizedCrop.get_params``, in units of a picture of area 1, and a flip."""
    draws = torch.rand(n_views, _TRIES * 2 + 3, generator=generator, dtype=torch.float64)
    width, height = math.sqrt(aspect), 1 / math.sqrt(aspect)
    area = _AREA[0] + (_AREA[1] - _AREA[0]) * draws[:, :_TRIES]
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    ratio = (low + (high - low) * draws[:, _TRIES : 2 * _TRIES]).exp()
    w, h = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (w <= width) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    # Where no try fits: the largest central crop within the ratios.
    ratio_of_picture = min(max(aspect, _RATIO[0]), _RATIO[1])
    fallback_w, fallback_h = min(width, height * ratio_of_picture), min(height, width / ratio_of_picture)
    fitted = fits.any(1)
    w = torch.where(fitted, w.gather(1, first).squeeze(1), fallback_w)
    h = torch.where(fitted, h.gather(1, first).squeeze(1), fallback_h)
    place = torch.where(fitted[:, None], draws[:, -3:-1] * 2 - 1, 0.0)
    frame = min(width, height)
    parameters = torch.zeros(n_views, N_PARAMETERS, dtype=torch.float64)
    parameters[:, 0] = place[:, 0] * (1 - w / width)
    parameters[:, 1] = place[:, 1] * (1 - h / height)
    parameters[:, 3] = 0.5 * (w * h).log() - math.log(frame)
    parameters[:, 4] = 0.5 * (w / h).log()
    return parameters, draws[:, -1] < 0.5
