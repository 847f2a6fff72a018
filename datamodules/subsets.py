"""Parts of a split: balanced, few of each class, or held out."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from metatpt.rng import sample_generator

if TYPE_CHECKING:
    from collections.abc import Sequence


def balanced_subset(labels: Sequence[int], size: int | None, seed: int) -> list[int]:
    """A random subset with equally many of each class, as far as there are; a smaller one is part of a larger.

    Args:
        labels: Class index of every sample.
        size: Number of samples to take; None or more than there are: all.
        seed: Seed of the choice.

    Returns:
        Places of the chosen samples, in ascending order.
    """
    if size is None or size >= len(labels):
        return list(range(len(labels)))
    turn = _turns(labels, seed, "max_samples")
    # sorted is stable: within a turn, which has one sample of each class, the shuffled order stays
    return sorted(sorted(turn, key=turn.__getitem__)[:size])


def few_shots(labels: Sequence[int], shots: int | None, seed: int) -> list[int]:
    """A random subset with so many of each class, or all that a class has; fewer shots are part of more.

    Args:
        labels: Class index of every sample.
        shots: Samples of each class; None for all.
        seed: Seed of the choice.

    Returns:
        Places of the chosen samples, in ascending order.
    """
    if shots is None:
        return list(range(len(labels)))
    return sorted(place for place, turn in _turns(labels, seed, "shots").items() if turn < shots)


def held_out(paths: Sequence[str], name: str, share: int = 5, most: int | None = None) -> set[str]:
    """A fixed part of some pictures, whatever the seed of the run: validation, where none is published.

    Args:
        paths: The pictures (of one class, for a part that is balanced), in a fixed order.
        name: Names the draw.
        share: One in so many is held out, rounded up.
        most: No more than so many are.
    """
    order = torch.randperm(len(paths), generator=sample_generator(0, 0, name)).tolist()
    return {paths[place] for place in order[: -(-len(paths) // share)][:most]}


def held_out_of_classes(
    paths: Sequence[str], labels: Sequence[int], names: Sequence[str], share: int = 5, most: int | None = None
) -> set[str]:
    """A fixed part of each class, see :func:`held_out`.

    Args:
        paths: The pictures, in a fixed order.
        labels: Class index of each.
        names: Names the draw of each class.
        share: One in so many of each class is held out, rounded up.
        most: No more than so many of each class are.
    """
    by_class: dict[int, list[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        by_class.setdefault(label, []).append(path)
    return {path for label, own in by_class.items() for path in held_out(own, names[label], share, most)}


def _turns(labels: Sequence[int], seed: int, stream: str) -> dict[int, int]:
    """The places of all samples in random order, and how many of its class come before each."""
    shuffled: list[int] = torch.randperm(len(labels), generator=sample_generator(seed, 0, stream)).tolist()
    seen: Counter[int] = Counter()
    turn = {}
    for place in shuffled:
        turn[place] = seen[labels[place]]
        seen[labels[place]] += 1
    return turn
