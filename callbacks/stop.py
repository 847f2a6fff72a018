"""A run that is told to stop stops where it can go on: after a batch."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

CHILD_SECONDS = 20.0
"""How long the first process waits for all that it has started, once its own batch is recorded; then it kills them."""

_log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """A run that was told to stop; its code is the exit status."""


class GracefulStop(Callback):
    """Ends a run at SIGTERM, which batch systems send before they kill, once the batch at hand is recorded.

    In `fit` that is a batch of training, or of the validation within; training goes on from the last checkpoint.

    It stands behind :class:`~metatpt.callbacks.RunRecord` in the list of callbacks. Lightning's own handler lets the
    processes meet in a collective operation, which hangs where only one of them was told. Here each stops by itself;
    the first one tells those that it has started. A process whose parent has died ends as well, so that nothing of a
    run is left that would still write.
    """

    def __init__(self) -> None:
        self._told = False
        self._handler: Any = None
        self._parent: int | None = None
        self._children: list[subprocess.Popen[bytes]] = []

    def _on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._handler is not None:  # of the validation within `fit`
            return
        self._told = False
        self._parent = os.getppid() if trainer.local_rank > 0 else None
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(signum: int, frame: object) -> None:
            self._told = True
            # Emptied for Lightning's observer, which would kill this process when one of them ends before it.
            started = getattr(trainer.strategy.launcher, "procs", [])
            self._children += started
            started.clear()
            for process in self._children:
                process.send_signal(signum)

        self._handler = signal.signal(signal.SIGTERM, stop)

    def _on_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._told:
            if trainer.is_global_zero:
                done = "done" if trainer.state.fn == TrainerFn.FITTING else "recorded"
                _log.warning("Told to stop (SIGTERM): the batch at hand is %s.", done)
            self._await_children()
            raise Stopped(128 + signal.SIGTERM)
        if self._parent is not None and os.getppid() != self._parent:
            print(f"metatpt: process {trainer.global_rank} ends, since process 0 has died", file=sys.stderr)
            raise Stopped(1)

    def _await_children(self) -> None:
        limit = time.monotonic() + CHILD_SECONDS
        for process in self._children:
            try:
                process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:  # in a long batch, or waiting for this process
                process.kill()
                process.wait()

    def _on_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._restore()

    def _restore(self, *args: Any, **kwargs: Any) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _on_start
    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _on_batch_end
    on_validation_end = on_test_end = on_predict_end = _on_end
    on_fit_end = on_exception = _restore
