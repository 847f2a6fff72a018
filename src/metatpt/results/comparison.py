"""Several runs beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metatpt.metrics import KINDS, Gain, gain, right, scored

from . import plots
from .runs import Run, options
from .setup import leaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Comparison:
    """What several runs have beside each other.

    Attributes:
        over_first: What the adapted predictions of each run have over those of the first one, over the pictures that
            both have; a text says why there is nothing.
        differences: Options, devices, versions and so on that are not those of all runs, with the value of each run.
        plots: Elements of a page, by name.
    """

    over_first: list[Gain | str]
    differences: dict[str, list[str]]
    plots: dict[str, str]


def compare(runs: Sequence[Run], draw: Callable[[Figure, str, str], str]) -> Comparison:
    """Put runs beside each other.

    Args:
        runs: At least two.
        draw: Makes an element of a page from a plot, a name and what it shows.
    """
    names = [f"{number} {run.setup.get('method', '')}" for number, run in enumerate(runs, 1)]
    drawn = {}
    gains = {prefix: [_over_zero_shot(run, prefix) for run in runs] for prefix in ("averaged_", "")}
    if any(each for of_kind in gains.values() for each in of_kind):
        figure = plots.intervals(names, gains, "gain over zero-shot in points")
        drawn["gains"] = draw(
            figure, "gains", "Gain over the zero-shot predictions of the same run, with 95 % intervals."
        )
    errors = {prefix: [_without_interval(run.metrics.get(f"{prefix}ece")) for run in runs] for prefix in KINDS}
    if any(each for of_kind in errors.values() for each in of_kind):
        figure = plots.intervals(names, errors, "calibration error in %")
        drawn["calibration"] = draw(figure, "calibration", "Calibration error: the smaller, the better.")
    return Comparison(
        over_first=["the first run", *(_over_first(runs[0], run) for run in runs[1:])],
        differences=_differences(runs),
        plots=drawn,
    )


def _over_zero_shot(run: Run, prefix: str) -> plots.Interval | None:
    having = scored(run.rows, "zero_shot_", prefix)
    return gain(right(having, "zero_shot_"), right(having, prefix))[:3] if having else None


def _without_interval(value: float | None) -> plots.Interval | None:
    return None if value is None else (value, value, value)


def _over_first(first: Run, run: Run) -> Gain | str:
    """The paired difference, or why there is none."""
    if first.setup.get("data") != run.setup.get("data"):
        return "none: another data set"
    if first.setup.get("class_names") != run.setup.get("class_names"):
        return "none: other classes"
    pictures = {_picture(row): row for row in scored(first.rows)}
    if not pictures or not scored(run.rows):
        return "none: no labels"
    pairs = [(pictures[_picture(row)], row) for row in scored(run.rows) if _picture(row) in pictures]
    if not pairs:
        return "none: no picture in common"
    before, after = zip(*pairs, strict=True)
    return gain(right(before), right(after))


def _picture(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["index"], row["path"], row["label_index"]


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    described = [dict(leaves({**options(run), **_last_session(run)})) for run in runs]
    names = dict.fromkeys(name for each in described for name in each)
    values = {name: [_text(each[name]) if name in each else "" for each in described] for name in names}
    return {name: of_runs for name, of_runs in values.items() if len(set(of_runs)) > 1}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _last_session(run: Run) -> dict[str, Any]:
    """Where and with what a run ended; when it ran makes no difference."""
    sessions = run.setup.get("sessions") or [{}]
    return {name: value for name, value in sessions[-1].items() if name != "started"}
