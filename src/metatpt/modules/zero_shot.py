"""CLIP as it is."""

from __future__ import annotations

from metatpt.types import Adaptation, Batch

from .base import AdaptationModule


class ZeroShotModule(AdaptationModule):
    """Zero-shot classification with a template, or the mean of several templates' class features (CLIP, ICML 2021)."""

    tunes = False

    def adapt(self, batch: Batch) -> Adaptation:
        """Predict the original view."""
        features = self.prompt.encode(batch.image[:, None], together=True)
        log_probs = self.log_probs(self.prompt.head(), features)[:, 0]
        return Adaptation(log_probs.float(), log_probs.float())
