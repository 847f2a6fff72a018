"""Hand-written prompts: nothing to tune."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.types import State

from .base import Head, PromptLearner, class_head


class TemplatePrompt(PromptLearner):
    """One template, or the re-normalised mean of several templates' class features.

    Args:
        clip: The frozen model.
        class_names: The C classes.
        templates: Texts with one ``{}`` each.
    """

    def __init__(self, clip: FrozenCLIP, class_names: Sequence[str], templates: Sequence[str]) -> None:
        tokens = [clip.tokenize(template, class_names) for template in templates]
        super().__init__(clip, tokens[0].column)
        self._layouts = [clip.layout(each) for each in tokens]

    def head(self, state: State | None = None) -> Head:
        """See :meth:`PromptLearner.head`; there is only the initial state."""
        return class_head(self.class_features(None, self._compute), self.clip.logit_scale, self.column)

    def _compute(self, state: State, held: int) -> Tensor:
        each = [self.clip.encode_prompts(layout) for layout in self._layouts]
        return each[0] if len(each) == 1 else F.normalize(torch.stack(each).mean(0), dim=-1)
