"""What all datamodules share: loaders of batches in the split's order, subsets, rows for unreadable pictures."""

from __future__ import annotations

import multiprocessing
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from metatpt.images import Sample, Source, collate, empty_sample, to_sample
from metatpt.results.rows import as_written
from metatpt.rng import numpy_generator, run_seed
from metatpt.shifts import SEVERITIES, RandomShift

from .sampler import FILLER, TrainingSampler, UnrepeatedSampler
from .subsets import balanced_subset, few_shots

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from multiprocessing.context import BaseContext

    from torch.utils.data import Sampler

    from metatpt.types import Batch, Preprocessing

Split = Literal["train", "val", "test"]

_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
_VALIDATION_SHOTS = 4


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


class TrainingDataset(Dataset[Sample]):
    """Pictures of a split as samples of an epoch, asked for by (epoch, index).

    Args:
        pictures: The split, as it is in evaluation.
        shift: What every picture is put under, if anything.
        seed: Seed of the run.
    """

    def __init__(self, pictures: PictureDataset, shift: RandomShift | None, seed: int) -> None:
        self.pictures = pictures
        self.shift = shift
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
        whole = self.pictures
        source, label, path = whole.pictures[index]
        transform = None
        if self.shift is not None:
            transform = partial(self.shift, generator=numpy_generator(self.seed, index, "training shift", epoch))
        return to_sample(
            source,
            whole.preprocessing,
            plain=whole.plain,
            label=label,
            index=index,
            path=path,
            epoch=epoch,
            transform=transform,
        )


