"""WebDataset shards in small, written without the package."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

CLASSES = ("cat", "dog", "owl")


def picture(number: int) -> bytes:
    """A PNG of 12 x 8 pixels; each number has its own colour."""
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (number % 256, number // 256, 50)).save(stream, "png")
    return stream.getvalue()


def sample(number: int) -> dict[str, bytes]:
    """A labelled sample's files by ending."""
    return {"png": picture(number), "cls": str(number % len(CLASSES)).encode(), "json": json.dumps({"a": 1}).encode()}


def write_shard(file: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """A tar file of keys, each with the contents of its files by ending."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for key, contents in samples:
            for ending, content in contents.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_shards(root: Path, *sizes: int) -> None:
    """Shards of so many samples, ``val-0000.tar`` and so on; all samples are numbered from 0."""
    first = 0
    for shard, size in enumerate(sizes):
        numbers = range(first, first + size)
        write_shard(root / f"val-{shard:04}.tar", ((f"{number:06}", sample(number)) for number in numbers))
        first += size


def write_webdataset(root: Path) -> None:
    """Two shards with seven samples of three classes."""
    write_shards(root, 4, 3)
