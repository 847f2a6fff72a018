"""What both ways of training with labels share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from metatpt.types import Batch

from .base import AdaptationModule
from .checkpoints import start_prompt


class LabelledTrainingModule(AdaptationModule):
    """Descends a labelled loss; a module says which, and what is trained.

    Args:
        start_from: Checkpoint whose prompt training starts from: of `fit` or `import-prompt`, with the same learner.
        **kwargs: See the method that is trained.
    """

    def __init__(self, start_from: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.start_from = start_from

    @abstractmethod
    def trained_parameters(self) -> list[nn.Parameter]:
        """What training learns."""

    @abstractmethod
    def labelled_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss of pictures that are all readable and labelled, and their logits ``[B, C]``."""

    def configure_metrics(self) -> None:
        """See :meth:`AdaptationModule.configure_metrics`."""
        super().configure_metrics()
        self.train_loss = MeanMetric()
        self.train_accuracy = MeanMetric()

    def on_fit_start(self) -> None:
        """See :meth:`AdaptationModule.on_fit_start`."""
        super().on_fit_start()
        if self.start_from is not None and self.trainer.ckpt_path is None:
            start_prompt(self, self.start_from)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch's readable, labelled pictures; the others weigh nothing."""
        labels = batch.label.tolist()
        counted = [row for row in range(len(batch)) if batch.error[row] is None and labels[row] >= 0]
        # What no picture depends on gets a gradient all the same: of zero, which every process then has.
        loss = torch.stack([0 * value.sum() for value in self.trained_parameters()]).sum()
        if counted:
            batch = batch.select(counted)
            with self.in_precision(batch.image.device):
                its_loss, logits = self.labelled_loss(batch)
            loss = loss + its_loss * (len(counted) / len(labels))
            self.train_loss.update(its_loss.detach(), len(counted))
            self.train_accuracy.update((logits.detach().argmax(-1) == batch.label).float())
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss
