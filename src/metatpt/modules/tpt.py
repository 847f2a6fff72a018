"""Test-time prompt tuning (Shu et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metatpt.functional import marginal_entropy
from metatpt.types import Adaptation, Batch, State

from .tuning import PromptTuningModule
from .views import Look


class TPTModule(PromptTuningModule):
    """Tune the context so that the mean prediction of the confident views is certain; predict the original view.

    The confident views are chosen once, under the initial prompt; the original has no special role among them.

    Args:
        outer_lr: Learning rate of the prompt, absolute; 5e-3 is the paper's. Null to use the relative one.
        outer_lr_relative: Learning rate in standard deviations of the initial context's entries, where `outer_lr` is
            null.
        **kwargs: See :class:`PromptTuningModule`.
    """

    def __init__(self, outer_lr: float | None = 5e-3, outer_lr_relative: float | None = None, **kwargs: Any) -> None:
        if outer_lr is not None and outer_lr_relative is not None:
            raise ValueError(
                f"outer_lr {outer_lr} and outer_lr_relative {outer_lr_relative} are both given; for the relative one "
                "set outer_lr to null"
            )
        super().__init__(outer_lr=outer_lr, outer_lr_relative=outer_lr_relative, **kwargs)

    def adapt(self, batch: Batch) -> Adaptation:
        """Tune the prompt on each picture's views and predict its original view."""
        look = self.look(batch)
        assert look.raw is not None
        return self._tune(look, self.selected_pixels(batch, look, look.raw) if self.keep_views else None)

    def adapt_views(self, views: Tensor) -> Adaptation:
        """The same for given views ``[B, V, 3, R, R]`` in [0, 1], view 0 the original."""
        look = self.look_at(views)
        return self._tune(look, look.seen)

    def _tune(self, look: Look, views: Tensor | None) -> Adaptation:
        def loss(state: State, step: int) -> Tensor:
            return marginal_entropy(self.log_probs(self.prompt.head(state), self.selected_features(look, state)))

        state, diagnostics = self.tune(self.start_state(len(look.features)), loss)
        self.finish_state(state)
        with torch.no_grad():
            log_probs = self.log_probs(self.prompt.head(state), self.original_features(look, state))[:, 0]
        return self.conclude(look, log_probs, views, **diagnostics)
