"""Training a prompt with labels: what a test-time method then starts from."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from metatpt.clip import FrozenCLIP
from metatpt.prompts import PromptFactory, PromptLearner, TextPrompt
from metatpt.types import Batch
from metatpt.views import ViewBounds, affine, bounded, sample_views, warp

from .checks import check_choice, check_number
from .labelled import LabelledTrainingModule
from .zero_shot import ZeroShotModule

_log = logging.getLogger(__name__)

TrainingViews = Literal["crop", "original"]


class PromptTrainingModule(LabelledTrainingModule, ZeroShotModule):
    """Few-shot training of a prompt learner (CoOp, IJCV 2022); its test is the trained prompt as it is.

    Args:
        lr: Learning rate of SGD; it falls with a cosine over the epochs.
        warmup_epochs: Epochs at `warmup_lr` before that.
        warmup_lr: Learning rate of these.
        momentum: Of SGD.
        weight_decay: Of SGD.
        training_views: ``crop`` (a random resized crop with flip of each picture, another one in each epoch) or
            ``original``.
        **kwargs: See :class:`LabelledTrainingModule` and :class:`AdaptationModule`; `prompt` is a
            :class:`metatpt.prompts.TextPrompt` by default.
    """

    def __init__(
        self,
        lr: float = 2e-3,
        warmup_epochs: int = 1,
        warmup_lr: float = 1e-5,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        training_views: TrainingViews = "crop",
        **kwargs: Any,
    ) -> None:
        check_number("lr", lr, 0, open_low=True)
        check_number("warmup_epochs", warmup_epochs, 0)
        check_number("warmup_lr", warmup_lr, 0)
        check_number("momentum", momentum, 0, 1)
        check_number("weight_decay", weight_decay, 0)
        check_choice("training_views", training_views, get_args(TrainingViews))
        super().__init__(**kwargs)
        self.lr = lr
        self.warmup_epochs = warmup_epochs
        self.warmup_lr = warmup_lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.training_views = training_views

    def configure_prompt(
        self, clip: FrozenCLIP, template: str | list[str], prompt: PromptFactory | None
    ) -> PromptLearner:
        """See :meth:`AdaptationModule.configure_prompt`."""
        return super().configure_prompt(clip, template, TextPrompt if prompt is None else prompt)

    def trained_parameters(self) -> list[nn.Parameter]:
        """All that the prompt learns."""
        return list(self.prompt.tuned.values())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with warm-up and cosine, a step an epoch."""
        parameters = self.trained_parameters()
        if not parameters:
            raise ValueError(f"{type(self.prompt).__name__} has nothing to train; choose another --model.prompt")
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(f"trainer.max_epochs is {epochs}; the learning rate's cosine needs a number of epochs")
        if self.warmup_epochs >= epochs:
            _log.warning(
                "warmup_epochs is %d and trainer.max_epochs %d: all training is at the warm-up's rate, %g",
                self.warmup_epochs, epochs, self.warmup_lr,
            )  # fmt: skip
        optimizer = torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)

        def share(epoch: int) -> float:
            if epoch < self.warmup_epochs:
                return self.warmup_lr / self.lr
            return 0.5 * (1 + math.cos(math.pi * epoch / epochs))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def on_train_start(self) -> None:
        """Take the options and the cosine at hand: those of a checkpoint may be others, and for fewer epochs."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        scheduler.base_lrs = [self.lr]
        (group,) = scheduler.optimizer.param_groups
        group["lr"] = self.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)
        group["momentum"], group["weight_decay"] = self.momentum, self.weight_decay

    def labelled_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :meth:`LabelledTrainingModule.labelled_loss`; with the learner's own regularisers."""
        return self.prompt.training_loss(self.training_images(batch), batch.label)

    def training_images(self, batch: Batch) -> Tensor:
        """What a batch's pictures are trained on, ``[B, 3, R, R]``: from (seed, epoch, index) alone."""
        if self.training_views == "original":
            return batch.image
        bounds, numbers, epochs = ViewBounds(), batch.index.tolist(), batch.epoch.tolist()
        raw, flip = sample_views("crop", bounds, 1, batch.aspect, numbers, self.run_seed(), epoch=epochs)
        matrices = affine(bounded(raw, bounds), flip, batch.aspect)
        return warp(batch.canvas, matrices, self.preprocessing.size)[:, 0]
