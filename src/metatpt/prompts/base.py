"""The interface of what is tuned. A method knows no learner by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metatpt.clip import FrozenCLIP
from metatpt.types import State

Head = Callable[[Tensor], Tensor]
"""Logits ``[B, V, C]`` of encoded views ``[B, V, D]``, under one state."""


class TunedParameters(nn.ParameterDict):
    """Parameters that stay in float32 (or float64) whatever precision the towers are cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_precision(tensor: Tensor) -> Tensor:
            target = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            dtype = target.dtype if target.dtype == torch.float64 else torch.float32
            return tensor.to(target.device, dtype)

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]


class PromptLearner(nn.Module, ABC):
    """A prompt over a frozen CLIP.

    Its parameters have no sample dimension: they are what training learns and a checkpoint holds. A *state* is a copy
    of them for each of B samples, ``{name: [B, ...]}``: what a test-time method tunes.

    Args:
        clip: The frozen model.
        column: ``[C]``: the row of each class among the different prompts.
    """

    column: Tensor
    reaches_pixels: bool = False
    """Whether a state changes how pictures are encoded."""

    def __init__(self, clip: FrozenCLIP, column: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("column", column, persistent=False)
        self.tuned = TunedParameters()
        self._kept: tuple[object, Tensor] | None = None

    def initial_state(self, batch_size: int) -> State:
        """The parameters, repeated for each sample."""
        return {name: value.detach().expand(batch_size, *value.shape) for name, value in self.tuned.items()}

    def spread(self) -> dict[str, float]:
        """Standard deviation of each parameter's entries: what a relative learning rate is relative to."""
        return {name: float(value.detach().double().std()) for name, value in self.tuned.items()}

    def encode(self, views: Tensor, state: State | None = None) -> Tensor:
        """Features of views.

        Args:
            views: ``[B, V, 3, R, R]`` in [0, 1].
            state: Of B samples; None for the initial one. Only a learner that reaches the pixels looks at it.

        Returns:
            ``[B, V, D]`` of unit length.
        """
        if views.shape[1] == 1:
            return self.clip.encode_image(views[:, 0])[:, None]
        # Sample by sample, so that rounding does not depend on the batch size: tuning multiplies a difference of 1e-7
        # in a gradient by 1e5 within a few steps. The views of one sample are many enough to fill a device.
        return torch.stack([self.clip.encode_image(each) for each in views])

    def kept(self, compute: Callable[[], Tensor]) -> Tensor:
        """Class features of the initial state: computed once for the parameters, device and precision at hand."""
        versions = [value._version for value in self.tuned.values()]
        key = (self.column.device, self.clip.dtype, self.clip.autocast_dtype, versions)
        if self._kept is None or self._kept[0] != key:
            with torch.no_grad():
                self._kept = key, compute()
        return self._kept[1]

    @abstractmethod
    def head(self, state: State | None = None) -> Head:
        """What turns encoded views into logits.

        Args:
            state: Of B samples; None for the initial state, whose class features are computed once and kept.
        """


def class_head(class_features: Tensor, scale: float, column: Tensor) -> Head:
    """Cosine logits: class features ``[U, D]`` or ``[B, U, D]``, of which class c has row ``column[c]``.

    Equal prompts share a row and so tie to the last bit, whatever the batch size and device.
    """

    def logits(features: Tensor) -> Tensor:
        # A product per sample, so that its rounding does not depend on the batch size; never in autocast's precision.
        with torch.autocast(features.device.type, enabled=False):
            return (scale * features @ class_features.expand(len(features), -1, -1).mT)[..., column]

    return logits
