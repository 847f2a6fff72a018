"""ShiftedShapes: a benchmark that is drawn. Nothing is downloaded, and every picture comes from (split, index) alone.

A picture shows one object, whose texture, colour and shape a caption names ("a photo of a striped red star."), on a
background. Clean pictures show it upright, in the middle and of medium size, each with a little play; a shift takes
one of these, or the light, or the drawing itself, away.
"""

from __future__ import annotations

import colorsys
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from .shifts import apply_shift, check_severity, check_shift

SIDE = 128
"""Side of a picture: twice the input of the bundled model, so that zooming in shows more."""

TEXTURES = ("plain", "striped", "dotted", "checkered")
COLORS = ("red", "yellow", "green", "blue", "purple", "pink")
SHAPES = ("triangle", "square", "star", "heart", "cross", "moon", "circle", "ring")

Combination = tuple[str, str, str]
"""Texture, colour and shape: in this order they make a class name."""

COMBINATIONS: tuple[Combination, ...] = tuple((t, c, s) for t in TEXTURES for c in COLORS for s in SHAPES)

HELD_OUT: tuple[Combination, ...] = tuple(
    (t, c, s)
    for it, t in enumerate(TEXTURES)
    for ic, c in enumerate(COLORS)
    for js, s in enumerate(SHAPES)
    if (js + 3 * ic + 2 * it) % 8 == 0
)
"""Combinations that no training picture shows (an eighth; each of their pairs of attributes is shown with others)."""

CLASSES: tuple[Combination, ...] = tuple(
    (TEXTURES[(js + ic) % 4], COLORS[ic], SHAPES[js]) for js in range(6) for ic in range(4)
)
"""What `val`, `test` and `few_shot` show: six shapes in each of four colours. Some of them are in :data:`HELD_OUT`.

The texture follows from colour and shape: so an outline drawing, which has none, still has one right answer.
"""

DRAWN_SHIFTS = ("scale", "position", "clutter", "outline")
SHIFT_NAMES = ("none", "rotation", "scale", "position", "clutter", "blur", "noise", "color_cast", "darkness", "outline")

Split = Literal["train", "val", "test", "few_shot"]
SPLIT_SEEDS: dict[Split, int] = {"train": 101, "val": 202, "test": 303, "few_shot": 404}
"""`train` is what the bundled model was trained on; `few_shot` is what a prompt is trained on."""

_SCALE = (0.82, 0.7, 0.6, 0.5, 0.4)  # factor on the object's size
_POSITION = (0.10, 0.16, 0.22, 0.28, 0.34)  # distance of the object from the centre / side
_CLUTTER = (3, 6, 10, 15, 22)  # number of small objects
_OUTLINE = (0.5, 0.4, 0.3, 0.15, 0.0)  # how much of the filling is left
_HUE_SATURATION_VALUE = {
    "red": (0.0, 0.9, 0.85),
    "yellow": (0.145, 0.9, 0.95),
    "green": (0.345, 0.8, 0.7),
    "blue": (0.605, 0.85, 0.85),
    "purple": (0.77, 0.75, 0.65),
    "pink": (0.9, 0.42, 0.98),
}


