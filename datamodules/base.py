"""What all datamodules share: loaders of batches in the split's order, subsets, rows for unreadable pictures."""

from __future__ import annotations

import multiprocessing
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from metatpt.images import Sample, Source, collate, empty_sample, to_sample
from metatpt.rng import run_seed, sample_generator

from .sampler import FILLER, UnrepeatedSampler

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.context import BaseContext

    from metatpt.types import Preprocessing

Split = Literal["val", "test"]

_SPLITS: dict[str | None, tuple[Split, ...]] = {
    "fit": ("val",),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
    None: ("val", "test"),
}


class Picture(NamedTuple):
    """A picture of a split: where its pixels are, its class index (-1 where unknown), its name in results."""

    source: Source
    label: int
    path: str


class Pictures(Protocol):
    """A split: what a leaf gives. It is pickled to the workers, and one picture must not depend on another."""

    @property
    def labels(self) -> Sequence[int]:
        """Class index of every picture, -1 where unknown; known without reading any."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture: ...


@dataclass(frozen=True)
class FilePictures:
    """A split whose pictures are files.

    Attributes:
        root: Folder that paths start from.
        paths: Paths below it, with ``/`` on every system.
        labels: Class index of each, -1 where unknown.
    """

    root: Path
    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Picture:
        return Picture(self.root / self.paths[index], self.labels[index], self.paths[index])


class PictureDataset(Dataset[Sample]):
    """Pictures of a split as samples; index :data:`FILLER` is a row that nothing counts.

    Args:
        pictures: The split.
        preprocessing: How the model wants its pixels.
        plain: Decode as open_clip does.
    """

    def __init__(self, pictures: Pictures, preprocessing: Preprocessing, plain: bool = False) -> None:
        self.pictures = pictures
        self.preprocessing = preprocessing
        self.plain = plain

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        if index == FILLER:
            return empty_sample(self.preprocessing)
        source, label, path = self.pictures[index]
        return to_sample(source, self.preprocessing, plain=self.plain, label=label, index=index, path=path)


class BaseDataModule(LightningDataModule):
    """Loaders for validate, test and predict, which takes the pictures of test.

    A leaf sets `class_names` in its ``__init__`` and gives its splits in :meth:`pictures`. A picture that cannot be
    read does not stop a run: its row has the reason in :attr:`metatpt.types.Batch.error`.

    Args:
        batch_size: Pictures per batch. It changes speed and memory, not the predictions.
        num_workers: Processes that read pictures, beside the main one. 0 runs everywhere, and reading a picture takes
            little time next to adapting to it; on a GPU 4 or more keep it busy.
        max_samples: Take a subset of so many pictures, balanced over the classes and drawn from the run's seed. A
            picture keeps its index in the whole split, so its random numbers too.
        decode: ``"upright"``: turned by the EXIF tag, flattened, 16 bits scaled; ``"plain"``: open_clip's own pixels,
            as in published benchmarks.

    Attributes:
        class_names: Name of every class, in the order of the labels.
        preprocessing: How the model wants its pixels: the Trainer's model says so in :meth:`setup`; without a Trainer
            set it before.
        n_total: Number of pictures in the whole split in use, after :meth:`setup`.
    """

    class_names: list[str]

    def __init__(
        self,
        batch_size: int = 8,
        num_workers: int = 0,
        max_samples: int | None = None,
        decode: Literal["upright", "plain"] = "upright",
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"Expected {name} of at least {least}, got {value}.")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"Expected max_samples of at least 1 (or null for all), got {max_samples}.")
        if decode not in ("upright", "plain"):
            raise ValueError(f"Expected decode 'upright' or 'plain', got {decode!r}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_samples = max_samples
        self.decode = decode
        self.preprocessing: Preprocessing | None = None
        self.n_total = 0
        self._splits: dict[Split, tuple[PictureDataset, list[int]]] = {}

    @abstractmethod
    def pictures(self, split: Split) -> Pictures:
        """The whole split, in its fixed order. Called in :meth:`setup`: check the disk here."""

    def setup(self, stage: str | None = None) -> None:
        """Read the splits of a stage.

        Args:
            stage: ``"validate"``, ``"test"``, ``"predict"``, or None for all (without a Trainer).

        Raises:
            RuntimeError: If nobody said which preprocessing the model wants.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        preprocessing: Preprocessing | None = getattr(module, "preprocessing", None) or self.preprocessing
        if preprocessing is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know which pixels the model wants: run it through a Trainer with a "
                "metatpt module, or set datamodule.preprocessing = module.preprocessing before setup()."
            )
        self.preprocessing = preprocessing
        self._splits = {}
        for split in _SPLITS[stage]:
            pictures = self.pictures(split)
            self.n_total = len(pictures)
            if self.max_samples is not None and self.max_samples > self.n_total:
                rank_zero_info(f"max_samples is {self.max_samples}; all {self.n_total} pictures are taken.")
            chosen = balanced_subset(pictures.labels, self.max_samples, run_seed())
            self._splits[split] = PictureDataset(pictures, preprocessing, self.decode == "plain"), chosen

    def val_dataloader(self) -> DataLoader[Sample]:
        """Batches of the validation split."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test split."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test split, whose labels need not be known."""
        return self._loader("test")

    def _loader(self, split: Split) -> DataLoader[Sample]:
        if split not in self._splits:
            raise RuntimeError(f"The {split} split is not set up: call {type(self).__name__}.setup() first.")
        dataset, indices = self._splits[split]
        trainer = self.trainer
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=UnrepeatedSampler(
                indices, trainer.world_size if trainer else 1, trainer.global_rank if trainer else 0
            ),
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            multiprocessing_context=_worker_context() if self.num_workers > 0 else None,
        )


def balanced_subset(labels: Sequence[int], size: int | None, seed: int) -> list[int]:
    """A random subset with equally many of each class, as far as there are; a smaller one is part of a larger.

    Args:
        labels: Class index of every sample.
        size: Number of samples to take; None or more than there are: all.
        seed: Seed of the choice.

    Returns:
        Places of the chosen samples, in ascending order.
    """
    if size is None or size >= len(labels):
        return list(range(len(labels)))
    shuffled: list[int] = torch.randperm(len(labels), generator=sample_generator(seed, 0, "max_samples")).tolist()
    seen: Counter[int] = Counter()
    turn = {}
    for place in shuffled:
        turn[place] = seen[labels[place]]
        seen[labels[place]] += 1
    # sorted is stable: within a turn, which has one sample of each class, the shuffled order stays
    return sorted(sorted(shuffled, key=turn.__getitem__)[:size])


def _worker_context() -> BaseContext:
    """How workers start: not by a fork of this process.

    It has threads (torch's, a logger's), and a fork may inherit a lock that nobody will release. They are forked from
    a clean server, which imports what they need once.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "metatpt.datamodules"])
    return context
