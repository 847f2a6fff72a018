"""Callbacks: the reset between samples, the record of a run, the progress bar."""

from .progress import AdaptationProgressBar
from .record import RunRecord
from .reset import ResetPrompts

__all__ = ["AdaptationProgressBar", "ResetPrompts", "RunRecord"]