def class_name(combination: Combination) -> str:
    """The name of a combination.

    >>> class_name(("striped", "red", "star"))
    'striped red star'
    """
    return " ".join(combination)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Lengths are fractions of the picture's side.

    Attributes:
        combination: Texture, colour and shape of the object.
        x: Centre of the object, from the left.
        y: Centre of the object, from the top.
        radius: Half its size.
        tilt: By how much it is turned, in radians.
        hue: Added to its colour's hue.
        phase: Where its texture starts, in periods.
        background: Grey level of the background in [0, 1], as `tint` modifies it.
        tint: What is added to the background's red, green and blue.
        slope: By how much the background brightens to the right and downwards.
        filling: How much of the object's filling is drawn; below 1 it has an outline.
    """

    combination: Combination
    x: float
    y: float
    radius: float
    tilt: float
    hue: float
    phase: tuple[float, float]
    background: float
    tint: tuple[float, float, float]
    slope: tuple[float, float]
    filling: float = 1.0


def clean_scene(combination: Combination, generator: np.random.Generator) -> Scene:
    """A scene with that object: upright, centred and of medium size but for a little play."""
    draw = generator.uniform
    return Scene(
        combination=combination,
        x=draw(0.46, 0.54),
        y=draw(0.46, 0.54),
        radius=draw(0.25, 0.33),
        tilt=draw(-0.12, 0.12),
        hue=draw(-0.02, 0.02),
        phase=(draw(-0.2, 0.2), draw(-0.2, 0.2)),
        background=draw(0.08, 0.92),
        tint=(draw(-0.06, 0.06), draw(-0.06, 0.06), draw(-0.06, 0.06)),
        slope=(draw(-0.1, 0.1), draw(-0.1, 0.1)),
    )


def draw_scene(scene: Scene, generator: np.random.Generator, clutter: int = 0, side: int = SIDE) -> Image.Image:
    """The picture of a scene.

    Args:
        scene: What to draw.
        generator: Draws the grain of the background, and the clutter.
        clutter: Number of small objects around and before the object.
        side: Width and height in pixels.
    """
    grain = generator.normal(0.0, 0.02, (side, side, 1)).astype(np.float32)
    size = 2 * side  # drawn at twice the side and averaged, for clean edges
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    grey = scene.background + scene.slope[0] * ramp[None, :] + scene.slope[1] * ramp[:, None]
    pixels = grey[:, :, None] + np.asarray(scene.tint, np.float32)
    _draw_object(pixels, scene)
    for _ in range(clutter):
        _draw_object(pixels, _piece_of_clutter(scene, generator))
    pixels = _averaged(pixels) + grain
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))


def shifted_scene(scene: Scene, shift: str, severity: int, generator: np.random.Generator) -> tuple[Scene, int]:
    """The scene under a shift that is drawn, and the number of pieces of clutter in it."""
    step = check_severity(severity) - 1
    if shift == "scale":
        return replace(scene, radius=scene.radius * _SCALE[step]), 0
    if shift == "position":
        direction = generator.uniform(0, 2 * math.pi)
        x, y = _POSITION[step] * math.cos(direction), _POSITION[step] * math.sin(direction)
        return replace(scene, x=scene.x + x, y=scene.y + y), 0
    if shift == "clutter":
        return scene, _CLUTTER[step]
    if shift == "outline":
        return replace(scene, filling=_OUTLINE[step]), 0
    raise ValueError(f"shift {shift!r} is not drawn; those that are: {', '.join(DRAWN_SHIFTS)}")


class ShiftedShapes(Dataset[tuple[Image.Image, int]]):
    """The pictures of a split, drawn when asked for, and their classes.

    Sample i depends on the split and on i, not on how many there are, nor on what was drawn before. Under every shift
    and severity it is the same scene, so shifts compare picture by picture. Classes are balanced: every run of
    ``len(class_names)`` samples that starts at a multiple of it has each class once.

    Args:
        split: ``"train"`` shows the combinations that are not held out, ``"val"``, ``"test"`` and ``"few_shot"`` show
            :data:`CLASSES`. The splits have different seeds.
        n: Number of samples.
        shift: ``"none"`` or a shift of :data:`SHIFT_NAMES`.
        severity: 1 to 5, of a shift.

    Raises:
        ValueError: Split, shift or severity do not exist, or `n` is not positive.
    """

    def __init__(self, split: Split = "test", n: int = 1000, shift: str = "none", severity: int = 3) -> None:
        if split not in SPLIT_SEEDS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLIT_SEEDS)}")
        if n < 1:
            raise ValueError(f"n {n}: a split has at least 1 sample")
        self.split: Split = split
        self.n = n
        self.shift = check_shift(shift, SHIFT_NAMES)
        self.severity = check_severity(severity)
        self.combinations = CLASSES
        if split == "train":
            held_out = set(HELD_OUT)
            self.combinations = tuple(one for one in COMBINATIONS if one not in held_out)
        self.class_names = [class_name(one) for one in self.combinations]

    def __len__(self) -> int:
        """Number of samples."""
        return self.n

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The picture, RGB and :data:`SIDE` pixels wide and high, and its class."""
        scene = self.scene(index)
        generator = self._generator("shift " + self.shift, index)
        grain = self._generator("grain", index)
        if self.shift in DRAWN_SHIFTS:
            shifted, clutter = shifted_scene(scene, self.shift, self.severity, generator)
            picture = draw_scene(shifted, grain, clutter)
        else:
            picture = draw_scene(scene, grain)
            if self.shift != "none":
                picture = apply_shift(self.shift, picture, self.severity, generator)
        return picture, self.label(index)

    def scene(self, index: int) -> Scene:
        """What sample `index` shows, before any shift."""
        return clean_scene(self.combinations[self.label(index)], self._generator("scene", index))

    def label(self, index: int) -> int:
        """The class of sample `index`."""
        if not 0 <= index < self.n:
            raise IndexError(f"index {index}: the split has samples 0 to {self.n - 1}")
        block, place = divmod(index, len(self.combinations))
        return int(self._generator("labels", block).permutation(len(self.combinations))[place])

    def _generator(self, stream: str, index: int) -> np.random.Generator:
        return np.random.default_rng([SPLIT_SEEDS[self.split], zlib.crc32(stream.encode()), index])


