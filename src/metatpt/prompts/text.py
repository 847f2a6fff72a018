"""Tunable context tokens before the class name, shared by all classes (CoOp, IJCV 2022; TPT, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.types import State

from .base import Head, PromptLearner, class_head


class TextPrompt(PromptLearner):
    """Context vectors ``[n_context, d]`` that start as the words of a template.

    Args:
        clip: The frozen model.
        class_names: The C classes.
        template: Its words before the ``{}`` are tuned; what follows the class name stays.

    Raises:
        ValueError: A template with no word before the class name.
    """

    def __init__(self, clip: FrozenCLIP, class_names: Sequence[str], template: str) -> None:
        tokens = clip.tokenize(template, class_names)
        if not tokens.n_context:
            raise ValueError(f"template {template!r} has no word before the class name, so there is nothing to tune")
        super().__init__(clip, tokens.column)
        self._layout = clip.layout(tokens)
        self.learn("context", clip.embed_context(tokens))

    def head(self, state: State | None = None) -> Head:
        """See :meth:`PromptLearner.head`; the state's ``context`` is ``[B, n_context, d]``."""
        keep = self.clip.keeps_graph(self._layout)
        return class_head(self.class_features(state, self._compute, keep), self.clip.logit_scale, self.column)

    def _compute(self, state: State, held: int) -> Tensor:
        return self.clip.encode_prompts(self._layout, state["context"], held=held)
