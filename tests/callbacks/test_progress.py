import importlib.util
import io
import sys
from pathlib import Path

import pytest

from metatpt.callbacks import progress
from metatpt.callbacks.progress import AdaptationProgressBar

spec = importlib.util.spec_from_file_location("toy_run", Path(__file__).with_name("toy_run.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(command, monkeypatch, stream, n=40, module=None):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    trainer = toy.make_trainer([AdaptationProgressBar()], enable_progress_bar=True)
    options = {} if command == "predict" else {"verbose": False}
    getattr(trainer, command)(module or toy.ToyModule(), datamodule=toy.ToyData([list(range(n))]), **options)
    return stream.getvalue()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_bar_shows_running_accuracy_and_gain(command, monkeypatch):
    shown = run(command, monkeypatch, Terminal())
    last = shown.rstrip().split("\r")[-1]
    assert "20/20" in last
    assert "accuracy=50.0 %, gain=+2.5" in last
    assert "v_num" not in shown
    assert "\r" in shown


def test_bar_without_labels_has_no_figures(monkeypatch):
    module = toy.ToyModule()
    module.running = {}
    shown = run("test", monkeypatch, Terminal(), module=module)
    assert "20/20" in shown
    assert "accuracy" not in shown


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_pipe_gets_nothing_from_a_short_run(command, monkeypatch):
    assert run(command, monkeypatch, io.StringIO()) == ""


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_pipe_gets_a_line_every_so_often(command, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    lines = run(command, monkeypatch, io.StringIO(), n=8).splitlines()
    assert [line.split("[")[0].split()[-1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert all("accuracy=50.0 %, gain=+2.5" in line for line in lines)
    assert not any("\r" in line for line in lines)


def test_version_number_of_the_logger_is_not_shown(monkeypatch, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    options = {"enable_progress_bar": True, "logger": CSVLogger(tmp_path)}
    trainer = toy.make_trainer([AdaptationProgressBar()], **options)
    trainer.test(toy.ToyModule(), datamodule=toy.ToyData([[0, 1]]), verbose=False)
    assert "accuracy=" in stream.getvalue()
    assert "v_num" not in stream.getvalue()


def test_without_figures_of_the_module(monkeypatch):
    module = toy.ToyModule()
    del module.running
    assert "20/20" in run("test", monkeypatch, Terminal(), module=module)
