"""How a method is told which prompt learner to make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from metatpt.class_paths import class_path
from metatpt.clip import FrozenCLIP

from .base import PromptLearner

PromptFactory = Callable[[FrozenCLIP, list[str], str], PromptLearner]
"""Makes a learner for a model, class names and a template: a learner's class, or a partial of it with options."""


def as_factory(prompt: PromptFactory | Mapping[str, Any]) -> PromptFactory:
    """A factory, also from what a checkpoint holds: a mapping with ``class_path`` and ``init_args``.

    Raises:
        ValueError: No learner is known under that path. Nothing is imported: a checkpoint does not say what runs.
    """
    if not isinstance(prompt, Mapping):
        return prompt
    known = {class_path(each): each for each in _subclasses(PromptLearner)}  # type: ignore[type-abstract]
    if prompt["class_path"] not in known:
        raise ValueError(
            f"the checkpoint has a prompt of class {prompt['class_path']}, which is not known here: give it with "
            f"--model.prompt (in Python import it first); known are {', '.join(sorted(known))}"
        )
    return partial(known[prompt["class_path"]], **prompt["init_args"])


def _subclasses(cls: type[PromptLearner]) -> list[type[PromptLearner]]:
    return [each for sub in cls.__subclasses__() for each in [sub, *_subclasses(sub)]]
