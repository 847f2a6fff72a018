"""Frozen weights in autocast's precision, cast once.

Autocast keeps its casts only of weights that are trained. Frozen ones it casts anew at every use, and every graph holds
its own copies until the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Whose products autocast computes in its own precision, on every device.
_CAST = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)


@dataclass(frozen=True)
class _Weight:
    module: nn.Module
    name: str
    full: Tensor
    low: Tensor


class CastWeights:
    """The weights of frozen linear and convolution layers in another precision.

    Args:
        parts: Modules that never ask for the dtype of a weight; their own weights stay as they are.
    """

    def __init__(self, *parts: nn.Module) -> None:
        self._parts = parts
        self._key: object = None
        self._weights: list[_Weight] = []

    @property
    def tensors(self) -> list[Tensor]:
        """What was cast last."""
        return [weight.low for weight in self._weights]

    @contextmanager
    def used(self, dtype: torch.dtype) -> Iterator[None]:
        """Layers compute with weights of that dtype in here, and under autocast give what they give without."""
        self._cast(dtype)
        try:
            for weight in self._weights:
                weight.module._parameters[weight.name] = weight.low  # type: ignore[assignment]
            yield
        finally:
            for weight in self._weights:
                weight.module._parameters[weight.name] = weight.full  # type: ignore[assignment]

    def _cast(self, dtype: torch.dtype) -> None:
        own = [
            (module, name, value)
            for part in self._parts
            for module in part.modules()
            if isinstance(module, _CAST)
            for name, value in module._parameters.items()
            if value is not None and value.dtype == torch.float32
        ]
        # Seen again after a move to another device, a loaded checkpoint, a cast of the whole model.
        key = (dtype, [(value.data_ptr(), value._version) for _, _, value in own])
        if key != self._key:
            with torch.inference_mode(False), torch.no_grad():  # a later backward pass may keep them
                self._weights = [_Weight(module, name, value, value.to(dtype)) for module, name, value in own]
            self._key = key
