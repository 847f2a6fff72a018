"""What is tuned: one file per prompt learner, on one interface."""

from .base import Head, Part, PromptLearner, TunedParameters, class_head
from .conditional import ConditionalPrompt
from .factory import PromptFactory, as_factory
from .multi_modal import MultiModalPrompt
from .representation import RepresentationPrompt
from .template import TemplatePrompt
from .text import TextPrompt
from .unified import UnifiedPrompt
from .visual import VisualPrompt

__all__ = [
    "ConditionalPrompt",
    "Head",
    "MultiModalPrompt",
    "Part",
    "PromptFactory",
    "PromptLearner",
    "RepresentationPrompt",
    "TemplatePrompt",
    "TextPrompt",
    "TunedParameters",
    "UnifiedPrompt",
    "VisualPrompt",
    "as_factory",
    "class_head",
]
