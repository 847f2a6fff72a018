"""The record of a run: a row per sample, written as the run goes, and the files and the table made from it."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from metatpt.results import Outcome, Record, check_unused, export, make_rows, results_summary, results_table
from metatpt.types import Adaptation, Batch

_STAGES = (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING)
_MB = 2**20

T = TypeVar("T")


class RunRecord(Callback):
    """Writes what `validate`, `test` or `predict` finds into a run folder, and prints it at the end.

    While it runs, every rank appends its rows to a record of its own, durably, batch by batch; at the end rank 0
    writes `predictions.csv` and `metrics.json` from all of them. `setup.json` says what the run's options stand for:
    the weights' preprocessing, the class names, versions. It says nothing in `fit`.

    It expects a :class:`~metatpt.types.Batch`, and an :class:`~metatpt.types.Adaptation` as output: bare from
    `predict_step`, as ``{"adaptation": ...}`` from the other steps. Names of classes and the size of the split come
    from the datamodule (`class_names`, `n_total`); without one, names come from the module, and the split is what was
    seen.

    `images_per_second`: pictures with a prediction, of all ranks, by the wall-clock seconds of the slowest rank, from
    the start of the loop to the end of the last batch: reading, warm-up and this record included.

    `peak_memory_mb`, in units of 2**20 bytes, of the rank with the most: on a GPU what tensors took at most during the
    run, else the largest resident set of the process so far, workers not included; left out where the system does not
    tell.

    Args:
        folder: The run folder. It is made; one that holds a run is refused when a run starts.

    Attributes:
        folder: The run folder, that of rank 0 on every rank.
        metrics: The content of `metrics.json`, on every rank, once a run has ended.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.metrics: dict[str, float | int] = {}
        self._record: Record | None = None
        self._outcome: Outcome | None = None
        self._class_names: list[str] | None = None
        self._start = self._seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the folder and opens the record."""
        if trainer.state.fn not in _STAGES:
            return

        def make_folder() -> Path:
            check_unused(self.folder, config=False)
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder

        self._outcome = None
        self.metrics = {}
        self.folder = _on_rank_zero(trainer, make_folder)
        self._record = Record(self.folder, trainer.global_rank)

    def _on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn not in _STAGES:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        names = getattr(datamodule, "class_names", None) or getattr(pl_module, "class_names", None)
        self._class_names = list(names) if names else None
        assert self._record is not None
        n_total = getattr(datamodule, "n_total", None)
        self._record.note(n_total=None if n_total is None else int(n_total))
        _on_rank_zero(trainer, lambda: self._write_setup(trainer, pl_module))
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start = time.perf_counter()
        self._seconds = 0.0

    def _write_setup(self, trainer: Trainer, pl_module: LightningModule) -> Path:
        """`setup.json`: what the options stand for, as far as it can move a number."""
        clip: Any = getattr(pl_module, "clip", None)
        preprocessing = getattr(pl_module, "preprocessing", None)
        packages = ("metatpt", "torch", "torchvision", "lightning", "open_clip_torch", "higher", "pillow")
        content = {
            "method": type(pl_module).__name__,
            "data": type(getattr(trainer, "datamodule", None)).__name__,
            "split": getattr(getattr(trainer, "datamodule", None), "source", None),
            "clip": None if clip is None else {"name": clip.name, "pretrained": clip.pretrained},
            "preprocessing": None if preprocessing is None else dataclasses.asdict(preprocessing),
            "template": getattr(pl_module, "hparams", {}).get("template"),
            "class_names": self._class_names,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }
        file = self.folder / "setup.json"
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return file

    def _on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn not in _STAGES:
            return
        if dataloader_idx > 0:
            raise ValueError("RunRecord records one split per run, but there are several dataloaders: run one by one.")
        adaptation = outputs.get("adaptation") if isinstance(outputs, dict) else outputs
        if not isinstance(adaptation, Adaptation):
            raise TypeError(
                f"RunRecord expected an Adaptation from predict_step, or {{'adaptation': Adaptation}} from "
                f"validation_step and test_step, of {type(pl_module).__name__}, got {type(outputs).__name__}."
            )
        if not isinstance(batch, Batch):
            raise TypeError(
                f"RunRecord expected the dataloader to yield metatpt.types.Batch, got {type(batch).__name__}."
            )
        assert self._record is not None
        if self._class_names is None:
            self._class_names = [str(i) for i in range(adaptation.log_probs.shape[1])]
        self._record.append(make_rows(batch, adaptation, self._class_names))
        self._seconds = time.perf_counter() - self._start

    def _on_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn not in _STAGES:
            return
        assert self._record is not None
        names = self._class_names
        facts = {} if names is None else {"class_names": names, "n_classes": len(names)}
        self._record.note(seconds=self._seconds, peak_memory_mb=_peak_memory_mb(pl_module.device), **facts)
        self._close()
        trainer.strategy.barrier("metatpt: all records are written")
        self._outcome = _on_rank_zero(trainer, lambda: export(self.folder, trainer.world_size))
        self.metrics = dict(self._outcome.metrics)

    on_validation_start = on_test_start = on_predict_start = _on_start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _on_batch_end
    on_validation_end = on_test_end = on_predict_end = _on_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints what the run came to: here, where progress bars are closed and Lightning has had its say."""
        self._close()
        if self._outcome is None or not trainer.is_global_zero:
            return
        if trainer.state.fn == TrainerFn.PREDICTING:
            shown = results_summary(self._outcome, self.folder)
        else:
            datamodule = getattr(trainer, "datamodule", None)
            title = f"{TrainerFn(stage).value}: {type(pl_module).__name__}"
            title += f" on {type(datamodule).__name__}" if datamodule is not None else ""
            source = getattr(datamodule, "source", None)
            title += f", {source}" if source else ""
            shown = results_table(self._outcome, title, self.folder)
        self._outcome = None
        Console(file=sys.stdout, highlight=False).print(shown, crop=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the record; the rows in it stay."""
        self._close()

    def _close(self) -> None:
        if self._record is not None:
            self._record.close()
            self._record = None


def _on_rank_zero(trainer: Trainer, function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, on all ranks; its error too, so that none waits for a rank that has failed."""
    result: T | Exception | None = None
    if trainer.is_global_zero:
        try:
            result = function()
        except Exception as error:
            result = error
    result = trainer.strategy.broadcast(result)
    if isinstance(result, Exception):
        raise result
    assert result is not None
    return result


def _peak_memory_mb(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MB
    if sys.platform == "win32":  # has no getrusage
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MB if sys.platform == "darwin" else peak * 1024 / _MB  # macOS counts bytes, Linux 1024 of them
