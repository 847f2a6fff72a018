"""A run whose every prediction follows from the sample's index; as a script, on as many processes as it is told.

It needs nothing of the package but what crosses folders. `python toy_run.py '[["FOLDER", "test", [[0, 2], [1]]]]'`
does a run with one process per list of indices.
"""

import json
import math
import sys

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from metatpt.callbacks.record import RunRecord
from metatpt.types import Adaptation, Batch

CLASS_NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
BROKEN, LOST = 5, 6  # cannot be read; its loss becomes NaN


def collate(indices, labelled=True):
    n = len(indices)
    return Batch(
        image=torch.zeros(n, 3, 2, 2),
        canvas=torch.zeros(n, 3, 4, 4, dtype=torch.uint8),
        aspect=torch.ones(n),
        label=torch.tensor([i % 6 if labelled and i >= 0 else -1 for i in indices]),
        index=torch.tensor(indices),
        path=[f"{i}.png" for i in indices],
        error=["no picture" if i == BROKEN else None for i in indices],
    )


class ToyModule(LightningModule):
    def __init__(self):
        super().__init__()
        self.running = {"accuracy": 0.5, "gain": 0.025}

    def adapt(self, batch):
        log_probs = torch.stack(
            [torch.randn(3, 6, generator=torch.Generator().manual_seed(int(i) + 1)) for i in batch.index]
        ).log_softmax(-1)
        for row, i in enumerate(batch.index.tolist()):
            log_probs[row] += math.nan if i == BROKEN else 0.0
            log_probs[row, 0] += math.nan if i == LOST else 0.0
        return Adaptation(
            log_probs[:, 0], log_probs[:, 1], log_probs[:, 2], diagnostics={"spread": log_probs[:, 1].sum(1)}
        )

    def test_step(self, batch, batch_idx):
        return {"adaptation": self.adapt(batch)}

    validation_step = test_step

    def predict_step(self, batch, batch_idx):
        return self.adapt(batch)


class Indices(Dataset):
    def __init__(self, indices):
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        return self.indices[place]


class ToyData(LightningDataModule):
    """Each rank's indices; one without any gets a filler row."""

    def __init__(self, parts, n_total=50, batch_size=2):
        super().__init__()
        self.parts, self.n_total, self.batch_size = parts, n_total, batch_size
        self.class_names = CLASS_NAMES
        self.labelled = True

    def test_dataloader(self):
        mine = self.parts[self.trainer.global_rank] or [-1]
        return DataLoader(
            Indices(mine), batch_size=self.batch_size, collate_fn=lambda indices: collate(indices, self.labelled)
        )

    val_dataloader = predict_dataloader = test_dataloader


def make_trainer(callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu",
        inference_mode=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
        **{"enable_progress_bar": False} | quiet | options,
    )


class Says(Callback):
    """What each process knows in the end."""

    def __init__(self, record):
        self.record = record

    def teardown(self, trainer, pl_module, stage):
        print(f"rank {trainer.global_rank} n={self.record.metrics.get('n')}", flush=True)


def main(jobs):
    for folder, command, parts in json.loads(jobs):
        record = RunRecord(folder)
        # Forked processes need not import torch again.
        trainer = make_trainer([record, Says(record)], strategy="ddp_fork", devices=len(parts))
        print(f"job {folder}", flush=True)
        try:
            getattr(trainer, command)(ToyModule(), datamodule=ToyData(parts))
        except Exception as error:
            print(f"failed: {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
