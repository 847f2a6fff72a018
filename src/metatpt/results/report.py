"""A page that shows what runs came to: one HTML file that needs nothing else, and its plots as PNG files beside it."""

from __future__ import annotations

import base64
import json
import shlex
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metatpt.metrics import BINS, KINDS, ClassGain, Gain, accuracy_interval, gain, gains_by_class, right, scored

from . import plots
from .comparison import compare
from .record import LISTED, PREDICTIONS
from .rows import Cell, Row
from .runs import Run, largest_changes, options, strip_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"

_TEMPLATE = "report.html.jinja"
_PLOTS = "plots"
_CHANGES = 4
"""How many pictures that gained are shown, and how many that lost; more of them if they have views."""

_GAINS = (("", "zero_shot_"), ("averaged_", "zero_shot_"), ("", "averaged_"))
_LEFT_OUT = ("skipped", "kept_zero_shot")
_ONE_RUN: dict[str, tuple[Callable[[Sequence[Row]], Any], str]] = {
    "reliability": (
        plots.reliability_diagram,
        f"Reliability: how often predictions of a confidence are right, in {BINS} bins (on the line: as often as they "
        "say), and how many pictures lie in each.",
    ),
    "entropies": (plots.entropies, "Entropy of the predictions before and after, in nats."),
    "class_gains": (plots.class_gains, "Gain of each class, the largest first."),
    "durations": (plots.durations, "Milliseconds per picture, without the slowest hundredth."),
}


@dataclass(frozen=True)
class _Section:
    """What the page says of one run.

    Attributes:
        name: Of its folder.
        title: Method and data.
        run: The run.
        resume: The command that goes on with it.
        intervals: Of the accuracies, by prefix.
        gains: By the prefixes of what gains and of what it is compared with.
        classes: Gains by class, the largest first.
        n_changed: How many predictions adaptation changed.
        plots: Elements of the page, by name.
        changes: The pictures that changed most.
        views: Those of a picture, as data URI, by its index.
        left_out: The pictures without an adapted prediction, by status.
        milliseconds: Per picture, by what is said of them.
        cost: The content of `cost.json`, if it is there.
    """

    name: str
    title: str
    run: Run
    resume: str
    intervals: dict[str, tuple[float, float]]
    gains: dict[tuple[str, str], Gain]
    classes: list[ClassGain]
    n_changed: int
    plots: dict[str, str]
    changes: dict[str, list[Row]]
    views: dict[Cell, str]
    left_out: dict[str, list[Row]]
    milliseconds: dict[str, float]
    cost: dict[str, Any]


def write_report(runs: Sequence[Run], folder: str | Path) -> Path:
    """Writes `report.html`, and its plots into `plots/`; what was there under these names is replaced.

    Args:
        runs: The runs, at least one; several are compared with the first of them.
        folder: Where to; it is made.

    Returns:
        The page.

    Raises:
        OSError: A file cannot be written, or one of a run not be read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    page = Path(folder) / PAGE
    (page.parent / _PLOTS).mkdir(parents=True, exist_ok=True)

    def draw(figure: Figure, name: str, caption: str) -> str:
        (page.parent / _PLOTS / f"{name}.png").write_bytes(plots.png(figure))
        drawn = Markup(plots.svg(figure, name, caption))
        return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(drawn, caption)

    sections = [
        _section(run, name, draw, "" if len(runs) == 1 else f"{number}-")
        for number, (run, name) in enumerate(zip(runs, _names(runs), strict=True), 1)
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (_percent, _percents, _points, _span, _number, _count, _json)
    environment.filters |= {each.__name__.removeprefix("_"): each for each in filters}
    text = environment.get_template(_TEMPLATE).render(
        sections=sections,
        comparison=compare(runs, draw) if len(runs) > 1 else None,
        theme=plots.THEME,
        kinds=KINDS,
        ends=plots.ends,
        listed=LISTED,
        predictions=PREDICTIONS,
    )
    # The bytes of a file name that are no UTF-8 cannot stand in the page.
    page.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def _section(run: Run, name: str, draw: Callable[[Figure, str, str], str], plot_prefix: str) -> _Section:
    scores = {prefix: right(having, prefix) for prefix in KINDS if (having := scored(run.rows, prefix))}
    gains = {}
    for after, before in _GAINS:
        if having := scored(run.rows, after, before):
            gains[after, before] = gain(right(having, before), right(having, after))
    views = {index: _data_uri(file) for index, file in strip_files(run.folder).items()}
    figures = {each: (plot(run.rows), caption) for each, (plot, caption) in _ONE_RUN.items()}
    return _Section(
        name=name,
        title=_title(run) or name,
        run=run,
        resume=f"metatpt {run.setup.get('stage', 'test')} --resume {shlex.quote(str(run.folder))}",
        intervals={prefix: accuracy_interval(correct) for prefix, correct in scores.items()},
        gains=gains,
        classes=gains_by_class(run.rows),
        n_changed=sum(row["prediction_index"] != row["zero_shot_prediction_index"] for row in run.rows),
        plots={
            each: draw(figure, f"{plot_prefix}{each}", caption)
            for each, (figure, caption) in figures.items()
            if figure is not None
        },
        changes=_changes(run.rows, views),
        views=views,
        left_out={status: [row for row in run.rows if row["status"] == status] for status in _LEFT_OUT},
        milliseconds=_milliseconds(run.rows),
        cost=_cost(run.folder),
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """The name of each run's folder, or its path where another one has that name."""
    names = [run.folder.resolve().name for run in runs]
    times = Counter(names)
    return [name if times[name] == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


def _title(run: Run) -> str:
    """Method and data, the split, the shift; empty where a run was stopped before it knew."""
    setup = run.setup
    if not setup:
        return ""
    parts = [f"{setup['method']} on {setup['data']}"]
    if setup["split"]:
        parts.append(setup["split"])
    data = (options(run).get("data") or {}).get("init_args") or {}
    if data.get("shift"):
        severity = f" of severity {data['severity']}" if "severity" in data else ""
        parts.append(f"shift {data['shift']}{severity}")
    return ", ".join(parts)


def _changes(rows: Sequence[Row], views: Container[Cell]) -> dict[str, list[Row]]:
    """The pictures that gained most, and those that lost most: the first few, and all that have views."""
    found = zip(("gains", "losses"), largest_changes(rows, len(rows)), strict=True)
    return {
        what: [row for place, row in enumerate(changed) if place < _CHANGES or row["index"] in views]
        for what, changed in found
    }


def _data_uri(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _milliseconds(rows: Sequence[Row]) -> dict[str, float]:
    values = plots.cells(rows, "milliseconds")
    if not len(values):
        return {}
    quantiles = {"median": 0.5, "95 % below": 0.95, "longest": 1.0}
    return {name: float(np.quantile(values, share)) for name, share in quantiles.items()}


def _cost(folder: Path) -> dict[str, Any]:
    file = folder / "cost.json"
    cost: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return cost


# Numbers, as the table of a run has them


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:+z.1f}"


def _percents(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _span(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{_points(low)} to {_points(high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _count(n: int, noun: str) -> str:
    return f"{_number(n)} {noun}" if n == 1 else f"{_number(n)} {noun}s"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
