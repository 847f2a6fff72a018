"""Plots of runs, made from their rows.

Each is small, so that its text can be read on a phone. Adapted, zero-shot and averaged predictions have a colour, a
marker and a line of their own, the same in all of them.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from metatpt.metrics import KINDS, ClassGain, ece, gains_by_class, reliability, right, scored

if TYPE_CHECKING:  # matplotlib takes a while to import, and most runs plot nothing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THEME = {
    "paper": ("#ffffff", "#15181c"),
    "ink": ("#1d1f22", "#e4e6e9"),
    "muted": ("#5b6068", "#a3a9b2"),
    "rule": ("#d4d7dc", "#3b4149"),
    "zero-shot": ("#6f6f73", "#b4b5ba"),
    "averaged": ("#b84a00", "#f0932b"),
    "adapted": ("#005fae", "#5cb4f2"),
}
"""Colours by name, on light and on dark paper; the last three differ for the colour-blind too."""

CLASSES = 12
"""How many classes are shown of those that gained most, and of those that gained least, where they are many."""

Interval = tuple[float, float, float]
"""A figure, and the lower and upper end of its interval; all are equal where it has none."""

_MARKERS = {"zero_shot_": "o", "averaged_": "s", "": "^"}
_LINES = {"zero_shot_": (0, (4, 2)), "averaged_": (0, (1, 1)), "": "-"}
_INK, _MUTED, _RULE = (THEME[name][0] for name in ("ink", "muted", "rule"))
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the font of the page, and can be searched
    "svg.hashsalt": "metatpt",  # equal plots have equal bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "grid.color": _RULE,
    "legend.frameon": False,
    "legend.columnspacing": 0.9,
    "legend.fontsize": 9,
    "legend.handlelength": 1.8,
    "legend.handletextpad": 0.5,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.color": _MUTED,
    "ytick.labelcolor": _INK,
}
_WIDTH, _HEIGHT = 4.5, 3.4  # inches
_LONGEST = 26  # characters of a name


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's own are."""
    from matplotlib import style

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has a font for it
        yield


