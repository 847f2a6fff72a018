"""A run of a method with views, each pixel of which says whose view it is; as a script, on several processes.

`python views_run.py CLIP FOLDER '[[0, 2], [1]]'` does a logged run with one process per list of indices.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from metatpt.callbacks import LogResults, ResetPrompts, RunRecord, ViewGallery
from metatpt.modules import ViewAverageModule

sys.path.append(str(Path(__file__).parent))
from toy_run import CLASS_NAMES, ToyData, ToyModule, make_trainer

N_VIEWS = 3


def pixel(index, view):
    """The value of all pixels of a view, of 255; originals are black."""
    return 8 * index + view + 1


class Views(ViewAverageModule):
    """`ToyModule`'s predictions, with views; stops at a batch, if it is told to."""

    stops_at = None

    def __init__(self, clip):
        super().__init__(clip=clip, class_names=CLASS_NAMES)

    def test_step(self, batch, batch_idx):
        if batch_idx == self.stops_at:
            raise RuntimeError("stopped")
        return super().test_step(batch, batch_idx)

    def adapt(self, batch):
        values = torch.tensor([[pixel(int(i), view) for view in range(N_VIEWS)] for i in batch.index]) / 255
        views = values[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
        return dataclasses.replace(ToyModule.adapt(self, batch), views=views if self.keep_views else None)


class Data(ToyData):
    """Pictures that can be left out of a resumed run."""

    def leave_out(self, done):
        self.parts = [[i for i in part if i not in done] for part in self.parts]


def main(clip, folder, parts):
    from lightning.pytorch.loggers import WandbLogger

    parts = json.loads(parts)
    trainer = make_trainer(
        [ResetPrompts(), RunRecord(folder), ViewGallery(2), LogResults()],
        logger=WandbLogger(save_dir=folder, offline=True),
        strategy="ddp",
        devices=len(parts),
    )
    trainer.test(Views(clip), datamodule=Data(parts), verbose=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
