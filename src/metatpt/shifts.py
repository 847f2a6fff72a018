"""Simulated domain shifts: transforms of pictures, each with a severity from 1 (mild) to 5 (severe).

Each is a pure function of a picture, a severity and a numpy generator, and returns an RGB picture of the same size.
Lengths are fractions of the shorter side, so that a severity means the same for a thumbnail and for a photograph.
The numbers that a shift draws do not depend on the severity: with equally seeded generators the severities of a shift
are the same disturbance, weaker or stronger.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Shift = Callable[[Image.Image, int, np.random.Generator], Image.Image]

SEVERITIES = (1, 2, 3, 4, 5)

NONE = "none"
"""Stands for no shift where one is chosen."""

_ROTATION = (12.0, 24.0, 36.0, 50.0, 70.0)  # degrees
_ZOOM_OUT = (0.8, 0.65, 0.5, 0.4, 0.3)  # side of the picture in its frame
_BLUR = (0.02, 0.035, 0.05, 0.07, 0.1)  # sigma / shorter side
_NOISE = (0.3, 0.5, 0.75, 1.0, 1.4)  # sigma, for pixels in [0, 1]
_COLOR_CAST = (0.2, 0.35, 0.5, 0.65, 0.8)  # how much of the light's two other colours is missing
_DARKNESS = (0.55, 0.45, 0.37, 0.3, 0.2)  # factor on pixels

_GRAINS = 128  # grains of noise along the shorter side: those of a photograph's pixels would average out


def check_severity(severity: int) -> int:
    """The severity, if it is one.

    Raises:
        ValueError: It is not a whole number from 1 to 5.

    >>> check_severity(6)
    Traceback (most recent call last):
    ...
    ValueError: severity 6 is none of 1, 2, 3, 4, 5; the nearest is 5
    """
    if severity in SEVERITIES and not isinstance(severity, bool):
        return int(severity)
    try:
        nearest = f"; the nearest is {min(SEVERITIES, key=lambda known: abs(known - severity))}"
    except TypeError:
        nearest = ""
    raise ValueError(f"severity {severity!r} is none of {', '.join(map(str, SEVERITIES))}{nearest}")


def check_shift(name: str, known: Iterable[str] | None = None) -> str:
    """The name of a shift, if it is one.

    Args:
        name: What was asked for.
        known: The names that there are; those of :data:`SHIFTS` if left out.

    Raises:
        ValueError: There is no such shift; the message names the nearest.

    >>> check_shift("rotations")
    Traceback (most recent call last):
    ...
    ValueError: shift 'rotations' is none of rotation, zoom_out, blur, noise, color_cast, darkness; the nearest is 'rotation'
    """  # noqa: E501 (a doctest compares the message as one line)
    names = list(SHIFTS if known is None else known)
    if name in names:
        return name
    nearest = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.0)[0]
    raise ValueError(f"shift {name!r} is none of {', '.join(names)}; the nearest is {nearest!r}")


def apply_shift(name: str, picture: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """The picture under the shift of that name.

    Args:
        name: One of :data:`SHIFTS`.
        picture: Any picture; it is taken as RGB.
        severity: 1 to 5.
        generator: Draws what is random in the shift.

    Raises:
        ValueError: The shift or the severity does not exist.
    """
    return SHIFTS[check_shift(name)](picture, severity, generator)


@dataclass(frozen=True)
class RandomShift:
    """One of some shifts, at one of some severities, each as likely as the others.

    Args:
        names: Names of :data:`SHIFTS`, and :data:`NONE` for the picture as it is. One that stands twice is drawn twice
            as often.
        severities: 1 to 5.

    Raises:
        ValueError: There is no such shift or severity, or none at all.
    """

    names: tuple[str, ...]
    severities: tuple[int, ...] = SEVERITIES

    def __post_init__(self) -> None:
        for name in self.names:
            check_shift(name, (NONE, *SHIFTS))
        for severity in self.severities:
            check_severity(severity)
        if not self.names or not self.severities:
            raise ValueError(f"expected at least one shift and one severity, got {self.names} and {self.severities}")

    def __call__(self, picture: Image.Image, generator: np.random.Generator) -> Image.Image:
        """The picture under the shift that is drawn."""
        name = self.names[generator.integers(len(self.names))]
        severity = self.severities[generator.integers(len(self.severities))]
        return picture if name == NONE else apply_shift(name, picture, severity, generator)


def rotation(picture: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Turned about its centre, to either side, by 75 to 100 % of 12, 24, 36, 50 or 70 degrees.

    The corners are filled by mirroring the picture at its borders.
    """
    largest = _ROTATION[check_severity(severity) - 1]
    angle = (1 if generator.random() < 0.5 else -1) * generator.uniform(0.75, 1.0) * largest
    width, height = picture.size
    # On each side as much as half the diagonal sticks out over half the side.
    margin = math.ceil((math.hypot(width, height) - min(width, height)) / 2) + 1
    turned = _mirrored(picture, margin, margin).rotate(angle, Image.Resampling.BICUBIC)
    return turned.crop((margin, margin, margin + width, margin + height))


