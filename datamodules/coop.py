"""CoOp's cross-data-set benchmarks: which split of a data set, and how it is read.

Zhou et al., "Learning to Prompt for Vision-Language Models" (2022), drew splits of their own for most of them, and most
work since reports its numbers on these. They differ from the data sets' own splits in pictures, and some in classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from lightning.pytorch.utilities import rank_zero_info
from torchvision import datasets

from .base import FilePictures, Split
from .benchmark import BenchmarkDataModule, fetch_once, find_root
from .names import some
from .subsets import held_out_of_classes

SplitKind = Literal["auto", "coop", "official"]

COOP_URL = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
"""Where CoOp publishes its split files."""

Pairs = list[tuple[str, int]]
"""Path and class index of pictures."""

Listing = dict[Split, Pairs]
"""Those of each split."""


class Counts(NamedTuple):
    """Published numbers: of classes, and of the pictures in each split (None where there is no such split)."""

    classes: int
    train: int | None
    val: int | None
    test: int


class CoOpDataModule(BenchmarkDataModule):
    """Base of CoOp's cross-data-set benchmarks; a leaf gives constants.

    CoOp's split keeps the order of its file, an official one is sorted by path. Where the official split has no
    validation part, a fixed fifth of each class's training pictures is held out for it; where there is no official
    split at all, every picture is for testing.

    Args:
        root: Folder of the data set, or the folder that it lies in.
        split: ``"coop"``: CoOp's split file, in the data set's folder or the one above, decides pictures, class names
            and labels. ``"official"``: the data set's own split, as torchvision has it. ``"auto"``: CoOp's where its
            file is there, else the official one. The log and the result say which.
        download: Fetch the data set through torchvision into `root`, if it is not there.
        partial: Run on a part of the data set: pictures that are missing are left out. The classes to choose from stay
            the same.
        **kwargs: See :class:`BaseDataModule`.

    Raises:
        FileNotFoundError: If the data set is not there, or the split's files are not.
        ValueError: If there is no such split, or it has not as many classes as published.
        ImportError: If the official split's files need scipy, and it is not installed.
        RuntimeError: If the download fails.
    """

    split_file: ClassVar[str]
    """CoOp's split file."""

    images: ClassVar[str] = ""
    """Folder that the paths in CoOp's split file start from, below the data set's folder."""

    marks: ClassVar[tuple[str, ...]]
    """Files or folders of which one shows that a folder is the data set's."""

    coop_counts: ClassVar[Counts]
    """Numbers of CoOp's split."""

    official_counts: ClassVar[Counts | None]
    """Numbers of the official split, None where it cannot be had."""

    @property
    def coop_source(self) -> str:
        """How the result names CoOp's split."""
        return f"coop split ({self.split_file})"

    official_source: ClassVar[str] = "official split (torchvision)"
    """How the result names the official split."""

    official_splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    """torchvision's names of the splits, testing last; empty where it has none."""

    torchvision_class: ClassVar[Any] = None
    """torchvision's data set, None where it has none."""

    torchvision_folder: ClassVar[str]
    """The folder in `root` that torchvision's class insists on."""

    needs_scipy: ClassVar[bool] = False
    """Whether the official split is in MATLAB files."""

    not_downloadable: ClassVar[str | None] = None
    """Why it cannot be downloaded, where it cannot."""

    def __init__(
        self,
        root: str | Path,
        split: SplitKind = "auto",
        download: bool = False,
        partial: bool = False,
        **kwargs: Any,
    ) -> None:
        if split not in get_args(SplitKind):
            raise ValueError(f"Expected split {', '.join(get_args(SplitKind))}, got {split!r}.")
        if split == "official" and self.official_counts is None:
            raise ValueError(f"{self.title} has no official split, only CoOp's: set --data.split coop.")
        if download:
            self.fetch(Path(root).expanduser())
        super().__init__(root, partial=partial, **kwargs)
        file = self._find_split_file()
        if split != "official" and file is not None:
            self._counts, self.source = self.coop_counts, self.coop_source
            self.class_names, self._listing = self.read_coop(file)
        elif split == "coop" or self.official_counts is None:
            raise FileNotFoundError(
                f"No {self.split_file} in {self.root} or the folder above it, which CoOp's split of {self.title} is "
                f"read from. CoOp publishes it: {COOP_URL}"
            )
        else:
            self._counts, self.source = self.official_counts, self.official_source
            self.class_names, self._listing = self.read_official()
        if len(self.class_names) != self._counts.classes:
            raise ValueError(
                f"{self.title}, {self.source}: expected {self._counts.classes} classes, found {len(self.class_names)} "
                f"({some(self.class_names)}) in {self.root}."
            )
        rank_zero_info(f"{self.title}: {self.source} in {self.root}.")

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether one of the `marks` is there, or CoOp's split file beside the folder of its pictures."""
        listed = any((place / cls.split_file).is_file() for place in (folder, folder.absolute().parent))
        beside = bool(cls.images) and (folder / cls.images).is_dir() and listed
        return beside or any((folder / mark).exists() for mark in cls.marks)

    def images_folder(self) -> str:
        """Where the pictures are, below the root."""
        return self.images

    def published(self, split: Split) -> int | None:
        """How many pictures the split has, CoOp's or the official one."""
        number: int | None = getattr(self._counts, split)
        return number

    def read(self, split: Split) -> FilePictures:
        """A split as listed.

        Raises:
            FileNotFoundError: If there is no such split, or none of its pictures.
            ValueError: If some of its pictures are missing, unless the data set is a partial one.
        """
        if split not in self._listing:
            raise FileNotFoundError(
                f"{self.title}, {self.source}: there is no {split} split. CoOp's has one: put {self.split_file} into "
                f"{self.root} ({COOP_URL})."
            )
        listed = self._listing[split]
        there = [(path, label) for path, label in listed if (self.root / path).exists()]
        if len(there) < len(listed) and not (self.partial and there):
            kept = {path for path, _ in there}
            missing = [path for path, _ in listed if path not in kept]
            what = (
                f"{self.title}, {self.source}: of the {len(listed)} pictures of split {split}, {len(missing)} are "
                f"missing in {self.root}: {some(missing)}. Is it unpacked completely"
            )
            if not there:
                raise FileNotFoundError(f"{what}, and its folders named as in {self.layout}?")
            raise ValueError(f"{what}? To run on a part of it, set --data.partial true.")
        return FilePictures(self.root, [path for path, _ in there], [label for _, label in there])

    def read_coop(self, file: Path) -> tuple[list[str], Listing]:
        """Class names, and the splits with paths below the data set's folder, out of CoOp's split file."""
        return read_split_file(file, self.images_folder())

    def read_official(self) -> tuple[list[str], Listing]:
        """Class names, and the splits with paths below the data set's folder, as torchvision has them."""
        self._check_scipy()
        with _named_as(self.torchvision_folder, self.root) as place:
            parts = [self._torchvision_list(place, split=name) for name in self.official_splits]
            names, test = parts[-1] if parts else self._torchvision_list(place)
        listing: Listing = {"test": test}
        if len(parts) == 2:
            held = self._held_out(*parts[0])
            listing["train"] = [pair for pair in parts[0][1] if pair[0] not in held]
            listing["val"] = [pair for pair in parts[0][1] if pair[0] in held]
        elif parts:
            listing["train"], listing["val"] = parts[0][1], parts[1][1]
        return [self.readable(name) for name in names], listing

    @staticmethod
    def readable(name: str) -> str:
        """A class name of torchvision's as CoOp writes it."""
        return name

    @classmethod
    def fetch(cls, root: Path) -> None:
        """Download the data set into a folder, if it is not there; processes that start together do it once.

        Raises:
            ValueError: If it cannot be downloaded.
            ImportError: If reading it needs scipy.
            RuntimeError: If the download fails.
        """
        by_hand = f"Put it into {root} as {cls.aliases[0]}/ by hand, with {cls.layout}; {cls.split_file} goes there too"
        if cls.not_downloadable:
            raise ValueError(f"{cls.title} cannot be downloaded: {cls.not_downloadable}. {by_hand} ({COOP_URL}).")

        def is_there() -> bool:
            try:
                found = find_root(root, cls.aliases, cls.holds, cls.title)
            except FileNotFoundError:
                return False
            # in torchvision's own folder a download may have been interrupted: torchvision looks itself
            return found != root / cls.torchvision_folder

        def fetch() -> None:
            cls._check_scipy()
            cls.torchvision_class(root, download=True)

        fetch_once(root, cls.title, is_there, fetch, f"{by_hand} ({COOP_URL}).")

    @classmethod
    def _check_scipy(cls) -> None:
        if cls.needs_scipy and find_spec("scipy") is None:
            raise ImportError(
                f"The official labels of {cls.title} are in MATLAB files, which need scipy: pip install "
                f"'metatpt[scipy]'. CoOp's split does without: put {cls.split_file} next to the data ({COOP_URL})."
            )

    def _find_split_file(self) -> Path | None:
        places = (self.root, self.root.absolute().parent)
        return next((place / self.split_file for place in places if (place / self.split_file).is_file()), None)

    def _held_out(self, names: list[str], pairs: Pairs) -> set[str]:
        draws = [f"{self.title} {name}" for name in names]
        return held_out_of_classes([path for path, _ in pairs], [label for _, label in pairs], draws)

    def _torchvision_list(self, place: Path, **split: str) -> tuple[list[str], Pairs]:
        """Class names, and sorted path and label of each picture, of a data set of torchvision's; opens no picture."""
        pairs: Iterable[tuple[Any, int]]
        try:
            if self.torchvision_class is datasets.OxfordIIITPet:  # the only one that takes no loader
                data = self.torchvision_class(place, **split)
                pairs = zip(data._images, data._labels, strict=True)
            else:
                data = self.torchvision_class(place, **split, loader=str)
                pairs = (data[index] for index in range(len(data)))
        except Exception as error:  # readers of damaged files raise whatever the damage led them to
            raise FileNotFoundError(
                f"torchvision does not find the official split of {self.title} in {self.root} ({error}). Expected "
                f"{self.layout}; or, for CoOp's split, {self.split_file} ({COOP_URL})."
            ) from error
        folder = place / self.torchvision_folder
        return list(data.classes), sorted((Path(path).relative_to(folder).as_posix(), int(y)) for path, y in pairs)


