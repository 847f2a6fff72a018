"""Batches and the loop around a method, on the bundled model.

    python benchmarks/loop.py

Pictures a second at batch sizes 1 and 8; and a whole ``Trainer.test`` (loop, record, metrics, tables) against the same
batches through the method alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning
import torch
from measure import costs, machine, parser
from torch.utils.data import DataLoader

from metatpt.callbacks import ResetPrompts, RunRecord
from metatpt.datamodules import ShiftedShapesDataModule
from metatpt.modules import MetaTPTModule, TPTModule
from metatpt.modules.tuning import PromptTuningModule
from metatpt.types import Batch


def batches(module: PromptTuningModule, size: int, samples: int) -> list[Batch]:
    data = ShiftedShapesDataModule(batch_size=size, max_samples=samples)
    data.preprocessing = module.preprocessing
    data.setup("test")
    return list(data.test_dataloader())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=24)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    names = ShiftedShapesDataModule().class_names
    print(f"bundled model, {options.samples} pictures, {machine(options.threads)}, median of {options.repeats}\n")
    print("| method | B = 1, pictures/s | B = 8, pictures/s | B = 8 against B = 1 | loop, record and metrics |")
    print("|---|---|---|---|---|")
    for kind in (TPTModule, MetaTPTModule):
        module = kind(class_names=names)
        by_size = {size: batches(module, size, options.samples) for size in (1, 8)}

        def alone(size: int, module: PromptTuningModule = module, by_size: dict[int, list[Batch]] = by_size) -> None:
            for batch in by_size[size]:
                module.process(batch)

        def tested(module: PromptTuningModule = module, by_size: dict[int, list[Batch]] = by_size) -> None:
            with tempfile.TemporaryDirectory() as folder:
                trainer = lightning.Trainer(
                    accelerator="cpu",
                    inference_mode=False,
                    use_distributed_sampler=False,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    callbacks=[ResetPrompts(), RunRecord(Path(folder) / "run")],
                )
                trainer.test(module, DataLoader(by_size[8], batch_size=None), verbose=False)

        cost = costs({"1": lambda: alone(1), "8": lambda: alone(8), "tested": tested}, options.repeats)
        rates = [options.samples / cost[size].seconds for size in ("1", "8")]
        overhead = cost["tested"].seconds / cost["8"].seconds - 1
        cells = [f"{rate:.2f}" for rate in rates] + [f"{rates[1] / rates[0]:.2f} x", f"{100 * overhead:+.1f} %"]
        print(f"| {kind.__name__} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
