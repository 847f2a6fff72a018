"""CIFAR-10 and CIFAR-100, and what corruptions make of their test pictures: CIFAR-10-C and CIFAR-100-C."""

from __future__ import annotations

import pickle
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from metatpt.shifts import SEVERITIES, check_severity

from .base import Picture, Split
from .benchmark import BenchmarkDataModule, fetch_once, find_root
from .imagenet import CORRUPTIONS, Corruption
from .subsets import held_out_of_classes

# torchvision reads them from the data set's files, which CIFAR-10-C and CIFAR-100-C come without
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_CIFAR100.split())

_SHAPE = (32, 32, 3)
_HELD_OUT = 10  # validation has every tenth training picture
_ARRAYS = {  # what a pickle of arrays calls
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class MappedRows:
    """Rows of a ``.npy`` file which stay on the disk: workers get its name, and open it for each picture.

    Attributes:
        file: The file, with an array ``[N, H, W, 3]``.
        start: Row that comes first.
    """

    file: Path
    start: int

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return np.array(np.load(self.file, mmap_mode="r")[self.start + index])


@dataclass(frozen=True)
class ArrayPictures:
    """A split whose pictures are rows of an array.

    Attributes:
        rows: ``[N, H, W, 3]`` uint8.
        labels: Class index of each.
        paths: Name of each in results.
    """

    rows: NDArray[np.uint8] | MappedRows
    labels: list[int]
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Picture:
        return Picture(Image.fromarray(self.rows[index]), self.labels[index], self.paths[index])


class CIFARDataModule(BenchmarkDataModule):
    """Base of CIFAR-10 and CIFAR-100, read by torchvision from the files for Python.

    Test is the 10,000 test pictures. Validation is a tenth of each class of the training pictures, drawn once and for
    all (whatever the seed of the run), and training is the rest. In results a picture is named by its number in its
    files: ``test/00042``.

    Args:
        root: Folder with the files (``cifar-10-batches-py``, ``cifar-100-python``), or the folder that it lies in.
        download: Fetch the data set into `root`, if it is not there.
        partial: Take files with fewer pictures, whose checksums are not the published ones.
        **kwargs: See :class:`BaseDataModule`.

    Raises:
        FileNotFoundError: If a file is missing.
    """

    dataset: ClassVar[Any]
    """torchvision's class."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    def __init__(self, root: str | Path, download: bool = False, partial: bool = False, **kwargs: Any) -> None:
        if download:
            self.fetch(Path(root).expanduser())
        super().__init__(root, partial=partial, **kwargs)
        self.class_names = list(self.classes)

    @classmethod
    def fetch(cls, root: Path) -> None:
        """Download the data set into a folder, if it is not there; processes that start together do it once.

        Raises:
            RuntimeError: If the download fails.
        """

        def is_there() -> bool:
            try:
                return find_root(root, cls.aliases, cls.holds, cls.title).is_dir()
            except FileNotFoundError:
                return False

        by_hand = f"Unpack {cls.dataset.url} in {root} by hand."
        fetch_once(root, cls.title, is_there, lambda: cls.dataset(root, download=True), by_hand)

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether all files are there."""
        files = [name for name, _ in [*cls.dataset.train_list, *cls.dataset.test_list]] + [cls.dataset.meta["filename"]]
        return all((folder / name).is_file() for name in files)

    def published(self, split: Split) -> int:
        """How many pictures a split has."""
        return {"train": 45_000, "val": 5_000, "test": 10_000}[split]

    def read(self, split: Split) -> ArrayPictures:
        """A split, in the order of its files.

        Raises:
            ValueError: If the files are not the published ones, hold code, or their class names are others.
        """
        source = self._load(is_train=split != "test")
        if list(source.classes) != self.class_names:
            raise ValueError(
                f"{self.root / source.meta['filename']}: expected the class names of {self.title} "
                f"({', '.join(self.class_names[:3])}, ...), got {len(source.classes)}: "
                f"{', '.join(source.classes[:3])}, ..."
            )
        folder = "test" if split == "test" else "train"
        paths = [f"{folder}/{place:05d}" for place in range(len(source.targets))]
        if split == "test":
            return ArrayPictures(source.data, list(source.targets), paths)
        draws = [f"{self.title} {name}" for name in self.class_names]
        held = held_out_of_classes(paths, source.targets, draws, share=_HELD_OUT)
        chosen = [place for place, path in enumerate(paths) if (path in held) == (split == "val")]
        return ArrayPictures(
            source.data[chosen], [source.targets[place] for place in chosen], [paths[place] for place in chosen]
        )

    def _load(self, is_train: bool) -> Any:
        """The data set as torchvision reads it, out of the folder that was found, whatever its name."""
        own: dict[str, Any] = {"base_folder": ""}
        if self.partial:
            own |= {
                part: [(name, None) for name, _ in getattr(self.dataset, part)] for part in ("train_list", "test_list")
            }
            own["meta"] = {**self.dataset.meta, "md5": None}
            names = [name for name, _ in (self.dataset.train_list if is_train else self.dataset.test_list)]
            for name in [*names, self.dataset.meta["filename"]]:
                _check_pickle(self.root / name)
        try:
            return type(self.title, (self.dataset,), own)(self.root, train=is_train)
        except RuntimeError as error:
            raise ValueError(
                f"The files in {self.root} are not the published ones of {self.title}: their checksums differ. "
                "Fetch them again, or set --data.partial true to run on them nevertheless."
            ) from error


class CIFAR10DataModule(CIFARDataModule):
    """CIFAR-10: ten kinds of animals and vehicles, 32 x 32 pixels.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).

    Test is the 10,000 test pictures. Validation is a fixed tenth of the training pictures, training the rest.
    """

    title = "CIFAR-10"
    layout = "data_batch_1 to data_batch_5, test_batch and batches.meta (the version for Python)"
    aliases = ("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar-10/cifar-10-batches-py")
    dataset = datasets.CIFAR10
    classes = CIFAR10_CLASSES


class CIFAR100DataModule(CIFARDataModule):
    """CIFAR-100: a hundred kinds of things with their fine labels, 32 x 32 pixels.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).

    Test is the 10,000 test pictures. Validation is a fixed tenth of the training pictures, training the rest.
    """

    title = "CIFAR-100"
    layout = "train, test and meta (the version for Python)"
    aliases = ("cifar-100-python", "cifar100/cifar-100-python", "cifar-100/cifar-100-python")
    dataset = datasets.CIFAR100
    classes = CIFAR100_CLASSES


class CIFARCDataModule(BenchmarkDataModule):
    """Base of CIFAR-10-C and CIFAR-100-C, tested on one corruption at one severity.

    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019).

    ``<corruption>.npy`` has 5 x 10,000 rows: the same test pictures at severity 1, then at 2, ...; ``labels.npy`` has
    the labels of these rows. In results a picture is named by its number: ``gaussian_noise/3/00042``. Validation and
    test are the same pictures: there are no others.

    Args:
        root: Folder with the files, or the folder that it lies in (``CIFAR-10-C``, ``CIFAR-100-C``).
        corruption: One of the 15 of the benchmark, or of its 4 extra ones: ``speckle_noise``, ``gaussian_blur``,
            ``spatter``, ``saturate``.
        severity: 1 to 5.
        partial: Take files with fewer pictures, as many of each severity.
        **kwargs: See :class:`BaseDataModule`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If there is no such corruption or severity.
    """

    splits = ("val", "test")
    layout = "<corruption>.npy and labels.npy"

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    def __init__(
        self,
        root: str | Path,
        corruption: Corruption = "gaussian_noise",
        severity: int = 5,
        partial: bool = False,
        **kwargs: Any,
    ) -> None:
        self.check_known("corruption", corruption, CORRUPTIONS)
        severity = check_severity(severity)
        super().__init__(root, partial=partial, **kwargs)
        self.corruption = corruption
        self.severity = severity
        self.source = f"{corruption} {severity}"
        self.class_names = list(self.classes)

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether the labels and any corruption are there."""
        return (folder / "labels.npy").is_file() and any((folder / f"{name}.npy").is_file() for name in CORRUPTIONS)

    def published(self, split: Split) -> int:
        """How many pictures there are of each severity."""
        return 10_000

    def read(self, split: Split) -> ArrayPictures:
        """The rows of the severity.

        Raises:
            FileNotFoundError: If there is no file of the corruption.
            ValueError: If a file has not the published shape, type or labels.
        """
        file = self.root / f"{self.corruption}.npy"
        if not file.is_file():
            there = ", ".join(sorted(each.stem for each in self.root.glob("*.npy") if each.stem in CORRUPTIONS))
            raise FileNotFoundError(f"No file {file.name} in {self.root}; of the corruptions there are: {there}.")
        rows = _array(file, "uint8 [50000, 32, 32, 3]")
        if rows.dtype != np.uint8 or rows.shape[1:] != _SHAPE or not len(rows) or len(rows) % len(SEVERITIES):
            raise ValueError(
                f"{file}: expected uint8 [50000, 32, 32, 3], 10,000 pictures at each of 5 severities, got {rows.dtype} "
                f"{list(rows.shape)}."
            )
        size = len(rows) // len(SEVERITIES)
        start = (self.severity - 1) * size
        labels = self._labels(len(rows))[start : start + size]
        folder = f"{self.corruption}/{self.severity}"
        return ArrayPictures(MappedRows(file, start), labels, [f"{folder}/{place:05d}" for place in range(size)])

    def _labels(self, size: int) -> list[int]:
        """Labels of all rows."""
        file = self.root / "labels.npy"
        array = _array(file, "integers [50000]")
        if array.dtype.kind not in "iu" or array.shape != (size,):
            raise ValueError(
                f"{file}: expected an integer for each of the {size} rows of {self.corruption}.npy, got {array.dtype} "
                f"{list(array.shape)}."
            )
        labels: list[int] = array.tolist()
        n_classes = len(self.class_names)
        if set(labels) - set(range(n_classes)) or not (self.partial or len(set(labels)) == n_classes):
            raise ValueError(
                f"{file}: expected labels from 0 to {n_classes - 1}, each of them, got {len(set(labels))} from "
                f"{min(labels)} to {max(labels)}. Is it another data set's?"
            )
        if (array.reshape(len(SEVERITIES), -1) != array[: size // len(SEVERITIES)]).any():
            raise ValueError(f"{file}: expected the same labels at each of the {len(SEVERITIES)} severities, in order.")
        return labels


class CIFAR10CDataModule(CIFARCDataModule):
    """CIFAR-10-C, tested on one corruption at one severity: 10,000 pictures of each.

    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019).

    Validation and test are the same pictures: there are no others.
    """

    title = "CIFAR-10-C"
    aliases = ("CIFAR-10-C", "cifar10-c", "cifar10_c", "cifar10c")
    classes = CIFAR10_CLASSES


class CIFAR100CDataModule(CIFARCDataModule):
    """CIFAR-100-C, tested on one corruption at one severity: 10,000 pictures of each.

    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019).

    Validation and test are the same pictures: there are no others.
    """

    title = "CIFAR-100-C"
    aliases = ("CIFAR-100-C", "cifar100-c", "cifar100_c", "cifar100c")
    classes = CIFAR100_CLASSES


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it calls {module}.{name}")
        return super().find_class(module, name)


def _check_pickle(file: Path) -> None:
    """Refuse a file that may do more than torchvision expects, which runs whatever it finds.

    Raises:
        ValueError: It is no pickle of arrays, lists and text.
    """
    try:
        with file.open("rb") as stream:
            _ArraysOnly(stream, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: expected a pickle of arrays, lists and text, but {error}. Another may run code, and is not read."
        ) from error


def _array(file: Path, expected: str) -> NDArray[Any]:
    """An array that stays on the disk.

    Raises:
        ValueError: If the file holds none, or less than its header says.
    """
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(file, mode="r")  # np.load takes other formats too
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: expected an array ({expected}), but {error}. Is the file damaged?") from error
    return array
