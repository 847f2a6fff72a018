"""Class names out of what a user gives: a list, ``cat,dog``, a file of names, a file by folder.

Every entry is text. A name is matched with a folder by itself, never by its position.
"""

from __future__ import annotations

import json
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEXT_FILES = {".txt", ".text", ".csv", ".tsv", ".json", ".yaml", ".yml", ".lst", ".list", ".names"}
_SYNSET = re.compile(r"n\d{8}")


def read_class_names(given: str | Sequence[str]) -> list[str]:
    """Class names where there are no class folders.

    Args:
        given: A list; or a string: the path of a text file (UTF-8) with one name a line, else names with commas
            between. Where every line of the file begins with a WordNet id (``n01440764 tench``), the ids order the
            names and are taken off.

    Raises:
        ValueError: If a name is empty or stands twice.
        FileNotFoundError: If `given` looks like a path and there is no such file.
    """
    entries, source = _entries(given)
    by_folder = _split_lines(entries, source) if source.startswith("file") else None
    if by_folder and all(_SYNSET.fullmatch(folder) for folder in by_folder):
        return [by_folder[folder] for folder in sorted(by_folder)]
    check_unique(entries, source)
    return entries


def match_folders(given: str | Sequence[str], folders: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """Class names, and which of them each class folder is.

    Args:
        given: As in :func:`read_class_names`. A file by folder has lines of a folder's name and its class's name, in
            any order (``n01440764 tench``); classes are then ordered by folder and names may be equal. A plain list
            has the folders' own names, in any order and up to case and underscores; it orders the classes, and may
            have more than there are folders.
        folders: Names of the class folders.

    Returns:
        The class names, and the class index of every folder.

    Raises:
        ValueError: If a folder has no name, or if a plain list's name is empty or stands twice.
        FileNotFoundError: If `given` looks like a path and there is no such file.
    """
    entries, source = _entries(given)
    exact = {entry: place for place, entry in enumerate(entries)}
    loose: dict[str, list[int]] = {}
    for place, entry in enumerate(entries):
        loose.setdefault(_loose(entry), []).append(place)
    labels = {}
    for folder in folders:
        places = [exact[folder]] if folder in exact else loose.get(_loose(folder), [])
        if len(set(places)) == 1:
            labels[folder] = places[0]
    if len(labels) < len(folders) and source.startswith("file"):
        by_folder = _split_lines(entries, source)
        if by_folder and _is_by_folder(by_folder, folders):
            return _by_folder(by_folder, folders, source)
    missing = [folder for folder in folders if folder not in labels]
    if not missing or len(entries) == len(folders):  # else the counts tell more: a plain list of 1001 ImageNet names
        check_unique(entries, source)
    if missing:
        raise ValueError(_mismatch(entries, source, missing, folders))
    return entries, labels


def check_unique(names: Sequence[str], source: str) -> None:
    """Refuse a user's own list in which a name stands twice.

    Raises:
        ValueError: If a name is empty or stands twice; it names both places, counted from 0.
    """
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"Class name {place} of {source} is empty.")
        if name in places:
            raise ValueError(
                f'Class name "{name}" stands twice in {source}: at {places[name]} and {place} (counted from 0). '
                "Remove one, or give the two classes different names."
            )
        places[name] = place


def nearest(name: str, known: Sequence[str]) -> str:
    """The names nearest to a mistyped one, for an error message."""
    by_loose = {_loose(other): other for other in known}
    close = get_close_matches(_loose(name), list(by_loose), n=3, cutoff=0.5)
    return "nearest: " + ", ".join(by_loose[key] for key in close) if close else "none is like it"


def quote_class_names(text: str) -> str:
    r"""YAML in which every entry of a ``class_names`` list is quoted, so that it is read as text.

    A YAML reader turns `1`, ``yes`` and ``null`` into a number, True and None, from which the text cannot be had
    back. For a loader of jsonargparse.

    >>> quote_class_names("data: {class_names: [1, yes, 'a b', null], n: 1}")
    'data: {class_names: ["1", "yes", \'a b\', "null"], n: 1}'
    """
    return _quoted(text, lists=False)


def quote_entries(text: str) -> str:
    """A YAML list in which every entry is quoted: for the value of ``--data.class_names`` on the command line.

    >>> quote_entries("[1, yes, cat]")
    '["1", "yes", "cat"]'
    >>> quote_entries("cat,dog")
    'cat,dog'
    """
    return _quoted(text, lists=True)


