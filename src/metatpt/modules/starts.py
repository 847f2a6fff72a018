"""Where the views of a picture start, learned in meta training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metatpt.prompts import TunedParameters
from metatpt.views import N_PARAMETERS, clamp_start

StartKind = Literal["drawn", "distribution", "policy"]

_HIDDEN = 64
_NOISE = 0.1  # of raw parameters: about 4 degrees of rotation under the default bounds

PROBES = torch.tensor(
    [[0, 0, 0, 0, 0, 0], [0, 0, 0.8, 0, 0, 0], [0, 0, -0.8, 0, 0, 0], [0, 0, 0, -0.5, 0, 0], [0, 0, 0, 0.5, 0, 0]]
)
"""``[P, 6]`` raw parameters of the views that a policy looks at: as it is, turned both ways, closer, further away."""


class ViewStart(nn.Module, ABC):
    """Moves drawn views to where they start."""

    probes: Tensor | None = None
    """Raw parameters ``[P, 6]`` of views whose features it needs."""

    @abstractmethod
    def forward(self, raw: Tensor, noise: Tensor, features: Tensor | None) -> Tensor:
        """Where views start.

        Args:
            raw: ``[B, V, 6]``, as drawn.
            noise: ``[B, V, 6]``, standard normal, of (seed, index).
            features: ``[B, P, D]`` of the probes, without a graph.

        Returns:
            ``[B, V, 6]``, on the tape of the parameters.
        """


class LearnedDistribution(ViewStart):
    """One distribution for all pictures: the drawn views scaled and shifted, with noise of a learned width.

    It starts as the drawn views with a little noise, which gives rotation and shear, that crops have none of, a spread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.learned = TunedParameters(
            {
                "shift": torch.zeros(N_PARAMETERS),
                "log_scale": torch.zeros(N_PARAMETERS),
                "log_noise": torch.full((N_PARAMETERS,), math.log(_NOISE)),
            }
        )

    def forward(self, raw: Tensor, noise: Tensor, features: Tensor | None) -> Tensor:
        """See :meth:`ViewStart.forward`."""
        learned = {name: value.to(raw) for name, value in self.learned.items()}
        return clamp_start(raw * learned["log_scale"].exp() + learned["shift"] + noise * learned["log_noise"].exp())


class LearnedPolicy(ViewStart):
    """A small network from a picture's own features to one transform, by which every other of its views is moved.

    It starts as no move at all. The other half of the views stays as drawn.

    Args:
        width: D of the features.
        generator: Draws the first layer.
    """

    probes = PROBES

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        inputs = len(PROBES) * width
        self.learned = TunedParameters(
            {
                "weight_1": torch.randn(_HIDDEN, inputs, generator=generator) * (2 / inputs) ** 0.5,
                "bias_1": torch.zeros(_HIDDEN),
                "weight_2": torch.zeros(N_PARAMETERS, _HIDDEN),
                "bias_2": torch.zeros(N_PARAMETERS),
            }
        )

    def forward(self, raw: Tensor, noise: Tensor, features: Tensor | None) -> Tensor:
        """See :meth:`ViewStart.forward`."""
        assert features is not None
        learned = {name: value.to(raw) for name, value in self.learned.items()}
        # Features have unit length: scaled to entries of about 1, as the first layer expects.
        x = features.to(raw).flatten(1) * features.shape[-1] ** 0.5
        hidden = F.relu(F.linear(x, learned["weight_1"], learned["bias_1"]))
        move = F.linear(hidden, learned["weight_2"], learned["bias_2"])
        moved = torch.arange(raw.shape[1], device=raw.device)[:, None] % 2 == 0
        return torch.where(moved, clamp_start(raw + move[:, None]), raw)
