"""A clock that only moves where time is spent, and books of what it was spent on."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Time that is spent on purpose.

    Attributes:
        books: Seconds by name: the truth that a meter must find.
        made: Number of stamps that were asked for.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.books: dict[str, float] = defaultdict(float)
        self.made = 0

    def spend(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.books[name] += seconds

    def through(self, x: Tensor, name: str, seconds: float) -> Tensor:
        """`x`, for which time is spent now and in every later pass of a gradient, of whatever order."""
        result: Tensor = _Spend.apply(x, self, name, seconds)
        return result

    def stamp(self) -> Moment:
        self.made += 1
        return Moment(self)


class Moment:
    """A stamp; its work is done one second later, as on a GPU that lags behind."""

    lag = 0.0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.at = clock.now

    def query(self) -> bool:
        return self.clock.now >= self.at + self.lag

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.at + self.lag)

    def elapsed_time(self, end: Moment) -> float:
        assert end.query(), "CUDA refuses to read an event that has not come"
        return 1000 * (end.at - self.at)


class _Spend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, name: str, seconds: float) -> Tensor:
        ctx.spent = clock, name, seconds
        clock.spend(name, seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        clock, name, seconds = ctx.spent
        return _Spend.apply(gradient, clock, name, 3 * seconds), None, None, None