def _quoted(text: str, lists: bool) -> str:
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return text  # whoever reads it next says what is wrong
    marks: dict[int, tuple[int, str]] = {}

    def quote(node: yaml.Node) -> None:
        if isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                if isinstance(entry, yaml.ScalarNode) and entry.style is None:
                    marks[entry.start_mark.index] = (entry.end_mark.index, json.dumps(entry.value, ensure_ascii=False))

    def visit(node: yaml.Node | None) -> None:
        if isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                visit(entry)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value.rpartition(".")[2] == "class_names":
                    quote(value)
                visit(value)

    if lists and root is not None:
        quote(root)
    visit(root)
    for start in sorted(marks, reverse=True):
        end, quoted = marks[start]
        text = text[:start] + quoted + text[end:]
    return text


def _entries(given: str | Sequence[str]) -> tuple[list[str], str]:
    """Stripped entries as they stand, and the words for where they come from."""
    if not isinstance(given, str):
        for place, entry in enumerate(given):
            if not isinstance(entry, str) and type(entry) is not int:
                raise ValueError(
                    f"Class name {place} is {entry!r}, not text: put it in quotes (YAML reads yes, null and 1.50 as "
                    "something else)."
                )
        entries, source = [str(entry).strip() for entry in given], "the list of class names"
    elif os.path.isfile(os.path.expanduser(given)):  # pathlib's raises where many names make too long a path
        text = Path(given).expanduser().read_text(encoding="utf-8-sig")
        entries, source = [line.strip() for line in text.splitlines() if line.strip()], f"file {given}"
    elif Path(given).suffix.lower() in _TEXT_FILES or ("," not in given and re.search(r"[/\\]", given)):
        what = "is a folder" if os.path.isdir(os.path.expanduser(given)) else "does not exist"
        raise FileNotFoundError(
            f"class_names {given!r} {what}: expected a text file with one name a line, names with commas between "
            "(cat,dog), or a list."
        )
    else:
        entries, source = [entry.strip() for entry in given.split(",")], f"class_names {given!r}"
    if not entries:
        raise ValueError(f"Expected at least one class name in {source}, got none.")
    return entries, source


def _loose(name: str) -> str:
    return re.sub(r"[_\s]+", " ", name).strip().casefold()


def _split_lines(lines: Sequence[str], source: str) -> dict[str, str]:
    """Folder -> class name of a file by folder; empty where it is none: a line has one word, or first words repeat."""
    pairs = [line.split(maxsplit=1) for line in lines]
    if any(len(pair) < 2 for pair in pairs):
        return {}
    folders = [pair[0] for pair in pairs]
    if len(set(folders)) == len(folders):
        return dict(pairs)
    if all(map(_SYNSET.fullmatch, folders)):
        check_unique(folders, source)
    return {}


def _is_by_folder(by_folder: dict[str, str], folders: Sequence[str]) -> bool:
    """Whether enough lines begin with a folder, or enough folders begin a line: a stray one is reported by name."""
    known = len(set(folders) & set(by_folder))
    return 2 * known >= min(len(folders), len(by_folder)) or all(map(_SYNSET.fullmatch, by_folder))


def _by_folder(by_folder: dict[str, str], folders: Sequence[str], source: str) -> tuple[list[str], dict[str, int]]:
    missing = [folder for folder in folders if folder not in by_folder]
    if missing:
        raise ValueError(
            f"{source} names classes by folder ({len(by_folder)} lines), but has no line for {len(missing)} of "
            f"{len(folders)} class folders: {some(missing)} ({nearest(missing[0], list(by_folder))})."
        )
    order = sorted(by_folder)
    places = {folder: place for place, folder in enumerate(order)}
    return [by_folder[folder] for folder in order], {folder: places[folder] for folder in folders}


def _mismatch(entries: Sequence[str], source: str, missing: Sequence[str], folders: Sequence[str]) -> str:
    return (
        f"{source} has {len(entries)} class names for {len(folders)} class folders, and none for {len(missing)} of "
        f"them: {some(missing)} ({nearest(missing[0], entries)}). Names are matched with folders by name, never by "
        f"position: give the folders' own names, or a file with a folder and its class name on each line "
        f'("{missing[0]} some name"). Pictures without labels belong into one folder without sub-folders.'
    )


def some(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
