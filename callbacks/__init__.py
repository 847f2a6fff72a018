"""Callbacks: the reset between samples, the record of a run, the progress bar."""

from .cost import CostMeter
from .gallery import ViewGallery
from .loggers import LogResults
from .progress import AdaptationProgressBar
from .record import RunRecord
from .reset import ResetPrompts
from .stop import GracefulStop

__all__ = [
    "AdaptationProgressBar",
    "CostMeter",
    "GracefulStop",
    "LogResults",
    "ResetPrompts",
    "RunRecord",
    "ViewGallery",
]
