"""Pictures in a user's own folder, with or without labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from .base import BaseDataModule, FilePictures, Split
from .names import match_folders, nearest, read_class_names, some
from .subsets import held_out_of_classes

_READABLE = (
    ".jpg .jpeg .jpe .jfif .png .apng .gif .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .j2k .tga .ico"
)
_PLUGIN = ".heic .heif .jxl"  # Pillow needs a plugin: without it they are named as unreadable, not silently left out
EXTENSIONS = frozenset(f"{_READABLE} {_PLUGIN}".split())
"""Files with these endings (in any case) are pictures; what is in them is told by their content."""

_STRAYS = frozenset({"__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "system volume information"})


class FolderDataModule(BaseDataModule):
    """Pictures in class folders, or in one folder without labels.

    Class folders: each sub-folder of `root` with pictures in it, at any depth, is a class; pictures directly in `root`
    have no label. A flat folder has no sub-folders with pictures: nothing is labelled. Hidden files and folders and
    those that systems leave behind (``.ipynb_checkpoints``, ``._1.png``, ``Thumbs.db``, ``__MACOSX``) are passed over,
    files without a picture's ending counted in the log. A picture's index is its place in the list sorted by its path
    below `root`, which is also its name in results.

    Validation and test are the same pictures, all of `root`. With `train_root`, validation is a fixed fifth of each
    class of the pictures there (whatever the seed of the run), and training their rest.

    Args:
        root: The folder.
        class_names: Names to choose from: a list, names with commas between (``cat,dog``), or a text file with one
            name a line. With class folders: by default the folders' names; else a list with all of them, in any
            order, or a file with a folder and its class name on each line (``n01440764 tench``). Labels go by name,
            never by position. A flat folder needs it, or takes the class folders' names of `train_root`.
        train_root: Another folder, with class folders to train on. It may lack some of the classes.
        **kwargs: See :class:`BaseDataModule`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no picture in it, or names and folders do not go together, or `root` and `train_root`
            have pictures in common.
    """

    splits: tuple[Split, ...] = ("val", "test")
    why_no_training = "to train, give another folder of class folders as train_root; root is what is tested on"

    def __init__(
        self,
        root: str | Path,
        class_names: str | list[str] | None = None,
        train_root: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        tested = _Found(root)
        self.root = tested.root
        learned = None if train_root is None else _Found(train_root)
        if learned is not None:
            self.splits = ("train", "val", "test")
            _check_apart(tested.root, learned.root)
            if not learned.by_folder:
                raise ValueError(f"train_root {train_root} has no class folders, which say what its pictures show.")
        in_use = [found for found in (tested, learned) if found is not None]
        labels: dict[str, int] = {}
        if class_names is None:
            named = next((found for found in in_use if found.by_folder), None)
            if named is None:
                raise ValueError(
                    f"{root} has {len(tested.loose)} pictures and no class folders, so class_names is needed: a text "
                    "file with one name a line, names with commas between (cat,dog), or a list."
                )
            self.class_names = list(named.by_folder)
            labels = {folder: label for label, folder in enumerate(self.class_names)}
            stray = [] if learned is None else [folder for folder in learned.by_folder if folder not in labels]
            if stray:
                raise ValueError(
                    f"train_root {train_root} has class folders that {root} lacks: {some(stray)} "
                    f"({nearest(stray[0], self.class_names)}). Give class_names with all of them."
                )
        elif folders := list(dict.fromkeys(folder for found in in_use for folder in found.by_folder)):
            self.class_names, labels = match_folders(class_names, folders)
        else:
            self.class_names = read_class_names(class_names)
        self._tested = tested.pictures(labels)
        self._learned = None if learned is None else _parts(learned.pictures(labels), self.class_names)
        for found in in_use:
            rank_zero_info(found.summary(len(self.class_names)))

    def pictures(self, split: Split) -> FilePictures:
        """All pictures of `root`; of `train_root` the part to train on, or the part held out to validate on."""
        if split == "test" or self._learned is None:
            return self._tested
        return self._learned[split]


class _Found:
    """What is in a folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no picture in it.
    """

    def __init__(self, root: str | Path) -> None:
        self.given = root
        self.root = existing_folder(root)
        self.loose, ignored = find_pictures(self.root, recursive=False)
        self.by_folder: dict[str, list[str]] = {}
        self.empty = []
        for folder in sub_folders(self.root):
            paths, others = find_pictures(self.root / folder)
            ignored += others
            if paths:
                self.by_folder[folder] = [f"{folder}/{path}" for path in paths]
            else:
                self.empty.append(folder)
        self.others = f"{ignored.total()} other files ({_counts(ignored)})" if ignored else ""
        if not self.loose and not self.by_folder:
            raise ValueError(
                f"No picture in {root}: expected files that end in {', '.join(sorted(EXTENSIONS))}, in the folder or in"
                f" a sub-folder for each class; found {self.others or 'nothing else'}."
            )

    def pictures(self, labels: Mapping[str, int]) -> FilePictures:
        """All pictures, given the class index of each class folder."""
        labelled = {path: labels[folder] for folder, paths in self.by_folder.items() for path in paths}
        labelled.update(dict.fromkeys(self.loose, -1))
        paths = sorted(labelled)
        return FilePictures(self.root, paths, [labelled[path] for path in paths])

    def summary(self, n_classes: int) -> str:
        """What was found and passed over, for the log."""
        n = len(self.loose) + sum(map(len, self.by_folder.values()))
        notes = [f"{self.given}: {n} pictures", f"{n_classes} classes"]
        if self.loose:
            notes.append(f"{len(self.loose)} pictures without label")
        if self.others:
            notes.append(f"passed over {self.others}")
        if self.empty:
            notes.append(f"folders without pictures are no classes: {', '.join(self.empty)}")
        return "; ".join(notes) + "."


def _check_apart(root: Path, train_root: Path) -> None:
    one, other = root.resolve(), train_root.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(
            f"root {root} and train_root {train_root} have pictures in common, and what was trained on cannot be "
            "tested on: give two folders of which neither lies in the other."
        )


def _parts(pictures: FilePictures, class_names: Sequence[str]) -> dict[Split, FilePictures]:
    """A fixed fifth of each class to validate on, and the rest; the only picture of a class is trained on."""
    times = Counter(pictures.labels)
    shared = [place for place, label in enumerate(pictures.labels) if label >= 0 and times[label] > 1]
    held = held_out_of_classes(
        [pictures.paths[place] for place in shared],
        [pictures.labels[place] for place in shared],
        [f"folder {name}" for name in class_names],
    )

    def part(is_held_out: bool) -> FilePictures:
        chosen = [place for place, path in enumerate(pictures.paths) if (path in held) == is_held_out]
        return FilePictures(
            pictures.root, [pictures.paths[place] for place in chosen], [pictures.labels[place] for place in chosen]
        )

    return {"train": part(False), "val": part(True)}


def existing_folder(root: str | Path) -> Path:
    """The folder of that name.

    Raises:
        FileNotFoundError: If there is none.
        NotADirectoryError: If it is a file.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"Expected a folder of pictures, got the file {root}.")
    raise FileNotFoundError(f"No folder {root} (looked from {Path.cwd()}).")


