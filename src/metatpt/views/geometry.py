"""Bounded affine transforms: six unbounded parameters a view, and the matrix that they stand for.

Convention:
    The *frame* of a view is the picture's central square on its shorter side: [-1, 1] in x (right) and y (down), the
    same unit on both, so rotation does not shear whatever the picture's aspect ratio. Zero parameters show the frame
    (what view 0 shows for models that crop). Matrices map output coordinates to *canvas* coordinates, where
    [-1, 1] x [-1, 1] is the whole picture, both normalised as in ``grid_sample(align_corners=False)``: -1 and 1 are
    the outer edges of the outermost pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

N_PARAMETERS = 6
"""Translation x, translation y, rotation, log scale, stretch, shear: the last dimension of raw parameters."""


@dataclass(frozen=True)
class ViewBounds:
    """How far a view may go: each parameter is its bound times the tanh of its raw value.

    Attributes:
        translation: Of the view's centre, in halves of the picture's width and height: 1 reaches the edge.
        rotation: In degrees.
        log_scale: Of the view's side, in nats: -1.4 shows a quarter of the frame's side, 1.4 four times it.
        stretch: Half the log of width / height.
        shear: Horizontal shift per unit of height.
    """

    translation: float = 1.0
    rotation: float = 45.0
    log_scale: float = 1.4
    stretch: float = 0.3
    shear: float = 0.3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"view bound {name} is {value}; expected a positive number")

    def tensor(self, like: Tensor) -> Tensor:
        """The bounds ``[6]`` in the order of the parameters, angles in radians."""
        return _on_device(self, like.dtype, like.device)


@cache  # a new tensor would be copied to the device, which waits for all work on it, at every step of an inner loop
def _on_device(bounds: ViewBounds, dtype: torch.dtype, device: torch.device) -> Tensor:
    translation, angle = bounds.translation, math.radians(bounds.rotation)
    values = [translation, translation, angle, bounds.log_scale, bounds.stretch, bounds.shear]
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def bounded(raw: Tensor, bounds: ViewBounds) -> Tensor:
    """Parameters in their units from raw ones, ``[..., 6]``."""
    return torch.tanh(raw) * bounds.tensor(raw)


def affine(parameters: Tensor, flip: Tensor, aspect: Tensor) -> Tensor:
    """Sampling matrices of views.

    Args:
        parameters: ``[B, V, 6]`` as :func:`bounded` gives them.
        flip: ``[B, V]`` bool: mirrored left to right.
        aspect: ``[B]``: width / height of each picture.

    Returns:
        ``[B, V, 2, 3]``: output coordinates (x, y, 1) to canvas coordinates.

    Raises:
        ValueError: Shapes that do not go together.

    >>> affine(torch.zeros(1, 1, 6), torch.zeros(1, 1, dtype=torch.bool), torch.tensor([2.0]))[0, 0].tolist()
    [[0.5, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if parameters.ndim != 3 or parameters.shape[-1] != N_PARAMETERS:
        raise ValueError(f"Expected parameters of shape [B, V, {N_PARAMETERS}], got {list(parameters.shape)}")
    if flip.shape != parameters.shape[:2] or aspect.shape != parameters.shape[:1]:
        raise ValueError(
            f"Expected flip of shape {list(parameters.shape[:2])} and aspect of shape {list(parameters.shape[:1])}, "
            f"got {list(flip.shape)} and {list(aspect.shape)}"
        )
    x, y, rotation, log_scale, stretch, shear = parameters.unbind(-1)
    cos, sin, scale = rotation.cos(), rotation.sin(), log_scale.exp()
    mirror = 1 - 2 * flip.to(parameters.dtype)
    wide, high = scale * stretch.exp(), scale * (-stretch).exp()
    # Rotation @ diag(wide, high) @ [[1, shear], [0, 1]] @ diag(mirror, 1)
    a, b = cos * wide * mirror, cos * wide * shear - sin * high
    c, d = sin * wide * mirror, sin * wide * shear + cos * high
    aspect = aspect.to(parameters.dtype)[:, None]
    half_width, half_height = aspect.clamp(min=1), (1 / aspect).clamp(min=1)  # of the picture, in frame units
    rows = torch.stack([a / half_width, b / half_width, x, c / half_height, d / half_height, y], dim=-1)
    return rows.reshape(*rows.shape[:-1], 2, 3)
