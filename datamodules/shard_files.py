"""Tar files of WebDataset: where they are, what is in them, and the index file that keeps what was counted."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import Request, urlopen
from uuid import uuid4

from lightning.pytorch.utilities import rank_zero_info

from .folder import EXTENSIONS, is_stray
from .names import some

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

Label = int | str | None
"""A sample's label as it stands in its shard: a class's number or name, or nothing."""

_END = bytes(1024)  # that of every tar file
_TIMEOUT = 30  # seconds that a web server may take to answer


@dataclass(frozen=True)
class Shard:
    """A tar file.

    Attributes:
        name: Its path below the folder that all shards have in common, with ``/``.
        url: Its absolute path or address.
    """

    name: str
    url: str

    def __str__(self) -> str:
        return _without_query(self.url)


class ShardSample(NamedTuple):
    """A sample of a shard: ``<shard>/<key>``, the content of its picture's file, its label."""

    path: str
    picture: bytes
    label: Label


# Where shards are


def find_shards(given: Sequence[str]) -> list[Shard]:
    """Shards in the order of their names.

    Args:
        given: Folders with .tar files, files, patterns with ``{0..9}`` or ``*``, addresses with ``{0..9}``.

    Raises:
        FileNotFoundError: One of them stands for nothing on the disk.
        ValueError: There is none, or one stands twice.
    """
    urls = [url for entry in given for url in (_braces(entry) if is_url(entry) else _files(entry))]
    if not urls:
        raise ValueError("Expected at least one shard, got an empty list.")
    places = [_without_query(url).split("/") for url in urls]
    twice = ["/".join(place) for place, count in Counter(map(tuple, places)).items() if count > 1]
    if twice:
        raise ValueError(f"Each sample is to be taken once, but shards stand twice in what was given: {some(twice)}.")
    in_common = takewhile(lambda parts: len(set(parts)) == 1, zip(*(place[:-1] for place in places), strict=False))
    depth = len(list(in_common))
    return sorted(
        (Shard("/".join(place[depth:]), url) for place, url in zip(places, urls, strict=True)),
        key=lambda shard: shard.name,
    )


def is_url(url: str) -> bool:
    """Whether it is on the web."""
    return url.lower().startswith(("http://", "https://"))


def _without_query(url: str) -> str:
    """A path as it is; an address without what comes after a question mark, which may be a key to it."""
    return url.partition("?")[0] if is_url(url) else url


def _files(entry: str) -> list[str]:
    """Absolute paths, with ``/`` on every system."""
    files: list[str] = []
    missing = []
    for name in [entry] if Path(entry).expanduser().exists() else _braces(entry):
        path = Path(name).expanduser().absolute()
        if path.is_dir():
            found = [file for file in path.glob("*.tar") if not is_stray(file.name)]
            if not found:
                raise FileNotFoundError(f"No .tar file in the folder {path}.")
        else:
            found = [path] if path.exists() else [Path(match) for match in glob.glob(str(path))]
        files += [file.as_posix() for file in found]
        missing += [] if found else [str(path)]
    if missing:
        raise FileNotFoundError(
            f"No shard {some(missing)}; {len(files)} others of {entry} are there. Expected a folder with .tar files, a "
            "file, a pattern (val-{0000..0063}.tar, val-*.tar), or an address that begins with http."
        )
    return files


def _braces(pattern: str) -> list[str]:
    return list(package("braceexpand").braceexpand(pattern))


# What is in them


def read_samples(shard: Shard) -> Generator[ShardSample, None, None]:
    """Samples of a shard in their order. Whether it is whole shows at its end.

    Raises:
        OSError: It cannot be read to its end, or is cut off.
        ValueError: A sample does not have one picture, or its label cannot be read.
    """
    with closing(_contents(shard)) as contents:
        for content in contents:
            path = f"{shard.name}/{content['__key__']}"
            yield ShardSample(path, _picture(content, path), _label(content, path))


