"""What is written and measured beside a run costs: the record, the gallery of views, the cost meter.

    python benchmarks/record.py

The bundled model on the bundled benchmark. Of a run with all three: the time inside of each one's hooks, as a share of
``Trainer.test``, what that is for a picture, and what comes once a run, however long it is (setup, final figures).
What a callback costs elsewhere (pixels kept for the gallery, marks of the meter) shows in runs with it alone against
runs without any; taken in turn, and as exact as the machine is quiet.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from measure import costs, machine, parser, quiet_trainer

from metatpt.callbacks import CostMeter, RunRecord, ViewGallery
from metatpt.datamodules import ShiftedShapesDataModule
from metatpt.modules import AdaptationModule, MetaTPTModule, TPTModule, ZeroShotModule

Make = Callable[[Path], Callback]

CALLBACKS: dict[str, Make] = {
    "RunRecord": RunRecord,
    "ViewGallery": lambda folder: ViewGallery(),
    "CostMeter": lambda folder: CostMeter(),
}


METHODS = {kind.__name__: kind for kind in (TPTModule, MetaTPTModule, ZeroShotModule)}


class Watched:
    """Makes a callback for a run folder, with a clock around each hook that it has.

    Attributes:
        batches: Seconds in the hooks of batches, of all that were made.
        once: In those of a run.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self.batches = self.once = 0.0

    def __call__(self, folder: Path) -> Callback:
        """One of them."""
        callback = self._make(folder)
        for name in dir(Callback):
            own = getattr(type(callback), name) is not getattr(Callback, name)
            if own and name.startswith(("on_", "setup", "teardown")):
                setattr(callback, name, partial(self._timed, getattr(callback, name), "_batch_" in name))
        return callback

    def _timed(self, hook: Callable[..., Any], of_batch: bool, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        hook(*args, **kwargs)
        seconds = time.perf_counter() - start
        if of_batch:
            self.batches += seconds
        else:
            self.once += seconds


def run(module: AdaptationModule, samples: int, *makes: Make) -> float:
    """Seconds of a run with callbacks."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # its own tables
        trainer = quiet_trainer(folder, *(make(Path(folder)) for make in makes))
        start = time.perf_counter()
        trainer.test(module, datamodule=ShiftedShapesDataModule(max_samples=samples), verbose=False)
        return time.perf_counter() - start


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=96)
    arguments.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    print(f"bundled model, {options.samples} pictures, {machine(options.threads)}, median of {options.repeats}\n")
    print("| method | callback | hooks, of a run's time | a picture, ms | once a run, ms | with it against without |")
    print("|---|---|---|---|---|---|")
    names = ShiftedShapesDataModule().class_names
    for method in options.method:
        module = METHODS[method](class_names=names)
        cases = {name: partial(run, module, options.samples, make) for name, make in CALLBACKS.items()}
        cost = costs({"none": partial(run, module, options.samples), **cases}, options.repeats)
        watched = {name: Watched(make) for name, make in CALLBACKS.items()}
        seconds = sum(run(module, options.samples, *watched.values()) for _ in range(options.repeats))
        for name, spent in watched.items():
            cells = [
                method,
                name,
                f"{100 * (spent.batches + spent.once) / seconds:.2f} %",
                f"{1000 * spent.batches / options.repeats / options.samples:.2f}",
                f"{1000 * spent.once / options.repeats:.0f}",
                f"{100 * (cost[name].seconds / cost['none'].seconds - 1):+.1f} %",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
