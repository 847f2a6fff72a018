"""Marked parts and the meter, on a clock that only moves where the tests spend time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.clock import Clock, Moment
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metatpt import timing
from metatpt.timing import PARTS, Call, Meter, timed

SECONDS = {"image_tower": 1.0, "text_tower": 10.0, "views": 100.0, "other": 1000.0}


class Model:
    """Parts that take known times, forward and backward."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.weight = leaf(0.7)

    def _slow(self, part: str, x: Tensor) -> Tensor:
        return self.clock.through(self.clock.through(x, part, SECONDS[part]) ** 3, part, SECONDS[part])

    @timed("image_tower")
    def image(self, x: Tensor) -> Tensor:
        return self._slow("image_tower", x)

    @timed("text_tower")
    def text(self, *, x: Tensor) -> Tensor:
        return self._slow("text_tower", x)

    @timed("views")
    def views(self, x: Tensor, inside: bool = False) -> Tensor:
        y = self.clock.through(x, "views", 5.0)
        return self.clock.through(self.image(y) if inside else y**2, "views", 7.0)

    @timed("image_tower")
    def prompted(self, x: Tensor) -> Tensor:
        return self._slow("image_tower", x * self.weight)

    def other(self, x: Tensor) -> Tensor:
        return self._slow("other", x)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> Iterator[Meter]:
    meter = Meter(clock.stamp)
    meter.start()
    yield meter
    meter.stop()


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def check(meter: Meter, clock: Clock) -> None:
    meter.lap()
    meter.wait()
    assert meter.seconds == dict.fromkeys(PARTS, 0.0) | clock.books
    assert sum(meter.seconds.values()) == clock.now


def test_forward_passes_and_what_lies_between(meter: Meter, clock: Clock) -> None:
    model, x = Model(clock), torch.ones(2)
    model.other(model.views(model.image(x)))
    model.text(x=x)
    check(meter, clock)
    assert set(clock.books) == {"image_tower", "views", "text_tower", "other"}


def test_inner_part_counts_alone(meter: Meter, clock: Clock) -> None:
    x = leaf(2.0)
    model = Model(clock)
    torch.autograd.grad(model.views(model.other(x), inside=True).sum(), x)
    check(meter, clock)
    assert clock.books == {"views": 12.0 * 4, "image_tower": 2.0 * 4, "other": 2000.0 * 4}


def test_backward_of_several_passes(meter: Meter, clock: Clock) -> None:
    model, x = Model(clock), leaf(0.5, 1.0)
    passes = [model.other(model.image(model.views(each))) for each in x.split(1)]
    text = model.text(x=x)
    loss = model.other(torch.cat(passes) * text).sum()
    torch.autograd.grad(loss, x)
    check(meter, clock)


@pytest.mark.parametrize("order", [2, 3])
def test_higher_orders(meter: Meter, clock: Clock, order: int) -> None:
    model, x = Model(clock), leaf(0.7)
    value = model.other(model.image(model.views(model.other(x)))).sum()
    forward = dict(clock.books)
    for left in reversed(range(order)):
        (gradient,) = torch.autograd.grad(value, x, create_graph=left > 0)
        value = gradient.sum()
    check(meter, clock)
    assert all(clock.books[name] > 10 * seconds for name, seconds in forward.items())


def test_a_step_that_is_differentiated_through(meter: Meter, clock: Clock) -> None:
    """The shape of an inner loop: only one input of the loss moves, by a gradient that hangs on the other."""
    model, prompt, raw = Model(clock), leaf(0.3), leaf(0.9)
    classes = model.text(x=prompt)
    loss = model.other(model.image(model.views(raw)) * classes).sum()
    (gradient,) = torch.autograd.grad(loss, raw, create_graph=True)
    learned = model.image(model.views(raw - 0.1 * gradient))
    torch.autograd.grad(model.other(learned * classes).sum(), prompt)
    check(meter, clock)


def test_recomputation_counts_for_its_part(meter: Meter, clock: Clock) -> None:
    model, x = Model(clock), leaf(0.7)

    @timed("image_tower")
    def tower(x: Tensor) -> Tensor:
        chunks = [
            checkpoint(lambda part: model._slow("image_tower", part), part, use_reentrant=False) for part in (x, x)
        ]
        return torch.cat(chunks)

    torch.autograd.grad(model.other(tower(model.other(x))).sum(), x)
    check(meter, clock)
    assert clock.books["image_tower"] > 2 * 2.0 * (1 + 3)  # more than forward and backward


