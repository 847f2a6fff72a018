"""What a run leaves: a row per sample, the files made from the rows, and the table at the end."""

from .record import Outcome, Record, check_unused, export
from .rows import COLUMNS, Row, make_rows
from .table import results_summary, results_table

__all__ = [
    "COLUMNS",
    "Outcome",
    "Record",
    "Row",
    "check_unused",
    "export",
    "make_rows",
    "results_summary",
    "results_table",
]
