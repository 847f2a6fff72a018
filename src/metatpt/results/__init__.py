"""What a run leaves: a row per sample, the files made from the rows, and the table at the end."""

from .record import Outcome, Progress, Record, check_unused, export, recover
from .rows import COLUMNS, Row, make_rows
from .table import failures, results_summary, results_table

__all__ = [
    "COLUMNS",
    "Outcome",
    "Progress",
    "Record",
    "Row",
    "check_unused",
    "export",
    "failures",
    "make_rows",
    "recover",
    "results_summary",
    "results_table",
]
