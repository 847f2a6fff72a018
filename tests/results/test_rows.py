import math
from collections import Counter

import pytest
import torch

from metatpt.metrics import summarize
from metatpt.results import COLUMNS, make_rows
from metatpt.types import Adaptation, Batch


def make_batch(labels, first=0, **changes):
    n = len(labels)
    fields = {
        "image": torch.zeros(n, 3, 2, 2),
        "canvas": torch.zeros(n, 3, 4, 4, dtype=torch.uint8),
        "aspect": torch.ones(n),
        "label": torch.tensor(labels),
        "index": torch.arange(first, first + n),
        "path": [f"{i}.png" for i in range(first, first + n)],
        "error": [None] * n,
    }
    return Batch(**fields | changes)


def names(n):
    return [f"class {i}" for i in range(n)]


def one_row(log_probs, label=0, class_names=None, **fields):
    adaptation = Adaptation(torch.tensor([log_probs]), torch.tensor([log_probs]), **fields)
    return make_rows(make_batch([label]), adaptation, class_names or names(len(log_probs)))[0]


def test_columns_are_those_of_the_design():
    row = one_row([-0.1, -2.0], diagnostics={"spread": torch.tensor([0.25])})
    kinds = ("prediction", "prediction_index", "probability", "label_probability", "label_rank")
    assert list(row) == [
        *("index", "path", "label", "label_index", "status"),
        *kinds,
        *(f"zero_shot_{kind}" for kind in kinds),
        *(f"averaged_{kind}" for kind in kinds),
        *("reason", "entropy", "zero_shot_entropy", "averaged_entropy", "spread"),
    ]
    assert list(row)[:-1] == list(COLUMNS)


def test_rank_and_prediction_agree_with_a_sorted_list():
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        n_classes = int(torch.randint(1, 9, (1,), generator=generator))
        # Few distinct values, so that most rows hold ties.
        log_probs = torch.randint(-3, 1, (n_classes,), generator=generator).float().log_softmax(0)
        label = int(torch.randint(n_classes, (1,), generator=generator))
        order = sorted(range(n_classes), key=lambda i: (-float(log_probs[i]), i))
        row = one_row(log_probs.tolist(), label)
        assert row["prediction_index"] == order[0]
        assert row["prediction"] == f"class {order[0]}"
        assert row["label_rank"] == order.index(label) + 1
        assert row["probability"] == pytest.approx(math.exp(log_probs.max()))
        assert row["label_probability"] == pytest.approx(math.exp(log_probs[label]))


@pytest.mark.parametrize(("label", "rank"), [(657, 1), (744, 2)])
def test_tie_of_equal_names_goes_to_the_lower_index(label, rank):
    class_names = ["missile" if i in (657, 744) else f"class {i}" for i in range(1000)]
    logits = torch.zeros(1000)
    logits[[657, 744]] = 9.0
    row = one_row(logits.log_softmax(0).tolist(), label, class_names)
    assert (row["prediction_index"], row["prediction"], row["label_rank"]) == (657, "missile", rank)
    assert row["label_index"] == label


def test_probabilities_do_not_underflow():
    row = one_row([0.0, -200.0, -5000.0, -math.inf], label=1)
    assert row["label_probability"] == pytest.approx(math.exp(-200), rel=1e-12)  # 0 in float32
    for label in (2, 3):
        worst = one_row([0.0, -200.0, -5000.0, -math.inf], label=label)
        assert 0 < worst["label_probability"] < 1e-300
        assert worst["label_rank"] == label + 1


def test_rounding_above_zero_is_no_probability_above_one():
    assert one_row([1.2e-7, -20.0])["probability"] == 1.0


def test_unknown_label_leaves_its_cells_empty():
    row = one_row([-0.1, -2.0], label=-1)
    empty = {"label", "label_index", "label_probability", "label_rank", "reason"}
    empty |= {f"zero_shot_{name}" for name in ("label_probability", "label_rank")}
    assert {name for name, cell in row.items() if cell is None and not name.startswith("averaged_")} == empty
    assert row["prediction_index"] == 0


def test_filler_rows_become_no_rows():
    batch = make_batch([0, 1, 0], index=torch.tensor([4, -1, 9]))
    log_probs = torch.randn(3, 2).log_softmax(1)
    assert [row["index"] for row in make_rows(batch, Adaptation(log_probs, log_probs), names(2))] == [4, 9]