class TrainingLoader(DataLoader[Sample]):
    """A loader whose workers start once the first batch is asked for.

    Lightning takes the iterator of a run that goes on before it has set the epoch: a DataLoader's workers would by
    then be busy with the epoch that is over.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # of which it promises more than an iterator
        yield from super().__iter__()


class BaseDataModule(LightningDataModule):
    """Loaders for fit, validate, test and predict, which takes the pictures of test.

    A leaf sets `class_names` in its ``__init__`` and gives its splits in :meth:`pictures`. A picture that cannot be
    read does not stop a run: its row has the reason in :attr:`metatpt.types.Batch.error`.

    Args:
        batch_size: Pictures per batch. It changes speed and memory, not the predictions.
        num_workers: Processes that read pictures, beside the main one. 0 runs everywhere, and reading a picture takes
            little time next to adapting to it; on a GPU 4 or more keep it busy.
        max_samples: Take a subset of so many pictures, balanced over the classes and drawn from the run's seed. A
            picture keeps its index in the whole split, so its random numbers too. Training has `shots`.
        shots: Train on so many pictures of each class, drawn from the run's seed (of a class that has fewer: all);
            null for all of them. More shots include fewer ones. Validation during training then has as many of each
            class, at most 4, as is usual.
        train_shifts: Put each training picture under one of these simulated shifts, names of
            :data:`metatpt.shifts.SHIFTS` and ``none``: a list, or names with commas between (``rotation,noise``). It
            is drawn anew in each epoch; null for pictures as they are.
        train_severities: Severities from 1 to 5 that these are drawn from; null for all five.
        decode: ``"upright"``: turned by the EXIF tag, flattened, 16 bits scaled; ``"plain"``: open_clip's own pixels,
            as in published benchmarks.

    Attributes:
        class_names: Name of every class, in the order of the labels.
        preprocessing: How the model wants its pixels: the Trainer's model says so in :meth:`setup`; without a Trainer
            set it before.
        n_total: Number of pictures in the whole split in use, after :meth:`setup`.
        source: Where the splits come from, in a few words, where there is a choice (``coop``, ``official``): it stands
            beside the result.
    """

    splits: tuple[Split, ...] = ("train", "val", "test")
    """Those that there are."""

    why_no_training: ClassVar[str] = "it is there to test on"
    """What there is to say where training is none of them."""

    coop_template: ClassVar[str | None] = None
    """CoOp's template for this data set, where it has one: what ``--model.template coop`` stands for."""

    class_names: list[str]

    def __init__(
        self,
        batch_size: int = 8,
        num_workers: int = 0,
        max_samples: int | None = None,
        shots: int | None = None,
        train_shifts: str | list[str] | None = None,
        train_severities: list[int] | None = None,
        decode: Literal["upright", "plain"] = "upright",
    ) -> None:
        super().__init__()
        for name, number, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if number < least:
                raise ValueError(f"Expected {name} of at least {least}, got {number}.")
        for name, value in (("max_samples", max_samples), ("shots", shots)):
            if value is not None and value < 1:
                raise ValueError(f"Expected {name} of at least 1 (or null for all), got {value}.")
        if decode not in ("upright", "plain"):
            raise ValueError(f"Expected decode 'upright' or 'plain', got {decode!r}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_samples = max_samples
        self.shots = shots
        self.train_shift = _training_shift(train_shifts, train_severities)
        self.decode = decode
        self.preprocessing: Preprocessing | None = None
        self.n_total = 0
        self.source: str | None = None
        self._splits: dict[Split, tuple[PictureDataset, list[int]]] = {}
        self._absent: dict[Split, FileNotFoundError] = {}

    @abstractmethod
    def pictures(self, split: Split) -> Pictures:
        """The whole split, in its fixed order. Called in :meth:`setup`: check the disk here."""

    def split_size(self, split: Split, pictures: Pictures) -> int:
        """How many pictures the whole split has: a result says of how many it is."""
        return len(pictures)

    def setup(self, stage: str | None = None) -> None:
        """Read the splits of a stage.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"``, ``"predict"``, or None for all (without a Trainer).

        Raises:
            RuntimeError: If nobody said which preprocessing the model wants.
            ValueError: If there is no such split, or none of its pictures to train on has a label.
            FileNotFoundError: If it is not there. Of all splits only that to test on must be; another one's loader
                then says so.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        preprocessing: Preprocessing | None = getattr(module, "preprocessing", None) or self.preprocessing
        if preprocessing is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know which pixels the model wants: run it through a Trainer with a "
                "metatpt module, or set datamodule.preprocessing = module.preprocessing before setup()."
            )
        self.preprocessing = preprocessing
        self._splits, self._absent = {}, {}
        for split in self.splits if stage is None else _SPLITS[stage]:
            if split not in self.splits:
                if (stage, split) == ("fit", "val"):  # training goes without
                    continue
                raise ValueError(
                    f"{type(self).__name__} has no {split} split, only {' and '.join(self.splits)}: "
                    f"{self.why_no_training}."
                )
            try:
                pictures = self.pictures(split)
            except FileNotFoundError as error:
                if stage is not None or split == "test":
                    raise
                self._absent[split] = error
                continue
            self.n_total = self.split_size(split, pictures)
            chosen = self._to_train_on(pictures) if split == "train" else self._to_test_on(pictures, stage == "fit")
            self._splits[split] = PictureDataset(pictures, preprocessing, self.decode == "plain"), chosen

    def _to_train_on(self, pictures: Pictures) -> list[int]:
        labels = pictures.labels
        chosen = [place for place in few_shots(labels, self.shots, run_seed()) if labels[place] >= 0]
        if not chosen:
            raise ValueError(
                f"None of the {len(labels)} pictures of {type(self).__name__} to train on has a label: training needs "
                "labels, from class folders for example."
            )
        unlabelled = sum(label < 0 for label in labels)
        if unlabelled:
            rank_zero_info(f"{unlabelled} pictures of the training split have no label and are left out.")
        return chosen

    def _to_test_on(self, pictures: Pictures, in_training: bool) -> list[int]:
        if self.max_samples is not None and self.max_samples > len(pictures):
            rank_zero_info(f"max_samples is {self.max_samples}; all {len(pictures)} pictures are taken.")
        labels = pictures.labels
        shots = None if self.shots is None or not in_training else min(self.shots, _VALIDATION_SHOTS)
        shown = few_shots(labels, shots, run_seed())
        chosen = balanced_subset([labels[place] for place in shown], self.max_samples, run_seed())
        return [shown[place] for place in chosen]

    def leave_out(self, done: Mapping[int, tuple[str, int | None]]) -> None:
        """Take only what is left of the splits that are set up, for a run that goes on.

        Args:
            done: Path and label (None where unknown) of the pictures to leave out, by index.

        Raises:
            ValueError: One of them is not that picture any more: the data have changed.
        """
        for split, (dataset, indices) in self._splits.items():
            labels, chosen = dataset.pictures.labels, set(indices)
            paths = dataset.pictures.paths if isinstance(dataset.pictures, FilePictures) else None
            for index, (path, label) in done.items():
                same = index in chosen and labels[index] == (-1 if label is None else label)
                if not same or (paths is not None and as_written(paths[index]) != path):
                    found = as_written(paths[index]) if paths is not None and index < len(paths) else "another one"
                    raise ValueError(
                        f"The data have changed since the run began: picture {index} of {split} was {path} (label "
                        f"{label}), and is {found} now. Bring the data back as they were, or start a new run."
                    )
            self._splits[split] = dataset, [index for index in indices if index not in done]

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of the training split; every rank takes equally many.

        Each epoch has another order and other shifts. The sampler learns of it by ``set_epoch``, which Lightning calls.
        """
        dataset, indices = self._set_up("train")
        seed = run_seed()
        sampler = TrainingSampler(indices, seed, *self._place())
        return self._loader(TrainingDataset(dataset, self.train_shift, seed), sampler, TrainingLoader)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Batches of the validation split; no loader where there is none and training goes without."""
        return [] if "val" not in self.splits and "train" in self._splits else self._in_order("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test split."""
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test split, whose labels need not be known."""
        return self._in_order("test")

    def _in_order(self, split: Split) -> DataLoader[Sample]:
        dataset, indices = self._set_up(split)
        return self._loader(dataset, UnrepeatedSampler(indices, *self._place()))

    def _set_up(self, split: Split) -> tuple[PictureDataset, list[int]]:
        if split in self._absent:
            raise self._absent[split]
        if split not in self._splits:
            raise RuntimeError(f"The {split} split is not set up: call {type(self).__name__}.setup() first.")
        return self._splits[split]

    def _place(self) -> tuple[int, int]:
        """Number of processes, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loader(
        self,
        dataset: Dataset[Sample],
        sampler: Sampler[int] | Sampler[tuple[int, int]] | None,
        kind: type[DataLoader[Sample]] = DataLoader,
    ) -> DataLoader[Sample]:
        return kind(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            multiprocessing_context=_worker_context() if self.num_workers > 0 else None,
        )


def _training_shift(names: str | Sequence[str] | None, severities: Sequence[int] | None) -> RandomShift | None:
    """What training pictures are put under, as a user gives it."""
    if names is None:
        if severities is not None:
            raise ValueError(f"train_severities {severities} are those of train_shifts, which are not given.")
        return None
    given = names.split(",") if isinstance(names, str) else names
    return RandomShift(
        tuple(str(name).strip() for name in given), SEVERITIES if severities is None else tuple(severities)
    )


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
