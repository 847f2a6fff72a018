"""What the loggers of a Trainer are told: how the run goes, and what it came to."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor

from metatpt.functional import entropy
from metatpt.metrics import ClassGain, gains_by_class
from metatpt.modules.checks import check_number
from metatpt.results import Row
from metatpt.results.plots import class_gains, entropies, png, reliability_diagram
from metatpt.results.record import CONFIG, COST, read_rows, record_files
from metatpt.results.rows import Cell
from metatpt.results.runs import change, largest_changes, strip_files
from metatpt.results.setup import read_setup

from .record import RunRecord
from .steps import STAGES, find_callback, read_step

_PLOTS = {"reliability_diagram": reliability_diagram, "class_gains": class_gains, "entropies": entropies}
_CHANGE = ("path", "label", "zero_shot_prediction", "prediction", "zero_shot_probability", "probability")

_log = logging.getLogger(__name__)


class LogResults(Callback):
    """Tells the Trainer's loggers what `validate`, `test` or `predict` finds; without a logger it does nothing.

    All loggers get, from rank 0 (``<stage>`` is ``val``, ``test`` or ``predict``):

    - ``config`` (`config.yaml`) and ``setup`` (`setup.json`) as hyperparameters;
    - while the run goes, every `trainer.log_every_n_steps` batches, of this process: ``<stage>/running_accuracy`` and
      ``<stage>/running_gain`` up to now, and over the batches since the last point ``<stage>/zero_shot_entropy`` and
      ``<stage>/entropy`` (means, in nats) and ``<stage>/milliseconds`` per picture. The step is the number of pictures;
    - at the end every figure of `metrics.json` as ``<stage>/<name>``, and of `cost.json`, where there is one, the
      seconds as ``<stage>/seconds/<part>``.

    Weights & Biases gets, in the end, the tables ``predictions``, ``largest_changes`` and ``gains_by_class``, and like
    TensorBoard the plots ``reliability_diagram``, ``class_gains`` and ``entropies`` and the strips of
    :class:`ViewGallery` as ``views``. All of this comes from the record, so what is logged after a run was resumed is
    that of the whole run. No weights, checkpoints or code are handed over.

    Args:
        max_rows: How many rows the table of predictions has at most (Weights & Biases takes 200,000).
        max_pictures: How many pictures that changed most are shown at most: half of them gained, half of them lost.
    """

    def __init__(self, max_rows: int = 10_000, max_pictures: int = 16) -> None:
        check_number("max_rows", max_rows, 1)
        check_number("max_pictures", max_pictures, 2)
        self.max_rows = max_rows
        self.max_pictures = max_pictures
        self._record: RunRecord | None = None
        self._n_pictures = 0
        self._since = 0.0
        self._sums: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks for the record.

        Raises:
            ValueError: There are loggers, but no :class:`RunRecord`.
        """
        self._record = None
        if trainer.state.fn not in STAGES or not trainer.loggers:
            return
        record = find_callback(trainer, RunRecord)
        if record is None:
            raise ValueError(
                "LogResults logs what RunRecord has recorded: add metatpt.callbacks.RunRecord(folder) to the trainer's "
                "callbacks (the command line does)."
            )
        if trainer.is_global_zero:
            self._record = record

    def _on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._n_pictures = 0 if self._record is None else self._record.n_done
        self._sums = None
        self._since = time.perf_counter()

    def _on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._record is None:
            return
        if batch_idx == 0:  # by now all callbacks have written what they write at the start
            parameters = _parameters(self._record.folder)
            for logger in trainer.loggers:
                logger.log_hyperparams(parameters)
        batch, adaptation = read_step(self, pl_module, outputs, batch)
        before, after = entropy(adaptation.zero_shot_log_probs), entropy(adaptation.log_probs)
        counted = batch.index >= 0
        having = counted & before.isfinite() & after.isfinite()
        # Read from the device when they are logged, and not before.
        values = [counted, having, before.where(having, 0), after.where(having, 0)]
        sums = torch.stack([each.float() for each in values]).sum(1)
        self._sums = sums if self._sums is None else self._sums + sums
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector of the trainer sets it
        if every and (batch_idx + 1) % every == 0:
            self._log_progress(trainer, pl_module)

    def _log_progress(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._sums is not None
        n_pictures, n_having, before, after = self._sums.tolist()
        seconds, self._since, self._sums = time.perf_counter() - self._since, time.perf_counter(), None
        self._n_pictures += round(n_pictures)
        figures = {f"running_{name}": value for name, value in getattr(pl_module, "running", {}).items()}
        if n_having:
            figures |= {"zero_shot_entropy": before / n_having, "entropy": after / n_having}
        if n_pictures:
            figures["milliseconds"] = 1000 * seconds / n_pictures
        _log_figures(trainer, figures, self._n_pictures)

    on_validation_start = on_test_start = on_predict_start = _on_start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _on_batch_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Logs what the run came to: here, where the record is whole and the loggers are still open."""
        record, self._record = self._record, None
        if record is None or not record.metrics:
            return
        cost = record.folder / COST
        seconds = json.loads(cost.read_text(encoding="utf-8"))["seconds"] if cost.exists() else {}
        step = int(record.metrics["n"])
        _log_figures(trainer, record.metrics | {f"seconds/{part}": value for part, value in seconds.items()}, step)
        takers = [logger for logger in trainer.loggers if isinstance(logger, (WandbLogger, TensorBoardLogger))]
        if not takers:
            return
        rows = list(read_rows(record_files(record.folder)))
        changed = [row for each in largest_changes(rows, self.max_pictures // 2) for row in each]
        files = strip_files(record.folder)
        strips = {row["index"]: files[row["index"]] for row in changed if row["index"] in files}
        plots = {name: Image.open(io.BytesIO(png(figure))) for name, plot in _PLOTS.items() if (figure := plot(rows))}
        for logger in takers:
            if isinstance(logger, WandbLogger):
                self._log_tables(logger, rows, changed, strips, step)
                for name, picture in plots.items():
                    logger.log_image(name, [picture], step)
            else:
                pictures = plots | {f"views/{index}": Image.open(file) for index, file in strips.items()}
                for name, picture in pictures.items():
                    logger.experiment.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            logger.save()

    def _log_tables(
        self, logger: WandbLogger, rows: list[Row], changed: list[Row], strips: Mapping[Cell, Path], step: int
    ) -> None:
        """Logs each table once, whole: W&B takes no more rows for one that it has."""
        import wandb

        if len(rows) > self.max_rows:
            _log.info("the table of W&B holds the first %d of %d rows (max_rows)", self.max_rows, len(rows))
        columns = list(dict.fromkeys(name for row in rows for name in row))
        logger.log_table("predictions", columns, [_cells(row, columns) for row in rows[: self.max_rows]], step=step)

        pictures = {index: wandb.Image(str(file)) for index, file in strips.items()}
        data = [[pictures.get(row["index"]), *_cells(row, _CHANGE), change(row)] for row in changed]
        logger.log_table("largest_changes", ["picture", *_CHANGE, "change"], data, step=step)
        if strips:
            captions = [_caption(row) for row in changed if row["index"] in strips]
            logger.log_image("views", [str(file) for file in strips.values()], step, caption=captions)

        gains = [[*each, each.gain] for each in gains_by_class(rows)]
        if gains:
            logger.log_table("gains_by_class", [*ClassGain._fields, "gain"], gains, step=step)


def _log_figures(trainer: Trainer, figures: Mapping[str, float], step: int) -> None:
    """Logs figures of the stage, but for those that are not finite: not every logger takes them."""
    stage = "val" if trainer.state.fn == TrainerFn.VALIDATING else TrainerFn(trainer.state.fn).value
    finite = {f"{stage}/{name}": value for name, value in figures.items() if math.isfinite(value)}
    for logger in trainer.loggers:
        logger.log_metrics(finite, step)
        logger.save()


def _parameters(folder: Path) -> dict[str, Any]:
    config = folder / CONFIG
    options = {"config": yaml.safe_load(config.read_text(encoding="utf-8"))} if config.exists() else {}
    return {**options, "setup": read_setup(folder)}


def _cells(row: Row, columns: Iterable[str]) -> list[Cell]:
    """Some cells of a row; what is not finite, which JSON does not hold, is left empty."""
    cells = [row.get(name) for name in columns]
    return [None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in cells]


def _caption(row: Row) -> str:
    label = "" if row["label"] is None else f"label {row['label']}, "
    return f"{label}{row['zero_shot_prediction']} to {row['prediction']}, {change(row):+.2f}, {row['path']}"
