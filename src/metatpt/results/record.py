"""What a run leaves on disk: a durable record while it runs, then `predictions.csv` and `metrics.json`.

Each rank appends to an SQLite file of its own, `record-rank0.sqlite` and so on; a batch's rows are committed, and on
the disk, before the next batch starts. At the end rank 0 reads all of them and writes the two files from the rows,
each at once (a reader never sees half of one). The record holds all that `metrics.json` is made of, and what a run
that was stopped needs to go on.
"""

from __future__ import annotations

import csv
import heapq
import json
import re
import shlex
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch

from metatpt.metrics import summarize
from metatpt.types import State

from .files import replaced
from .rows import COLUMNS, RECORDED, Cell, Row

PREDICTIONS = "predictions.csv"
METRICS = "metrics.json"
CONFIG = "config.yaml"
COST = "cost.json"
VIEWS = "views"
LISTED = 10
"""How many skipped pictures a summary lists by name."""

_TYPES = {"_index": "INTEGER", "_rank": "INTEGER", "probability": "REAL", "entropy": "REAL", "milliseconds": "REAL"}
"""By the end of a column's name."""

_RECORD = re.compile(r"record-rank(\d+)\.sqlite")


@dataclass(frozen=True)
class Outcome:
    """What a run came to, read from its record.

    Attributes:
        metrics: The content of `metrics.json`.
        n_kept_zero_shot: How many samples kept their zero-shot prediction.
        kept: Path and reason of the first of them.
        skipped: Path and reason of the first skipped pictures.
    """

    metrics: dict[str, float | int]
    n_kept_zero_shot: int = 0
    kept: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """How far a run had come when it was stopped.

    Attributes:
        done: Path and label (None where unknown) of every picture that has its prediction, by index. Skipped ones are
            left to be tried again (the disk that failed may be there again); not in a stream, whose pictures come in
            order.
        n_labelled: How many of them have a label and a prediction.
        n_right: How many of these are right.
        n_zero_shot_right: How many of these were right without adaptation.
        stream: What was carried over from the last picture to the next, where anything was.
        session: The number of the session that goes on, from 1.
    """

    done: dict[int, tuple[str, int | None]] = field(default_factory=dict)
    n_labelled: int = 0
    n_right: int = 0
    n_zero_shot_right: int = 0
    stream: State | None = None
    session: int = 1


