"""ShiftedShapes: the bundled benchmark, drawn on the fly."""

from __future__ import annotations

from typing import Literal

from metatpt.shapes import CLASSES, SHIFT_NAMES, ShiftedShapes, class_name
from metatpt.shifts import check_severity, check_shift

from .base import BaseDataModule, Picture, Split

ShiftName = Literal[
    "none", "rotation", "scale", "position", "clutter", "blur", "noise", "color_cast", "darkness", "outline"
]

SIZES: dict[Split, int] = {"val": 480, "test": 960}
"""Pictures of each split: 20 and 40 of each class."""


class DrawnPictures:
    """A split of ShiftedShapes, as datamodules read it.

    Args:
        split: ``"val"`` or ``"test"``; they have different seeds.
        shift: ``"none"`` or the name of a shift.
        severity: 1 to 5.
    """

    def __init__(self, split: Split, shift: str, severity: int) -> None:
        self.data = ShiftedShapes(split, SIZES[split], shift, severity)
        self.labels = [self.data.label(index) for index in range(len(self.data))]
        self._folder = f"shifted_shapes/{split}/{shift}" + ("" if shift == "none" else f"-{severity}")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Picture:
        picture, label = self.data[index]
        return Picture(picture, label, f"{self._folder}/{index:05d}")


class ShiftedShapesDataModule(BaseDataModule):
    """Drawn pictures of one object each, such as "a striped red star", under a shift that no training picture has.

    24 classes, 480 validation and 960 test pictures of 128 x 128 pixels; nothing is downloaded. The bundled model
    (``clip: builtin``) was trained on the clean training split. See :mod:`metatpt.shapes` for what is drawn.

    Args:
        shift: ``"none"`` (clean pictures), or what becomes of them: ``"rotation"``, ``"scale"`` (the object is
            small), ``"position"`` (it is off-centre), ``"clutter"``, ``"blur"``, ``"noise"``, ``"color_cast"``,
            ``"darkness"`` or ``"outline"`` (a line drawing).
        severity: From 1 (mild) to 5 (severe); clean pictures have none.
        batch_size: See :class:`BaseDataModule`.
        num_workers: See :class:`BaseDataModule`.
        max_samples: See :class:`BaseDataModule`. Eight of each class by default, so that a run ends within minutes on
            two cores; null for all.

    Raises:
        ValueError: If there is no such shift or severity.
    """

    splits = ("val", "test")

    def __init__(
        self,
        shift: ShiftName = "scale",
        severity: int = 3,
        batch_size: int = 8,
        num_workers: int = 0,
        max_samples: int | None = 192,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, max_samples=max_samples)
        self.shift = check_shift(shift, SHIFT_NAMES)
        self.severity = check_severity(severity)
        self.class_names = [class_name(combination) for combination in CLASSES]

    def pictures(self, split: Split) -> DrawnPictures:
        """The split, under the shift."""
        return DrawnPictures(split, self.shift, self.severity)
