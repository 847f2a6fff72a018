"""Files, opened pictures and tensors to view 0 and canvas: the one decoder of datamodules and Classifier.

A picture is decoded by its content, turned upright by its EXIF tag, flattened onto white where it is transparent, and
scaled from 16 to 8 bits; from the same pixels come view 0 (the model's own preprocessing) and the canvas (the whole
picture), out of which views are warped.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import default_collate

from metatpt.types import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from metatpt.types import Preprocessing

Source = str | Path | bytes | Image.Image | Tensor
"""What can be decoded: a path, a file's content, an opened picture, or a tensor ``[3, H, W]``."""

BACKGROUND = (255, 255, 255)
"""RGB colour that transparent pixels are flattened onto: white, which pictures with transparency are drawn for."""

CANVAS_SCALE = 2
"""Side of the canvas in sides of view 0: at scale 1 the bilinear warp is then an exact 2 x 2 average."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ONE_AT_A_TIME = threading.RLock()  # warning filters are the process's: two threads would restore each other's
_SMALL = 16_000_000  # pixels: up to here (64 MB) the whole resized picture is made, as torchvision does


class UnreadableImageError(ValueError):
    """A picture that cannot be decoded; its message is the reason, without the path."""


@dataclass
class Sample:
    """One row of a :class:`metatpt.types.Batch`, with its fields' names and meanings."""

    image: Tensor
    canvas: Tensor
    aspect: float
    label: int = -1
    index: int = -1
    path: str = ""
    error: str | None = None
    epoch: int = 0


def to_sample(
    source: Source,
    preprocessing: Preprocessing,
    *,
    plain: bool = False,
    label: int = -1,
    index: int = -1,
    path: str = "",
    epoch: int = 0,
    transform: Callable[[Image.Image], Image.Image] | None = None,
) -> Sample:
    """Everything that a method needs of one picture.

    Args:
        source: The picture.
        preprocessing: How the model wants its pixels.
        plain: Decode as open_clip does, see :func:`decode`.
        label: Class index, -1 where unknown.
        index: Number of the sample in its split.
        path: Name of the picture in results.
        epoch: Epoch of training that it is met in.
        transform: What becomes of the decoded RGB picture before view 0 and canvas are made of it.

    Returns:
        The sample; of a picture that cannot be read its row, with zeros for pixels and the reason in `error`.
    """
    try:
        picture = decode(source, plain=plain)
    except UnreadableImageError as error:
        return empty_sample(preprocessing, label=label, index=index, path=path, error=str(error), epoch=epoch)
    if transform is not None:
        picture = transform(picture)
    return Sample(
        image=preprocess(picture, preprocessing),
        canvas=canvas(picture, CANVAS_SCALE * preprocessing.size),
        aspect=picture.width / picture.height,
        label=label,
        index=index,
        path=path,
        epoch=epoch,
    )