def check_unused(folder: str | Path, *, config: bool = True) -> None:
    """Refuses a folder that already holds a run.

    Args:
        folder: Where a run is to be written; it need not exist.
        config: Whether a `config.yaml` counts as a run. It does not for who comes after the command line, which has
            just written its own.

    Raises:
        FileExistsError: It holds a run; the message names what was found and the ways out.
        NotADirectoryError: It is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"The run folder {folder} is a file: give another one with --run.")
    names = [PREDICTIONS, METRICS, VIEWS, *([CONFIG] if config else [])]
    found = [name for name in names if (folder / name).exists()] + [file.name for file in record_files(folder)]
    if found:
        go_on = f"--resume {shlex.quote(str(folder))}"
        if (folder / "checkpoints").exists():  # of `fit`
            go_on = f"--ckpt_path {shlex.quote(str(folder / 'checkpoints' / 'last.ckpt'))} and another --run"
        raise FileExistsError(
            f"The run folder {folder} already holds a run ({', '.join(found)}). Go on with it with {go_on}, "
            "give another one with --run (without it, a new one is made under runs/), or remove this one."
        )


class Record:
    """The rows of one rank, durable once :meth:`append` returns.

    Args:
        folder: The run folder; it exists. Where it holds the record of a run that is resumed, rows are added to it.
        rank: Number of the process.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.file = record_file(folder, rank)
        if not self.file.parent.is_dir():
            raise FileNotFoundError(
                f"Process {rank} does not find the run folder {folder}, which process 0 has made: it must lie on a "
                "disk that all nodes share (--run)."
            )
        with _clear_errors(self.file):
            self._connection = _connect(self.file)
        self._diagnostics: list[str] = self._get("diagnostics") or []

    def append(self, rows: Sequence[Row], stream: State | None = None) -> None:
        """Writes and commits the rows of a batch.

        Args:
            rows: The rows.
            stream: What is carried over to the next batch, if anything is: it is committed with them.

        Raises:
            ValueError: A sample's index has been written before.
            OSError: They cannot be written; what was written before is whole.
        """
        if not rows:
            return
        names = [name for name in rows[0] if name not in RECORDED]
        new = [name for name in names if name not in self._diagnostics]
        values = [
            (*(row.get(name) for name in RECORDED), json.dumps({name: row[name] for name in names})) for row in rows
        ]
        places = ", ".join("?" * (len(RECORDED) + 1))
        with _clear_errors(self.file), self._connection:
            if new:
                self._diagnostics += new
                self._set("diagnostics", self._diagnostics)
            if stream is not None:
                held = safetensors.torch.save({name: value.cpu().contiguous() for name, value in stream.items()})
                self._connection.execute("INSERT OR REPLACE INTO stream VALUES (0, ?)", (held,))
            try:
                self._connection.executemany(f"INSERT INTO rows VALUES ({places})", values)
            except sqlite3.IntegrityError as error:
                raise ValueError(
                    f"A sample came twice: one of the indices {[row['index'] for row in rows]} is already in "
                    f"{self.file}. Batch.index is a sample's number in its whole split, and a run records one split."
                ) from error

    def note(self, **facts: Any) -> None:
        """Writes and commits facts of this rank (anything JSON holds): `seconds`, `n_total`, ..."""
        with _clear_errors(self.file), self._connection:
            for name, value in facts.items():
                self._set(name, value)

    def close(self) -> None:
        """Lets go of the file; no log stays beside it where it can be helped. Closing twice does nothing."""
        # What the log holds is committed: where it cannot be folded in (a full disk), it stays beside the file.
        with closing(self._connection), suppress(sqlite3.Error):
            self._connection.execute("PRAGMA journal_mode=DELETE")

    def _get(self, name: str) -> Any:
        found = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def _set(self, name: str, value: Any) -> None:
        self._connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))


def record_file(folder: str | Path, rank: int) -> Path:
    """The record of one rank in a run folder."""
    return Path(folder) / f"record-rank{rank}.sqlite"


