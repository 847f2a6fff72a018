import math
import random

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from metatpt.metrics import PREFIXES, accuracy, accuracy_top5, ece, gain_interval, nll, summarize


def random_row(rng, n_classes, label, averaged=True):
    row = {"status": "ok", "label_index": label}
    for prefix in PREFIXES:
        prediction = None if prefix == "averaged_" and not averaged else rng.randrange(n_classes)
        known = prediction is not None and label is not None
        row |= {
            f"{prefix}prediction_index": prediction,
            f"{prefix}probability": None if prediction is None else rng.random(),
            f"{prefix}label_probability": rng.random() + 1e-9 if known else None,
            f"{prefix}label_rank": (1 if prediction == label else rng.randint(2, n_classes)) if known else None,
        }
    return row


def skipped_row(label):
    row = {"status": "skipped", "label_index": label}
    columns = ("prediction_index", "probability", "label_probability", "label_rank")
    return row | {prefix + column: None for prefix in PREFIXES for column in columns}


@pytest.mark.parametrize("n_bins", [10, 15])
def test_confidence_of_exactly_one_lies_in_the_last_bin(n_bins):
    assert ece([1.0, 0.95], [False, True], n_bins) == pytest.approx(0.475, abs=1e-12)


def test_calibration_error_is_that_of_torchmetrics_below_one():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 7, generator=generator).double().mul(3).softmax(1)
    labels = torch.randint(7, (500,), generator=generator)
    confidence, prediction = probabilities.max(1)
    expected = multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=15)
    assert ece(confidence.tolist(), (prediction == labels).tolist()) == pytest.approx(float(expected), abs=1e-6)


def test_bins_are_closed_on_the_left():
    # 0.2 opens the fourth of 15 bins: with 0.19 in the third, their errors do not cancel.
    assert ece([0.2, 0.19], [True, False], 15) == pytest.approx((0.8 + 0.19) / 2)
    assert ece([0.2, 0.21], [True, False], 15) == pytest.approx(abs(1 - 0.41) / 2)


def test_accuracy_is_a_mean_over_samples():
    prediction, label = [0] * 10, [0] * 8 + [1, 2]
    assert accuracy(prediction, label) == pytest.approx(0.8)
    reference = multiclass_accuracy(torch.tensor(prediction), torch.tensor(label), num_classes=3, average="micro")
    assert accuracy(prediction, label) == pytest.approx(float(reference))


def test_top5_and_likelihood_by_hand():
    assert accuracy_top5([1, 2, 5, 6, 1000]) == pytest.approx(0.6)
    assert nll([1.0, math.exp(-3)]) == pytest.approx(1.5)
    assert nll([1e-200]) == pytest.approx(200 * math.log(10))  # float32 has no such number


def test_interval_is_that_of_resampling_the_samples_themselves():
    rng = random.Random(1)
    before = [rng.random() < 0.5 for _ in range(120)]
    after = [rng.random() < 0.6 for _ in range(120)]
    change = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    gains = [sum(rng.choices(change, k=120)) / 120 for _ in range(4000)]
    expected = np.quantile(gains, [0.025, 0.975])
    assert gain_interval(before, after) == pytest.approx(expected, abs=0.012)  # a step of 1/120 and a bit


def test_interval_is_paired_seeded_and_degenerate_without_changes():
    swap = [True, False] * 50, [False, True] * 50
    assert gain_interval(*swap) == gain_interval(*swap)
    assert gain_interval(*swap)[0] < 0 < gain_interval(*swap)[1]
    assert gain_interval(swap[0], swap[0]) == (0.0, 0.0)  # unpaired, it would be about 28 points wide
    assert gain_interval([True], [False]) == (-1.0, -1.0)


@pytest.mark.parametrize("n_classes", [1, 3, 4, 5, 1000])
def test_top5_of_fewer_than_five_classes_is_left_out(n_classes):
    rng = random.Random(0)
    metrics = summarize([random_row(rng, max(n_classes, 2), 0) for _ in range(9)], n_classes=n_classes, n_total=9)
    assert ("accuracy_top5" in metrics) == (n_classes >= 5)
    assert ("averaged_accuracy_top5" in metrics) == (n_classes >= 5)


def test_without_labels_only_counts_are_left():
    rng = random.Random(0)
    rows = [random_row(rng, 6, None) for _ in range(4)] + [skipped_row(None)]
    assert summarize(rows, n_classes=6, n_total=50) == {"n": 5, "n_total": 50, "n_labelled": 0, "n_skipped": 1}
    assert summarize([], n_classes=0, n_total=0) == {"n": 0, "n_total": 0, "n_labelled": 0, "n_skipped": 0}


def test_without_views_averaged_figures_are_left_out():
    rng = random.Random(0)
    metrics = summarize([random_row(rng, 6, 1, averaged=False) for _ in range(4)], n_classes=6, n_total=4)
    assert not [key for key in metrics if key.startswith("averaged")]
    assert "zero_shot_ece" in metrics


def test_half_labelled_counts_the_labelled_half():
    rng = random.Random(0)
    labelled = [random_row(rng, 6, i % 6) for i in range(30)]
    rest = [random_row(rng, 6, None) for _ in range(30)] + [skipped_row(2)]
    both = summarize(labelled + rest, n_classes=6, n_total=99)
    alone = summarize(labelled, n_classes=6, n_total=30)
    assert (both["n"], both["n_labelled"], both["n_skipped"]) == (61, 30, 1)
    for key in alone.keys() - {"n", "n_total", "n_skipped"}:
        assert both[key] == alone[key], key


def test_keys_are_those_of_the_design():
    rng = random.Random(0)
    metrics = summarize([random_row(rng, 6, i % 6) for i in range(8)], n_classes=6, n_total=8)
    figures = [prefix + name for prefix in PREFIXES for name in ("accuracy", "accuracy_top5", "nll", "ece")]
    gain = ["gain", "gain_low", "gain_high"]
    assert set(metrics) == {"n", "n_total", "n_labelled", "n_skipped", *figures, *gain}
    assert metrics["gain"] == pytest.approx(metrics["accuracy"] - metrics["zero_shot_accuracy"])
    assert metrics["gain_low"] <= metrics["gain"] <= metrics["gain_high"]