def test_a_gradient_that_ends_inside_closes_its_part(meter: Meter, clock: Clock) -> None:
    """As with prompts inside of a tower, whose pictures carry no gradient."""
    model, pictures = Model(clock), torch.ones(1, dtype=torch.float64)
    for _ in range(2):
        torch.autograd.grad(model.other(model.prompted(pictures)).sum(), model.weight)
        clock.spend("other", 1.0)
    check(meter, clock)


def test_errors_leave_no_part_open(meter: Meter, clock: Clock) -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of memory")

    @timed("image_tower")
    def tower(x: Tensor, breaks: bool = False) -> Tensor:
        clock.spend("image_tower", 1.0)
        if breaks:
            raise ValueError("no picture")
        return Breaks.apply(x)

    with pytest.raises(ValueError, match="no picture"):
        tower(leaf(1.0), breaks=True)
    clock.spend("other", 2.0)

    @timed("views")
    def with_a_backward_pass_inside() -> None:
        x = leaf(1.0)
        torch.autograd.grad(tower(x).sum(), x)

    with pytest.raises(RuntimeError, match="out of memory"):
        with_a_backward_pass_inside()
    clock.spend("other", 2.0)
    x = leaf(1.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.autograd.grad(tower(x).sum(), x)
    meter.lap()
    clock.spend("other", 4.0)
    check(meter, clock)


def test_numbers_and_memory_are_the_same(clock: Clock) -> None:
    def run() -> tuple[list[Tensor], list[int]]:
        model, x, kept = Model(clock), torch.linspace(0.1, 0.9, 50).requires_grad_(), []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            first = model.other(model.image(model.views(x)) + x.sin() * model.text(x=x)).sum()
            (gradient,) = torch.autograd.grad(first, x, create_graph=True)
            (second,) = torch.autograd.grad((gradient * x.cos()).sum(), x)
        return [first, gradient, second], kept

    plain, kept = run()
    meter = Meter(clock.stamp)
    meter.start()
    try:
        measured, kept_measured = run()
    finally:
        meter.stop()
    assert clock.made > 20
    for ours, theirs in zip(measured, plain, strict=True):
        assert torch.equal(ours, theirs)
    assert kept_measured == kept


def test_nothing_is_copied(meter: Meter) -> None:
    seen = []
    x = leaf(1.0)
    y = timed("views")(lambda x: seen.append(x) or x)(x)
    assert len({id(each) for each in (x, *seen, y)}) == 3
    assert {each.data_ptr() for each in (x, *seen, y)} == {x.data_ptr()}


def test_nobody_measures(clock: Clock) -> None:
    model, x = Model(clock), leaf(0.7)
    assert model.image(x).grad_fn.name() == model._slow("image_tower", x).grad_fn.name()
    meter = Meter(clock.stamp)
    meter.start()
    graph = model.image(x).sum()
    meter.stop()
    made = clock.made
    torch.autograd.grad(graph, x)  # of a graph that was made while one was there
    model.image(x)
    assert clock.made == made


def test_one_meter_at_a_time(meter: Meter, clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="one CostMeter at a time"):
        Meter(clock.stamp).start()
    assert timing._meter is meter
    Meter(clock.stamp).stop()  # of one that does not run
    assert timing._meter is meter


def test_device_that_lags_behind_is_never_waited_for(
    meter: Meter, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Moment, "lag", 5.0)
    call = Call("data")
    for _ in range(4):
        meter.open(call)
        clock.spend("data", 1.0)
        meter.close(call)
        clock.spend("other", 2.0)
        before = clock.now
        meter.lap()
        assert clock.now == before
    read = dict(meter.seconds)
    assert (read["data"], read["other"]) == (2.0, 4.0)  # the laps whose work is done by now
    clock.now += 100.0
    meter.open(call)  # fetching the batch that is not there
    meter.stop()
    meter.wait()
    assert (meter.seconds["data"], meter.seconds["other"]) == (4.0, 8.0)


def test_host_clock() -> None:
    stamp = timing.stamps(torch.device("cpu"))
    first, second = stamp(), stamp()
    assert first.query()
    assert 0 <= first.elapsed_time(second) < 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", iter([1.0, 3.5]).__next__)
        assert stamp().elapsed_time(stamp()) == 2500


def test_gpu_stamps_are_events_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.stream = stream

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    made = timing.stamps(torch.device("cuda", 1))()
    assert isinstance(made, Event)
    assert made.stream == "stream of cuda:1"