def read_split_file(file: Path, below: str = "") -> tuple[list[str], Listing]:
    """CoOp's ``split_zhou_<Name>.json``; whether the pictures are there is not looked at.

    Args:
        file: The file: ``train``, ``val`` and ``test``, each a list of [path, label, class name].
        below: Folder to put before the paths.

    Returns:
        The class names in the order of their labels; path and label of every picture of each split.

    Raises:
        ValueError: If it is not such a file, or if labels and names do not go together.
    """
    prefix = f"{below}/" if below else ""
    names: dict[int, str] = {}
    listing: Listing = {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for split in get_args(Split):
            listing[split] = [(prefix + path, label) for path, label, _ in content[split]]
            for _, label, name in content[split]:
                if names.setdefault(label, name) != name:
                    raise ValueError(f"label {label} is {names[label]!r} and {name!r}")
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"labels are not 0 to {len(names) - 1}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a split file of CoOp's ({error}): expected train, val and test, each a list of "
            f"[path, label, class name]. CoOp publishes it: {COOP_URL}"
        ) from error
    return [names[label] for label in range(len(names))], listing


@contextmanager
def _named_as(name: str, folder: Path) -> Iterator[Path]:
    """A place in which the folder has the name that is written into torchvision's class."""
    parts = Path(name).parts
    if folder.absolute().parts[-len(parts) :] == parts:
        yield folder.absolute().parents[len(parts) - 1]
        return
    with TemporaryDirectory() as place:
        link = Path(place, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield Path(place)
