"""``metatpt doctor``: look a data set over before a run."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from metatpt.checkup import Report, examine
from metatpt.datamodules import BaseDataModule

from .classes import BASES, option_types, options_at
from .errors import RunError, UsageError, explain, root_cause
from .request import Request, read_request
from .run import dump

_OWN = ("pictures", "sheet")
_PICTURES = 200


def doctor(arguments: list[str]) -> int:
    """Run the command.

    Returns:
        Exit status: 0, or 1 where something is wrong with the data.

    Raises:
        UsageError: An option that does not fit.
        RunError: The data set is not there, or not in a known layout.
    """
    request = read_request("doctor", arguments)
    given = dict(request.options)
    for key in given:
        if key.partition(".")[0] not in ("data", *_OWN):
            raise UsageError(f"--{key}: doctor looks at data only, and takes --data, --pictures and --sheet.")
    report = examine(_datamodule(request), _number(given.get("pictures", str(_PICTURES))))
    sheet = None
    if report.sheet is not None:
        sheet = Path(given.get("sheet", f"doctor-{request.classes['data'].__name__}.png")).expanduser()
        try:
            report.sheet.save(sheet)
        except (OSError, ValueError) as error:
            raise UsageError(f"--sheet {sheet}: the picture cannot be written: {error}") from error
    _show(report, sheet)
    return int(report.is_wrong)


def _number(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or text == "0":
        raise UsageError(f"--pictures: expected a whole number of at least 1, or all; got {text!r}.")
    return int(text)


def _datamodule(request: Request) -> BaseDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(BASES["data"], "data", fail_untyped=False, required=True)
    given = {key: value for key, value in request.options if key not in _OWN}

    def type_of(key: str) -> object:
        return option_types(request.classes["data"]).get(key.partition(".")[2])

    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder, "config.yaml")
        merged.write_text(dump({"data": request.config["data"]}), encoding="utf-8")
        try:
            config = parser.parse_args([f"--config={merged}", *(f"--{key}={value}" for key, value in given.items())])
        except argparse.ArgumentError as error:
            named = {key.replace(".init_args.", "."): value for key, value in given.items()}
            raise UsageError(explain(str(error), named, type_of, options_at, request.sources)) from error
    try:
        data: BaseDataModule = parser.instantiate(config).data
    except Exception as error:
        root = root_cause(error)
        if isinstance(root, (ValueError, OSError, ImportError)):
            raise RunError(str(root)) from root
        raise root from None
    return data


def _show(report: Report, sheet: Path | None) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        table.add_row(finding.what, f"WRONG: {finding.found}" if finding.wrong else finding.found)
    console = Console(highlight=False, markup=False)
    console.print(table)
    if sheet is not None:
        console.print(f"Look whether the names are right: {sheet}", soft_wrap=True)
    if not report.is_wrong:
        console.print("Nothing is wrong.")
