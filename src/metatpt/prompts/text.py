"""Tunable context tokens around the class name (CoOp, IJCV 2022; TPT, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metatpt.clip import ContextLayout, FrozenCLIP, PromptTokens
from metatpt.clip.tokens import Init, Position
from metatpt.rng import run_seed, sample_generator
from metatpt.types import State

from .base import Head, PromptLearner, class_head, plain_names
from .initial import normal


class TextPrompt(PromptLearner):
    """Context vectors that start as the words of a template: CoOp's and TPT's prompt.

    Its one parameter is ``context``: ``[n_context, d]``, or ``[C, n_context, d]`` per class.

    Args:
        clip: The frozen model.
        class_names: The C classes.
        template: Text with ``{}``. The words before it are tuned, or left out with ``init: random``; what follows the
            class name stays.
        n_context: Number of vectors; by default that of the words (tokens), or 16 with ``init: random``. Words that
            fewer vectors leave over stay as they are, behind the vectors.
        init: Start as the ``words``, or ``random`` from N(0, 0.02).
        per_class: Whether each class has a context of its own, which then holds for these classes only.
        position: Of the class name: behind the vectors (``end``), behind half of them, rounded down (``middle``), or
            before all (``front``).

    Raises:
        ValueError: A template with no word before the class name to start from, more vectors than words, or words
            left over that have no place.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        class_names: Sequence[str],
        template: str,
        n_context: int | None = None,
        init: Init = "words",
        per_class: bool = False,
        position: Position = "end",
    ) -> None:
        tokens = clip.tokenize(template, class_names, ContextLayout(n_context, init, per_class, position))
        context = initial_context(clip, tokens, template, init, len(class_names) if per_class else None)
        super().__init__(clip, tokens.column)
        self._layout = clip.layout(tokens)
        self._trained_on = list(class_names) if per_class else None
        self.learn("context", context)

    def head(self, state: State | None = None) -> Head:
        """See :meth:`PromptLearner.head`."""
        keep = self.clip.keeps_graph(self._layout)
        return class_head(self.class_features(state, self._compute, keep), self.clip.logit_scale, self.column)

    def _compute(self, state: State, held: int) -> Tensor:
        return self.clip.encode_prompts(self._layout, state["context"], held=held)

    def trained_on(self, class_names: Sequence[str]) -> None:
        """Refuse a context per class that was trained on other classes.

        Raises:
            ValueError: Naming the first class that differs.
        """
        ours = self._trained_on
        if ours is None:
            return
        why = "a context per class holds for the classes that it was trained on, in their order"
        for number, (theirs, name) in enumerate(zip(plain_names(class_names), plain_names(ours), strict=False)):
            if theirs != name:
                raise ValueError(f"{why}: class {number} was {theirs!r}, and is {name!r} here")
        if len(class_names) != len(ours):
            raise ValueError(f"{why}: these were {len(class_names)}, and are {len(ours)} here")


def initial_context(
    clip: FrozenCLIP, tokens: PromptTokens, template: str, init: Init, n_classes: int | None = None
) -> Tensor:
    """Where a context starts, ``[n, d]``, or ``[C, n, d]`` for so many classes.

    Raises:
        ValueError: There is no word to start from.
    """
    if not tokens.n_context:
        raise ValueError(
            f"template {template!r} has no word before the class name, so there is nothing to tune; take another, or "
            "init: random"
        )
    words = clip.embed_context(tokens)
    shape = words.shape if n_classes is None else (n_classes, *words.shape)
    if init == "words":
        return words.expand(shape)
    return normal(shape, sample_generator(run_seed(), 0, "prompt")).to(words)
