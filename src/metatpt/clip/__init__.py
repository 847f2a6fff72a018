"""The frozen model: loading, image tower, prompt-tunable text tower, the bundled tiny model."""

from .loading import load_clip
from .model import FrozenCLIP
from .tokens import ContextLayout, PromptTokens

__all__ = ["ContextLayout", "FrozenCLIP", "PromptTokens", "load_clip"]
