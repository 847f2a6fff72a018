"""The frozen model: loading, image tower, prompt-tunable text tower, the bundled tiny model."""

from .loading import load_clip
from .model import FrozenCLIP
from .tokens import PromptTokens

__all__ = ["FrozenCLIP", "PromptTokens", "load_clip"]
