"""Pictures in a user's own folder, with or without labels."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from .base import BaseDataModule, FilePictures, Split
from .names import match_folders, read_class_names

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
    below `root`, which is also its name in results. Validation and test are the same pictures.

    Args:
        root: The folder.
        class_names: Names to choose from: a list, names with commas between (``cat,dog``), or a text file with one
            name a line. With class folders: by default the folders' names; else a list with all of them, in any
            order, or a file with a folder and its class name on each line (``n01440764 tench``). Labels go by name,
            never by position. A flat folder needs it.
        **kwargs: See :class:`BaseDataModule`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no picture in it, or names and folders do not go together.
    """

    splits = ("val", "test")

    def __init__(self, root: str | Path, class_names: str | list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = existing_folder(root)
        loose, ignored = find_pictures(self.root, recursive=False)
        by_folder: dict[str, list[str]] = {}
        empty = []
        for folder in sub_folders(self.root):
            paths, others = find_pictures(self.root / folder)
            ignored += others
            if paths:
                by_folder[folder] = [f"{folder}/{path}" for path in paths]
            else:
                empty.append(folder)
        found = f"{ignored.total()} other files ({_counts(ignored)})" if ignored else "nothing else"
        if not loose and not by_folder:
            raise ValueError(
                f"No picture in {root}: expected files that end in {', '.join(sorted(EXTENSIONS))}, in the folder or in"
                f" a sub-folder for each class; found {found}."
            )
        labels: dict[str, int] = {}
        if not by_folder and class_names is None:
            raise ValueError(
                f"{root} has {len(loose)} pictures and no class folders, so class_names is needed: a text file with one"
                " name a line, names with commas between (cat,dog), or a list."
            )
        if not by_folder:
            assert class_names is not None
            self.class_names = read_class_names(class_names)
        elif class_names is None:
            self.class_names = list(by_folder)
            labels = {folder: label for label, folder in enumerate(by_folder)}
        else:
            self.class_names, labels = match_folders(class_names, list(by_folder))
        labelled = {path: labels[folder] for folder, paths in by_folder.items() for path in paths}
        labelled.update(dict.fromkeys(loose, -1))
        paths = sorted(labelled)
        self._pictures = FilePictures(self.root, paths, [labelled[path] for path in paths])
        notes = [f"{root}: {len(paths)} pictures", f"{len(self.class_names)} classes"]
        if loose:
            notes.append(f"{len(loose)} pictures without label")
        if ignored:
            notes.append(f"passed over {found}")
        if empty:
            notes.append(f"folders without pictures are no classes: {', '.join(empty)}")
        rank_zero_info("; ".join(notes) + ".")

    def pictures(self, split: Split) -> FilePictures:
        """All pictures, in either split."""
        return self._pictures


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
