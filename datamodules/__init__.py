"""One LightningDataModule per benchmark, and one for a user's own folder."""

from .base import BaseDataModule
from .folder import FolderDataModule
from .pacs import PACSDataModule
from .shifted_shapes import ShiftedShapesDataModule

__all__ = ["BaseDataModule", "FolderDataModule", "PACSDataModule", "ShiftedShapesDataModule"]
