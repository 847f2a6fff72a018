"""Batches and the loop around a method, on the bundled model.

    python benchmarks/loop.py

Pictures a second at batch sizes 1 and 8; and a whole ``Trainer.test`` (loop, record, metrics, tables) against the same
batches through the method alone. What the loop adds to each picture is told from what a run takes once (start, final
figures and their intervals) by runs of two lengths.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from measure import costs, machine, parser, quiet_trainer
from torch.utils.data import DataLoader

from metatpt.callbacks import RunRecord
from metatpt.datamodules import ShiftedShapesDataModule
from metatpt.modules import MetaTPTModule, TPTModule
from metatpt.modules.tuning import PromptTuningModule
from metatpt.types import Batch


def batches(module: PromptTuningModule, size: int, samples: int) -> list[Batch]:
    data = ShiftedShapesDataModule(batch_size=size, max_samples=samples)
    data.preprocessing = module.preprocessing
    data.setup("test")
    return list(data.test_dataloader())


def alone(module: PromptTuningModule, batches: list[Batch]) -> None:
    for batch in batches:
        module.process(batch)


def tested(module: PromptTuningModule, batches: list[Batch]) -> None:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # its own tables
        trainer = quiet_trainer(folder, RunRecord(Path(folder) / "run"))
        trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=48)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    few, many = options.samples // 6, options.samples
    names = ShiftedShapesDataModule().class_names
    print(f"bundled model, {many} pictures, {machine(options.threads)}, median of {options.repeats}\n")
    print("| method | B = 1, pictures/s | B = 8, pictures/s | B = 8 / B = 1 | loop adds to a picture | once a run, s |")
    print("|---|---|---|---|---|---|")
    for kind in (TPTModule, MetaTPTModule):
        module = kind(class_names=names)
        cases = {
            "B = 1": partial(alone, module, batches(module, 1, many)),
            "B = 8": partial(alone, module, batches(module, 8, many)),
            "B = 8, few": partial(alone, module, batches(module, 8, few)),
            "tested": partial(tested, module, batches(module, 8, many)),
            "tested, few": partial(tested, module, batches(module, 8, few)),
        }
        seconds = {name: cost.seconds for name, cost in costs(cases, options.repeats).items()}
        rates = [many / seconds[case] for case in ("B = 1", "B = 8")]
        adds = (seconds["tested"] - seconds["tested, few"]) / (seconds["B = 8"] - seconds["B = 8, few"]) - 1
        once = seconds["tested"] - seconds["B = 8"] * (1 + adds)
        cells = [f"{rate:.2f}" for rate in rates]
        cells += [f"{rates[1] / rates[0]:.2f} x", f"{100 * adds:+.1f} %", f"{once:.1f}"]
        print(f"| {kind.__name__} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
