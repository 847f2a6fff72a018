"""What is tuned: one file per prompt learner, on one interface."""

from .base import Head, PromptLearner, TunedParameters
from .template import TemplatePrompt
from .text import TextPrompt

__all__ = ["Head", "PromptLearner", "TemplatePrompt", "TextPrompt", "TunedParameters"]
