"""Callbacks: the reset between samples, the record of a run, the progress bar, checkpoints."""

from .checkpoints import BestCheckpoint, LastCheckpoint
from .cost import CostMeter
from .gallery import ViewGallery
from .loggers import LogResults
from .progress import AdaptationProgressBar
from .record import RunRecord
from .reset import ResetPrompts
from .stop import GracefulStop

__all__ = [
    "AdaptationProgressBar",
    "BestCheckpoint",
    "CostMeter",
    "GracefulStop",
    "LastCheckpoint",
    "LogResults",
    "ResetPrompts",
    "RunRecord",
    "ViewGallery",
]
