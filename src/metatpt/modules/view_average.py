"""The free control: confident views averaged, nothing tuned."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metatpt.types import Adaptation, Batch

from .views import Look, ViewModule


class ViewAverageModule(ViewModule):
    """Zero-shot predictions of the confident views, averaged by entropy weights.

    Args:
        selection: Share of the views that are confident.
        **kwargs: See :class:`ViewModule`.
    """

    tunes = False

    def __init__(self, selection: float = 0.3, **kwargs: Any) -> None:
        super().__init__(selection=selection, **kwargs)

    def adapt(self, batch: Batch) -> Adaptation:
        """Average the confident views of each picture."""
        look = self.look(batch)
        assert look.raw is not None
        return self._conclude(look, self.selected_pixels(batch, look, look.raw) if self.keep_views else None)

    def adapt_views(self, views: Tensor) -> Adaptation:
        """The same for given views ``[B, V, 3, R, R]`` in [0, 1], view 0 the original."""
        look = self.look_at(views)
        return self._conclude(look, look.seen)

    def _conclude(self, look: Look, views: Tensor | None) -> Adaptation:
        return self.conclude(look, self.averaged(look), views)