def zoom_out(picture: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Shrunk to 80, 65, 50, 40 or 30 % of its sides (drawn within 10 % of that), before a blurred copy of itself."""
    factor = _ZOOM_OUT[check_severity(severity) - 1] * generator.uniform(0.9, 1.1)
    rgb = picture.convert("RGB")
    width, height = rgb.size
    small = rgb.resize((max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.LANCZOS)
    frame = rgb.filter(ImageFilter.GaussianBlur(0.15 * min(width, height)))
    frame.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
    return frame


def blur(picture: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Gaussian blur, sigma 2, 3.5, 5, 7 or 10 % of the shorter side (drawn within 10 % of that)."""
    sigma = _BLUR[check_severity(severity) - 1] * min(picture.size) * generator.uniform(0.9, 1.1)
    return picture.convert("RGB").filter(ImageFilter.GaussianBlur(sigma))


def noise(picture: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Gaussian noise, sigma 0.3, 0.5, 0.75, 1 or 1.4 of the range, independent per grain and channel.

    A grain is a pixel, or in larger pictures 1/128 of the shorter side.
    """
    sigma = _NOISE[check_severity(severity) - 1]
    width, height = picture.size
    grain = max(1.0, min(width, height) / _GRAINS)
    rows, columns = max(1, round(height / grain)), max(1, round(width / grain))
    field = generator.standard_normal((rows, columns, 3), dtype=np.float32)
    if (rows, columns) != (height, width):
        field = field[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    return _picture(_pixels(picture) + sigma * field)


def color_cast(picture: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Lit by coloured light of a random hue, which lacks 20, 35, 50, 65 or 80 % of the opposite colour."""
    strength = _COLOR_CAST[check_severity(severity) - 1]
    hue = generator.random()
    light = np.asarray([0.5 + 0.5 * math.cos(2 * math.pi * (hue - channel / 3)) for channel in range(3)], np.float32)
    return _picture(_pixels(picture) * (1 - strength * (1 - light)))


def darkness(picture: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Underexposed: pixels times 0.55, 0.45, 0.37, 0.3 or 0.2 (drawn within 10 % of that), and slight sensor noise."""
    factor = _DARKNESS[check_severity(severity) - 1] * generator.uniform(0.9, 1.1)
    pixels = _pixels(picture)
    return _picture(pixels * factor + 0.01 * generator.standard_normal(pixels.shape, dtype=np.float32))


SHIFTS: dict[str, Shift] = {
    "rotation": rotation,
    "zoom_out": zoom_out,
    "blur": blur,
    "noise": noise,
    "color_cast": color_cast,
    "darkness": darkness,
}


def _pixels(picture: Image.Image) -> NDArray[np.floating[Any]]:
    """``[H, W, 3]`` in [0, 1]."""
    return np.asarray(picture.convert("RGB"), np.float32) / 255


def _picture(pixels: NDArray[np.floating[Any]]) -> Image.Image:
    """The picture of ``[H, W, 3]`` pixels, clipped to [0, 1]."""
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))


def _mirrored(picture: Image.Image, x: int, y: int) -> Image.Image:
    """The picture with borders of x and y pixels in which it is mirrored, over and over where they are wide."""
    pixels = np.asarray(picture.convert("RGB"))
    return Image.fromarray(np.pad(pixels, ((y, y), (x, x), (0, 0)), "symmetric"))