def _piece_of_clutter(scene: Scene, generator: np.random.Generator) -> Scene:
    """A small object of any kind, near or partly over the main one, whose middle stays free."""
    combination = COMBINATIONS[int(generator.integers(len(COMBINATIONS)))]
    piece = clean_scene(combination, generator)
    direction, distance = generator.uniform(0, 2 * math.pi), generator.uniform(0.5, 1.5) * scene.radius
    return replace(
        piece,
        x=scene.x + distance * math.cos(direction),
        y=scene.y + distance * math.sin(direction),
        radius=scene.radius * generator.uniform(0.22, 0.42),
        tilt=generator.uniform(-math.pi, math.pi),
    )


def _draw_object(pixels: NDArray[np.floating[Any]], scene: Scene) -> None:
    """Draws the object over ``[size, size, 3]`` pixels in [0, 1]."""
    texture, color, shape = scene.combination
    size = len(pixels)
    radius = scene.radius * size
    reach = math.ceil(1.25 * radius)  # only the square around the object is computed
    left, top = (max(0, math.floor(centre * size) - reach) for centre in (scene.x, scene.y))
    right, bottom = (min(size, math.floor(centre * size) + reach) for centre in (scene.x, scene.y))
    if left >= right or top >= bottom:
        return
    # Coordinates in the object's own frame, in radii.
    cosine, sine = math.cos(scene.tilt), math.sin(scene.tilt)
    x = (np.arange(left, right, dtype=np.float32) + 0.5 - scene.x * size)[None, :] / radius
    y = (np.arange(top, bottom, dtype=np.float32) + 0.5 - scene.y * size)[:, None] / radius
    second = _PATTERNS[texture](cosine * x + sine * y + scene.phase[0], cosine * y - sine * x + scene.phase[1])
    first_color, second_color = _two_colors(color, scene.hue)
    paint = np.where(second[:, :, None], second_color, first_color)

    area = Image.new("L", (right - left, bottom - top), 0)
    outline = area.copy()
    for points, value in zip(_CONTOURS[shape], (255, 0), strict=False):  # the second contour is a hole
        turned = radius * points @ np.asarray([[cosine, sine], [-sine, cosine]])
        path = [(float(a + scene.x * size - left), float(b + scene.y * size - top)) for a, b in turned]
        ImageDraw.Draw(area).polygon(path, fill=value)
        if scene.filling < 1:
            width = max(1, round(0.1 * radius))
            ImageDraw.Draw(outline).line([*path, *path[:2]], fill=255, width=width, joint="curve")
    region = pixels[top:bottom, left:right]
    region += scene.filling * _coverage(area) * (paint - region)
    if scene.filling < 1:
        region += _coverage(outline) * (first_color - region)