def empty_sample(
    preprocessing: Preprocessing,
    *,
    label: int = -1,
    index: int = -1,
    path: str = "",
    error: str | None = None,
    epoch: int = 0,
) -> Sample:
    """A row without a picture: zeros for pixels, an aspect ratio of 1."""
    side = preprocessing.size
    return Sample(
        image=torch.zeros(3, side, side),
        canvas=torch.zeros(3, CANVAS_SCALE * side, CANVAS_SCALE * side, dtype=torch.uint8),
        aspect=1.0,
        label=label,
        index=index,
        path=path,
        error=error,
        epoch=epoch,
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch."""
    return Batch(
        # In a worker this writes into shared memory at once.
        image=default_collate([sample.image for sample in samples]),
        canvas=default_collate([sample.canvas for sample in samples]),
        aspect=torch.tensor([sample.aspect for sample in samples], dtype=torch.float32),
        label=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        path=[sample.path for sample in samples],
        error=[sample.error for sample in samples],
        epoch=torch.tensor([sample.epoch for sample in samples], dtype=torch.int64),
    )


def decode(source: Source, plain: bool = False) -> Image.Image:
    """A picture as upright 8-bit RGB.

    The format is told by the content, never by the name; of an animation the first frame is taken (of an opened one
    the frame it stands at). Transparency is flattened onto :data:`BACKGROUND`; grey levels of 16 bits (and integers
    of 32, which Pillow uses for them) are divided by 257. Floats have no known range and are refused, and so is
    PostScript, which is a program.

    Args:
        source: A path, a file's content, an opened PIL picture (left as it is), or a tensor ``[3, H, W]``, uint8 or
            floats in [0, 1].
        plain: Only ``convert("RGB")``: open_clip's own pixels, which neither turns nor flattens nor scales.

    Raises:
        UnreadableImageError: If `source` is no picture, or a damaged, missing, empty or too large one. Too large is
            what Pillow warns about: more than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    with _quiet():
        if isinstance(source, str | os.PathLike):
            source = _content(Path(source))
        picture = _from_bytes(source) if isinstance(source, bytes) else source
        if not isinstance(picture, Image.Image):
            raise TypeError(
                f"Expected a path, a file's bytes, a PIL picture or a tensor [3, H, W], got {type(source).__name__}: "
                "pass arrays as torch.from_numpy(array).permute(2, 0, 1)."
            )
        if picture.width * picture.height == 0:
            raise UnreadableImageError(f"picture without pixels ({picture.width} x {picture.height})")
        _check_size(picture.width, picture.height)
        if picture.format == "EPS":  # whatever its name: Pillow would hand it to Ghostscript
            raise UnreadableImageError("PostScript (EPS), which is a program and is not run; save pixels, as a PNG")
        if picture.mode.startswith("F") and not plain:  # convert("RGB") clips: 0 to 1 would be black
            raise UnreadableImageError(
                f"floating-point pixels (mode {picture.mode}): values without a known range; save 8 or 16 bits"
            )
        try:
            picture.load()
            return picture.convert("RGB") if plain else _to_rgb(_upright(picture))
        except Exception as error:  # decoders raise whatever the damage led them to: OSError, SyntaxError, ...
            raise UnreadableImageError(f"damaged picture: {_reason(error)}") from error


def preprocess(picture: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """View 0: the preprocessing of open_clip's ``image_transform_v2``, before normalisation.

    A very long picture is cropped before it is resized, which gives the same pixels (to 1/255) out of a fraction of
    the memory: 30,000 x 10 would become 672,000 x 224 first.

    Args:
        picture: RGB picture.
        preprocessing: Size, interpolation and resize mode.

    Returns:
        ``[3, R, R]`` float32 in [0, 1].
    """
    side, mode = preprocessing.size, preprocessing.resize_mode
    resample = _FILTERS[preprocessing.interpolation]
    if mode == "squash":
        return _floats(picture.resize((side, side), resample))
    width, height = picture.size
    if mode == "longest":
        # open_clip rounds to 0 pixels, and fails, where the picture is longer than 2 R times its breadth.
        ratio = max(width, height) / side
        full = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        padded = Image.new("RGB", (side, side), (preprocessing.fill_color,) * 3)
        padded.paste(picture.resize(full, resample), ((side - full[0]) // 2, (side - full[1]) // 2))
        return _floats(padded)
    # torchvision's Resize and CenterCrop, with their roundings.
    long_side = int(side * max(width, height) / min(width, height))
    full = (side, long_side) if width <= height else (long_side, side)
    left, top = round((full[0] - side) / 2), round((full[1] - side) / 2)
    if full[0] * full[1] <= _SMALL:
        return _floats(picture.resize(full, resample).crop((left, top, left + side, top + side)))
    return _floats(_resized_window(picture, full, (left, top), side, resample))


def canvas(picture: Image.Image, size: int) -> Tensor:
    """The whole picture, resized (bicubic, antialiased) without keeping its aspect ratio.

    Returns:
        ``[3, S, S]`` uint8.
    """
    return _bytes(picture.resize((size, size), Image.Resampling.BICUBIC))


def _resized_window(
    picture: Image.Image, full: tuple[int, int], corner: tuple[int, int], side: int, resample: Image.Resampling
) -> Image.Image:
    """The square at `corner` of what ``picture.resize(full, resample)`` would give.

    Pillow resizes rows, rounds to 8 bits, then columns; from version 13 on it turns that order for some sizes, so
    the two are separate calls here. It holds a box in single precision, so boxes are small numbers: the neighbourhood
    of the window is cut out first.
    """
    scales = picture.width / full[0], picture.height / full[1]
    cut, box = [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]
    for axis, (scale, length) in enumerate(zip(scales, picture.size, strict=True)):
        reach = math.ceil(2 * max(1.0, scale)) + 1  # of the bicubic kernel, beyond the window
        start, stop = corner[axis] * scale, min((corner[axis] + side) * scale, length)
        cut[axis], cut[axis + 2] = max(0, math.floor(start) - reach), min(length, math.ceil(stop) + reach)
        box[axis], box[axis + 2] = start - cut[axis], stop - cut[axis]
    near = picture.crop((cut[0], cut[1], cut[2], cut[3]))
    narrow = near.resize((side, near.height), resample, box=(box[0], 0, box[2], near.height))
    return narrow.resize((side, side), resample, box=(0, box[1], side, box[3]))


def _content(path: Path) -> bytes:
    """A file whole, so that no handle stays open."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"cannot be read: {error.strerror or error}") from error


def _from_bytes(content: bytes) -> Image.Image:
    """Open a file's content, and tell what it is."""
    if not content:
        raise UnreadableImageError("empty file (0 bytes)")
    try:
        return Image.open(BytesIO(content))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        _check_size(*_size_of_large(content))
        raise UnreadableImageError(f"too large: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not a picture that Pillow can read ({len(content)} bytes)") from error
    except Exception as error:  # see decode
        raise UnreadableImageError(f"damaged picture: {_reason(error)}") from error


def _size_of_large(content: bytes) -> tuple[int, int]:
    """Width and height of a picture that ``Image.open`` refuses for its size; it names only their product."""
    for factory, accept in Image.OPEN.values():
        if accept is None or accept(content[:16]) is True:
            try:
                return factory(BytesIO(content), "").size
            except Exception:  # not of this format
                continue
    return 0, 0


def _check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise UnreadableImageError(
            f"too large: {width} x {height} = {width * height} pixels, more than {limit} (PIL.Image.MAX_IMAGE_PIXELS)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Pillow says about damaged metadata; its warning of a huge picture becomes an error."""
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block says nothing about the orientation, and the pixels are fine
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return _scaled(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return _flattened(picture.convert("RGBA"))


def _scaled(picture: Image.Image) -> Image.Image:
    """Integers of 16 bits to 8; ``convert`` would clip them at 255."""
    levels = np.asarray(picture).astype(np.int64)
    grey = Image.fromarray(np.clip((levels + 128) // 257, 0, 255).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    grey.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return _flattened(grey.convert("RGBA"))


def _flattened(picture: Image.Image) -> Image.Image:
    flat = Image.new("RGB", picture.size, BACKGROUND)
    flat.paste(picture, mask=picture.getchannel("A"))
    return flat


def _from_tensor(tensor: Tensor) -> Image.Image:
    shape = list(tensor.shape)
    if tensor.ndim != 3 or shape[0] != 3:
        raise UnreadableImageError(f"expected a tensor of shape [3, H, W], got {shape}")
    if 0 in shape:
        raise UnreadableImageError(f"picture without pixels (tensor {shape})")
    if tensor.dtype != torch.uint8:
        if not tensor.is_floating_point():
            raise UnreadableImageError(f"expected a tensor of uint8, or of floats in [0, 1], got {tensor.dtype}")
        low, high = tensor.min().item(), tensor.max().item()
        if not (low >= 0 and high <= 1):  # NaN fails as well
            raise UnreadableImageError(
                f"expected floats in [0, 1], got {low:.4g} to {high:.4g}: do not normalise, and divide bytes by 255"
            )
        tensor = (tensor.float() * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(tensor.cpu().permute(1, 2, 0).numpy()))


def _bytes(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # made contiguous where samples are put together


def _floats(picture: Image.Image) -> Tensor:
    return _bytes(picture).float().div(255)
