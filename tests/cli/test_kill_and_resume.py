"""A run that is killed again and again, and resumed each time, leaves what one leaves that nobody has touched."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers.command_line import rows, write_pictures
from helpers.fork_server import ForkServer

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
    pytest.mark.timeout(900),  # on a machine that has other things to do
]

KILLS = 22
N = 120
SECONDS = 200
"""Time that a run may take, on such a machine."""
GONE = 60
"""Time that what is left of a run may take to end, once one of its processes has been killed."""

COSTS = {"images_per_second", "peak_memory_mb"}
SLOW_METHOD = '''"""Test-time prompt tuning that takes its time."""

import time
from typing import Any

from metatpt.modules import TPTModule
from metatpt.types import Adaptation, Batch


class SlowModule(TPTModule):
    """Test-time prompt tuning.

    Args:
        pause: Seconds that a picture takes longer.
        **kwargs: See TPTModule.
    """

    def __init__(self, pause: float = 0.03, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pause = pause

    def adapt(self, batch: Batch) -> Adaptation:
        """Wait, and adapt."""
        time.sleep(self.pause * len(batch))
        return super().adapt(batch)
'''


class Session:
    """The processes of a run, which have a session of their own each.

    Args:
        leaders: The processes that were started.
        status: The exit status of one of them, once it has ended within so many seconds.
        log: Takes what they print, or the beginning of the names of the files that do.
    """

    def __init__(self, leaders: list[int], status: Callable[[int, float], int], log: Path) -> None:
        self.leaders = leaders
        self.log = log
        self._status = status

    def end(self, seconds: float = SECONDS) -> list[int]:
        """Exit status of each, once nothing of the run is left."""
        limit = time.monotonic() + seconds
        found = [self._status(leader, seconds) for leader in self.leaders]
        while self._others():
            assert time.monotonic() < limit, f"{self._others()} still run"
            time.sleep(0.05)
        return found

    def has_ended(self) -> bool:
        return not any(_runs(psutil.Process(leader)) for leader in self.leaders if psutil.pid_exists(leader))

    def printed(self) -> str:
        return "".join(file.read_text() for file in sorted(self.log.parent.glob(f"{self.log.name}*")))

    def kill(self) -> None:
        for leader in self.leaders:
            os.killpg(leader, signal.SIGKILL)

    def _others(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _runs(process, self.leaders)]


def _runs(process: psutil.Process, sessions: list[int] | None = None) -> bool:
    """Whether it still runs, in one of some sessions."""
    try:
        there = sessions is None or os.getsid(process.pid) in sessions
        return there and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


class Commands:
    """Runs of the slow method on the same pictures."""

    def __init__(self, server: ForkServer, root: Path, clip: Path) -> None:
        self.server = server
        self.root = root
        self.launched: list[subprocess.Popen[bytes]] = []
        (root / "slow.py").write_text(SLOW_METHOD)
        write_pictures(root / "pets", "cat", "dog", n=N // 2)
        self.new = ["test", "--model", "slow.SlowModule", "--model.n_views", 4, "--model.selection", 0.5]
        self.new += ["--data", "FolderDataModule", "--data.root", root / "pets"]
        self.new += ["--model.clip", clip, "--trainer.accelerator", "cpu", "--run"]

    def fork(self, *arguments: object) -> Session:
        log = self._log()
        return Session([self.server.start(self.root, arguments, log)], self.server.status, log)

    def fork_two(self, *arguments: object) -> Session:
        log = self._log()
        return Session(self.server.start_ranks(self.root, arguments, log, 2), self.server.status, log)

    def launch_two(self, *arguments: object) -> Session:
        """Two processes, of which the first one starts the second, as a user does it."""
        whole = [sys.executable, "-m", "metatpt", *arguments, "--trainer.strategy", "ddp", "--trainer.devices", 2]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        log = self._log()
        with log.open("w") as stream:
            process = subprocess.Popen(
                list(map(str, whole)), cwd=self.root, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            )  # fmt: skip
        self.launched.append(process)
        return Session([process.pid], lambda _, seconds: process.wait(seconds), log)

    def finish(self, session: Session) -> str:
        assert set(session.end()) == {0}, session.printed()
        return session.printed()

    def _log(self) -> Path:
        return self.root / f"log-{len(list(self.root.glob('log-*'))):03}"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: Path) -> Iterator[Commands]:
    with ForkServer() as server:
        commands = Commands(server, tmp_path_factory.mktemp("runs"), tiny_clip_folder)
        yield commands
        for process in commands.launched:
            if process.poll() is None:  # of a test that has failed
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def untouched(commands: Commands) -> Path:
    """A run that was never killed."""
    folder = commands.root / "untouched"
    commands.finish(commands.fork(*commands.new, folder))
    assert {row["status"] for row in rows(folder)} == {"ok"}
    return folder


def await_batches(folder: Path, n: int, session: Session, start: float) -> None:
    """Wait until about so many batches of a session are recorded, or it has ended.

    It has begun once it has noted so in `setup.json`; SQLite's log then grows with each batch (the record is locked).
    """
    setup, sizes = folder / "setup.json", set()
    while time.time() < start + SECONDS:
        if setup.exists() and setup.stat().st_mtime > start:
            sizes.add(sum(file.stat().st_size for file in folder.glob("record-rank*.sqlite-wal") if file.exists()))
        if len(sizes) > n or session.has_ended():
            return
        time.sleep(0.002)
    raise TimeoutError(session.printed())


def recorded(folder: Path) -> list[int]:
    """Indices in all records together; no record is damaged."""
    found = []
    for file in folder.glob("record-rank*.sqlite"):
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            found += [index for (index,) in connection.execute('SELECT "index" FROM rows')]
    return found


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def figures(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in content.items() if name not in COSTS}


def check_same(folder: Path, untouched: Path) -> None:
    assert (folder / "predictions.csv").read_bytes() == (untouched / "predictions.csv").read_bytes()
    assert figures(folder) == figures(untouched)
    assert sorted(recorded(folder)) == list(range(N))


def pictures_done(session: Session) -> int:
    """As it was when a session went on with a run."""
    found = re.search(r"(\d+) pictures are done", session.printed())
    return int(found[1]) if found else 0


def test_many_kills(commands: Commands, untouched: Path) -> None:
    random = np.random.default_rng(0)
    folder = commands.root / "killed"
    ways = random.permutation(["one"] * 13 + ["two"] * 5 + ["launched"])
    # Where one of two is killed, the other may first do all that it can.
    ways = ["one", *ways, "the first of two", "the second of two"]
    assert len(ways) == KILLS
    arguments = [*commands.new, folder]
    done = []
    for way in ways:
        begun, batches = time.time(), int(random.integers(1, 4))
        start = {"one": commands.fork, "two": commands.fork_two}.get(way, commands.launch_two)
        session = start(*arguments, "--data.batch_size", random.integers(1, 3))
        if done and way == "one" and random.random() < 0.2:
            time.sleep(random.uniform(0.1, 2))  # while it starts
        else:
            await_batches(folder, batches, session, begun)
            time.sleep(random.uniform(0, 0.06))
        if way.endswith("of two"):
            first = psutil.Process(session.leaders[0])
            (first if way.startswith("the first") else first.children()[0]).kill()
            assert session.end(GONE) != [0]
        else:
            session.kill()
            assert set(session.end(GONE)) == {-signal.SIGKILL}, f"it ended; at the kills before, {done} were done"
        done.append(pictures_done(session))
        arguments = ["test", "--resume", folder]
    assert len(set(done)) > KILLS // 2, f"most kills came before any batch: {done}"
    commands.finish(commands.fork(*arguments))
    check_same(folder, untouched)
    # what is done can be resumed too: nothing is left to do
    printed = commands.finish(commands.fork(*arguments))
    assert f"{N} pictures are done" in printed
    check_same(folder, untouched)


@pytest.mark.parametrize("start", ["fork", "launch_two"])
def test_told_to_stop(commands: Commands, untouched: Path, start: str) -> None:
    """As batch systems do before they kill: with several processes, the first one alone."""
    folder = commands.root / f"told-{start}"
    begun = time.time()
    session = getattr(commands, start)(*commands.new, folder, "--data.batch_size", 2)
    await_batches(folder, 6, session, begun)
    os.kill(session.leaders[0], signal.SIGTERM)
    assert session.end(GONE) == [128 + signal.SIGTERM]
    printed = session.printed()
    assert "Told to stop (SIGTERM): the batch at hand is recorded" in printed
    assert f"To go on: metatpt test --resume {folder}" in printed
    assert "Traceback" not in printed
    assert not (folder / "predictions.csv").exists()
    done = len(recorded(folder))
    assert 0 < done < N
    alone = ("--trainer.devices", 1, "--trainer.strategy", "auto")  # its own config says two processes, or one
    printed = commands.finish(commands.fork("test", "--resume", folder, *alone))
    assert f"{done} pictures are done" in printed
    check_same(folder, untouched)


def test_a_stream_goes_on_where_it_was(commands: Commands, untouched: Path) -> None:
    """Each prediction depends on all pictures before it."""
    online = ("--reset.policy", "online", "--data.batch_size", 1)
    whole, folder = commands.root / "stream", commands.root / "stream-killed"
    commands.finish(commands.fork(*commands.new, whole, *online))
    assert (whole / "predictions.csv").read_bytes() != (untouched / "predictions.csv").read_bytes()
    arguments = [*commands.new, folder, *online]
    for batches in (5, 20, 1):
        begun = time.time()
        session = commands.fork(*arguments)
        await_batches(folder, batches, session, begun)
        session.kill()
        assert session.end(GONE) == [-signal.SIGKILL]
        arguments = ["test", "--resume", folder]
    commands.finish(session := commands.fork(*arguments))
    assert 20 < pictures_done(session) < N
    check_same(folder, whole)


def test_another_config_is_refused(commands: Commands) -> None:
    folder = commands.root / "refused"
    begun = time.time()
    session = commands.fork(*commands.new, folder)
    await_batches(folder, 2, session, begun)
    session.kill()
    session.end(GONE)
    before = content(folder)
    for arguments, said in [
        (("--model.n_views", 5), "--model.n_views 5 (the run: 4)"),
        (("--seed_everything", 1), "--seed_everything 1 (the run: 0)"),
        (
            ("--model", "ZeroShotModule"),
            "--model 'metatpt.modules.ZeroShotModule' (the run: 'slow.SlowModule')",
        ),
        (("--run", commands.root / "another"), "--run and --resume are both given"),
    ]:
        session = commands.fork("test", "--resume", folder, *arguments)
        assert session.end() == [2]
        assert said in session.printed()
    session = commands.fork("predict", "--resume", folder)
    assert session.end() == [2]
    assert f"it is a run of test: metatpt test --resume {folder}" in session.printed()
    assert content(folder) == before


def test_a_config_with_code_is_not_run(commands: Commands, untouched: Path) -> None:
    folder, marker = commands.root / "code", commands.root / "marker"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"model: !!python/object/apply:builtins.open [{marker}, w]\n")
    session = commands.fork("test", "--resume", folder)
    assert session.end() == [2]
    assert "could not determine a constructor for the tag" in session.printed()
    assert not marker.exists()
