"""The record of a run: a row per sample, written as the run goes, and the files and the table made from it."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from metatpt.modules import AdaptationModule
from metatpt.modules.checkpoints import plain
from metatpt.results import (
    Outcome,
    Progress,
    Record,
    check_unused,
    export,
    make_rows,
    recover,
    results_summary,
    results_table,
    start_session,
)
from metatpt.results.setup import check_same_setup, file_hash, hardware, read_setup, revisions, versions, write_setup
from metatpt.rng import run_seed

from .memory import peak_memory_mb, reset_peak_memory
from .reset import ResetPrompts
from .steps import STAGES, find_callback, on_rank_zero, raise_together, read_step

_LIMITS = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}

_NOT_OPTIONS = ("class_names", "template", "clip", "pretrained", "memory")
"""Of the module's: they stand for themselves in the setup, or move no prediction."""

_log = logging.getLogger(__name__)


class RunRecord(Callback):
    """Writes what `validate`, `test` or `predict` finds into a run folder, and prints it at the end.

    While it runs, every rank appends its rows to a record of its own, durably, batch by batch; at the end rank 0
    writes `predictions.csv` and `metrics.json` from all of them. `setup.json` says what a prediction depends on (the
    method's options, seed, policy, hashes of weights and checkpoint, preprocessing, class names), and of each session
    when and where it ran. It says nothing in `fit`.

    It expects a :class:`~metatpt.types.Batch`, and an :class:`~metatpt.types.Adaptation` as output: bare from
    `predict_step`, as ``{"adaptation": ...}`` from the other steps. Names of classes and the size of the split come
    from the datamodule (`class_names`, `n_total`); without one, names come from the module, and the split is what was
    seen.

    With `resume`, a run that was stopped goes on: what its record holds is left out of the datamodule's split, and
    what a stream carries over (``policy: online``) is taken up again. Any number of processes may go on.

    `images_per_second`: pictures with a prediction, of all ranks, by the wall-clock seconds of the slowest rank, from
    the start of the loop to the end of the last batch: reading, warm-up and this record included; of a resumed run
    those of the last session that predicted something. A row's `milliseconds` (in the record only) are those of its
    batch, from its being on the device to its predictions being read, by the pictures in it.

    `peak_memory_mb`, in units of 2**20 bytes, of the rank with the most: on a GPU what tensors took at most during the
    run, else the largest resident set of the process so far, workers not included; left out where the system does not
    tell.

    Args:
        folder: The run folder. It is made; one that holds a run is refused when a run starts.
        resume: Go on with the run that it holds.

    Attributes:
        folder: The run folder, that of rank 0 on every rank.
        outcome: What the run came to, on every rank, once it has ended.
    """

    def __init__(self, folder: str | Path, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.resume = resume
        self.outcome: Outcome | None = None
        self._record: Record | None = None
        self._progress = Progress()
        self._setup: dict[str, Any] = {}
        self._class_names: list[str] | None = None
        self._start = self._batch_start = self._seconds = 0.0
        self._n_predicted = 0
        self._is_shown = True

    @property
    def metrics(self) -> dict[str, float | int]:
        """The content of `metrics.json`, on every rank, once a run has ended."""
        return {} if self.outcome is None else dict(self.outcome.metrics)

    @property
    def n_done(self) -> int:
        """How many pictures earlier sessions of a resumed run have done."""
        return len(self._progress.done)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the folder and opens the record."""
        if trainer.state.fn not in STAGES:
            return

        def open_folder() -> tuple[Path, Progress]:
            if self.resume:
                return self.folder, recover(self.folder)
            check_unused(self.folder, config=False)
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder, Progress()

        self.outcome = None
        datamodule: Any = getattr(trainer, "datamodule", None)
        names = getattr(datamodule, "class_names", None) or getattr(pl_module, "class_names", None)
        self._class_names = list(names) if names else None
        self.folder, self._progress = on_rank_zero(trainer, open_folder)
        self._setup = on_rank_zero(trainer, lambda: self._made_with(trainer, pl_module))
        if self.resume:
            self._go_on(trainer, pl_module)
        error = None
        try:
            self._record = Record(self.folder, trainer.global_rank)
        except OSError as failed:
            error = failed
        raise_together(trainer, error)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that it is the same run, before anything is changed, and leaves out what is done."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "leave_out"):
            raise TypeError(
                f"{type(datamodule).__name__} cannot leave pictures out, so this run cannot be resumed: use a "
                "datamodule on metatpt.datamodules.BaseDataModule."
            )
        name = _LIMITS[_stage(trainer)]
        limit = getattr(trainer, name)
        if isinstance(limit, int) or limit != 1.0:  # 1.0 is all of them, and 1 is one batch
            raise ValueError(
                f"A run with --trainer.{name} {limit} cannot be resumed, since that counts batches: start a new run, "
                "limited by --data.max_samples."
            )
        if isinstance(pl_module, AdaptationModule):
            pl_module.check_resumable()
        datamodule.leave_out(self._progress.done)

        def start() -> Path:
            check_same_setup(read_setup(self.folder), self._setup)
            start_session(self.folder, self._progress)
            return self.folder

        on_rank_zero(trainer, start)
        if trainer.is_global_zero:
            _log.info("going on with %s: %d pictures are done", self.folder, self.n_done)

    def _on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn not in STAGES:
            return
        assert self._record is not None
        n_total = getattr(getattr(trainer, "datamodule", None), "n_total", None)
        self._record.note(n_total=None if n_total is None else int(n_total), **self._classes())
        on_rank_zero(trainer, lambda: self._write_setup(trainer, pl_module))
        if isinstance(pl_module, AdaptationModule):
            done = self._progress
            if done.stream is not None:
                pl_module.resume_stream({name: value.to(pl_module.device) for name, value in done.stream.items()})
            if trainer.is_global_zero and trainer.state.fn != TrainerFn.PREDICTING:  # which counts nothing
                pl_module.count_earlier(done.n_labelled, done.n_right, done.n_zero_shot_right)
        reset_peak_memory(pl_module.device)
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._n_predicted = 0

    def _classes(self) -> dict[str, Any]:
        names = self._class_names
        return {} if names is None else {"class_names": names, "n_classes": len(names)}

    def _made_with(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What a prediction depends on, besides the picture. Locations are not in it, but what lies there."""
        clip: Any = getattr(pl_module, "clip", None)
        preprocessing = getattr(pl_module, "preprocessing", None)
        datamodule = getattr(trainer, "datamodule", None)
        reset = find_callback(trainer, ResetPrompts)
        options = plain(dict(getattr(pl_module, "hparams", {})))
        return {
            "stage": _stage(trainer),
            "method": type(pl_module).__name__,
            "options": {name: value for name, value in options.items() if name not in _NOT_OPTIONS and name[0] != "_"},
            "seed": run_seed(),
            "policy": None if reset is None else reset.policy,
            "data": type(datamodule).__name__,
            "split": getattr(datamodule, "source", None),
            "n_total": getattr(datamodule, "n_total", None),
            "clip": None if clip is None else {"name": clip.name, "sha256": clip.fingerprint()},
            "checkpoint": file_hash(trainer.ckpt_path) if trainer.ckpt_path else None,
            "preprocessing": None if preprocessing is None else dataclasses.asdict(preprocessing),
            "template": options.get("template"),
            "class_names": self._class_names,
        }

    def _write_setup(self, trainer: Trainer, pl_module: LightningModule) -> Path:
        """`setup.json`: what the options stand for, and each session."""
        session = {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "devices": trainer.world_size,
            "hardware": hardware(pl_module.device),
            "versions": versions(),
            "revision": revisions(),
        }
        before = read_setup(self.folder).get("sessions", []) if self.resume else []
        return write_setup(self.folder, {**self._setup, "sessions": [*before, session]})

    def _on_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._batch_start = time.perf_counter()

    def _on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn not in STAGES:
            return
        if dataloader_idx > 0:
            raise ValueError("RunRecord records one split per run, but there are several dataloaders: run one by one.")
        batch, adaptation = read_step(self, pl_module, outputs, batch)
        assert self._record is not None
        if self._class_names is None:
            self._class_names = [str(i) for i in range(adaptation.log_probs.shape[1])]
        rows = make_rows(batch, adaptation, self._class_names)
        predicted = [row for row in rows if row["status"] != "skipped"]
        now = time.perf_counter()  # rows are made of predictions, which have been read from the device
        for row in predicted:
            row["milliseconds"] = 1000 * (now - self._batch_start) / len(predicted)
        self._record.append(rows, pl_module.stream() if isinstance(pl_module, AdaptationModule) else None)
        self._n_predicted += len(predicted)
        self._seconds = time.perf_counter() - self._start

    def _on_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn not in STAGES:
            return
        assert self._record is not None
        self._record.note(**self._classes())
        if self._n_predicted or self._progress.session == 1:  # speed and memory are those of who has done something
            self._record.note(
                session=self._progress.session,
                seconds=self._seconds,
                n_predicted=self._n_predicted,
                peak_memory_mb=peak_memory_mb(pl_module.device),
            )
        self._close()
        trainer.strategy.barrier("metatpt: all records are written")
        self.outcome = on_rank_zero(trainer, lambda: export(self.folder, trainer.world_size))
        self._is_shown = False

    on_validation_start = on_test_start = on_predict_start = _on_start
    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _on_batch_start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _on_batch_end
    on_validation_end = on_test_end = on_predict_end = _on_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints what the run came to: here, where progress bars are closed and Lightning has had its say."""
        self._close()
        if self.outcome is None or self._is_shown or not trainer.is_global_zero:
            return
        self._is_shown = True
        if trainer.state.fn == TrainerFn.PREDICTING:
            shown = results_summary(self.outcome, self.folder)
        else:
            datamodule = getattr(trainer, "datamodule", None)
            title = f"{TrainerFn(stage).value}: {type(pl_module).__name__}"
            title += f" on {type(datamodule).__name__}" if datamodule is not None else ""
            source = getattr(datamodule, "source", None)
            title += f", {source}" if source else ""
            shown = results_table(self.outcome, title, self.folder)
        Console(file=sys.stdout, highlight=False).print(shown, crop=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the record; the rows in it stay, and the log says how to go on."""
        if self._record is None:
            return
        self._close()
        if trainer.is_global_zero and (self._n_predicted or self.n_done):
            _log.info(
                "What is done lies in %s. To go on: metatpt %s --resume %s",
                self.folder,
                _stage(trainer),
                shlex.quote(str(self.folder)),
            )

    def _close(self) -> None:
        if self._record is not None:
            self._record.close()
            self._record = None


def _stage(trainer: Trainer) -> str:
    return TrainerFn(trainer.state.fn).value
