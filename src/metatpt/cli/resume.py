"""``--resume``: a run goes on with its own config."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from metatpt.callbacks.checkpoints import CHECKPOINTS
from metatpt.results.record import CONFIG, record_files
from metatpt.results.setup import leaves, read_setup

from .errors import UsageError

_FREE = ("data.batch_size", "data.num_workers", "model.memory", "on_error")
"""What may be another in the session that goes on: no prediction depends on it."""

_PLACES = ("data.root", "data.shards", "data.index_file", "data.class_names", "model.pretrained", "ckpt_path")
"""Where something lies: what lies there is checked by content, once it is read."""

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
    name = shlex.quote(str(folder))
    if not config.is_file():
        if record_files(folder):
            raise UsageError(
                f"--resume {name}: that run was started from Python (it has no {CONFIG}). It goes on there, with "
                f"RunRecord({str(folder)!r}, resume=True)."
            )
        what = f"{name} has no {CONFIG}, so no run has begun there" if folder.is_dir() else f"{name} is no folder"
        raise UsageError(f"--resume {name}: {what}. Start a run with --run {name}.")
    if (folder / CHECKPOINTS).is_dir() and not record_files(folder):
        raise UsageError(
            f"--resume {name}: it is a run of fit. Test what it has learned with metatpt {command} -c {config} "
            f"--ckpt_path {folder / CHECKPOINTS}/last.ckpt"
        )
    stage = read_setup(folder).get("stage", command)
    if stage != command:
        raise UsageError(f"--resume {name}: it is a run of {stage}: metatpt {stage} --resume {name}.")
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
    names = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
    # Another class has other options, which would only hide that.
    classes = [name for name in names if name.endswith(".class_path") and name.count(".") == 1]
    lines = [
        f"--{name.removesuffix('.class_path')} {_shown(after, name)} (the run: {_shown(before, name)})"
        for name in classes or names
        if not _is_free(name)
    ]
    if lines:
        raise UsageError(
            f"--resume {saved.parent}: the run goes on with its own config, and this is another one:\n  "
            + "\n  ".join(lines)
            + f"\nLeave these out, or start a new run. (Free to change: {', '.join([*_FREE, *_PLACES])}, and the "
            "trainer's options but for the precision.)"
        )


def _shown(options: Mapping[str, Any], name: str) -> str:
    return repr(options[name]) if name in options else "not set"


def _is_free(name: str) -> bool:
    return name in (*_FREE, *_PLACES) or (name.startswith("trainer.") and name != _NOT_FREE_OF_TRAINER)
