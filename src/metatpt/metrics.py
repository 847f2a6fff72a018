"""Figures of a run from its rows, one per sample.

All are functions of what a row of `predictions.csv` holds (the prediction, its probability, the label's probability
and rank), so that they can be computed again from that file. torchmetrics' functions want all probabilities of all
samples instead; the tests compare with them where they are right (their calibration error puts a confidence of
exactly 1.0 into a bin of its own, their default accuracy is a mean over classes, and they count a label of -1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

PREFIXES = ("", "zero_shot_", "averaged_")
"""What begins the columns and keys of the adapted, the zero-shot and the averaged prediction."""

KINDS = {"zero_shot_": "zero-shot", "averaged_": "averaged", "": "adapted"}
"""What they are called, in the order in which they are shown."""

BINS = 15
RESAMPLES = 10_000
TOP = 5


def accuracy(prediction: Sequence[int], label: Sequence[int]) -> float:
    """Share of the samples whose prediction is their label: a mean over samples, not over classes.

    Args:
        prediction: ``[N]`` class indices.
        label: ``[N]`` class indices.

    >>> accuracy([0] * 10, [0] * 8 + [1, 2])
    0.8
    """
    return sum(guess == truth for guess, truth in zip(prediction, label, strict=True)) / len(label)


def accuracy_top5(label_rank: Sequence[int]) -> float:
    """Share of the samples whose label is among the five most probable classes.

    Args:
        label_rank: ``[N]`` place of the label among the classes, 1 for the most probable.

    >>> accuracy_top5([1, 5, 6, 2])
    0.75
    """
    return sum(rank <= TOP for rank in label_rank) / len(label_rank)


def accuracy_interval(correct: Sequence[bool]) -> tuple[float, float]:
    """95 % interval of an accuracy (Wilson, 1927, "Probable inference, the law of succession, ...").

    It lies in [0, 1] and has a width where all samples are right, too, which resampling them would not give.

    Args:
        correct: ``[N]`` whether each prediction is its label.

    Returns:
        Lower and upper end, as fractions.

    >>> low, high = accuracy_interval([True] * 81 + [False] * 182)
    >>> round(low, 4), round(high, 4)
    (0.2553, 0.3662)
    >>> accuracy_interval([True] * 10)[1]
    1.0
    """
    n, z = len(correct), statistics.NormalDist().inv_cdf(0.975)
    share = sum(correct) / n
    centre = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def nll(label_probability: Sequence[float]) -> float:
    """Negative log-likelihood of the labels, in nats: mean of ``-log p(label)``.

    Args:
        label_probability: ``[N]`` probabilities, above 0.

    >>> round(nll([0.5, 0.25]), 4)
    1.0397
    >>> round(nll([1e-60]), 2)
    138.16
    """
    return math.fsum(-math.log(probability) for probability in label_probability) / len(label_probability)


def ece(confidence: Sequence[float], correct: Sequence[bool], n_bins: int = BINS) -> float:
    """Expected calibration error: mean over samples of ``|accuracy - mean confidence|`` of their bin.

    Bins are equally wide and closed on the left; the last one is closed on both sides, so that a confidence of
    exactly 1.0 (which float32 reaches easily) lies in it (Guo et al., 2017, "On Calibration of Modern Neural
    Networks", section 2).

    Args:
        confidence: ``[N]`` probabilities of the predictions.
        correct: ``[N]`` whether each prediction is its label.
        n_bins: Number of bins over [0, 1].

    >>> round(ece([1.0, 0.95], [False, True]), 4)
    0.475
    """
    confidences = np.asarray(confidence, dtype=np.float64)
    surplus = np.bincount(_bins(confidences, n_bins), weights=np.asarray(correct, dtype=np.float64) - confidences)
    return float(np.abs(surplus).sum() / len(confidences))


def reliability(
    confidence: Sequence[float], correct: Sequence[bool], n_bins: int = BINS
) -> list[tuple[int, float, float]]:
    """The bins of :func:`ece` that hold a sample, lowest first: how many, their mean confidence, their accuracy.

    Args:
        confidence: ``[N]`` probabilities of the predictions.
        correct: ``[N]`` whether each prediction is its label.
        n_bins: Number of bins over [0, 1].

    >>> reliability([0.75, 1.0, 0.25], [False, True, False], n_bins=2)
    [(1, 0.25, 0.0), (2, 0.875, 0.5)]
    """
    confidences = np.asarray(confidence, dtype=np.float64)
    bins = _bins(confidences, n_bins)
    counts, sums, hits = (np.bincount(bins, weights) for weights in (None, confidences, np.asarray(correct, float)))
    held = np.flatnonzero(counts)
    return [(int(counts[bin]), float(sums[bin] / counts[bin]), float(hits[bin] / counts[bin])) for bin in held]


def _bins(confidence: npt.NDArray[np.float64], n_bins: int) -> npt.NDArray[np.intp]:
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    return np.minimum(np.searchsorted(edges, confidence, side="right") - 1, n_bins - 1)


def gain_interval(before: Sequence[bool], after: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the gain in accuracy: percentiles of a paired bootstrap over the samples.

    A sample contributes -1, 0 or +1 to the gain. To draw N samples with replacement is to draw how many of each come
    up, a multinomial, so a resample costs one draw however large N is.

    Args:
        before: ``[N]`` whether each sample was right without adaptation.
        after: ``[N]`` whether it is right with it.
        seed: Seed of the resamples.

    Returns:
        Lower and upper end, as fractions.

    >>> low, high = gain_interval([False] * 60 + [True] * 40, [True] * 20 + [False] * 40 + [True] * 40)
    >>> round(low, 2), round(high, 2)
    (0.12, 0.28)
    """
    n = len(before)
    change = [int(right) - int(was_right) for was_right, right in zip(before, after, strict=True)]
    shares = [change.count(value) / n for value in (-1, 0, 1)]
    lost, _, won = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES).T
    low, high = np.quantile((won - lost) / n, [0.025, 0.975])
    return float(low), float(high)


