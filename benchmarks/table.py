"""Print runs as a Markdown table: ``python benchmarks/table.py runs/a runs/b ...``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def percent(metrics: dict[str, float], key: str, digits: int = 1) -> str:
    """A fraction in %, or a dash where the run has none."""
    return f"{100 * metrics[key]:.{digits}f}" if key in metrics else "-"


def row(folder: Path) -> str:
    """One line of the table."""
    metrics = json.loads((folder / "metrics.json").read_text())
    keys = ("zero_shot_nll", "averaged_nll", "nll")
    likelihoods = [f"{metrics[key]:.3f}" if key in metrics else "-" for key in keys]
    cells = [
        folder.name,
        f"{metrics['n']} of {metrics['n_total']}",
        percent(metrics, "zero_shot_accuracy"),
        percent(metrics, "averaged_accuracy"),
        percent(metrics, "accuracy"),
        f"{100 * metrics['gain']:+.1f} ({100 * metrics['gain_low']:+.1f} to {100 * metrics['gain_high']:+.1f})",
        " / ".join(percent(metrics, key) for key in ("zero_shot_ece", "averaged_ece", "ece")),
        " / ".join(likelihoods),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    print("| run | pictures | zero-shot | averaged | adapted | gain (95 %) | calibration error | likelihood loss |")
    print("|---|---|---|---|---|---|---|---|")
    for folder in options.runs:
        print(row(folder))


if __name__ == "__main__":
    main()