def recover(folder: str | Path) -> Progress:
    """How far a run had come. What it has recorded stays as it is; the log of a killed process is folded in.

    Args:
        folder: The run folder.

    Raises:
        OSError: A record cannot be written, or the run is still going on.
        ValueError: Two different pictures have the same index.
    """
    done: dict[int, tuple[str, int | None]] = {}
    n_labelled = n_right = n_zero_shot_right = sessions = 0
    stream: State | None = None
    for file in record_files(folder):
        with _clear_errors(file), closing(_connect(file)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")
            held = connection.execute("SELECT value FROM stream").fetchone()
            stream = stream if held is None else safetensors.torch.load(held[0])
            noted = connection.execute("SELECT value FROM facts WHERE name = 'session'").fetchone()
            sessions = max(sessions, 0 if noted is None else json.loads(noted[0]))
            names = "path, label_index, prediction_index, zero_shot_prediction_index"
            which = "WHERE status != 'skipped'" if held is None else ""
            rows = connection.execute(f'SELECT "index", {names} FROM rows {which}')
            for index, path, label, adapted, zero_shot in rows:
                if index in done:
                    _check_same(index, done[index][0], path)
                    continue
                done[index] = path, label
                if label is not None and adapted is not None:
                    n_labelled += 1
                    n_right += adapted == label
                    n_zero_shot_right += zero_shot == label
        file.with_name(f"{file.name}-shm").unlink(missing_ok=True)  # of somebody who has read the log
    return Progress(done, n_labelled, n_right, n_zero_shot_right, stream, sessions + 1)


def start_session(folder: str | Path, progress: Progress) -> None:
    """Gets a run ready to be added to: what was made from its record at an end goes, and so do rows to be tried again.

    Args:
        folder: The run folder.
        progress: What :func:`recover` has found there.

    Raises:
        OSError: A file cannot be written.
    """
    for name in (PREDICTIONS, METRICS, COST):
        Path(folder, name).unlink(missing_ok=True)
    if progress.stream is not None:
        return
    for file in record_files(folder):
        with _clear_errors(file), closing(_connect(file)) as connection:
            with connection:
                connection.execute("DELETE FROM rows WHERE status = 'skipped'")
            connection.execute("PRAGMA journal_mode=DELETE")


def export(folder: str | Path, world_size: int = 1) -> Outcome:
    """Writes `predictions.csv`, by index, and `metrics.json` from the records of all ranks.

    A sample that two ranks have (Lightning's own sampler repeats some, so that all ranks have equally many) counts
    once. Records of earlier sessions count, if the run was resumed.

    Args:
        folder: The run folder; all records in it are closed.
        world_size: How many processes have run.

    Raises:
        FileNotFoundError: A rank's record is not there.
        ValueError: Two different pictures have the same index.
        OSError: A file cannot be written.
    """
    folder = Path(folder)
    missing = [file.name for file in (record_file(folder, rank) for rank in range(world_size)) if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which other processes wrote: the run folder must lie on a disk that "
            "all nodes share (--run)."
        )
    files = record_files(folder)
    facts = [read_facts(file) for file in files]
    diagnostics = list(dict.fromkeys(name for of_rank in facts for name in of_rank.get("diagnostics", [])))
    n_kept = 0
    named: dict[str, list[tuple[str, str]]] = {"kept_zero_shot": [], "skipped": []}
    with replaced(folder / PREDICTIONS) as stream:
        writer = csv.DictWriter(stream, [*COLUMNS, *diagnostics], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in read_rows(files):
            writer.writerow(row)  # floats by repr: as many digits as give the same float64
            n_kept += row["status"] == "kept_zero_shot"
            if row["status"] != "ok" and len(named[str(row["status"])]) < LISTED:
                named[str(row["status"])].append((str(row["path"]), str(row["reason"] or "")))
    metrics = figures(read_rows(files), facts)
    with replaced(folder / METRICS) as stream:
        json.dump(metrics, stream, indent=2, allow_nan=False)
        stream.write("\n")
    return Outcome(metrics, n_kept, kept=named["kept_zero_shot"], skipped=named["skipped"])


def figures(rows: Iterable[Row], facts: Sequence[dict[str, Any]]) -> dict[str, float | int]:
    """The content of `metrics.json`.

    Args:
        rows: The rows of all ranks, read once.
        facts: What each rank has noted. Speed and memory are those of the last `session` that predicted something.
    """

    def noted(name: str, session: int | None = None) -> list[Any]:
        chosen = (of_rank for of_rank in facts if session is None or of_rank.get("session") == session)
        return [of_rank[name] for of_rank in chosen if of_rank.get(name) is not None]

    metrics = summarize(rows, n_classes=max(noted("n_classes"), default=0), n_total=0)
    metrics["n_total"] = max(noted("n_total"), default=metrics["n"])
    last = max(noted("session"), default=1)
    n_predicted, seconds = sum(noted("n_predicted", last)), max(noted("seconds", last), default=0.0)
    if n_predicted and seconds > 0:
        metrics["images_per_second"] = n_predicted / seconds
    if memory := noted("peak_memory_mb", last):
        metrics["peak_memory_mb"] = max(memory)
    return metrics


def read_rows(files: Iterable[Path]) -> Iterator[Row]:
    """The rows of some records by index, read as they are needed, each sample once.

    Raises:
        ValueError: Two different pictures have the same index.
        OSError: A record cannot be read.
    """
    with ExitStack() as stack:
        last: Row = {"index": None, "path": None}
        for row in heapq.merge(*(_rows(file, stack) for file in files), key=_index):
            if row["index"] == last["index"]:
                _check_same(_index(row), last["path"], row["path"])
                continue
            last = row
            yield row


def read_facts(file: Path) -> dict[str, Any]:
    """What a rank has noted in its record.

    Raises:
        OSError: It cannot be read.
    """
    with _clear_errors(file, "read"), _reading(file) as connection:
        return {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM facts")}


def record_files(folder: str | Path) -> list[Path]:
    """The records in a run folder, by rank; of earlier sessions with more processes too."""
    files = Path(folder).glob("record-rank*.sqlite")
    found = {int(match[1]): file for file in files if (match := _RECORD.fullmatch(file.name))}
    return [found[rank] for rank in sorted(found)]


def _check_same(index: int, path: object, other: object) -> None:
    if path != other:
        raise ValueError(
            f"Two pictures have index {index}: {path} and {other}. Batch.index is a sample's number in its whole split."
        )


def _index(row: Row) -> int:
    index = row["index"]
    assert isinstance(index, int)
    return index


def _rows(file: Path, stack: ExitStack) -> Iterator[Row]:
    with _clear_errors(file, "read"):
        connection = stack.enter_context(_reading(file))
        names = ", ".join(f'"{name}"' for name in RECORDED)
        for *cells, diagnostics in connection.execute(f'SELECT {names}, diagnostics FROM rows ORDER BY "index"'):
            row: dict[str, Cell] = dict(zip(RECORDED, cells, strict=True))
            yield row | json.loads(diagnostics)


def _connect(file: Path) -> sqlite3.Connection:
    """A connection that writes, to a file that is made where it is not there."""
    connection = sqlite3.connect(file, timeout=1.0, isolation_level="IMMEDIATE")
    # A write-ahead log takes one flush per commit instead of several. Under the exclusive lock it needs no shared
    # memory, so it works on network disks too, and a second run on the same file is refused.
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    columns = ", ".join(f'"{name}" {_sql_type(name)}' for name in RECORDED)
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"CREATE TABLE IF NOT EXISTS rows ({columns}, diagnostics TEXT)")
        connection.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)")
        connection.execute("CREATE TABLE IF NOT EXISTS stream (id INTEGER PRIMARY KEY, value BLOB)")
    return connection


@contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection that only reads."""
    log = file.with_name(f"{file.name}-wal")
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(closing(_open(file)))
            connection.execute("SELECT 1 FROM facts")
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or not log.exists():
                raise
            # Of a killed run: to read its log takes a file beside it, which a read-only folder cannot have.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for each in (file, log):
                shutil.copy(each, folder)
            connection = stack.enter_context(closing(_open(folder / file.name)))
        yield connection


def _open(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(file.resolve().as_uri() + "?mode=ro", uri=True, timeout=1.0)


def _sql_type(column: str) -> str:
    if column == "index":
        return "INTEGER PRIMARY KEY"
    return next((kind for suffix, kind in _TYPES.items() if column.endswith(suffix)), "TEXT")


@contextmanager
def _clear_errors(file: Path, what: str = "write") -> Iterator[None]:
    """SQLite's errors of one line without a file name, as an error that names it and says what to do."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            raise OSError(f"{file} is in use: a run is still writing there (database is locked).") from error
        if "malformed" in str(error) or "not a database" in str(error):
            raise OSError(f"{file} is damaged ({error}): it is no record that was written here whole.") from error
        why = "Is the disk full, or the folder read-only? Rows written before are whole." if what == "write" else ""
        raise OSError(f"Cannot {what} {file}: {error}. {why}".rstrip()) from error
