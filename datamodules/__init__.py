"""One LightningDataModule per benchmark, and one for a user's own folder."""

from .base import BaseDataModule
from .benchmark import BenchmarkDataModule
from .cifar import CIFAR10CDataModule, CIFAR10DataModule, CIFAR100CDataModule, CIFAR100DataModule
from .cross_datasets import (
    Caltech101DataModule,
    DTDDataModule,
    EuroSATDataModule,
    FGVCAircraftDataModule,
    Flowers102DataModule,
    Food101DataModule,
    OxfordPetsDataModule,
    StanfordCarsDataModule,
    SUN397DataModule,
    UCF101DataModule,
)
from .domains import (
    DomainNetDataModule,
    OfficeHomeDataModule,
    PACSDataModule,
    TerraIncognitaDataModule,
    VLCSDataModule,
)
from .folder import FolderDataModule
from .imagenet import (
    ImageNetADataModule,
    ImageNetCDataModule,
    ImageNetDataModule,
    ImageNetRDataModule,
    ImageNetSketchDataModule,
    ImageNetV2DataModule,
)
from .shards import WebDatasetDataModule
from .shifted_shapes import ShiftedShapesDataModule

__all__ = [
    "BaseDataModule",
    "BenchmarkDataModule",
    "CIFAR10CDataModule",
    "CIFAR10DataModule",
    "CIFAR100CDataModule",
    "CIFAR100DataModule",
    "Caltech101DataModule",
    "DTDDataModule",
    "DomainNetDataModule",
    "EuroSATDataModule",
    "FGVCAircraftDataModule",
    "Flowers102DataModule",
    "FolderDataModule",
    "Food101DataModule",
    "ImageNetADataModule",
    "ImageNetCDataModule",
    "ImageNetDataModule",
    "ImageNetRDataModule",
    "ImageNetSketchDataModule",
    "ImageNetV2DataModule",
    "OfficeHomeDataModule",
    "OxfordPetsDataModule",
    "PACSDataModule",
    "SUN397DataModule",
    "ShiftedShapesDataModule",
    "StanfordCarsDataModule",
    "TerraIncognitaDataModule",
    "UCF101DataModule",
    "VLCSDataModule",
    "WebDatasetDataModule",
]
