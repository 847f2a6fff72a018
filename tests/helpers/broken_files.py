"""Files with a picture's name that are none, as disks, downloads and other programs leave them."""

from __future__ import annotations

import gzip
import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = (50, 40)
REFUSED = {"bomb", "floats", "program"}
"""Kinds that Pillow may decode: they are refused for what they are, not for a damage."""

_NO_PICTURE = r"^not a picture that Pillow can read \(\d+ bytes\)$"
_CUT = r"^damaged picture: .*[Tt]runcated"
_DAMAGED = r"^damaged picture: \w"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class BrokenFile(NamedTuple):
    """What is wrong with it, the ending of its name, its content, and a pattern of the reason that is given."""

    kind: str
    ending: str
    content: bytes
    reason: str


def broken_files(seed: int = 0) -> list[BrokenFile]:
    """More than 40 files of more than 12 kinds; the seed decides where they are cut, flipped and filled."""
    return [BrokenFile(*each) for each in _broken(np.random.default_rng(seed))]


def mix_in(root: Path, folders: list[str], seed: int = 0) -> dict[str, str]:
    """Writes broken files, and links to nothing, between the pictures of class folders.

    Returns:
        Their paths below `root`, with a pattern of the reason for each.
    """
    random = np.random.default_rng(seed)
    reasons = {}

    def place(kind: str, ending: str, reason: str) -> Path:
        number = len(reasons)
        path = f"{random.choice(folders)}/{random.integers(10):04}-{kind}-{number}.{ending}"
        reasons[path] = reason
        return root / path

    for kind, ending, content, reason in broken_files(seed):
        place(kind, ending, reason).write_bytes(content)
    place("gone", "jpg", "^cannot be read: No such file").symlink_to("moved-away.jpg")
    loop = place("loop", "png", "^cannot be read: Too many levels")
    loop.symlink_to(loop.name)
    if os.geteuid() != 0:  # root reads everything
        locked = place("locked", "png", "^cannot be read: Permission denied")
        locked.write_bytes(_picture(random, "PNG"))
        locked.chmod(0)
    return reasons


def _broken(random: np.random.Generator) -> Iterator[tuple[str, str, bytes, str]]:
    for ending in ("jpg", "png", "webp"):
        yield "empty", ending, b"", r"^empty file \(0 bytes\)$"
    for ending in ("jpg", "gif"):
        yield "text", ending, b"A picture says more than a thousand words.\n", _NO_PICTURE
    for ending in ("png", "jpeg"):
        yield "page", ending, b"<!DOCTYPE html>\n<html><body><h1>404 Not Found</h1></body></html>\n", _NO_PICTURE
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    yield "pointer", "jpg", pointer, _NO_PICTURE
    yield "packed", "jpg", gzip.compress(_picture(random, "JPEG"), mtime=0), _NO_PICTURE
    for ending in ("jpg", "png", "bmp"):
        yield "random", ending, random.bytes(2000), _NO_PICTURE
    for kind in ("JPEG", "PNG", "TIFF"):  # as after a power cut: as long as it was to be
        yield "zeros", kind.lower(), bytes(len(_picture(random, kind))), _NO_PICTURE
    yield "half", "jpg", _part(_picture(random, "JPEG"), 0.5), _CUT
    yield "half", "png", _part(_picture(random, "PNG"), 0.5), _CUT
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF"):
        for _ in range(3):
            yield "cut", kind.lower(), _part(_picture(random, kind), random.uniform(0.3, 0.95)), _CUT
    for kind in ("WEBP", "JPEG2000"):
        for _ in range(2):
            ending = "jp2" if kind == "JPEG2000" else "webp"
            yield "cut", ending, _part(_picture(random, kind), random.uniform(0.3, 0.95)), _DAMAGED
    jpeg = _picture(random, "JPEG")
    yield "header", "jpg", jpeg[:20], _NO_PICTURE
    yield "header", "jpg", jpeg[: jpeg.index(b"\xff\xda")], _DAMAGED
    png = _picture(random, "PNG")
    for place in (17, 30):  # in the width, in the checksum itself
        yield "checksum", "png", _flipped(png, place), _NO_PICTURE
    start = png.index(b"IDAT") + 4
    for _ in range(3):
        yield "flipped", "png", _flipped(png, int(random.integers(start, len(png) - 20))), _DAMAGED
    tiff = _picture(random, "TIFF", compression="tiff_adobe_deflate")
    for _ in range(2):
        yield "flipped", "tiff", _flipped(tiff, int(random.integers(len(tiff) // 3, len(tiff) // 2))), _DAMAGED
    frame = jpeg.index(b"\xff\xc0")
    yield "flat", "jpg", jpeg[: frame + 7] + bytes(2) + jpeg[frame + 9 :], _NO_PICTURE
    yield "flat", "png", _png(0, 40), _NO_PICTURE
    bmp = _picture(random, "BMP")
    yield "compression", "bmp", bmp[:30] + b"\x63" + bmp[31:], r"^damaged picture: Unsupported BMP compression"
    yield "words", "png", _png(*SIZE, _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))), _DAMAGED
    stream = io.BytesIO()
    Image.new("1", (12_000, 8_000)).save(stream, "PNG")
    yield "bomb", "png", stream.getvalue(), "^too large: 12000 x 8000 = 96000000 pixels"
    yield "bomb", "png", _png(100_000, 100_000), "^too large: 100000 x 100000 = 10000000000 pixels"
    gif = _picture(random, "GIF")
    yield "bomb", "gif", gif[:6] + b"\xff" * 4 + gif[10:], "^too large: 65535 x 65535 = "
    stream = io.BytesIO()
    Image.fromarray(random.random(SIZE[::-1], dtype=np.float32)).save(stream, "TIFF")
    yield "floats", "tif", stream.getvalue(), "^floating-point pixels"
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 40\n%%EndComments\nshowpage\n%%EOF\n"
    yield "program", "jpg", program, "^PostScript .* is not run"


def _picture(random: np.random.Generator, kind: str, **options: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)).save(stream, kind, **options)
    return stream.getvalue()


def _part(content: bytes, share: float) -> bytes:
    return content[: int(share * len(content))]


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def _png(width: int, height: int, chunk: bytes = b"") -> bytes:
    """A PNG that says so of itself, with few bytes behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rest = chunk + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")
    return _SIGNATURE + _chunk(b"IHDR", header) + rest


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