class Gain(NamedTuple):
    """What predictions have over others of the same samples.

    Attributes:
        gain: Accuracy minus accuracy, as a fraction.
        low: Lower end of its 95 % interval (:func:`gain_interval`).
        high: Upper end.
        n: How many samples.
        won: How many of them are right now and were not.
        lost: How many were right and are not.
    """

    gain: float
    low: float
    high: float
    n: int
    won: int
    lost: int


def gain(before: Sequence[bool], after: Sequence[bool]) -> Gain:
    """What `after` has over `before`.

    Args:
        before: ``[N]`` whether each sample was right; N is at least 1.
        after: ``[N]`` whether it is right now.

    >>> gain([True, False, False, False], [False, True, True, False])._replace(low=0, high=0)
    Gain(gain=0.25, low=0, high=0, n=4, won=2, lost=1)
    """
    won = sum(now > then for then, now in zip(before, after, strict=True))
    lost = sum(now < then for then, now in zip(before, after, strict=True))
    return Gain((won - lost) / len(before), *gain_interval(before, after), len(before), won, lost)


def scored(rows: Iterable[Mapping[str, Any]], *prefixes: str) -> list[Mapping[str, Any]]:
    """The rows that figures are over: with a label, an adapted prediction, and those of `prefixes`.

    >>> rows = [{"label_index": label, "prediction_index": 1} for label in (0, None)]
    >>> scored(rows, "")
    [{'label_index': 0, 'prediction_index': 1}]
    """
    needed = ["label_index", "prediction_index", *(f"{prefix}prediction_index" for prefix in prefixes)]
    return [row for row in rows if all(row[name] is not None for name in needed)]


def right(rows: Iterable[Mapping[str, Any]], prefix: str = "") -> list[bool]:
    """Whether each row's prediction is its label.

    >>> right([{"label_index": 0, "zero_shot_prediction_index": 1}], "zero_shot_")
    [False]
    """
    return [row[f"{prefix}prediction_index"] == row["label_index"] for row in rows]


class ClassGain(NamedTuple):
    """Accuracies of the pictures of one class, as fractions; `averaged` over those of them that have one, or None."""

    label_index: int
    label: str
    n: int
    zero_shot: float
    averaged: float | None
    adapted: float

    @property
    def gain(self) -> float:
        """What adaptation brings the class."""
        return self.adapted - self.zero_shot


