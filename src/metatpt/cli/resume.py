"""``--resume``: a run goes on with its own config."""

from __future__ import annotations

from pathlib import Path

import yaml

from metatpt.results.record import CONFIG
from metatpt.results.runs import leaves
from metatpt.results.setup import read_setup

from .errors import UsageError

_FREE = ("data.batch_size", "data.num_workers", "data.root", "model.memory", "on_error")
"""What may be another in the session that goes on: no prediction depends on it (the pictures are checked)."""

_NOT_FREE_OF_TRAINER = "trainer.precision"


def saved_config(folder: Path, command: str) -> Path:
    """The config of a run that was stopped.

    Args:
        folder: The run folder.
        command: The command that is to go on with it.

    Raises:
        UsageError: There is no such run, or it is one of another command.
    """
    config = folder / CONFIG
    if not config.is_file():
        what = f"{folder} has no {CONFIG}, so no run has begun there" if folder.is_dir() else f"{folder} is no folder"
        raise UsageError(f"--resume {folder}: {what}. Start a run with --run {folder}.")
    stage = read_setup(folder).get("stage", command)
    if stage != command:
        raise UsageError(f"--resume {folder}: it is a run of {stage}: metatpt {stage} --resume {folder}.")
    return config


def check_same_config(saved: Path, now: str) -> None:
    """Refuse to go on under another config.

    Args:
        saved: The run's own.
        now: The one that is asked for, as it would be saved.

    Raises:
        UsageError: Naming each difference.
    """
    before, after = (dict(leaves(yaml.safe_load(text))) for text in (saved.read_text(encoding="utf-8"), now))
    lines = [
        f"--{name} {after.get(name)!r} (the run: {before.get(name)!r})"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name) and not _is_free(name)
    ]
    if lines:
        raise UsageError(
            f"--resume {saved.parent}: the run goes on with its own config, and this is another one:\n  "
            + "\n  ".join(lines)
            + f"\nLeave these out, or start a new run. (Free to change: {', '.join(_FREE)}, and the trainer's options "
            "but for the precision.)"
        )


def _is_free(name: str) -> bool:
    return name in _FREE or (name.startswith("trainer.") and name != _NOT_FREE_OF_TRAINER)