def sub_folders(folder: Path) -> list[str]:
    """Names of the sub-folders that are not strays, sorted."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_stray(entry.name))


def find_pictures(folder: Path, recursive: bool = True) -> tuple[list[str], Counter[str]]:
    """Pictures below a folder.

    Returns:
        Their paths below `folder`, with ``/`` on every system, sorted; and how many other files there are by ending
        (strays not counted).
    """
    paths: list[str] = []
    others: Counter[str] = Counter()

    def visit(below: Path, prefix: str, above: frozenset[Path]) -> None:
        with os.scandir(below) as entries:  # pathlib would ask the disk about each of a million files
            for entry in entries:
                if is_stray(entry.name):
                    continue
                if _is_folder(entry):
                    # Links are followed, but not in a circle.
                    if recursive and (real := Path(entry.path).resolve()) not in above:
                        visit(Path(entry.path), f"{prefix}{entry.name}/", above | {real})
                    continue
                ending = os.path.splitext(entry.name)[1].lower()
                if ending in EXTENSIONS:
                    paths.append(prefix + entry.name)
                else:
                    others[ending or "no ending"] += 1

    visit(folder, "", frozenset({folder.resolve()}))
    return sorted(paths), others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: with a picture's name it becomes a picture that cannot be read
        return False


def is_stray(name: str) -> bool:
    """Whether a file or folder is hidden, or one that a system or tool leaves behind."""
    return name.startswith(".") or name.lower() in _STRAYS or name.lower() in ("thumbs.db", "desktop.ini")


def _counts(others: Counter[str]) -> str:
    return ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
