"""What a run costs: where its time goes, and how much memory it takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from metatpt.results.files import replaced
from metatpt.results.record import COST
from metatpt.timing import PARTS, Call, Meter, stamps

from .folder import run_folder
from .memory import peak_memory_mb, reset_peak_memory
from .steps import STAGES, on_rank_zero

_log = logging.getLogger(__name__)


class CostMeter(Callback):
    """Measures where the time of `validate`, `test` or `predict` goes, and how much memory it takes at most.

    At the end rank 0 writes `cost.json` into the folder of :class:`RunRecord`, or without one into
    `trainer.default_root_dir`, and logs one line. It says nothing in `fit`. No prediction changes by it.

    `seconds`, summed over processes, from the start of the loop to the end of the last batch:

    - `data`: waiting for the loader, and copying to the device;
    - `views`: drawing and warping them;
    - `image_tower`, `text_tower`: encoding pictures and prompts;
    - `other`: the rest: losses, optimisers, other callbacks, the record, Lightning's loop.

    Backward passes count for the part that they go through, first and second order, and so does what is computed again
    in them. On a GPU times are those of its stream, read afterwards: the run never waits for them. There a part has the
    time that the device takes for it, or that it waits for the host meanwhile. A method that calls the model past
    :class:`~metatpt.clip.FrozenCLIP` has its time in `other`.

    `pictures`: how many that was for, of all processes; of a resumed run those of its last session, as all here.
    `peak_memory_mb`: as in `metrics.json`.

    Attributes:
        cost: The content of `cost.json`, on every rank, once a run has ended.
    """

    def __init__(self) -> None:
        self.cost: dict[str, Any] = {}
        self._meter: Meter | None = None
        self._profiler: Profiler | None = None
        self._pictures: Any = 0

    def _on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn not in STAGES:
            return
        self.cost, self._pictures = {}, 0
        reset_peak_memory(pl_module.device)
        meter = Meter(stamps(pl_module.device))
        meter.start()
        self._meter, self._profiler = meter, trainer.profiler  # type: ignore[attr-defined]
        trainer.profiler = _DataWatch(trainer.profiler, meter)  # type: ignore[attr-defined]

    def _on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._meter is not None:
            self._pictures = self._pictures + (batch.index >= 0).sum()  # stays on the device, which would be waited for
            self._meter.lap()

    def _on_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._meter is None:
            return
        meter = self._meter
        self._stop(trainer)
        meter.wait()
        precise = torch.float32 if pl_module.device.type == "mps" else torch.float64
        own = torch.tensor([self._pictures, *meter.seconds.values()], dtype=precise, device=pl_module.device)
        pictures, *seconds = trainer.strategy.reduce(own, reduce_op="sum").tolist()
        self.cost = {"pictures": int(pictures), "seconds": dict(zip(PARTS, seconds, strict=True))}
        memory = peak_memory_mb(pl_module.device)
        if memory is not None:
            largest = torch.tensor(memory, dtype=precise, device=pl_module.device)
            self.cost["peak_memory_mb"] = float(trainer.strategy.reduce(largest, reduce_op="max"))
        on_rank_zero(trainer, lambda: self._write(run_folder(trainer)))

    def _write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / COST
        with replaced(file) as stream:
            json.dump(self.cost, stream, indent=2)
            stream.write("\n")
        _log.info("%s", _line(self.cost))
        return file

    # At the start of the epoch other callbacks have made ready what they need: the record hashes the model.
    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _on_start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _on_batch_end
    on_validation_end = on_test_end = on_predict_end = _on_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Measures no more; a run that breaks leaves no `cost.json`."""
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if self._meter is not None:
            self._meter.stop()
            trainer.profiler = self._profiler  # type: ignore[attr-defined]
            self._meter = self._profiler = None


class _DataWatch(Profiler):
    """Lightning's profiler, and a meter that learns from it when data are fetched and copied.

    No callback is called at these moments: what lies between two batches is other callbacks' time too.

    Args:
        profiler: The trainer's own, which is told everything.
        meter: The meter.
    """

    def __init__(self, profiler: Profiler, meter: Meter) -> None:
        super().__init__()
        self._profiler = profiler
        self._meter = meter
        self._data = Call("data")

    def start(self, action_name: str) -> None:
        """Begins an action."""
        if _is_data(action_name):
            self._meter.open(self._data)
        self._profiler.start(action_name)

    def stop(self, action_name: str) -> None:
        """Ends it."""
        self._profiler.stop(action_name)
        if _is_data(action_name):
            self._meter.close(self._data)


def _is_data(action_name: str) -> bool:
    return action_name.endswith(("_next", ".batch_to_device"))


def _line(cost: dict[str, Any]) -> str:
    """A cost in one line: shares of the time, and memory."""
    total = sum(cost["seconds"].values())
    shares = ", ".join(f"{part.replace('_', ' ')} {value / total:.0%}" for part, value in cost["seconds"].items())
    memory = f"; at most {cost['peak_memory_mb']:,.0f} MB" if "peak_memory_mb" in cost else ""
    return f"cost of {cost['pictures']} pictures: {total:.1f} s ({shares}){memory}"