@_style()
def reliability_diagram(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Accuracy against confidence in the bins of :func:`metatpt.metrics.ece`, and how many pictures each holds.

    Args:
        rows: The rows of a run.

    Returns:
        The plot, or None where no row has a label and a prediction.
    """
    if not scored(rows):
        return None
    figure, (above, below) = _figure(height_ratios=(3, 1))
    above.plot([0, 100], [0, 100], color=_RULE)
    for prefix, name in KINDS.items():
        if having := scored(rows, prefix):
            confidence, correct = [row[f"{prefix}probability"] for row in having], right(having, prefix)
            counts, *means = np.array(reliability(confidence, correct)).T
            x, y = (100 * mean for mean in means)
            above.plot(x, y, **_look(prefix), label=f"{name} {100 * ece(confidence, correct):.1f} %")
            below.plot(x, 100 * counts / len(having), **_look(prefix))
    above.set(xlim=(-3, 103), ylim=(-5, 105), ylabel="accuracy in %")
    above.tick_params(labelbottom=False)
    below.set(xlim=(-3, 103), ylim=0, xlabel="confidence in %", ylabel="% of\npictures")
    above.grid()
    _legend(figure, above, "calibration error")
    return figure


@_style()
def class_gains(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """What adaptation brings each class, the largest gain first; of many classes the two ends.

    Args:
        rows: The rows of a run.

    Returns:
        The plot, or None where no row has a label and both predictions.
    """
    gains = gains_by_class(rows)
    if not gains:
        return None
    shown = ends(gains)
    figure, (axes,) = _figure(height=0.9 + 0.19 * len(shown))
    axes.barh(range(len(shown)), [100 * each.gain for each in shown], color=_colour(""), height=0.7)
    axes.axvline(0, color=_MUTED, linewidth=1)
    if len(shown) < len(gains):
        axes.axhline(CLASSES - 0.5, color=_MUTED, linewidth=1, linestyle=":")
        axes.set_title(f"{CLASSES} largest and {CLASSES} smallest of {len(gains):,} classes", fontsize=10)
    times = Counter(each.label for each in gains)
    _names(axes, [each.label if times[each.label] == 1 else f"{each.label} ({each.label_index})" for each in shown])
    axes.set_xlabel("gain over zero-shot in points")
    axes.grid(axis="x")
    return figure


@_style()
def entropies(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """How the entropy of the predictions is distributed before and after.

    Args:
        rows: The rows of a run.

    Returns:
        The plot, or None where no row has a prediction.
    """
    values = {prefix: cells(rows, f"{prefix}entropy") for prefix in KINDS}
    if not any(map(len, values.values())):
        return None
    figure, (axes,) = _figure()
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), _bins(len(rows)))
    for prefix, of_kind in values.items():
        if len(of_kind):
            shares = 100 * np.histogram(of_kind, edges)[0] / len(of_kind)
            label = f"{KINDS[prefix]} {of_kind.mean():.2f}"
            axes.stairs(shares, edges, color=_colour(prefix), linestyle=_LINES[prefix], linewidth=1.8, label=label)
    axes.set(xlabel="entropy in nats", ylabel="% of pictures", ylim=0)
    _legend(figure, axes, "mean")
    return figure


@_style()
def durations(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """How the milliseconds per picture are distributed, but for the slowest hundredth.

    Args:
        rows: The rows of a run.

    Returns:
        The plot, or None where no row has them.
    """
    values = cells(rows, "milliseconds")
    if not len(values):
        return None
    figure, (axes,) = _figure()
    values = values[values <= np.quantile(values, 0.99)]
    shares, edges = np.histogram(values, _bins(len(values)))
    axes.stairs(100 * shares / len(values), edges, color=_MUTED, fill=True)
    axes.set(xlabel="milliseconds per picture", ylabel="% of pictures", ylim=0)
    return figure


@_style()
def intervals(names: Sequence[str], values: Mapping[str, Sequence[Interval | None]], label: str) -> Figure:
    """A figure of several runs beside each other, with intervals.

    Args:
        names: The runs.
        values: By prefix (``zero_shot_``, ``averaged_`` or nothing), the figure of each run; None where a run has none.
        label: What the figure is, in hundredths.
    """
    figure, (axes,) = _figure(height=1.1 + 0.5 * len(names))
    for place, (prefix, of_kind) in enumerate(values.items()):
        having = [(row, each) for row, each in enumerate(of_kind) if each is not None]
        if having:
            # Beside each other: where two are equal, both can be seen.
            y = [row + 0.24 * (place - (len(values) - 1) / 2) for row, _ in having]
            x, low, high = 100 * np.array([each for _, each in having]).T
            axes.errorbar(x, y, xerr=(x - low, high - x), **_look(prefix) | {"linestyle": "none"}, label=KINDS[prefix])
    axes.axvline(0, color=_MUTED, linewidth=1)
    _names(axes, names)
    axes.set_xlabel(label)
    axes.grid(axis="x")
    _legend(figure, axes)
    return figure


def ends(gains: Sequence[ClassGain]) -> list[ClassGain]:
    """Of sorted classes the ones that are shown: all, or where they are many both ends."""
    return [*gains] if len(gains) <= 2 * CLASSES else [*gains[:CLASSES], *gains[-CLASSES:]]


def cells(rows: Sequence[Mapping[str, Any]], column: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The figures of a column, without empty cells."""
    return np.array([row[column] for row in rows if row.get(column) is not None], dtype=np.float64)


@_style()
def png(figure: Figure) -> bytes:
    """A plot as a PNG file on white paper."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=200, facecolor=THEME["paper"][0])
    return stream.getvalue()


@_style()
def svg(figure: Figure, name: str, title: str) -> str:
    """A plot as an element of a page, whose colours are the page's: ``var(--ink)`` and so on, by :data:`THEME`.

    Args:
        figure: The plot.
        name: Begins the ids in it, which must differ from those of the page's other plots.
        title: What it shows, for who does not see it.
    """
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # else they name addresses and the time
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(stream.getvalue())
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            for variable, (light, _) in THEME.items():
                value = value.replace(light, f"var(--{variable})")
            value = f"{name}-{value}" if key == "id" else re.sub(r"(^|url\()#", rf"\g<1>#{name}-", value)
            element.set(key, value)
    root.attrib |= {"role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its namespace: in a page an SVG needs none."""
    return name.rpartition("}")[2]


def _figure(height: float = _HEIGHT, height_ratios: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure((_WIDTH, height), layout="constrained")
    axes = figure.subplots(len(height_ratios), squeeze=False, height_ratios=height_ratios)
    return figure, list(axes[:, 0])


def _bins(n: int) -> int:
    """How many bins of a histogram `n` values fill: Rice's rule, up to what can be told apart."""
    return min(24, math.ceil(2 * math.cbrt(n)))


def _colour(prefix: str) -> str:
    return THEME[KINDS[prefix]][0]


def _look(prefix: str) -> dict[str, Any]:
    return {"color": _colour(prefix), "marker": _MARKERS[prefix], "linestyle": _LINES[prefix], "markersize": 5}


def _legend(figure: Figure, axes: Axes, title: str | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc="outside upper center", ncols=3)


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Names beside rows, the first one at the top."""
    clean = [" ".join("".join(c if c.isprintable() else " " for c in name).split()) for name in names]
    short = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in clean]
    axes.set_yticks(range(len(names)), short, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
