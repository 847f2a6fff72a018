"""A row per sample, as it stands in `predictions.csv`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from metatpt.metrics import PREFIXES
from metatpt.types import Adaptation, Batch, Status

Cell = int | float | str | None
Row = dict[str, Cell]
"""The cells of a sample by column; None is an empty cell."""

_PREDICTION = ("prediction", "prediction_index", "probability", "label_probability", "label_rank")
COLUMNS: tuple[str, ...] = (
    "index",
    "path",
    "label",
    "label_index",
    "status",
    *(prefix + name for prefix in PREFIXES for name in _PREDICTION),
    "reason",
    *(prefix + "entropy" for prefix in PREFIXES),
)
"""The columns of every run, in order; a method's diagnostics follow them under their own names."""

RECORDED = (*COLUMNS, "milliseconds")
"""The columns of the record. `predictions.csv` has no times in it, so that two equal runs leave equal files."""

_FLOOR = float(np.finfo(np.float64).tiny)  # exp(-708): below it a probability would lose digits, then become 0
_SKIPPED: Status = "skipped"


def make_rows(batch: Batch, adaptation: Adaptation, class_names: Sequence[str]) -> list[Row]:
    """The rows of a batch: one for each sample, skipped ones included, none for filler rows (index -1).

    Probabilities are computed from the log-probabilities in float64 and lie in [2.2e-308, 1]. The prediction is the
    most probable class, of equal ones that of the lowest index; `label_rank` is 1 for the most probable class and
    counts equal ones in the same order. Entropies are those of the C probabilities, in nats. A sample whose adapted
    log-probabilities are not finite keeps its zero-shot prediction; where that is not finite either, it has none and
    is skipped.

    Args:
        batch: B pictures.
        adaptation: What a method made of them, all B rows.
        class_names: C names.

    Raises:
        ValueError: The adaptation does not fit the batch or the class names.
    """
    _check(batch, adaptation, class_names)
    log_probs = {
        "": _float64(adaptation.log_probs),
        "zero_shot_": _float64(adaptation.zero_shot_log_probs),
        "averaged_": None if adaptation.averaged_log_probs is None else _float64(adaptation.averaged_log_probs),
    }
    labels, indices = batch.label.tolist(), batch.index.tolist()
    diagnostics = {name: values.detach().float().cpu().numpy() for name, values in adaptation.diagnostics.items()}
    rows = []
    for i, index in enumerate(indices):
        if index < 0:
            continue
        label = labels[i] if labels[i] >= 0 else None
        of_sample = {prefix: None if values is None else values[i] for prefix, values in log_probs.items()}
        status, reason = _outcome(batch.error[i], adaptation, i, of_sample)
        if status == "skipped":
            of_sample = dict.fromkeys(PREFIXES)
        elif status == "kept_zero_shot":
            of_sample[""] = of_sample["zero_shot_"]
        row: Row = {
            "index": index,
            "path": as_written(batch.path[i]),
            "label": None if label is None else as_written(class_names[label]),
            "label_index": label,
            "status": status,
        }
        for prefix in PREFIXES:
            cells = _prediction(of_sample[prefix], label, class_names)
            row.update({prefix + name: cell for name, cell in zip(_PREDICTION, cells, strict=True)})
        row["reason"] = as_written(reason) or None
        row.update({prefix + "entropy": _entropy(of_sample[prefix]) for prefix in PREFIXES})
        row.update({name: _figure(values[i]) for name, values in diagnostics.items()})
        rows.append(row)
    return rows


def _outcome(
    error: str | None, adaptation: Adaptation, i: int, log_probs: dict[str, npt.NDArray[np.float64] | None]
) -> tuple[Status, str]:
    """Status of a sample and the reason for it: what the method says, unless the numbers say otherwise."""
    status = adaptation.status[i] if adaptation.status else "ok"
    reason = adaptation.reason[i] if adaptation.reason else ""
    if error is not None:
        return _SKIPPED, error
    if status == "skipped":
        return status, reason
    if status == "ok" and _is_prediction(log_probs[""]):
        return status, reason
    if _is_prediction(log_probs["zero_shot_"]):
        return "kept_zero_shot", reason or "the adapted log-probabilities are not finite"
    return _SKIPPED, reason or "neither the adapted nor the zero-shot log-probabilities are finite"


def _is_prediction(log_probs: npt.NDArray[np.float64] | None) -> bool:
    """Whether ``[C]`` log-probabilities say something; a class of probability 0 (-inf) is no fault."""
    return log_probs is not None and not np.isnan(log_probs).any() and bool(np.isfinite(log_probs.max()))


def _prediction(
    log_probs: npt.NDArray[np.float64] | None, label: int | None, class_names: Sequence[str]
) -> tuple[Cell, Cell, Cell, Cell, Cell]:
    """The five cells of a prediction, from ``[C]`` log-probabilities."""
    if log_probs is None or not _is_prediction(log_probs):
        return None, None, None, None, None
    best = int(log_probs.argmax())  # numpy promises the first of equal ones, on every machine
    cells = as_written(class_names[best]), best, _probability(log_probs[best])
    if label is None:
        return *cells, None, None
    own = log_probs[label]
    rank = 1 + int((log_probs > own).sum()) + int((log_probs[:label] == own).sum())
    return *cells, _probability(own), rank


def _entropy(log_probs: npt.NDArray[np.float64] | None) -> float | None:
    if log_probs is None or not _is_prediction(log_probs):
        return None
    possible = log_probs[log_probs > -np.inf]  # 0 log 0 is 0
    return max(0.0, -float((np.exp(possible) * possible).sum()))


def _probability(log_prob: float) -> float:
    # Rounding of the log-softmax can leave a value just above 0.
    return max(_FLOOR, math.exp(min(float(log_prob), 0.0)))


def _float64(log_probs: Tensor) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = log_probs.detach().cpu().double().numpy()
    return values


def _figure(value: np.float32) -> float | None:
    """A diagnostic as the shortest decimal that is this float32, or an empty cell for NaN."""
    return None if np.isnan(value) else float(str(value))


def as_written(value: str) -> str:
    r"""`value` as it can be written: bytes of a file name that are not UTF-8 become ``\udcXX``."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _check(batch: Batch, adaptation: Adaptation, class_names: Sequence[str]) -> None:
    expected = (len(batch), len(class_names))
    for name in ("log_probs", "zero_shot_log_probs", "averaged_log_probs"):
        values = getattr(adaptation, name)
        if values is not None and tuple(values.shape) != expected:
            raise ValueError(
                f"Expected Adaptation.{name} of shape [B, C] = {list(expected)} (B pictures, C class names), "
                f"got {list(values.shape)}."
            )
    for name, values in adaptation.diagnostics.items():
        if tuple(values.shape) != expected[:1]:
            raise ValueError(
                f"Expected diagnostic {name!r} of shape [B] = [{len(batch)}], got {list(values.shape)}: "
                "a diagnostic is one figure per sample."
            )
        if name in RECORDED:
            raise ValueError(f"A diagnostic is called {name!r}, which is a column of every record: rename it.")
    for name in ("status", "reason"):
        given = getattr(adaptation, name)
        if given and len(given) != len(batch):
            raise ValueError(
                f"Expected Adaptation.{name} with an entry for each of {len(batch)} pictures, got {given}."
            )
    highest = int(batch.label.max()) if len(batch) else -1
    if highest >= len(class_names):
        row = int(batch.label.argmax())
        raise ValueError(
            f"Label {highest} of {batch.path[row]} has no class: there are {len(class_names)} class names "
            f"(labels 0 to {len(class_names) - 1}, -1 where unknown)."
        )
