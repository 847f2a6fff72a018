"""A run that is told to stop (processes that are killed are in tests/cli/test_kill_and_resume.py)."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from metatpt.callbacks import GracefulStop, RunRecord
from metatpt.callbacks.stop import Stopped
from metatpt.results.runs import read_run

spec = importlib.util.spec_from_file_location("toy_run", Path(__file__).with_name("toy_run.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


class Told(toy.ToyModule):
    """Gets a signal in the middle of its second batch."""

    def test_step(self, batch, batch_idx):
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().test_step(batch, batch_idx)


def run(folder, module, stop):
    toy.make_trainer([RunRecord(folder), stop]).test(
        module, datamodule=toy.ToyData([[0, 1, 2, 3, 4, 6]]), verbose=False
    )


def test_the_batch_at_hand_is_recorded_and_then_it_ends(tmp_path, caplog):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, Told(), GracefulStop())
    assert stopped.value.code == 143
    assert [row["index"] for row in read_run(tmp_path).rows] == [0, 1, 2, 3]
    assert "the batch at hand is recorded" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_ends_by_itself_leaves_the_handler(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stop = GracefulStop()
    run(tmp_path / "a", toy.ToyModule(), stop)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(Stopped):
        run(tmp_path / "b", Told(), stop)
    run(tmp_path / "c", toy.ToyModule(), stop)  # what it was told is forgotten
    assert len(read_run(tmp_path / "c").rows) == 6


def test_processes_that_it_has_started_are_told_and_awaited(tmp_path, monkeypatch):
    monkeypatch.setattr("metatpt.callbacks.stop.CHILD_SECONDS", 0.5)
    obeys = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(7)); print(flush=True); time.sleep(60)"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); print(flush=True)\nwhile True: time.sleep(1)"
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for code in (obeys, deaf)]
    for child in children:
        child.stdout.readline()

    launcher = SimpleNamespace(procs=list(children))

    class Starts(Told):
        def on_test_start(self):
            monkeypatch.setattr(type(self.trainer.strategy), "launcher", launcher, raising=False)

    with pytest.raises(Stopped):
        run(tmp_path, Starts(), GracefulStop())
    monkeypatch.undo()
    assert [child.returncode for child in children] == [7, -signal.SIGKILL]
    assert launcher.procs == []  # Lightning's observer sees none that has failed
    for child in children:
        child.stdout.close()


def test_a_process_whose_parent_has_died_ends(tmp_path, monkeypatch, capsys):
    class Orphaned(toy.ToyModule):
        def test_step(self, batch, batch_idx):
            if batch_idx == 1:
                monkeypatch.setattr(os, "getppid", lambda: 1)
            return super().test_step(batch, batch_idx)

    run(tmp_path / "first", Orphaned(), GracefulStop())  # the first process may be left alone, by nohup for one
    monkeypatch.undo()
    monkeypatch.setattr("lightning.pytorch.Trainer.local_rank", 1)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "second", Orphaned(), GracefulStop())
    assert stopped.value.code == 1
    assert "process 0 has died" in capsys.readouterr().err
