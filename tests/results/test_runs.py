"""A run as it lies in its folder."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch

from metatpt.results.runs import change, largest_changes, read_run
from metatpt.results.setup import check_same_setup, hardware, read_setup, revision, versions, write_setup


def row(index, before, after, label=0):
    return {
        "index": index,
        "label_index": label,
        "zero_shot_label_probability": None if label is None else before,
        "label_probability": None if label is None else after,
        "zero_shot_entropy": before,
        "entropy": after,
    }


def test_change_is_the_labels_probability_or_the_entropy_lost():
    assert change(row(0, 0.25, 0.75)) == 0.5
    assert change(row(0, 0.75, 0.25)) == -0.5
    assert change(row(0, 1.5, 0.25, label=None)) == 1.25
    assert change(row(0, None, None)) is None


def test_largest_changes_are_those_of_a_sorted_list():
    changes = [0.25, -0.5, 0.0, 0.5, -0.25, 0.25, None]
    rows = [
        row(i, None if each is None else 0.5, None if each is None else 0.5 + each) for i, each in enumerate(changes)
    ]
    gains, losses = largest_changes(rows, 2)
    assert [each["index"] for each in gains] == [3, 0]
    assert [each["index"] for each in losses] == [1, 4]
    assert [len(each) for each in largest_changes(rows, 9)] == [3, 2]  # what did not change is neither


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run.*record-rank0\.sqlite"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_run(tmp_path / "nowhere")


def test_setup_is_compared_value_by_value(tmp_path):
    assert read_setup(tmp_path) == {}
    now = {"mean": (0.5, 0.25), "class_names": ["a", "b"], "clip": None}
    write_setup(tmp_path, now | {"sessions": []})
    before = read_setup(tmp_path)
    check_same_setup(before, now)
    check_same_setup({}, now)
    with pytest.raises(ValueError, match=r"class_names: \['b', 'a'\] \(the run: \['a', 'b'\]\)"):
        check_same_setup(before, now | {"class_names": ["b", "a"]})


def test_revision_is_the_commit_and_says_when_files_differ(tmp_path: Path):
    assert revision(tmp_path) is None

    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", tmp_path, *options, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")
    assert revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_machine_and_versions():
    found = hardware(torch.device("cpu"))
    assert found["cores"] >= 1
    assert math.isfinite(found["memory_gb"])
    assert found["processor"]
    assert versions()["torch"] == torch.__version__.partition("+")[0]