def _averaged(pixels: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Means over 2 x 2 pixels (of slices: many times faster than ``mean`` over short axes)."""
    odd, even = pixels[1::2], pixels[::2]
    total: NDArray[np.floating[Any]] = odd[:, ::2] + odd[:, 1::2] + even[:, ::2] + even[:, 1::2]
    return total * np.float32(0.25)


def _coverage(mask: Image.Image) -> NDArray[np.floating[Any]]:
    """``[H, W, 1]`` in [0, 1]."""
    return np.asarray(mask, np.float32)[:, :, None] / 255


def _two_colors(name: str, hue: float) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """The two colours of an object: its own, and a light one of the same hue for its texture."""
    base, saturation, value = _HUE_SATURATION_VALUE[name]
    own = colorsys.hsv_to_rgb((base + hue) % 1.0, saturation, value)
    light = colorsys.hsv_to_rgb((base + hue) % 1.0, 0.15 * saturation, 0.5 + 0.5 * value)
    return np.asarray(own, np.float32), np.asarray(light, np.float32)


Field = NDArray[np.floating[Any]]

_PERIOD = 0.5  # of textures, in radii

# Where an object has its second colour, from coordinates in its own frame.
_PATTERNS: dict[str, Callable[[Field, Field], NDArray[np.bool_]]] = {
    "plain": lambda x, y: np.zeros(np.broadcast_shapes(x.shape, y.shape), np.bool_),
    "striped": lambda x, y: (y / _PERIOD) % 1.0 < 0.45,
    "dotted": lambda x, y: ((x / _PERIOD) % 1.0 - 0.5) ** 2 + ((y / _PERIOD) % 1.0 - 0.5) ** 2 < 0.1,
    "checkered": lambda x, y: (np.floor(2 * x / _PERIOD) + np.floor(2 * y / _PERIOD)) % 2 < 1,
}


def _polygon(*angles_radii: tuple[float, float]) -> NDArray[np.float64]:
    """Corners ``[n, 2]`` from angles in degrees, clockwise from the top, and radii."""
    return np.asarray([(r * math.sin(math.radians(a)), -r * math.cos(math.radians(a))) for a, r in angles_radii])


def _circle(radius: float) -> NDArray[np.float64]:
    return _polygon(*((float(angle), radius) for angle in range(0, 360, 6)))


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16, -(y + 2.5) / 16], axis=1)


def _moon() -> NDArray[np.float64]:
    """A crescent that opens to the right: what is left of a disc where a smaller one, further right, covers it."""
    tip = np.asarray([math.sin(math.radians(40)), math.cos(math.radians(40))])  # both arcs meet at (x, -y) and (x, y)
    outer = _polygon(*((float(angle), 1.0) for angle in range(320, 39, -5)))
    shift = 0.45
    radius = math.hypot(tip[0] - shift, tip[1])
    end = math.degrees(math.atan2(tip[0] - shift, tip[1]))
    inner = _polygon(*((float(angle), radius) for angle in np.linspace(end, 360 - end, 40)))
    return np.concatenate([outer, inner + np.asarray([shift, 0.0])])


_ARM = 0.34  # half the width of a cross's arms

# Contours in radii, x to the right and y downwards; a second one is a hole.
_CONTOURS: dict[str, list[NDArray[np.float64]]] = {
    "triangle": [_polygon((0, 1.1), (120, 1.1), (240, 1.1))],
    "square": [_polygon((45, 1.15), (135, 1.15), (225, 1.15), (315, 1.15))],
    "star": [_polygon(*((36.0 * k, 1.1 if k % 2 == 0 else 0.48) for k in range(10)))],
    "heart": [_heart()],
    "cross": [
        np.asarray(
            [
                (-_ARM, -1),
                (_ARM, -1),
                (_ARM, -_ARM),
                (1, -_ARM),
                (1, _ARM),
                (_ARM, _ARM),
                (_ARM, 1),
                (-_ARM, 1),
                (-_ARM, _ARM),
                (-1, _ARM),
                (-1, -_ARM),
                (-_ARM, -_ARM),
            ]
        )
    ],
    "moon": [_moon()],
    "circle": [_circle(0.95)],
    "ring": [_circle(1.0), _circle(0.5)],
}
