"""Where the time of a run goes: functions marked with the part that they belong to, and a meter that tells parts apart.

A mark costs a comparison as long as nobody measures. While a meter runs, each moment counts for one part: the innermost
that is open, or `other`.

A tower's backward pass runs in no function of ours. So what a marked function takes and gives passes through two
identities: a gradient that reaches the one behind it is about to go through the function, one that reaches the one in
front of it has been. A gradient's own graph has the same two, the other way round, and so on for all orders.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, get_args

import torch
from torch import Tensor

Part = Literal["data", "views", "image_tower", "text_tower", "other"]
PARTS: tuple[Part, ...] = get_args(Part)

P = ParamSpec("P")
R = TypeVar("R")


class Stamp(Protocol):
    """A moment, in the words of CUDA's events."""

    def query(self) -> bool:
        """Whether it has come."""

    def synchronize(self) -> None:
        """Wait for it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from it to another."""


class _HostStamp:
    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: _HostStamp) -> float:
        return 1000 * (end_event.seconds - self.seconds)


def stamps(device: torch.device) -> Callable[[], Stamp]:
    """What tells the time of work on a device: on a GPU events on its stream, elsewhere the host's clock.

    An event comes when all work before it is done, and making one does not wait for that.
    """
    if device.type != "cuda":
        return _HostStamp

    def event() -> Stamp:
        made = torch.cuda.Event(enable_timing=True)
        made.record(torch.cuda.current_stream(device))
        return made

    return event


class Call:
    """One call of a marked function, or another stretch of time: what is opened and closed again.

    Args:
        part: What its time counts for.
    """

    def __init__(self, part: Part) -> None:
        self.part = part


class Meter:
    """The seconds of each part in a process, from :meth:`start` to the end of the last lap.

    Args:
        stamp: Gives the present moment; see :func:`stamps`.

    Attributes:
        seconds: By part; their sum is the time from the start to the end of the last lap that was read.
    """

    def __init__(self, stamp: Callable[[], Stamp]) -> None:
        self.seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._stamp = stamp
        self._open: list[Call] = []
        self._marks: list[tuple[Part, Stamp]] = []  # of this lap: what came to an end, and when
        self._laps: deque[list[tuple[Part, Stamp]]] = deque()  # that are not read yet
        self._read_to: Stamp | None = None

    def start(self) -> None:
        """Measure from here on.

        Raises:
            RuntimeError: Another meter does already.
        """
        global _meter
        if _meter is not None:
            raise RuntimeError("a meter is running in this process already: one CostMeter at a time")
        _meter = self
        self._read_to = self._stamp()

    def stop(self) -> None:
        """Measure no more. What came after the last lap counts for nothing."""
        global _meter
        if _meter is self:
            _meter = None

    def open(self, call: Call) -> None:
        """From here on time counts for that call's part, until it is closed or another one opened inside."""
        self._mark()
        self._open.append(call)

    def close(self, call: Call) -> None:
        """Ends a call and what was left open inside of it; one that is not open may be closed too."""
        if call in self._open:
            self._mark()
            del self._open[self._open.index(call) :]

    def lap(self) -> None:
        """Ends a lap, and reads the laps before it whose work is done."""
        self._mark()
        self._open.clear()  # an error in a backward pass leaves its part open
        self._laps.append(self._marks)
        self._marks = []
        while self._laps and self._laps[0][-1][1].query():
            self._read(self._laps.popleft())

    def wait(self) -> None:
        """Reads all laps, and waits for their work."""
        if self._laps:
            self._laps[-1][-1][1].synchronize()
        while self._laps:
            self._read(self._laps.popleft())

    def _mark(self) -> None:
        self._marks.append((self._open[-1].part if self._open else "other", self._stamp()))

    def _read(self, lap: list[tuple[Part, Stamp]]) -> None:
        assert self._read_to is not None
        for part, stamp in lap:
            self.seconds[part] += self._read_to.elapsed_time(stamp) / 1000
            self._read_to = stamp


_meter: Meter | None = None


def timed(part: Part) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a function: its time, that of its backward passes and of what is computed again in them, is that part's.

    Backward passes count where the function gives a tensor. They end at the tensor argument that carries a gradient (at
    most one); where there is none, as with a prompt inside of a tower, at the end of the whole backward pass.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            meter = _meter
            if meter is None:
                return function(*args, **kwargs)
            call = Call(part)
            meter.open(call)
            try:
                given: Any = [_through(_Front, value, call) for value in args]
                named: Any = {name: _through(_Front, value, call) for name, value in kwargs.items()}
                result: R = _through(_Back, function(*given, **named), call)
                return result
            finally:
                meter.close(call)

        return measured

    return decorate


def _through(side: type[_Front | _Back], x: Any, call: Call) -> Any:
    carries_gradient = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
    return side.apply(x, call) if carries_gradient else x


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return x.view_as(x)


class _Front(_Identity):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        if _meter is not None:
            _meter.close(ctx.call)
        return _through(_Back, gradient, ctx.call), None


class _Back(_Identity):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        if _meter is not None:
            _meter.open(ctx.call)
            # For a gradient that never reaches the front.
            torch.autograd.Variable._execution_engine.queue_callback(partial(_meter.close, ctx.call))
        return _through(_Front, gradient, ctx.call), None
