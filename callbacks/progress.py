"""The progress bar, with what adaptation has brought so far."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

LINE_SECONDS = 30.0
"""Where there is no terminal, a line of text at most this often."""


class AdaptationProgressBar(TQDMProgressBar):
    """Lightning's bar with the running accuracy and gain of `validate`, `test` and `predict`.

    They come from the module's `running` (of this process, rank 0's where there are many; nothing without labels).
    Where output is no terminal there is no bar, whose states would all be written one after the other, but a line
    every 30 seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start = self._last_line = 0.0

    @property
    def is_enabled(self) -> bool:
        """Whether there is a bar to draw."""
        return super().is_enabled and _is_terminal()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the clock."""
        super().setup(trainer, pl_module, stage)
        self._start = self._last_line = time.monotonic()

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands at the bar's end: what was logged for it, then the running figures (gain in points)."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        running = getattr(pl_module, "running", {})
        if "accuracy" in running:
            shown["accuracy"] = f"{100 * running['accuracy']:.1f} %"
        if "gain" in running:
            shown["gain"] = f"{100 * running['gain']:+.1f}"
        return shown

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
        elif super().is_enabled and now - self._last_line >= LINE_SECONDS:
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


def _is_terminal() -> bool:
    """Whether standard output, where Lightning draws, can redraw a line: a terminal or a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules
