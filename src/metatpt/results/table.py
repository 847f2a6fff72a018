"""What a run came to, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metatpt.metrics import KINDS

from .record import PREDICTIONS, Outcome


def results_table(outcome: Outcome, title: str = "", folder: str | Path | None = None) -> RenderableType:
    """One table: the predictions beside each other, the gain, the cost, and what was left out.

    Accuracies and calibration error are in percent; what has no meaning in this run is not shown. Print it with
    ``crop=False``, so that long paths stay whole.

    Args:
        outcome: What the run came to.
        title: Stands above it.
        folder: The run folder, named below it.
    """
    metrics = outcome.metrics
    kinds = [prefix for prefix in KINDS if f"{prefix}accuracy" in metrics] or [""]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for prefix in kinds:
        table.add_column(KINDS[prefix] if "accuracy" in metrics else "", justify="right")

    def compare(name: str, key: str, form: str, factor: float = 1.0) -> None:
        if key in metrics:
            cells = [metrics.get(prefix + key) for prefix in kinds]
            table.add_row(name, *("" if cell is None else form.format(cell * factor) for cell in cells))

    def single(name: str, value: str) -> None:
        table.add_row(name, *[""] * (len(kinds) - 1), value)

    compare("top-1 accuracy", "accuracy", "{:.1f} %", 100)
    compare("top-5 accuracy", "accuracy_top5", "{:.1f} %", 100)
    compare("calibration error", "ece", "{:.1f} %", 100)
    compare("negative log-likelihood", "nll", "{:.3f}")
    if "gain" in metrics:
        gain, low, high = (f"{100 * metrics[key]:+z.1f}" for key in ("gain", "gain_low", "gain_high"))
        table.add_section()
        single("gain in points", gain)
        single("its 95 % interval", f"{low} to {high}")
    if table.row_count:
        table.add_section()
    single("pictures", f"{metrics['n']} of {metrics['n_total']}")
    if not metrics["n_labelled"]:
        single("labels", "no labels")
    elif metrics["n_labelled"] < metrics["n"] - metrics["n_skipped"]:
        single("of them labelled", f"{metrics['n_labelled']}")
    single("skipped", f"{metrics['n_skipped']}")
    single("kept zero-shot", f"{outcome.n_kept_zero_shot}")
    if "images_per_second" in metrics:
        single("images per second", f"{metrics['images_per_second']:.3g}")
    if "peak_memory_mb" in metrics:
        single("peak memory", f"{metrics['peak_memory_mb']:,.0f} MB")
    return Group(*([_whole(title)] if title else []), table, *_left_out(outcome, folder))


def results_summary(outcome: Outcome, folder: str | Path) -> RenderableType:
    """A line on what was predicted and where it is, with what was left out.

    Args:
        outcome: What the run came to.
        folder: The run folder.
    """
    metrics = outcome.metrics
    parts = [_count(int(metrics["n"] - metrics["n_skipped"]), "prediction")]
    if metrics["n"] < metrics["n_total"]:
        parts.append(f"{metrics['n']} of {metrics['n_total']} pictures")
    parts.append(f"{metrics['n_skipped']} skipped")
    if outcome.n_kept_zero_shot:
        parts.append(f"{outcome.n_kept_zero_shot} kept zero-shot")
    if "images_per_second" in metrics:
        parts.append(f"{metrics['images_per_second']:.3g} images per second")
    return Group(_whole(", ".join(parts)), *_left_out(outcome, folder))


def failures(outcome: Outcome) -> str:
    """The pictures without an adapted prediction, the first of each kind by name; empty where there are none.

    Args:
        outcome: What the run came to.
    """
    n = int(outcome.metrics["n_skipped"]) + outcome.n_kept_zero_shot
    if not n:
        return ""
    first = [f"  {_line(path)}: {_line(reason)}" for path, reason in [*outcome.skipped, *outcome.kept]]
    more = [f"  ... and {n - len(first)} more, with their reasons, in {PREDICTIONS}"] if n > len(first) else []
    return "\n".join([f"{_count(n, 'picture')} without adapted prediction:", *first, *more])


def _left_out(outcome: Outcome, folder: str | Path | None) -> list[RenderableType]:
    return [
        *_files("Skipped", outcome.skipped, int(outcome.metrics["n_skipped"])),
        *_files("Kept zero-shot", outcome.kept, outcome.n_kept_zero_shot),
        *([] if folder is None else [_whole(f"Results: {Path(folder) / PREDICTIONS}")]),
    ]


def _files(heading: str, files: Sequence[tuple[str, str]], n: int) -> list[RenderableType]:
    if not files:
        return []
    lines = [f"  {_line(path)}: {_line(reason)}" for path, reason in files]
    if n > len(files):
        lines.append(f"  ... and {n - len(files)} more in {PREDICTIONS}")
    return [_whole("\n".join([f"{heading}:", *lines]))]


def _whole(text: str) -> Text:
    """`text` without line breaks of ours: paths are there to be copied."""
    return Text(text, no_wrap=True, overflow="ignore")


def _line(text: str) -> str:
    """`text` on one line, with what a terminal would act upon made visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.splitlines()))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
