"""Where parameters start that are no words. In float32 on the CPU, so the same on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Prompts: N(0, 0.02)."""
    return 0.02 * torch.randn(*shape, generator=generator, dtype=torch.float32)


def uniform(shape: Sequence[int], bound: float, generator: torch.Generator) -> Tensor:
    """Uniform in [-bound, bound]."""
    return bound * (2 * torch.rand(*shape, generator=generator, dtype=torch.float32) - 1)


def linear(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight ``[outputs, inputs]`` and bias ``[outputs]`` of a linear map, as torch starts its own."""
    bound = inputs**-0.5
    return uniform((outputs, inputs), bound, generator), uniform((outputs,), bound, generator)
