"""What a run leaves on disk: a durable record while it runs, then `predictions.csv` and `metrics.json`.

Each rank appends to an SQLite file of its own, `record-rank0.sqlite` and so on; a batch's rows are committed, and on
the disk, before the next batch starts. At the end rank 0 reads all of them and writes the two files from the rows,
each at once (a reader never sees half of one). The record holds all that `metrics.json` is made of.
"""

from __future__ import annotations

import csv
import heapq
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from metatpt.metrics import summarize

from .rows import COLUMNS, Cell, Row

PREDICTIONS = "predictions.csv"
METRICS = "metrics.json"
CONFIG = "config.yaml"
LISTED = 10
"""How many skipped pictures a summary lists by name."""

_TYPES = {"_index": "INTEGER", "_rank": "INTEGER", "probability": "REAL"}  # by the end of a column's name


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
    names = [PREDICTIONS, METRICS, *([CONFIG] if config else [])]
    found = [name for name in names if (folder / name).exists()] + [file.name for file in _record_files(folder)]
    if found:
        raise FileExistsError(
            f"The run folder {folder} already holds a run ({', '.join(found)}). Give another one with --run "
            "(without it, a new one is made under runs/), or remove this one."
        )


class Record:
    """The rows of one rank, durable once :meth:`append` returns.

    Args:
        folder: The run folder; it exists.
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
        self._diagnostics: list[str] = []
        with _clear_errors(self.file):
            self._connection = sqlite3.connect(self.file, timeout=1.0)
            # A write-ahead log takes one flush per commit instead of several. Under the exclusive lock it needs no
            # shared memory, so it works on network disks too, and a second run on the same file is refused.
            self._connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            with self._connection:
                columns = ", ".join(f'"{name}" {_sql_type(name)}' for name in COLUMNS)
                self._connection.execute(f"CREATE TABLE rows ({columns}, diagnostics TEXT)")
                self._connection.execute("CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT)")

    def append(self, rows: Sequence[Row]) -> None:
        """Writes and commits the rows of a batch.

        Raises:
            ValueError: A sample's index has been written before.
            OSError: They cannot be written; what was written before is whole.
        """
        if not rows:
            return
        names = [name for name in rows[0] if name not in COLUMNS]
        new = [name for name in names if name not in self._diagnostics]
        values = [(*(row[name] for name in COLUMNS), json.dumps({name: row[name] for name in names})) for row in rows]
        places = ", ".join("?" * (len(COLUMNS) + 1))
        with _clear_errors(self.file), self._connection:
            if new:
                self._diagnostics += new
                self._set("diagnostics", self._diagnostics)
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

    def _set(self, name: str, value: Any) -> None:
        self._connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))


def record_file(folder: str | Path, rank: int) -> Path:
    """The record of one rank in a run folder."""
    return Path(folder) / f"record-rank{rank}.sqlite"


def export(folder: str | Path, world_size: int = 1) -> Outcome:
    """Writes `predictions.csv`, by index, and `metrics.json` from the records of all ranks.

    A sample that two ranks have (Lightning's own sampler repeats some, so that all ranks have equally many) counts
    once.

    Args:
        folder: The run folder; all records in it are closed.
        world_size: How many processes have run.

    Raises:
        FileNotFoundError: A rank's record is not there.
        ValueError: Two different pictures have the same index.
        OSError: A file cannot be written.
    """
    folder = Path(folder)
    files = [record_file(folder, rank) for rank in range(world_size)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which other processes wrote: the run folder must lie on a disk that "
            "all nodes share (--run)."
        )
    facts = [_facts(file) for file in files]
    diagnostics = list(dict.fromkeys(name for of_rank in facts for name in of_rank.get("diagnostics", [])))
    n = n_kept = 0
    named: dict[str, list[tuple[str, str]]] = {"kept_zero_shot": [], "skipped": []}
    with _replaced(folder / PREDICTIONS) as stream:
        writer = csv.DictWriter(stream, [*COLUMNS, *diagnostics], lineterminator="\n")
        writer.writeheader()
        for row in _merged(files):
            writer.writerow(row)  # floats by repr: as many digits as give the same float64
            n += 1
            n_kept += row["status"] == "kept_zero_shot"
            if row["status"] != "ok" and len(named[str(row["status"])]) < LISTED:
                named[str(row["status"])].append((str(row["path"]), str(row["reason"] or "")))
    n_total = next((of_rank["n_total"] for of_rank in facts if of_rank.get("n_total") is not None), n)
    n_classes = next((of_rank["n_classes"] for of_rank in facts if "n_classes" in of_rank), 0)
    metrics = summarize(_merged(files), n_classes=n_classes, n_total=n_total)
    seconds = max((of_rank["seconds"] for of_rank in facts if of_rank.get("seconds")), default=0.0)
    if seconds > 0 and n > metrics["n_skipped"]:
        metrics["images_per_second"] = (n - metrics["n_skipped"]) / seconds
    memory = [of_rank["peak_memory_mb"] for of_rank in facts if of_rank.get("peak_memory_mb") is not None]
    if memory:
        metrics["peak_memory_mb"] = max(memory)
    with _replaced(folder / METRICS) as stream:
        json.dump(metrics, stream, indent=2, allow_nan=False)
        stream.write("\n")
    return Outcome(metrics, n_kept, kept=named["kept_zero_shot"], skipped=named["skipped"])


def _merged(files: Iterable[Path]) -> Iterator[Row]:
    """The rows of all ranks by index, read as they are needed, each sample once."""
    with ExitStack() as stack:
        last: Row = {"index": None, "path": None}
        for row in heapq.merge(*(_rows(file, stack) for file in files), key=_index):
            if row["index"] == last["index"]:
                if row["path"] != last["path"]:
                    raise ValueError(
                        f"Two pictures have index {row['index']}: {last['path']} and {row['path']}. Batch.index is a "
                        "sample's number in its whole split."
                    )
                continue
            last = row
            yield row


def _index(row: Row) -> int:
    index = row["index"]
    assert isinstance(index, int)
    return index


def _rows(file: Path, stack: ExitStack) -> Iterator[Row]:
    connection = stack.enter_context(closing(_open(file)))
    names = ", ".join(f'"{name}"' for name in COLUMNS)
    for *cells, diagnostics in connection.execute(f'SELECT {names}, diagnostics FROM rows ORDER BY "index"'):
        row: dict[str, Cell] = dict(zip(COLUMNS, cells, strict=True))
        yield row | json.loads(diagnostics)


def _facts(file: Path) -> dict[str, Any]:
    with closing(_open(file)) as connection:
        return {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM facts")}


def _open(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(file.resolve().as_uri() + "?mode=ro", uri=True)


def _record_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("record-rank*.sqlite"))


def _sql_type(column: str) -> str:
    if column == "index":
        return "INTEGER PRIMARY KEY"
    return next((kind for suffix, kind in _TYPES.items() if column.endswith(suffix)), "TEXT")


@contextmanager
def _replaced(file: Path) -> Iterator[TextIO]:
    """A stream whose content becomes `file` when all of it is on the disk, and not before."""
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _clear_errors(file: Path) -> Iterator[None]:
    """SQLite's errors of one line without a file name, as an error that names it and says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(
            f"Cannot write {file}: {error}. Is the disk full, the folder read-only, or another run writing there? "
            "Rows written before are whole."
        ) from error
