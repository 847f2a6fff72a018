"""A run over several processes leaves what a run on one leaves, sample by sample."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.command_line import rows, write_pictures
from helpers.fork_server import ForkServer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

COSTS = {"images_per_second", "peak_memory_mb"}
SECONDS = 200
"""Time that a run may take, on a machine that has other things to do."""

METHODS = {
    "tuned": ["MetaTPTModule", "--model.n_views", 4, "--model.selection", 0.5, "--model.outer_steps", 2],
    "as it is": ["ZeroShotModule"],
}


class Job(NamedTuple):
    """A run on so many pictures, against which a run on one process is held."""

    command: str
    method: str
    pictures: int
    processes: int
    batch_size: int = 1
    num_workers: int = 0


JOBS = {
    "7 on 2, tuned": Job("test", "tuned", 7, 2, batch_size=3),
    "7 on 3, tuned": Job("test", "tuned", 7, 3, batch_size=8),
    "7 on 2": Job("test", "as it is", 7, 2),
    "7 on 3": Job("test", "as it is", 7, 3),
    "7 on 3, in batches": Job("test", "as it is", 7, 3, batch_size=3),
    "2 on 3, tuned": Job("test", "tuned", 2, 3, batch_size=8),
    "2 on 3": Job("test", "as it is", 2, 3),
    "predict": Job("predict", "tuned", 7, 2),
    "predict, 2 workers": Job("predict", "tuned", 7, 2, batch_size=3, num_workers=2),
    "1 worker": Job("test", "tuned", 7, 1, batch_size=3, num_workers=1),
    "3 workers": Job("test", "tuned", 7, 1, num_workers=3),
}


class Runs:
    """Runs in folders of their own; that of each job, and of the one process beside it, is made once."""

    def __init__(self, server: ForkServer, root: Path, clip: Path) -> None:
        self.server = server
        self.root = root
        self.clip = clip
        for n in (7, 2):
            pictures = write_pictures(root / f"pets-{n}", "cat", "dog", n=(n + 1) // 2)
            (pictures / "dog" / "0003.png").unlink(missing_ok=True)

    def __call__(self, job: Job) -> Path:
        """The run folder; beside it lies what each process has printed."""
        folder = self.root / "-".join(map(str, job)).replace(" ", "-")
        if not folder.exists():
            options = ["--data", "FolderDataModule", "--data.root", self.root / f"pets-{job.pictures}"]
            options += ["--data.batch_size", job.batch_size, "--data.num_workers", job.num_workers]
            options += ["--model.clip", self.clip, "--trainer.accelerator", "cpu", "--run", folder]
            whole = [job.command, "--model", *METHODS[job.method], *options]
            log = folder.with_suffix(".log")
            if job.processes == 1:
                processes = [self.server.start(self.root, whole, log)]
            else:
                processes = self.server.start_ranks(self.root, whole, log, job.processes)
            status = [self.server.status(process, SECONDS) for process in processes]
            assert status == [0] * job.processes, "\n".join(file.read_text() for file in self.root.glob(f"{log.name}*"))
        return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: Path) -> Iterator[Runs]:
    with ForkServer() as server:
        yield Runs(server, tmp_path_factory.mktemp("runs"), tiny_clip_folder)


def figures(folder: Path) -> dict[str, float]:
    content = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in content.items() if name not in COSTS}


def recorded(folder: Path, rank: int) -> list[int]:
    """The indices in the record of a rank, as they were written."""
    with closing(sqlite3.connect(folder / f"record-rank{rank}.sqlite")) as connection:
        return [index for (index,) in connection.execute('SELECT "index" FROM rows ORDER BY rowid')]


@pytest.mark.parametrize("name", JOBS)
def test_many_leave_what_one_leaves(runs: Runs, name: str) -> None:
    job = JOBS[name]
    folder, alone = runs(job), runs(Job(job.command, job.method, job.pictures, 1))
    found, expected = rows(folder), rows(alone)
    assert [int(row["index"]) for row in found] == list(range(job.pictures))
    assert {row["status"] for row in found} == {"ok"}
    if job.method == "tuned" or job.batch_size == 1:
        assert (folder / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()
        assert figures(folder) == figures(alone)
        return
    for row, same in zip(found, expected, strict=True):  # pictures that are encoded together are rounded together
        numbers = {key for key in row if key.endswith(("probability", "entropy"))}
        assert {key: row[key] for key in row.keys() - numbers} == {key: same[key] for key in row.keys() - numbers}
        for key in numbers - {key for key in row if not row[key]}:
            assert float(row[key]) == pytest.approx(float(same[key]), abs=1e-5)
    assert figures(folder) == pytest.approx(figures(alone), abs=1e-5)


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job.processes > 1])
def test_each_process_records_its_share_and_the_first_one_speaks(runs: Runs, name: str) -> None:
    job = JOBS[name]
    folder = runs(job)
    shares = [list(range(rank, job.pictures, job.processes)) for rank in range(job.processes)]
    assert [recorded(folder, rank) for rank in range(job.processes)] == shares
    first, *others = (folder.with_suffix(f".log-{rank}").read_text().splitlines() for rank in range(job.processes))
    last = "predictions.csv"
    assert sum(line.startswith("Results: ") and line.endswith(last) for line in first) == 1
    assert sum("top-1 accuracy" in line for line in first) == (job.command == "test")
    assert sum(line.startswith("config: ") for line in first) == 1
    for lines in others:
        assert [line for line in lines if not line.startswith("Initializing distributed: ")] == []


def test_a_broken_picture_fails_the_run_in_the_end_once(runs: Runs, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pets", "cat", "dog", n=2)
    (pictures / "cat" / "0001.png").write_bytes(b"")  # of the second process
    options = ["--data", "FolderDataModule", "--data.root", pictures, "--run", tmp_path / "run"]
    options += ["--model.clip", runs.clip, "--trainer.accelerator", "cpu"]
    processes = runs.server.start_ranks(tmp_path, ["test", "--model", "ZeroShotModule", *options], tmp_path / "log", 2)
    status = [runs.server.status(process, SECONDS) for process in processes]
    first, second = ((tmp_path / f"log-{rank}").read_text() for rank in range(2))
    assert status[0] == 1
    assert "cat/0001.png: empty file" in first.rpartition("metatpt: ")[2]
    assert "empty file" not in second
    assert [row["status"] for row in rows(tmp_path / "run")] == ["ok", "skipped", "ok", "ok"]


def test_the_program_starts_its_processes_itself(tiny_clip_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """And they share the folder that the first one has named."""
    options = ["test", "--model", "ZeroShotModule", "--data", "FolderDataModule", "--data.root", pictures]
    options += ["--model.clip", tiny_clip_folder, "--trainer.accelerator", "cpu", "--data.batch_size", 1]
    options += ["--trainer.strategy", "ddp", "--trainer.devices", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", "metatpt", *map(str, options)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert [int(row["index"]) for row in rows(folder)] == list(range(7))
    assert result.stdout.count("top-1 accuracy") == 1
    assert result.stderr.count("config: ") == 1
    assert "sync_dist" not in result.stderr
    assert recorded(folder, 0) == [0, 2, 4, 6]
    assert recorded(folder, 1) == [1, 3, 5]
