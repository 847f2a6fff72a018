"""Pure functions: entropies, confidence selection, losses over views, and the steps that tune a state.

C classes, V views, K selected views, B samples. Entropies are in nats. Losses have one value per sample, so that their
sum over B gives each sample the gradient that it would get alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metatpt.types import State


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy over the last dimension, ``[..., C] -> [...]``; a probability of 0 adds nothing.

    >>> round(float(entropy(torch.tensor([0.5, 0.5, 0.0]).log())), 4)
    0.6931
    """
    probs = log_probs.exp()
    return -(probs * log_probs.masked_fill(probs == 0, 0)).sum(-1)


def uniform_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Equal weights ``[B, V]`` over the views where `mask` is true, as logarithms."""
    # The dtype is given: torch's default one may be half precision, under Lightning's "-true" precisions.
    weights = mask.to(dtype)
    return (weights / weights.sum(1, keepdim=True)).log()


def log_mean(log_probs: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Logarithm of the mean probability over views, ``[B, V, C] -> [B, C]``.

    Args:
        log_probs: ``[B, V, C]``.
        log_weights: ``[B, V]``, whose exponentials sum to 1; equal ones by default.
    """
    if log_weights is None:
        return log_probs.logsumexp(1) - math.log(log_probs.shape[1])
    return (log_probs + log_weights.to(log_probs.dtype)[..., None]).logsumexp(1)


def marginal_entropy(log_probs: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Entropy of the mean probability over views, ``[B, V, C] -> [B]`` (TPT, eq. 3; MEMO).

    >>> views = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]).log()
    >>> round(float(marginal_entropy(views)), 4)
    0.6931
    """
    return entropy(log_mean(log_probs, log_weights))


def n_selected(n_views: int, selection: float) -> int:
    """Number of confident views, at least one: ``max(1, floor(selection * n_views))``.

    >>> n_selected(64, 0.1), n_selected(5, 0.1), n_selected(10, 0.3)
    (6, 1, 3)
    """
    # 10 * 0.3 is 3.0000000000000004 or 2.9999999999999996 by its factors: round off what no user meant.
    return max(1, math.floor(round(selection * n_views, 9)))


def select_confident(log_probs: Tensor, selection: float) -> Tensor:
    """Indices ``[B, K]`` of the views of lowest entropy, most confident first; ties go to the lower index.

    Args:
        log_probs: ``[B, V, C]``.
        selection: Share of the views to keep.
    """
    order = entropy(log_probs.detach()).argsort(dim=1, stable=True)
    return order[:, : n_selected(log_probs.shape[1], selection)]


def take_views(values: Tensor, chosen: Tensor) -> Tensor:
    """Rows of `values` ``[B, V, ...]`` at `chosen` ``[B, K]``, as ``[B, K, ...]``."""
    return values.gather(1, chosen.reshape(*chosen.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))


def cross_entropy(target_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """Cross-entropy from a target ``[B, 1, C]`` or ``[B, V, C]`` to views ``[B, V, C]``, as ``[B, V]``."""
    return -(target_log_probs.exp() * log_probs).sum(-1)


def kl_divergence(target_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """KL divergence from views to a target, KL(target to views), as ``[B, V]``."""
    difference = (target_log_probs - log_probs).masked_fill(target_log_probs == -math.inf, 0)
    return (target_log_probs.exp() * difference).sum(-1)


def diversity(features: Tensor) -> Tensor:
    """Mean cosine distance between views of unit length, ``[B, K, D] -> [B]``; 0 for a single view."""
    n = features.shape[1]
    if n == 1:
        return features.new_zeros(len(features))
    total = features.sum(1).square().sum(-1)  # of all pairs, each view with itself included
    return 1 - (total - features.square().sum((1, 2))) / (n * (n - 1))


def entropy_weighted_mean(log_probs: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Log of the views' mean probability, confident views weighing more.

    Args:
        log_probs: ``[B, V, C]``.
        temperature: In nats: a view's weight is softmax(-H / temperature).
        mask: ``[B, V]`` bool: the views that count; all by default.

    Returns:
        ``[B, C]``.
    """
    scores = -entropy(log_probs) / temperature
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return log_mean(log_probs, torch.log_softmax(scores, dim=1))


def normalise(gradient: Tensor, dims: int) -> Tensor:
    """Scale a gradient to unit length over its last `dims` dimensions; a zero gradient stays zero.

    Differentiable at zero too, with derivative zero (a square root is not).
    """
    axes = tuple(range(-dims, 0))
    # The result does not depend on the scale, but its derivatives are powers of a length that may be 1e-30.
    scale = gradient.detach().abs().amax(axes, keepdim=True)
    gradient = gradient / torch.where(scale > 0, scale, 1)
    square = gradient.square().sum(axes, keepdim=True)
    moves = square > 0
    return gradient * torch.where(moves, torch.where(moves, square, 1).rsqrt(), 0)


# Steps of the outer loop. Elementwise in the sample dimension, hence each sample gets its own.


def outer_step(
    optimizer: str, values: State, gradients: State, memory: dict[str, State], rates: State, step: int
) -> State:
    """One optimiser step on a state.

    Args:
        optimizer: ``"adamw"`` (decoupled weight decay 0.01, betas 0.9 and 0.999, eps 1e-8, as torch.optim.AdamW),
            ``"sgd"``, or ``"normalised_sgd"`` (the gradient of each sample scaled to a root mean square of 1, so
            that the rate is the typical change of an entry, as it is for AdamW).
        values: State ``[B, ...]`` of each name.
        gradients: Their gradients.
        memory: Optimiser state, written here; empty for a fresh one.
        rates: Learning rate ``[B, 1, ...]`` of each name.
        step: Number of this step, from 1.

    Returns:
        The new state.
    """
    new: State = {}
    for name, value in values.items():
        gradient, rate = gradients[name], rates[name]
        if optimizer == "adamw":
            slots = memory.setdefault(name, {"mean": torch.zeros_like(value), "square": torch.zeros_like(value)})
            slots["mean"] = slots["mean"].lerp(gradient, 1 - 0.9)
            slots["square"] = 0.999 * slots["square"] + (1 - 0.999) * gradient.square()
            size = slots["square"].sqrt() / math.sqrt(1 - 0.999**step) + 1e-8
            new[name] = value * (1 - rate * 0.01) - rate / (1 - 0.9**step) * slots["mean"] / size
        elif optimizer == "normalised_sgd":
            width = math.prod(value.shape[1:])
            new[name] = value - rate * math.sqrt(width) * normalise(gradient, value.ndim - 1)
        else:
            new[name] = value - rate * gradient
    return new
