import io
import re

import pytest
from rich.console import Console

from metatpt.results import Outcome, results_summary, results_table

FULL = {
    **{"n": 210, "n_total": 2048, "n_labelled": 180, "n_skipped": 3},
    **{"accuracy": 0.5, "accuracy_top5": 0.9123, "nll": 1.23456, "ece": 0.0871},
    **{"zero_shot_accuracy": 0.45, "zero_shot_accuracy_top5": 0.9, "zero_shot_nll": 1.5, "zero_shot_ece": 0.1},
    **{"averaged_accuracy": 0.52, "averaged_accuracy_top5": 0.91, "averaged_nll": 1.4, "averaged_ece": 0.11},
    **{"gain": 0.05, "gain_low": -0.0123, "gain_high": 0.104},
    **{"images_per_second": 12.345, "peak_memory_mb": 1812.4},
}


def render(renderable, width=80):
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(renderable, crop=False)
    return stream.getvalue()


def cells(text, name):
    """The cells of the line that begins with `name`."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return re.split(r"\s{2,}", line.strip())[1:]


def without(*keys):
    return {key: value for key, value in FULL.items() if key not in keys}


def test_full_table():
    text = render(results_table(Outcome(FULL, 2), "test: MetaTPTModule", "runs/a"))
    assert text.splitlines()[0].strip() == "test: MetaTPTModule"
    assert re.search(r"zero-shot +averaged +adapted", text)
    assert cells(text, "top-1") == ["45.0 %", "52.0 %", "50.0 %"]
    assert cells(text, "top-5") == ["90.0 %", "91.0 %", "91.2 %"]
    assert cells(text, "calibration error") == ["10.0 %", "11.0 %", "8.7 %"]
    assert cells(text, "negative log") == ["1.500", "1.400", "1.235"]
    assert cells(text, "gain") == ["+5.0"]
    assert cells(text, "its 95 % interval") == ["-1.2 to +10.4"]
    assert cells(text, "pictures") == ["210 of 2048"]
    assert cells(text, "of them labelled") == ["180"]
    assert cells(text, "skipped") == ["3"]
    assert cells(text, "kept zero-shot") == ["2"]
    assert cells(text, "images per second") == ["12.3"]
    assert cells(text, "peak memory") == ["1,812 MB"]
    assert "Results: runs/a/predictions.csv" in text
    assert "\x1b" not in text  # piped: no colour


def test_without_views_there_is_no_averaged_column():
    text = render(results_table(Outcome({key: value for key, value in FULL.items() if "averaged" not in key})))
    assert "averaged" not in text
    assert cells(text, "top-1") == ["45.0 %", "50.0 %"]


def test_few_classes_leave_out_top5():
    text = render(results_table(Outcome({key: value for key, value in FULL.items() if "top5" not in key})))
    assert "top-5" not in text
    assert "top-1" in text


def test_without_labels_no_accuracy_is_shown():
    metrics = {"n": 5, "n_total": 5, "n_labelled": 0, "n_skipped": 1, "images_per_second": 0.5}
    text = render(results_table(Outcome(metrics)))
    assert "no labels" in text
    assert not re.search(r"accuracy|calibration|gain|nan|zero-shot +adapted", text)
    assert cells(text, "pictures") == ["5 of 5"]


def test_memory_and_speed_may_be_missing():
    text = render(results_table(Outcome(without("images_per_second", "peak_memory_mb"))))
    assert "memory" not in text
    assert "per second" not in text


@pytest.mark.parametrize("shape", [results_table, lambda outcome: results_summary(outcome, "runs/a")])
def test_left_out_files_are_listed_and_capped(shape):
    skipped = [(f"a/{i}[red].png", "truncated\nfile") for i in range(10)]
    outcome = Outcome(without() | {"n_skipped": 14}, 1, kept=[("b.png", "the loss became NaN")], skipped=skipped)
    text = render(shape(outcome))
    assert "a/9[red].png: truncated file" in text  # brackets are no markup
    assert "... and 4 more in predictions.csv" in text
    assert "b.png: the loss became NaN" in text
    assert "... and 4 more" not in render(shape(Outcome(without() | {"n_skipped": 10}, 0, skipped=skipped)))


def test_control_characters_of_a_file_name_do_not_reach_the_terminal():
    text = render(results_table(Outcome(FULL, 0, skipped=[("a\x1b[2J.png", "no picture")])))
    assert "\x1b" not in text
    assert r"a\x1b[2J.png: no picture" in text


def test_long_paths_stay_whole_and_narrow_terminals_keep_the_figures():
    folder = "runs/" + "x" * 200
    assert f"Results: {folder}/predictions.csv" in render(results_summary(Outcome(FULL), folder))
    assert cells(render(results_table(Outcome(FULL)), 60), "top-1") == ["45.0 %", "52.0 %", "50.0 %"]


def test_summary_says_what_and_where():
    metrics = {"n": 20, "n_total": 2000, "n_labelled": 0, "n_skipped": 1, "images_per_second": 40.0}
    text = render(results_summary(Outcome(metrics, 2), "runs/a"))
    assert "19 predictions, 20 of 2000 pictures, 1 skipped, 2 kept zero-shot, 40 images per second" in text
    assert "runs/a/predictions.csv" in text
    assert "1 prediction, 0 skipped" in render(
        results_summary(Outcome(metrics | {"n": 1, "n_total": 1, "n_skipped": 0}), "")
    )
