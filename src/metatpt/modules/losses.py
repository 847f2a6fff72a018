"""The losses of both loops, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metatpt.functional import (
    cross_entropy,
    diversity,
    entropy,
    kl_divergence,
    log_mean,
    marginal_entropy,
    uniform_weights,
)

from .checks import check_choice


@dataclass
class Predictions:
    """What losses look at, of B samples.

    Attributes:
        log_probs: ``[B, 1 + K, C]``: the original, then the views of S.
        features: ``[B, K, D]``: of the views of S, of unit length.
        counted: ``[B, 1 + K]`` bool: all but the original's second place, where it is in S.
        teacher: ``[B, C]``: log of the frozen teacher q, for the outer loop.
    """

    log_probs: Tensor
    features: Tensor
    counted: Tensor
    teacher: Tensor | None = None

    @property
    def original(self) -> Tensor:
        """``[B, 1, C]``."""
        return self.log_probs[:, :1]

    @property
    def selected(self) -> Tensor:
        """``[B, K, C]``."""
        return self.log_probs[:, 1:]

    @property
    def weights(self) -> Tensor:
        """``[B, 1 + K]``: logarithms of equal weights over the original and S."""
        return uniform_weights(self.counted, self.log_probs.dtype)


Loss = Callable[[Predictions], Tensor]


def _weighted(values: Tensor, log_weights: Tensor) -> Tensor:
    return (values * log_weights.exp().to(values.dtype)).sum(1)


def _view_consistency(p: Predictions) -> Tensor:
    return kl_divergence(p.selected, log_mean(p.selected)[:, None]).mean(1)


def _anchor(p: Predictions) -> Tensor:
    return kl_divergence(p.original.detach(), p.selected).mean(1)


INNER: dict[str, Loss] = {
    "marginal_entropy": lambda p: marginal_entropy(p.selected),
    "entropy": lambda p: entropy(p.selected).mean(1),
    "anchor": _anchor,
    "consistency": _view_consistency,
    "diversity": lambda p: -diversity(p.features),
    "adversarial": lambda p: -_view_consistency(p),
}


def _teach(p: Predictions) -> Tensor:
    assert p.teacher is not None
    return _weighted(cross_entropy(p.teacher[:, None], p.log_probs), p.weights)


OUTER: dict[str, Loss] = {
    "consistency": _teach,
    "marginal_entropy": lambda p: marginal_entropy(p.selected),
    "kl": _anchor,
    "js": lambda p: marginal_entropy(p.log_probs, p.weights) - _weighted(entropy(p.log_probs), p.weights),
}


def teacher(log_probs: Tensor, counted: Tensor) -> Tensor:
    """The teacher q ``[B, C]``, as logarithm: the mean prediction of the original and S, without gradient."""
    return log_mean(log_probs.detach(), uniform_weights(counted, log_probs.dtype))


def weighted_losses(option: str, given: str | Mapping[str, float], known: Mapping[str, Loss]) -> dict[str, float]:
    """Losses and their weights from a name or a mapping.

    Raises:
        ValueError: An unknown name, no loss, or `adversarial` without `anchor`.
    """
    weights = {given: 1.0} if isinstance(given, str) else dict(given)
    if not weights:
        raise ValueError(f"{option} is empty; give one of {', '.join(known)}, or a mapping of names to weights")
    for name in weights:
        check_choice(option, name, list(known))
    if "adversarial" in weights and "anchor" not in weights:
        raise ValueError(
            f"{option} has adversarial without anchor, which destroys the content of the views; add anchor, for "
            "instance {adversarial: 1, anchor: 1}"
        )
    return weights


def combine(weights: Mapping[str, float | Tensor], known: Mapping[str, Loss], predictions: Predictions) -> Tensor:
    """Weighted sum of losses, ``[B]``."""
    return torch.stack([weight * known[name](predictions) for name, weight in weights.items()]).sum(0)
