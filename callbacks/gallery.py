"""A gallery of views: those of the pictures that adaptation changed most."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.utils import save_image

from metatpt.modules import ViewModule
from metatpt.modules.checks import check_number
from metatpt.results import Row, make_rows
from metatpt.results.files import replaced
from metatpt.results.record import read_rows, record_files
from metatpt.results.rows import Cell
from metatpt.results.runs import largest_changes, strip_file

from .folder import run_folder
from .record import RunRecord
from .steps import STAGES, find_callback, read_step

_GAP = 2  # white pixels between two views

_log = logging.getLogger(__name__)


class ViewGallery(Callback):
    """Keeps the views of the pictures that gained most and of those that lost most by adaptation.

    ``<run folder>/views/<index>.png`` is a strip: the original at the left, then the views that the method has
    selected, as they ended, the most confident first (the original again, where it is one of them). What a picture
    gains is what :func:`~metatpt.results.runs.change` says: probability of its label, or without one entropy lost.

    A strip is written when its picture enters the largest changes up to now, and removed when it falls out, so a run
    that is stopped has its gallery too. Each process keeps its own; once all have ended, the record says which pictures
    count over all processes and sessions, and the others are removed. The run folder is that of :class:`RunRecord`, or
    without one `trainer.default_root_dir`: then the galleries of several processes stay side by side.

    Put it behind :class:`RunRecord` in the list of callbacks, so that its time is in no row's `milliseconds`.

    Args:
        n: How many pictures that gained, and how many that lost; 0 for no gallery.
        max_views: How many views a strip shows, at most, besides the original.
    """

    def __init__(self, n: int = 4, max_views: int = 8) -> None:
        check_number("n", n, 0)
        check_number("max_views", max_views, 1)
        self.n = n
        self.max_views = max_views
        self._module: ViewModule | None = None
        self._kept_views = False
        self._rows: dict[Cell, Row] = {}
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has the method keep the pixels of its views."""
        self._rows, self._ended = {}, False
        if trainer.state.fn not in STAGES or not self.n:
            return
        if isinstance(pl_module, ViewModule):
            self._module, self._kept_views = pl_module, pl_module.keep_views
            pl_module.keep_views = True
        elif trainer.is_global_zero:
            _log.info("%s looks at no views: there will be no gallery", type(pl_module).__name__)

    def _on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._module is None:
            return
        batch, adaptation = read_step(self, pl_module, outputs, batch)
        if adaptation.views is None:  # no picture of this batch could be read
            return
        predicted = dataclasses.replace(adaptation, averaged_log_probs=None, diagnostics={})
        rows = make_rows(batch, predicted, self._module.class_names)
        before, self._rows = self._rows, _most_changed([*self._rows.values(), *rows], self.n)
        folder = run_folder(trainer)
        for index in self._rows.keys() - before.keys():
            place = batch.index.tolist().index(index)
            self._write(strip_file(folder, index), batch.image[place], adaptation.views[place])
        for index in before.keys() - self._rows.keys():
            strip_file(folder, index).unlink(missing_ok=True)

    def _write(self, file: Path, image: Tensor, views: Tensor) -> None:
        """Writes an original ``[3, R, R]`` and its views ``[K, 3, R, R]``."""
        strip = torch.cat([image[None].to(views.dtype), views[: self.max_views]]).float()
        content = io.BytesIO()
        save_image(strip, content, format="PNG", nrow=len(strip), padding=_GAP, pad_value=1.0)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as stream:
            stream.buffer.write(content.getbuffer())

    def _on_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._module is not None:
            self._ended = True
            trainer.strategy.barrier("metatpt: all views are written")

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _on_batch_end
    on_validation_end = on_test_end = on_predict_end = _on_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what does not count over all processes: here, where the record is whole."""
        self._restore()
        if not self._ended or not trainer.is_global_zero:
            return
        record = find_callback(trainer, RunRecord)
        if record is None:
            return
        rows = list(read_rows(record_files(record.folder)))
        kept = _most_changed(rows, self.n)
        for index in (row["index"] for row in rows):
            file = strip_file(record.folder, index)
            if index not in kept:
                file.unlink(missing_ok=True)
            file.with_name(f"{file.name}.partial").unlink(missing_ok=True)  # of a process that was killed

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the method as it was; the gallery stays."""
        self._restore()

    def _restore(self) -> None:
        if self._module is not None:
            self._module.keep_views, self._module = self._kept_views, None


def _most_changed(rows: Iterable[Row], n: int) -> dict[Cell, Row]:
    """The rows of the gallery by index; by index also where changes are equal, whatever process they come from."""
    gains, losses = largest_changes(sorted(rows, key=itemgetter("index")), n)
    return {row["index"]: row for row in [*gains, *losses]}
