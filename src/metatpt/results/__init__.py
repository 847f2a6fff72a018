"""What a run leaves: a row per sample, the files made from the rows, and the table at the end."""

from .record import Outcome, Progress, Record, check_unused, export, recover, start_session
from .rows import COLUMNS, Row, make_rows
from .runs import Run, read_run
from .table import failures, results_summary, results_table

__all__ = [
    "COLUMNS",
    "Outcome",
    "Progress",
    "Record",
    "Row",
    "Run",
    "check_unused",
    "export",
    "failures",
    "make_rows",
    "read_run",
    "recover",
    "results_summary",
    "results_table",
    "start_session",
]
