"""`metatpt report`: which runs, where to, and what is no run."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.command_line import CommandLine
from helpers.runs import make_samples, write_run

from metatpt.results import Record

NAMES = ["cat", "dog"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "first", make_samples(4, NAMES), NAMES)


def test_a_run_of_the_command_line(metatpt: CommandLine) -> None:
    assert metatpt.small("test", "--model", "ViewAverageModule", "--model.n_views", 4, "--run", "first").status == 0
    result = metatpt("report", "first")
    assert result.status == 0, result.err
    assert result.out == f"Report: {Path('first', 'report.html')}\n"
    page = Path("first", "report.html").read_text(encoding="utf-8")
    assert "<title>ViewAverageModule on FolderDataModule</title>" in page
    assert "over 7 pictures" in " ".join(page.split())
    assert Path("first", "plots", "reliability.png").is_file()


def test_several_go_into_a_folder_of_their_own(metatpt: CommandLine, run: Path) -> None:
    second = write_run(run.parent / "second", make_samples(4, NAMES), NAMES)
    result = metatpt("report", run, second)
    assert result.status == 0, result.err
    assert "2 runs beside each other" in Path("report", "report.html").read_text(encoding="utf-8")
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("order", [["RUN", "--to", "there/it/is"], ["--to=there/it/is", "RUN"]])
def test_another_folder(metatpt: CommandLine, run: Path, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metatpt.results.report._ONE_RUN", {})
    result = metatpt("report", *(str(run) if each == "RUN" else each for each in order))
    assert result.status == 0, result.err
    assert Path("there", "it", "is", "report.html").is_file()
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which run? metatpt report RUN"),
        (["nowhere"], "nowhere is no folder: no record-rank0.sqlite was found there."),
        (["."], "holds no run: no record-rank0.sqlite was found there."),
        (["RUN", "nowhere"], "nowhere is no folder"),
        (["RUN", "--too", "x"], "--too: there is no such option; report takes run folders and --to FOLDER."),
        (["RUN", "--to"], "--to: expected one argument"),
    ],
)
def test_what_cannot_be_reported(metatpt: CommandLine, run: Path, arguments: list[str], message: str) -> None:
    result = metatpt("report", *(str(run) if each == "RUN" else each for each in arguments))
    assert result.status == 2
    assert message in result.message
    assert not Path("report").exists()


def test_where_it_cannot_be_written(metatpt: CommandLine, run: Path) -> None:
    Path("file").write_text("")
    result = metatpt("report", run, "--to", "file")
    assert result.status == 1
    assert "The report cannot be written" in result.message
    assert "--to" in result.message


def test_a_run_that_is_still_going_on(metatpt: CommandLine, run: Path) -> None:
    record = Record(run)
    result = metatpt("report", run)
    record.close()
    assert result.status == 1
    assert "a run is still writing there" in result.message


@pytest.mark.parametrize("arguments", [["--help"], ["-h", "some/run"]])
def test_help(metatpt: CommandLine, arguments: list[str]) -> None:
    result = metatpt("report", *arguments)
    assert result.status == 0
    assert "usage: metatpt report RUN [RUN ...] [--to FOLDER]" in result.out
    assert "--model" not in result.out
