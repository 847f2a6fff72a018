"""Gradients through a float16 tower without underflow.

Float16 ends at 6e-8, and the gradient of a confident prediction is smaller. A gradient is scaled to a largest entry of
1 as it enters the tower from behind, and back as it leaves: exact powers of two, per call, without a look at the values
on the host. (A trainer's loss scaling cannot serve here: test-time steps never pass through it.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GradientScale:
    """The scale of the gradient in one pass through a tower: ``leave(tower(enter(x)))``.

    Args:
        active: Whether to scale at all. A second derivative reaches a tower not from behind alone, and parameters of a
            hook leave it at other places: for both the scale would be wrong.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self.factor: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """What goes into the tower; its gradient is scaled back."""
        return _Enter.apply(x, self) if self.active else x

    def leave(self, features: Tensor) -> Tensor:
        """What comes out of it; its gradient is scaled."""
        return _Leave.apply(features, self) if self.active else features


class _Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)


class _Enter(_Unchanged):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.scale.factor, None


class _Leave(_Unchanged):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        largest = gradient.detach().abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
        ctx.scale.factor = torch.exp2(-torch.ceil(torch.log2(largest)))
        return gradient * ctx.scale.factor, None
