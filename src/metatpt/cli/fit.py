"""``metatpt fit``: what it needs, what it writes, and what it says in the end."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from metatpt.callbacks.checkpoints import CHECKPOINTS, BestCheckpoint, LastCheckpoint
from metatpt.modules import AdaptationModule
from metatpt.results.record import CONFIG

from .classes import known_classes

_LOG = "log"

_log = logging.getLogger("metatpt")


def check_learns(module: AdaptationModule) -> None:
    """Refuse a model that training cannot change.

    Raises:
        ValueError: Saying what is missing, and which methods learn.
    """
    name = type(module).__name__
    if not _has_training_step(type(module)):
        learning = [known for known, cls in known_classes("model").items() if _has_training_step(cls)]
        there = f"--model {' or '.join(learning)}" if learning else "--model with one that does"
        raise ValueError(
            f"{name} has no training_step, so there is nothing that fit could train. Train a prompt with {there}; "
            f"{name} then takes it with --ckpt_path."
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"{name} with the prompt {type(module.prompt).__name__} has nothing to learn (no parameter requires a "
            f"gradient): choose a prompt with --model.prompt. There are: {', '.join(known_classes('model.prompt'))}."
        )


def _has_training_step(cls: type) -> bool:
    return getattr(cls, "training_step", None) is not LightningModule.training_step


def curves(folder: Path) -> CSVLogger:
    """The logger of a run of which none was asked for: ``log/metrics.csv`` in its folder."""
    return CSVLogger(folder, _LOG, version="")


def kept(folder: Path, theirs: list[Callback], checkpoints: bool, logs: bool) -> list[Callback]:
    """The callbacks that keep what is learned, and the curve of the learning rate.

    Args:
        folder: The run folder.
        theirs: Callbacks of the user; of a kind that she has, there are none of ours.
        checkpoints: Whether checkpoints are wanted.
        logs: Whether there is a logger.
    """
    ours: list[Callback] = []
    if checkpoints and not any(isinstance(each, ModelCheckpoint) for each in theirs):
        ours += [LastCheckpoint(folder / CHECKPOINTS), BestCheckpoint(folder / CHECKPOINTS)]
    if logs and not any(isinstance(each, LearningRateMonitor) for each in theirs):
        ours.append(LearningRateMonitor(logging_interval="epoch"))
    return ours


class TellCheckpoint(Callback):
    """Says where the checkpoint of `fit` lies, and how it is tested, or how training goes on after it was stopped.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints it: here, where progress bars are closed."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        best, last = _checkpoint(trainer, True), _checkpoint(trainer, False)
        lines = []
        if best is not None and best.best_model_path:
            score = float(best.best_model_score or 0.0)
            lines.append(f"best ({best.monitor} {score:.4f}): {_short(best.best_model_path)}")
        if last is not None and last.best_model_path:
            lines.append(f"after the last epoch: {_short(last.best_model_path)}")
        if not lines:
            _log.warning("No checkpoint was kept, so what was learned is lost with this process.")
            return
        chosen: Any = best if best is not None and best.best_model_path else last
        print("\n".join([*lines, f"to test it: {self._command('test', chosen.best_model_path)}"]))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Logs how training goes on."""
        last = _checkpoint(trainer, False)
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero or last is None:
            return
        if last.best_model_path and Path(last.best_model_path).is_file():
            _log.info("To train on from the last epoch: %s", self._command("fit", last.best_model_path))

    def _command(self, command: str, checkpoint: str) -> str:
        config, path = (shlex.quote(str(each)) for each in (self.folder / CONFIG, _short(checkpoint)))
        return f"metatpt {command} -c {config} --ckpt_path {path}"


def _checkpoint(trainer: Trainer, monitors: bool) -> ModelCheckpoint | None:
    """The first that monitors something, or that does not."""
    callbacks: list[Any] = trainer.checkpoint_callbacks
    return next(
        (each for each in callbacks if isinstance(each, ModelCheckpoint) and (each.monitor is not None) == monitors),
        None,
    )


def _short(path: str) -> Path:
    """A path as seen from the working folder."""
    whole = Path(path)
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole
