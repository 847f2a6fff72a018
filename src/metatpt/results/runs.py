"""A run as it lies in its folder, and what adaptation changed most in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .record import CONFIG, METRICS, VIEWS, figures, read_facts, read_rows, record_files
from .rows import Cell, Row
from .setup import read_setup


@dataclass(frozen=True)
class Run:
    """What a run has left.

    Attributes:
        folder: Where.
        rows: A row for each picture, by index: the cells of `predictions.csv`, and the `milliseconds` that it took.
        metrics: The content of `metrics.json`; of a run that did not end computed from the rows that there are.
        setup: The content of `setup.json`.
        config: The text of `config.yaml`; empty where the run had none.
        complete: Whether it has ended.
    """

    folder: Path
    rows: list[Row]
    metrics: dict[str, float | int]
    setup: dict[str, Any]
    config: str
    complete: bool


def read_run(folder: str | Path) -> Run:
    """Reads a run, also one that was stopped.

    Raises:
        FileNotFoundError: There is no record in that folder.
        OSError: A record cannot be read, or the run is still going on.
    """
    folder = Path(folder)
    files = record_files(folder)
    if not files:
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"{folder} {what}: no record-rank0.sqlite was found there.")
    rows = list(read_rows(files))
    config = folder / CONFIG
    return Run(
        folder=folder,
        rows=rows,
        metrics=figures(rows, [read_facts(file) for file in files]),
        setup=read_setup(folder),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        complete=(folder / METRICS).exists(),
    )


def options(run: Run) -> dict[str, Any]:
    """The options of a run, as its config has them; empty where it has none."""
    content: dict[str, Any] = yaml.safe_load(run.config) or {}
    return content


def change(row: Row) -> float | None:
    """What adaptation changed for a picture: the probability that its label gained, or the entropy lost, in nats.

    The latter where there is no label. None where there is no prediction.
    """
    before, after = (
        ("entropy", "zero_shot_entropy")
        if row["label_index"] is None
        else (
            "zero_shot_label_probability",
            "label_probability",
        )
    )
    first, last = row[before], row[after]
    return last - first if isinstance(first, (int, float)) and isinstance(last, (int, float)) else None


def largest_changes(rows: Iterable[Row], n: int) -> tuple[list[Row], list[Row]]:
    """The pictures that adaptation changed most.

    Args:
        rows: Rows of a run.
        n: How many of each.

    Returns:
        Up to `n` that gained, and up to `n` that lost, each with the largest change first.
    """
    changes = [(value, row) for row in rows if (value := change(row)) is not None]
    # Sorting is stable in both directions: of equal ones that of the lowest index comes first.
    gains = sorted((pair for pair in changes if pair[0] > 0), key=lambda pair: pair[0], reverse=True)
    losses = sorted((pair for pair in changes if pair[0] < 0), key=lambda pair: pair[0])
    return [row for _, row in gains[:n]], [row for _, row in losses[:n]]


def strip_file(folder: Path, index: Cell) -> Path:
    """Where the views of a picture are shown, in a run folder that has a gallery."""
    return folder / VIEWS / f"{index}.png"


def strip_files(folder: Path) -> dict[Cell, Path]:
    """The gallery of a run: file by index of the picture."""
    files = (folder / VIEWS).glob("*.png")
    return {int(file.stem): file for file in files if file.stem.isdigit()}