def _contents(shard: Shard) -> Generator[dict[str, Any], None, None]:
    """Samples as webdataset makes them: the content of files by their endings, and ``__key__``."""
    webdataset = package("webdataset")
    try:
        with closing(webdataset.gopen(shard.url) if is_url(shard.url) else open(shard.url, "rb")) as opened:
            stream = _Stream(opened)
            files = webdataset.tariterators.tar_file_expander([{"url": shard.url, "stream": stream}])
            yield from webdataset.tariterators.group_by_keys(files)
            stream.check_end()
    except Exception as error:
        raise OSError(f"Shard {shard} cannot be read: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """What tarfile or curl says, without what webdataset adds: the stream, and curl's call with the whole address."""
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    of_curl = re.search(r"exit (\d+) \(read\)", text)
    return f"curl ended with status {of_curl[1]} (man curl)" if of_curl else text.partition(" @ ")[0]


class _Stream:
    """Watches what is read: to tarfile, a file that is cut off between two of its members is only a shorter one."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._last = b""

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        self._last = (self._last + data)[-len(_END) :]
        return data

    def check_end(self) -> None:
        while self.read(2**20):
            pass
        if self._last != _END:
            raise EOFError("it does not end as a tar file does; it is cut off, or compressed, as shards are not")


def _picture(content: dict[str, Any], path: str) -> bytes:
    endings = [ending for ending in content if not ending.startswith("__")]
    found = [ending for ending in endings if f".{ending}" in EXTENSIONS]
    if len(found) != 1:
        raise ValueError(
            f"Sample {path} has {len(found)} pictures, expected one; its endings: {', '.join(endings)}. The files of "
            "a sample lie one after the other and have the same name up to its first dot."
        )
    picture: bytes = content[found[0]]
    return picture


def _label(content: dict[str, Any], path: str) -> Label:
    try:
        if "cls" in content:
            text: str = content["cls"].decode().strip()
            return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else text
        more = json.loads(content.get("json", "null"))
    except ValueError as error:
        raise ValueError(f"The label of sample {path} cannot be read: {error}.") from error
    label: Any = more.get("label") if isinstance(more, dict) else None
    if label is not None and type(label) not in (int, str):
        raise ValueError(f"Sample {path} has the label {label!r}: expected the number or the name of a class.")
    given: Label = label
    return given


# What is known of them


def read_index(file: Path, shards: Sequence[Shard]) -> list[list[Label]]:
    """The labels of the samples of every shard, from the index file; what that lacks is read and added to it.

    Raises:
        OSError: A shard cannot be read, or the file cannot be written.
        ValueError: The file is something else, or a sample is not as it should be.
    """
    known = _load(file)
    with ThreadPoolExecutor(16) as pool:  # a question to each web address
        versions = dict(zip(shards, pool.map(_version, shards), strict=True))
    unknown = [shard for shard in shards if known.get(shard.name, {}).get("version") != versions[shard]]
    if unknown:
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(f"Cannot write {file}, the index of shards: give another file, --data.index_file.")
        changed = [shard.name for shard in unknown if shard.name in known]
        since = f" (changed since the last time: {some(changed)})" if changed else ""
        rank_zero_info(f"Counting samples, once: in {len(unknown)} of {len(shards)} shards{since}; kept in {file}.")
        try:
            for shard in unknown:
                labels = [sample.label for sample in read_samples(shard)]
                known[shard.name] = {"version": versions[shard], "labels": labels}
        finally:  # those before a broken one need not be read again
            _save(file, known)
    return [known[shard.name]["labels"] for shard in shards]


def _version(shard: Shard) -> str:
    """What is another when a shard is: its size, and when it was written."""
    if not is_url(shard.url):
        status = os.stat(shard.url)
        return f"{status.st_size} bytes, {status.st_mtime_ns}"
    try:
        with urlopen(Request(shard.url, method="HEAD"), timeout=_TIMEOUT) as answer:
            written = answer.headers["Last-Modified"] or answer.headers["ETag"]
            return f"{answer.headers['Content-Length']} bytes, {written}"
    except (OSError, ValueError) as error:
        raise OSError(f"No answer about shard {shard}: {error}.") from error


def _load(file: Path) -> dict[str, dict[str, Any]]:
    if not file.exists():
        return {}
    try:
        known: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["metatpt_shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no index of shards: remove it, or give another, --data.index_file.") from error
    return known


def _save(file: Path, known: dict[str, dict[str, Any]]) -> None:
    """At once: a reader never sees half of it."""
    partial = file.with_name(f"{file.name}.{uuid4().hex}")
    try:
        partial.write_text(json.dumps({"metatpt_shards": known}, separators=(",", ":")), encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def package(name: str) -> Any:
    """A package of the extra.

    Raises:
        ImportError: It is not installed; names the extra.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            "WebDatasetDataModule reads shards through the package webdataset, which is not installed: pip install "
            '"metatpt[webdataset]".'
        ) from error