def gains_by_class(rows: Iterable[Mapping[str, Any]]) -> list[ClassGain]:
    """Accuracies by class, the largest gain first, over the rows that have a label and both predictions.

    Classes are told apart by their index: ImageNet has two pairs of equal names. Of equal gains the class of the lowest
    index comes first.

    >>> row = {"label_index": 3, "label": "crane", "zero_shot_prediction_index": 0, "averaged_prediction_index": None}
    >>> gains_by_class([row | {"prediction_index": 3}, row | {"prediction_index": 0}])
    [ClassGain(label_index=3, label='crane', n=2, zero_shot=0.0, averaged=None, adapted=0.5)]
    """
    classes: dict[int, list[Mapping[str, Any]]] = {}
    for row in scored(rows, "zero_shot_"):
        classes.setdefault(row["label_index"], []).append(row)
    found = []
    for index, of_class in classes.items():
        averaged = scored(of_class, "averaged_")
        found.append(
            ClassGain(
                index,
                of_class[0]["label"],
                n=len(of_class),
                zero_shot=statistics.fmean(right(of_class, "zero_shot_")),
                averaged=statistics.fmean(right(averaged, "averaged_")) if averaged else None,
                adapted=statistics.fmean(right(of_class)),
            )
        )
    return sorted(found, key=lambda each: (-each.gain, each.label_index))


def summarize(rows: Iterable[Mapping[str, Any]], *, n_classes: int, n_total: int) -> dict[str, float | int]:
    """The figures of a run, by the keys of `metrics.json` (speed and memory are not in the rows).

    - ``n``: rows, skipped ones included; ``n_total``: pictures of the whole split; ``n_skipped``: rows without a
      prediction; ``n_labelled``: rows with a label and a prediction, which all that follows is over.
    - ``accuracy``, ``accuracy_top5``, ``nll``, ``ece`` of the adapted predictions, with ``zero_shot_`` of the
      zero-shot ones, with ``averaged_`` of the averaged ones (over the rows that have one). Accuracies are fractions.
      A sample that kept its zero-shot prediction counts with it.
    - ``gain``: accuracy minus zero-shot accuracy over the rows that have both, with ``gain_low`` and ``gain_high``
      (:func:`gain_interval`).

    What has no meaning (no labels, top-5 of fewer than five classes, no averaged predictions) is left out.

    Args:
        rows: The rows, read once; of their columns, those of `predictions.csv` that are used here. An empty cell is
            None.
        n_classes: Number of classes that the predictions are over.
        n_total: Pictures of the whole split, however many of them are in the rows.

    >>> row = {"status": "ok", "label_index": 1, "averaged_prediction_index": None}
    >>> adapted = {"prediction_index": 1, "probability": 0.5, "label_probability": 0.5, "label_rank": 1}
    >>> zero_shot = {"zero_shot_" + name: value for name, value in adapted.items()}
    >>> summarize([row | adapted | zero_shot], n_classes=3, n_total=9)  # doctest: +NORMALIZE_WHITESPACE
    {'n': 1, 'n_total': 9, 'n_labelled': 1, 'n_skipped': 0,
     'accuracy': 1.0, 'nll': 0.6931471805599453, 'ece': 0.5,
     'zero_shot_accuracy': 1.0, 'zero_shot_nll': 0.6931471805599453, 'zero_shot_ece': 0.5,
     'gain': 0.0, 'gain_low': 0.0, 'gain_high': 0.0}
    """
    n = n_skipped = n_labelled = 0
    columns: dict[str, list[tuple[int, int, float, float, int]]] = {prefix: [] for prefix in PREFIXES}
    before: list[bool] = []
    after: list[bool] = []
    for row in rows:
        n += 1
        n_skipped += row["status"] == "skipped"
        label = row["label_index"]
        if label is None or row["prediction_index"] is None:
            continue
        n_labelled += 1
        for prefix in PREFIXES:
            if row[f"{prefix}prediction_index"] is not None:
                columns[prefix].append(
                    (
                        label,
                        row[f"{prefix}prediction_index"],
                        row[f"{prefix}probability"],
                        row[f"{prefix}label_probability"],
                        row[f"{prefix}label_rank"],
                    )
                )
        if row["zero_shot_prediction_index"] is not None:
            before.append(row["zero_shot_prediction_index"] == label)
            after.append(row["prediction_index"] == label)

    metrics: dict[str, float | int] = {"n": n, "n_total": n_total, "n_labelled": n_labelled, "n_skipped": n_skipped}
    for prefix, samples in columns.items():
        if not samples:
            continue
        labels, predictions, probabilities, label_probabilities, ranks = zip(*samples, strict=True)
        metrics[f"{prefix}accuracy"] = accuracy(predictions, labels)
        if n_classes >= TOP:
            metrics[f"{prefix}accuracy_top5"] = accuracy_top5(ranks)
        metrics[f"{prefix}nll"] = nll(label_probabilities)
        metrics[f"{prefix}ece"] = ece(probabilities, [a == b for a, b in zip(predictions, labels, strict=True)])
    if before:
        metrics["gain"], metrics["gain_low"], metrics["gain_high"] = gain(before, after)[:3]
    return metrics
