"""Figures of a run from its rows, one per sample.

All are functions of what a row of `predictions.csv` holds (the prediction, its probability, the label's probability
and rank), so that they can be computed again from that file. torchmetrics' functions want all probabilities of all
samples instead; the tests compare with them where they are right (their calibration error puts a confidence of
exactly 1.0 into a bin of its own, their default accuracy is a mean over classes, and they count a label of -1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

PREFIXES = ("", "zero_shot_", "averaged_")
"""What begins the columns and keys of the adapted, the zero-shot and the averaged prediction."""

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
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    bins = np.minimum(np.searchsorted(edges, confidences, side="right") - 1, n_bins - 1)
    surplus = np.bincount(bins, weights=np.asarray(correct, dtype=np.float64) - confidences, minlength=n_bins)
    return float(np.abs(surplus).sum() / len(confidences))


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
        metrics["gain"] = (sum(after) - sum(before)) / len(before)
        metrics["gain_low"], metrics["gain_high"] = gain_interval(before, after)
    return metrics
