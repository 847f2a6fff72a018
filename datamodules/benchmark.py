"""Published benchmarks on disk: where they lie, and checks of what is there before an hour is spent on it.

Folders stand for classes by their names, never by their order. What is missing, stray or too little is an error that
names it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info

from .base import BaseDataModule, FilePictures, Pictures, Split
from .folder import existing_folder, find_pictures, sub_folders
from .names import nearest, some


class BenchmarkDataModule(BaseDataModule):
    """Base of published benchmarks.

    A leaf gives its constants and reads a split in :meth:`read`; here it is checked against the published counts.

    Args:
        root: Folder of the data set, or the folder that it lies in under one of the names in use (`aliases`).
        partial: Run on a part of the data set: missing pictures and class folders are no error. The classes to choose
            from stay the same.
        **kwargs: See :class:`BaseDataModule`.

    Attributes:
        root: The folder that was found.
    """

    title: ClassVar[str]
    """Its name in messages: "ImageNet-V2"."""

    aliases: ClassVar[tuple[str, ...]] = ()
    """Names of its folder that are in use, compared without regard to case."""

    layout: ClassVar[str]
    """What lies in its folder, for messages: ``<wnid>/*.jpg``."""

    def __init__(self, root: str | Path, partial: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.partial = partial
        self.root = find_root(root, self.aliases, self.holds, f"{self.title} as {self.layout}")

    @classmethod
    @abstractmethod
    def holds(cls, folder: Path) -> bool:
        """Whether a folder looks like the data set's: a quick test, of which the checks come later."""

    @abstractmethod
    def read(self, split: Split) -> Pictures:
        """A split as it is on the disk, in its fixed order: sorted by path, or as a split file has it."""

    @abstractmethod
    def published(self, split: Split) -> int | None:
        """How many pictures a whole split has; None where nobody has published it."""

    def pictures(self, split: Split) -> Pictures:
        """A split, checked.

        Raises:
            FileNotFoundError: A folder or file is missing.
            ValueError: A class folder is missing or stray, or there are not as many pictures as published.
        """
        pictures = self.read(split)
        if not len(pictures):
            raise ValueError(f"{self.title}, split {split}: no picture in {self.root}. Is it unpacked completely?")
        self.check_count(f"split {split}", len(pictures), self.published(split))
        return pictures

    def split_size(self, split: Split, pictures: Pictures) -> int:
        """The published number, also where only a part of the data set is there."""
        return self.published(split) or len(pictures)

    @classmethod
    def check_known(cls, kind: str, given: str, known: Sequence[str]) -> str:
        """An option that has one of some values.

        Raises:
            ValueError: It has another; names the nearest one.
        """
        if given not in known:
            raise ValueError(
                f"{cls.title} has no {kind} {given!r} ({nearest(given, known)}): expected one of {', '.join(known)}."
            )
        return given

    def check_count(self, part: str, found: int, expected: int | None) -> None:
        """Refuse another number of pictures than the published one; with `partial`, only a larger one.

        Args:
            part: What was counted: ``split test``.
            found: Number of pictures.
            expected: The published number; None where there is none.

        Raises:
            ValueError: Naming both.
        """
        if expected is None or found == expected:
            return
        what = f"{self.title}, {part}: found {found} of {expected} pictures in {self.root}"
        if found > expected or not self.partial:
            raise ValueError(
                f"{what}. Is it unpacked completely, and nothing else with it? To run on a part of it, set "
                "--data.partial true."
            )
        rank_zero_info(f"{what}.")


def fetch_once(root: Path, title: str, is_there: Callable[[], bool], fetch: Callable[[], object], by_hand: str) -> None:
    """Download a data set into a folder, if it is not there; processes that start together do it once.

    Args:
        root: The folder, which is made.
        title: The data set.
        is_there: Whether nothing is to be done.
        fetch: Downloads it.
        by_hand: What to do where that fails.

    Raises:
        RuntimeError: It fails.
    """
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{title}.lock"):
        if is_there():
            return
        try:
            fetch()
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"{title} could not be downloaded by torchvision ({error}). {by_hand}") from error


def find_root(root: str | Path, aliases: Sequence[str], holds: Callable[[Path], bool], expected: str) -> Path:
    """The folder of a data set: the one in the given folder that has one of the names in use, or the given one.

    Args:
        root: What the user gave.
        aliases: Names in use, compared without regard to case; with ``/`` for a folder in a folder.
        holds: Whether a folder looks like it.
        expected: The data set and its layout in words, for the error.

    Raises:
        FileNotFoundError: Neither looks like it; says what was found.
    """
    given = existing_folder(root)
    tried = []
    for alias in aliases:  # first: a folder of several data sets may have another one's folders in it
        folder = _below(given, alias)
        if folder is not None:
            if holds(folder):
                return folder
            tried.append(folder)
    if holds(given):
        return given
    folders = sub_folders(given)
    inside = f"; nor does {' or '.join(map(str, tried))}" if tried else ""
    raise FileNotFoundError(
        f"{given} does not hold {expected}{inside}. Found there: {some(folders) if folders else 'no folders'}. Give "
        f"the folder of the data set itself, or the one that it lies in"
        + (f" as {some(aliases)}" if aliases else "")
        + "."
    )


def _below(folder: Path, name: str) -> Path | None:
    """The folder of that name below another one, whatever the case of its letters."""
    for part in name.split("/"):
        found = next((each for each in sub_folders(folder) if each.casefold() == part.casefold()), None)
        if found is None:
            return None
        folder = folder / found
    return folder


def class_folders(
    root: Path,
    below: str,
    classes: Mapping[str, int],
    *,
    partial: bool = False,
    hint: str = "",
    ignore: Iterable[str] = (),
) -> FilePictures:
    """Pictures in class folders, with labels by the folders' names.

    Args:
        root: Folder that paths start from.
        below: Where the class folders are, below `root`; may be empty.
        classes: Class index of each folder.
        partial: Whether folders may be missing or empty.
        hint: The likely cause of stray or missing folders, for the error.
        ignore: Folders that belong to the data set and are no classes.

    Raises:
        FileNotFoundError: `below` is missing.
        ValueError: A folder is missing, stray or empty.
    """
    place = root / below
    if not place.is_dir():
        raise FileNotFoundError(f"No folder {place}; in {root} there are: {some(sub_folders(root)) or 'no folders'}.")
    folders = [name for name in sub_folders(place) if name not in set(ignore)]
    check_folders(place, folders, list(classes), partial=partial, hint=hint)
    labels: dict[str, int] = {}
    for name in folders:
        paths = find_pictures(place / name)[0]
        if not paths and not partial:
            raise ValueError(f"No picture in {place / name}: is the data set unpacked completely?")
        prefix = f"{below}/{name}" if below else name
        labels.update((f"{prefix}/{path}", classes[name]) for path in paths)
    paths = sorted(labels)
    return FilePictures(root, paths, [labels[path] for path in paths])


def check_folders(
    place: Path, found: Sequence[str], expected: Sequence[str], *, partial: bool = False, hint: str = ""
) -> None:
    """Refuse class folders that are not those expected.

    Raises:
        ValueError: Naming what is stray and what is missing.
    """
    stray = sorted(set(found) - set(expected))
    missing = sorted(set(expected) - set(found))
    if not stray and (partial or not missing):
        return
    parts = [f"{place}: expected {len(expected)} class folders ({some(sorted(expected))}), found {len(found)}"]
    if stray:
        parts.append(f"no class: {some(stray)} ({nearest(stray[0], list(expected))})")
    if missing:
        parts.append(f"missing: {some(missing)}")
    if hint:
        parts.append(hint)
    if missing and not stray:
        parts.append("to run on a part of it, set --data.partial true")
    raise ValueError("; ".join(parts) + ".")
