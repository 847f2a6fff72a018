"""Where callbacks put their files."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

from .record import RunRecord
from .steps import find_callback


def run_folder(trainer: Trainer) -> Path:
    """The folder of the trainer's :class:`RunRecord`, or without one `trainer.default_root_dir`."""
    record = find_callback(trainer, RunRecord)
    return Path(trainer.default_root_dir) if record is None else record.folder
