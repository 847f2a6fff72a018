"""The progress bar, with what adaptation has brought so far, or the loss of training."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

LINE_SECONDS = 30.0
"""Where there is no terminal, a line of text at most this often."""


class AdaptationProgressBar(TQDMProgressBar):
    """Lightning's bar with the running accuracy and gain of `validate`, `test` and `predict`, and the loss of `fit`.

    They come from the module's `running` (of this process, rank 0's where there are many; nothing without labels), the
    loss from its `training_step`.
    Where output is no terminal there is no bar, whose states would all be written one after the other, but a line
    every 30 seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start = self._last_line = 0.0
        self._loss: Tensor | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether there is a bar to draw."""
        return super().is_enabled and _is_terminal()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the clock."""
        super().setup(trainer, pl_module, stage)
        self._start = self._last_line = time.monotonic()
        self._loss = None

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands at the bar's end: what was logged for it, then the running figures (gain in points)."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        if trainer.state.fn == "fit":
            if self._loss is not None:
                shown.pop("train/loss", None)  # the same, where the module has put it there
                shown["loss"] = f"{float(self._loss):.3f}"
            return shown
        running = getattr(pl_module, "running", {})
        if "accuracy" in running:
            shown["accuracy"] = f"{100 * running['accuracy']:.1f} %"
        if "gain" in running:
            shown["gain"] = f"{100 * running['gain']:+.1f}"
        return shown

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._loss = loss.detach() if isinstance(loss, Tensor) else None  # read from the device when it is shown
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self.is_enabled and self._line_is_due():
            self._show(self.train_progress_bar, self.get_metrics(trainer, pl_module), batch_idx + 1)

    # The bars that Lightning draws in these three show no figures: they are put there before each is drawn.

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if not trainer.sanity_checking and trainer.state.fn == "validate":
            self._show(self.val_progress_bar, self.get_metrics(trainer, pl_module), args[2] + 1)
        super().on_validation_batch_end(trainer, pl_module, *args, **kwargs)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self._show(self.test_progress_bar, self.get_metrics(trainer, pl_module), args[2] + 1)
        super().on_test_batch_end(trainer, pl_module, *args, **kwargs)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self._show(self.predict_progress_bar, self.get_metrics(trainer, pl_module), args[2] + 1)
        super().on_predict_batch_end(trainer, pl_module, *args, **kwargs)

    def _show(self, bar: Tqdm, figures: dict[str, Any], n: int) -> None:
        now = time.monotonic()
        if self.is_enabled:
            bar.set_postfix(figures, refresh=False)
        elif self._line_is_due():
            self._last_line = now
            # A bar that is switched off still knows its name and length.
            line = Tqdm.format_meter(
                n,
                bar.total,
                now - self._start,
                prefix=bar.desc,
                postfix=", ".join(f"{name}={value}" for name, value in figures.items()),
                bar_format="{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
            )
            print(line, file=sys.stderr, flush=True)

    def _line_is_due(self) -> bool:
        return super().is_enabled and time.monotonic() - self._last_line >= LINE_SECONDS


def _is_terminal() -> bool:
    """Whether standard output, where Lightning draws, can redraw a line: a terminal or a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules
