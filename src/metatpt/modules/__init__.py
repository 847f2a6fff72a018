"""The methods: one LightningModule each, on one base class."""

from .base import AdaptationModule
from .meta import MetaTrainingModule
from .metatpt import MetaTPTModule
from .tpt import TPTModule
from .training import PromptTrainingModule
from .view_average import ViewAverageModule
from .views import ViewModule
from .zero_shot import ZeroShotModule

__all__ = [
    "AdaptationModule",
    "MetaTPTModule",
    "MetaTrainingModule",
    "PromptTrainingModule",
    "TPTModule",
    "ViewAverageModule",
    "ViewModule",
    "ZeroShotModule",
]
