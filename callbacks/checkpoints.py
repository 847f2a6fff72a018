"""The checkpoints that `fit` leaves: ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt``."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

CHECKPOINTS = "checkpoints"
"""Their folder in that of the run."""

MONITOR = "val/accuracy"
"""What the best checkpoint is best in."""

_log = logging.getLogger(__name__)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the state of training at the end of each epoch as ``last.ckpt``: training goes on from it.

    Args:
        dirpath: Its folder.
    """

    def __init__(self, dirpath: str | Path) -> None:
        super().__init__(dirpath, "last", save_on_train_epoch_end=True, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the file of the session that is gone on from stays there."""


class BestCheckpoint(ModelCheckpoint):
    """Keeps the state after the epoch with the highest `val/accuracy` as ``best.ckpt``.

    Without validation, or without labels in it, there is none. Where training goes on in another folder, the best
    checkpoint up to then is copied to it, so that it is always the best of all epochs.

    Args:
        dirpath: Its folder.
    """

    def __init__(self, dirpath: str | Path) -> None:
        super().__init__(
            dirpath, "best", monitor=MONITOR, mode="max", save_on_train_epoch_end=False, enable_version_counter=False
        )
        self._is_first = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes note whether this process writes."""
        super().setup(trainer, pl_module, stage)
        self._is_first = trainer.is_global_zero

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, where the epoch was the best."""
        if MONITOR in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best checkpoint up to now."""
        before, score = Path(state_dict["best_model_path"]), state_dict["best_model_score"]
        if score is None:
            return
        if not before.is_file():
            if self._is_first:
                _log.warning("The best checkpoint up to now, %s, is gone: the best one is that from here on.", before)
            return
        folder = Path(str(self.dirpath))
        file = folder / f"best{self.FILE_EXTENSION}"
        if self._is_first and file != before:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(before, file)
        path = str(file)
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": path,
                "kth_best_model_path": path,
                "kth_value": score,
                "best_k_models": {path: score},
            }
        )