def test_unreadable_and_skipped_pictures_keep_a_row_with_their_reason():
    log_probs = torch.full((3, 2), math.nan)
    log_probs[2] = torch.tensor([-0.1, -2.0])
    batch = make_batch([0, 1, 0], error=["truncated file", None, None])
    adaptation = Adaptation(log_probs, log_probs, status=["ok", "skipped", "ok"], reason=["", "out of memory", ""])
    rows = make_rows(batch, adaptation, names(2))
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("skipped", "truncated file"),
        ("skipped", "out of memory"),
        ("ok", None),
    ]
    for row in rows[:2]:
        assert all(row[column] is None for column in COLUMNS if "prediction" in column or "probability" in column)
        assert row["label"] is not None
    metrics = summarize(rows, n_classes=2, n_total=3)
    assert (metrics["n"], metrics["n_skipped"], metrics["n_labelled"], metrics["accuracy"]) == (3, 2, 1, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("told", [True, False])
def test_sample_that_became_nan_counts_with_its_zero_shot_prediction(bad, told):
    adapted = torch.tensor([[bad, -1.0]])
    zero_shot = torch.tensor([[-2.0, -0.1]])
    fields = {"status": ["kept_zero_shot"], "reason": ["the loss became NaN"]} if told else {}
    (row,) = make_rows(make_batch([1]), Adaptation(adapted, zero_shot, **fields), names(2))
    assert row["status"] == "kept_zero_shot"
    assert "NaN" in row["reason"] or "finite" in row["reason"]
    assert (row["prediction_index"], row["label_rank"]) == (1, 1)
    assert row["probability"] == row["zero_shot_probability"] == pytest.approx(math.exp(-0.1))
    assert summarize([row], n_classes=2, n_total=1)["accuracy"] == 1.0


def test_nothing_finite_is_a_skip():
    log_probs = torch.full((1, 2), math.nan)
    (row,) = make_rows(make_batch([1]), Adaptation(log_probs, log_probs, status=["kept_zero_shot"]), names(2))
    assert row["status"] == "skipped"
    assert "finite" in row["reason"]
    assert row["prediction"] is None


def test_averaged_prediction_that_is_not_finite_is_empty():
    log_probs = torch.tensor([[-0.1, -2.0], [-0.1, -2.0]])
    averaged = torch.tensor([[-2.0, -0.1], [math.nan, -0.1]])
    rows = make_rows(make_batch([0, 0]), Adaptation(log_probs, log_probs, averaged), names(2))
    assert [row["averaged_prediction_index"] for row in rows] == [1, None]
    metrics = summarize(rows, n_classes=2, n_total=2)
    assert (metrics["accuracy"], metrics["averaged_accuracy"], metrics["n_labelled"]) == (1.0, 0.0, 2)


@pytest.mark.parametrize("sizes", [(3,), (2, 1), (1, 1, 1)])
def test_calibration_does_not_depend_on_how_pictures_were_batched(sizes):
    # As raw logits, the first two rows pass for probabilities (all lie in [0, 1]).
    logits = torch.tensor([[0.3, 0.2, 0.1], [0.25, 0.05, 0.15], [2.0, -1.0, 0.0]])
    rows = []
    for part in logits.log_softmax(1).split(sizes):
        rows += make_rows(make_batch([0] * len(part), first=len(rows)), Adaptation(part, part), names(3))
    assert summarize(rows, n_classes=3, n_total=3)["ece"] == pytest.approx(0.4740, abs=5e-5)


def test_one_class_only():
    row = one_row([0.0])
    assert (row["prediction_index"], row["probability"], row["label_rank"]) == (0, 1.0, 1)
    assert summarize([row], n_classes=1, n_total=1)["ece"] == 0.0


def test_half_precision_is_read_as_it_is():
    log_probs = torch.tensor([[-0.1, -2.0]], dtype=torch.bfloat16)
    (row,) = make_rows(make_batch([1]), Adaptation(log_probs, log_probs), names(2))
    assert row["label_probability"] == pytest.approx(math.exp(-2))


def test_diagnostics_are_short_and_empty_where_nan():
    values = torch.tensor([0.3, math.nan])
    log_probs = torch.tensor([[-0.1, -2.0]] * 2)
    rows = make_rows(make_batch([0, 0]), Adaptation(log_probs, log_probs, diagnostics={"spread": values}), names(2))
    assert [row["spread"] for row in rows] == [0.3, None]  # not 0.30000001192092896


def test_file_name_that_is_no_utf8_is_written():
    batch = make_batch([0], path=["caf\udce9.png"])
    log_probs = torch.tensor([[-0.1, -2.0]])
    (row,) = make_rows(batch, Adaptation(log_probs, log_probs), names(2))
    assert row["path"] == "caf\\udce9.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(2, 3)}, r"log_probs of shape .* = \[2, 2\].*got \[2, 3\]"),
        ({"averaged_log_probs": torch.zeros(1, 2)}, r"averaged_log_probs of shape .*got \[1, 2\]"),
        ({"diagnostics": {"angle": torch.zeros(2, 4)}}, r"'angle' of shape \[B\] = \[2\], got \[2, 4\]"),
        ({"diagnostics": {"probability": torch.zeros(2)}}, "'probability', which is a column"),
        ({"diagnostics": {"milliseconds": torch.zeros(2)}}, "'milliseconds', which is a column"),
        ({"status": ["ok"]}, "status with an entry for each of 2"),
    ],
)
def test_adaptation_that_does_not_fit_is_an_error(change, message):
    fields = {"log_probs": torch.zeros(2, 2), "zero_shot_log_probs": torch.zeros(2, 2)} | change
    with pytest.raises(ValueError, match=message):
        make_rows(make_batch([0, 1]), Adaptation(**fields), names(2))


def test_label_without_a_class_is_an_error():
    with pytest.raises(ValueError, match=r"Label 2 of 1\.png has no class: there are 2 class names"):
        make_rows(make_batch([0, 2]), Adaptation(torch.zeros(2, 2), torch.zeros(2, 2)), names(2))


def test_large_batch_of_many_classes_has_all_rows():
    log_probs = torch.randn(64, 300).log_softmax(1)
    rows = make_rows(make_batch([5] * 64), Adaptation(log_probs, log_probs, log_probs), names(300))
    assert Counter(row["status"] for row in rows) == {"ok": 64}
