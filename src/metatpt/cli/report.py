"""``metatpt report``: a page that shows what runs came to."""

from __future__ import annotations

import argparse
from pathlib import Path

from metatpt.results.report import write_report
from metatpt.results.runs import Run, read_run

from .errors import RunError, UsageError
from .help import command_help


def report(arguments: list[str]) -> int:
    """Run the command.

    Returns:
        Exit status: 0.

    Raises:
        UsageError: A folder that holds no run, or an option that there is not.
        RunError: A run cannot be read, or the page not be written.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("-h", "--help", action="store_true")
    try:
        given, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}: metatpt report RUN [RUN ...] [--to FOLDER].") from error
    if given.help:
        print(command_help("report"))
        return 0
    if unknown:
        raise UsageError(f"{unknown[0]}: there is no such option; report takes run folders and --to FOLDER.")
    if not given.runs:
        raise UsageError(
            "Which run? metatpt report RUN [RUN ...] takes folders that test, validate or predict has left."
        )
    folders = [folder.expanduser() for folder in given.runs]
    default = folders[0] if len(folders) == 1 else Path("report")
    folder = default if given.to is None else given.to.expanduser()
    runs = [_read(each) for each in folders]
    try:
        page = write_report(runs, folder)
    except OSError as error:
        raise RunError(f"The report cannot be written: {error}. Give another folder with --to.") from error
    print(f"Report: {page}")
    return 0


def _read(folder: Path) -> Run:
    try:
        return read_run(folder)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error
