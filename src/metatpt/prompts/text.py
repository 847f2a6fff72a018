"""Tunable context tokens before the class name, shared by all classes (CoOp, IJCV 2022; TPT, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metatpt.clip import FrozenCLIP
from metatpt.types import State

from .base import Head, PromptLearner
from .template import class_head


class TextPrompt(PromptLearner):
    """Context vectors ``[n_context, d]`` that start as the words of a template.

    Args:
        clip: The frozen model.
        template: Its words before the ``{}`` are tuned; what follows the class name stays.
        class_names: The C classes.

    Raises:
        ValueError: A template with no word before the class name.
    """

    column: Tensor

    def __init__(self, clip: FrozenCLIP, template: str, class_names: Sequence[str]) -> None:
        super().__init__(clip)
        tokens = clip.tokenize(template, class_names)
        if not tokens.n_context:
            raise ValueError(f"template {template!r} has no word before the class name, so there is nothing to tune")
        self._layout = clip.layout(tokens)
        self.register_buffer("column", tokens.column, persistent=False)
        self.tuned["context"] = nn.Parameter(clip.embed_context(tokens))
        self._kept: tuple[torch.device, torch.dtype, int, Tensor] | None = None

    def head(self, state: State | None = None) -> Head:
        """See :meth:`PromptLearner.head`; the state's ``context`` is ``[B, n_context, d]``."""
        if state is None:
            features = self._initial_features()
        else:
            # Sample by sample, as views are encoded, and for the same reason.
            each = [self.clip.encode_prompts(self._layout, context) for context in state["context"].split(1)]
            features = torch.cat(each)
        return class_head(features, self.clip.logit_scale, self.column)

    def _initial_features(self) -> Tensor:
        context = self.tuned["context"]
        key = (context.device, self.clip.dtype, context._version)
        if self._kept is None or self._kept[:3] != key:
            with torch.no_grad():
                self._kept = (*key, self.clip.encode_prompts(self._layout, context[None])[0])
        return self._kept[3]
