"""Hand-written prompts: nothing to tune."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.types import State

from .base import Head, PromptLearner


class TemplatePrompt(PromptLearner):
    """One template, or the re-normalised mean of several templates' class features.

    Args:
        clip: The frozen model.
        templates: Texts with one ``{}`` each.
        class_names: The C classes.
    """

    column: Tensor

    def __init__(self, clip: FrozenCLIP, templates: Sequence[str], class_names: Sequence[str]) -> None:
        super().__init__(clip)
        self._tokens = [clip.tokenize(template, class_names) for template in templates]
        self.register_buffer("column", self._tokens[0].column, persistent=False)
        self._kept: tuple[torch.device, torch.dtype, Tensor] | None = None

    def head(self, state: State | None = None) -> Head:
        """See :meth:`PromptLearner.head`; there is only the initial state."""
        device, dtype = self.column.device, self.clip.dtype
        if self._kept is None or self._kept[:2] != (device, dtype):
            with torch.no_grad():
                each = [self.clip.encode_prompts(self.clip.layout(tokens)) for tokens in self._tokens]
                features = each[0] if len(each) == 1 else F.normalize(torch.stack(each).mean(0), dim=-1)
            self._kept = (device, dtype, features[0])
        return class_head(self._kept[2], self.clip.logit_scale, self.column)


def class_head(class_features: Tensor, scale: float, column: Tensor) -> Head:
    """Cosine logits: class features ``[U, D]`` or ``[B, U, D]``, of which class c has row ``column[c]``.

    Equal prompts share a row and so tie to the last bit, whatever the batch size and device.
    """

    def logits(features: Tensor) -> Tensor:
        # A product per sample, so that its rounding does not depend on the batch size; never in autocast's precision.
        with torch.autocast(features.device.type, enabled=False):
            return (scale * features @ class_features.expand(len(features), -1, -1).mT)[..., column]

    return logits
