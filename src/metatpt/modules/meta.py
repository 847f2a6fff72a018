"""Meta training: the prompt, and what goes with it, are learned so that the test-time step helps.

Each training picture is adapted by the module's own two loops, without its label; what is descended is the labelled
loss of the adapted prediction (MAML, ICML 2017, for prompts: meta prompt tuning, ACL 2023).
"""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from metatpt.types import Batch, State

from .checks import check_choice, check_number
from .labelled import LabelledTrainingModule
from .metatpt import MetaTPTModule
from .tuning import Tape

_log = logging.getLogger(__name__)

Meta = Literal["maml", "fomaml", "reptile", "multitask"]

_TAPES: dict[Meta, Tape] = {"maml": "second", "fomaml": "first", "reptile": "first", "multitask": "second"}


class MetaTrainingModule(LabelledTrainingModule, MetaTPTModule):
    """MetaTPT whose initial prompt is trained to be adapted; its test is MetaTPT from there.

    With them are trained, where they are asked for, the start of the views, the step sizes of both loops, and the
    weights of the inner losses. Stop-gradients in the losses (the frozen teacher, an anchor) stay such in training, and
    a rate relative to the spread of the prompt counts as a number.

    Args:
        meta: ``maml`` (the labelled loss is differentiated through all steps), ``fomaml`` (the steps' gradients are
            constants), ``reptile`` (the labelled loss's mean gradient at the prompts from which the steps were taken)
            or ``multitask`` (the labelled loss at the initial prompt and views: the control without adaptation).
        lr: Learning rate of Adam.
        outer_optimizer: ``sgd`` or ``normalised_sgd``, which can be differentiated through.
        **kwargs: See :class:`LabelledTrainingModule` and :class:`MetaTPTModule`.
    """

    def __init__(
        self,
        meta: Meta = "maml",
        lr: float = 1e-3,
        outer_optimizer: Literal["sgd", "normalised_sgd"] = "normalised_sgd",
        **kwargs: Any,
    ) -> None:
        check_choice("meta", meta, get_args(Meta))
        check_number("lr", lr, 0, open_low=True)
        if outer_optimizer not in ("sgd", "normalised_sgd"):
            raise ValueError(
                f"outer_optimizer {outer_optimizer}: meta training differentiates through its steps, and a fresh step "
                "of AdamW is about the sign of the gradient, which has no derivative; use normalised_sgd or sgd"
            )
        super().__init__(outer_optimizer=outer_optimizer, **kwargs)
        if self.schedule == "joint":
            raise ValueError("schedule joint has no inner loop to train through; use sequential or nested")
        if self.carries_over() is not None:
            raise ValueError("augmentation online carries over from sample to sample, and training shuffles them")
        if self.inner_optimizer == "adam":
            raise ValueError("inner_optimizer adam cannot be trained through; use normalised_sgd or sgd")
        self.meta = meta
        self.lr = lr
        for name in set(self.prompt.tuned) - set(self.prompt.state_names):
            self.prompt.tuned[name].requires_grad_(False)  # else DDP would wait for its gradient

    def configure_metrics(self) -> None:
        """See :meth:`AdaptationModule.configure_metrics`."""
        super().configure_metrics()
        self.train_movement = MeanMetric()

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """What training learns: of the prompt what test time tunes, the start of the views, rates and weights."""
        tuned = [self.prompt.tuned[name] for name in self.prompt.state_names]
        start = list(self.view_start.parameters()) if self.view_start is not None else []
        return [*tuned, *start, *self.learned.values()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam: prompts, rates and networks have entries of very different sizes."""
        return torch.optim.Adam(self.trained_parameters(), self.lr)

    def on_train_start(self) -> None:
        """Take the option at hand: that of a checkpoint may be another."""
        self.trainer.optimizers[0].param_groups[0]["lr"] = self.lr

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take no step on a gradient that is not finite: a way through normalised steps may be steep beyond numbers."""
        gradients = [each.grad for each in self.trained_parameters() if each.grad is not None]
        if not all(bool(each.isfinite().all()) for each in gradients):
            for each in self.trained_parameters():
                each.grad = None
            _log.warning("step %d is left out: the meta gradient is not finite", self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """See :meth:`LabelledTrainingModule.training_step`."""
        loss = super().training_step(batch, batch_idx)
        self.log("train/movement", self.train_movement, on_step=False, on_epoch=True)
        return loss

    def labelled_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :meth:`LabelledTrainingModule.labelled_loss`; after adaptation."""
        values, log_probs, movement = self.meta_loss(batch)
        self.train_movement.update(movement)
        return values.mean(), log_probs

    def meta_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Adapt to labelled pictures, on the tape of what is trained.

        Returns:
            The labelled loss ``[B]``; adapted log-probabilities ``[B, C]``; and how far the prompt has moved ``[B]``,
            in standard deviations of its entries.
        """
        steps = self.outer_steps, self.inner_steps
        self.tape, self.clip.double_backward = _TAPES[self.meta], self.meta == "maml"
        if self.meta == "multitask":
            self.outer_steps = self.inner_steps = 0
        self.prompt.graphs_held = 2 * self.outer_steps + 1  # each step's, with the inner loop's, and the prediction's
        try:
            look = self.look(batch)
            way, learned = self.outer_loop(batch, look, self.start_state(len(batch)))
            log_probs = self.predicted(batch, look, learned, way.state)
            places = way.visited if self.meta == "reptile" and way.visited else None
            each = [log_probs] if places is None else [self.predicted(batch, look, learned, at) for at in places]
        finally:
            self.outer_steps, self.inner_steps = steps
            self.tape, self.clip.double_backward, self.prompt.graphs_held = None, False, 1
        labels = batch.label[:, None]
        values = torch.stack([-one.gather(1, labels)[:, 0] for one in each]).mean(0)
        return values, log_probs, self._movement(way.state)

    def _movement(self, state: State) -> Tensor:
        start, spread = self.prompt.initial_state(1), self.prompt.spread()
        moved = [
            (value.detach() - start[name]).square().flatten(1).mean(1).sqrt() / spread[name]
            for name, value in state.items()
            if spread[name]
        ]
        return torch.stack(moved).mean(0) if moved else next(iter(state.values())).new_zeros(1)
