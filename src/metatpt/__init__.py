"""Meta test-time prompt tuning of CLIP-like models, on PyTorch Lightning."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import Classifier, Prediction

__all__ = ["Classifier", "Prediction", "__version__"]

__version__ = version("metatpt")


def __getattr__(name: str) -> Any:
    # Looked up when asked for: importing the classifier loads Lightning and open_clip, which takes seconds.
    if name in ("Classifier", "Prediction"):
        from . import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
