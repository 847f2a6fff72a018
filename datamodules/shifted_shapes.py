"""ShiftedShapes: the bundled benchmark, drawn on the fly."""

from __future__ import annotations

from typing import Literal

from metatpt import shapes
from metatpt.shapes import CLASSES, SHIFT_NAMES, ShiftedShapes, class_name
from metatpt.shifts import check_severity, check_shift

from .base import BaseDataModule, Picture, Split

ShiftName = Literal[
    "none", "rotation", "scale", "position", "clutter", "blur", "noise", "color_cast", "darkness", "outline"
]

SIZES: dict[Split, int] = {"train": 1536, "val": 480, "test": 960}
"""Pictures of each split: 64, 20 and 40 of each class."""

_DRAWN_AS: dict[Split, shapes.Split] = {"train": "few_shot", "val": "val", "test": "test"}


class DrawnPictures:
    """A split of ShiftedShapes, as datamodules read it.

    Args:
        split: The splits have different seeds; what is called ``"train"`` here is ``"few_shot"`` in
            :class:`metatpt.shapes.ShiftedShapes`.
        shift: ``"none"`` or the name of a shift.
        severity: 1 to 5.
    """

    def __init__(self, split: Split, shift: str, severity: int) -> None:
        drawn_as = _DRAWN_AS[split]
        self.data = ShiftedShapes(drawn_as, SIZES[split], shift, severity)
        self.labels = [self.data.label(index) for index in range(len(self.data))]
        self._folder = f"shifted_shapes/{drawn_as}/{shift}" + ("" if shift == "none" else f"-{severity}")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Picture:
        picture, label = self.data[index]
        return Picture(picture, label, f"{self._folder}/{index:05d}")


class ShiftedShapesDataModule(BaseDataModule):
    """Drawn pictures of one object each, such as "a striped red star", under a shift that no training picture has.

    24 classes, 480 validation and 960 test pictures of 128 x 128 pixels; nothing is downloaded. The bundled model
    (``clip: builtin``) was trained on others, clean ones of 168 combinations. To train a prompt on there are 64 more of
    each class, which are clean too unless `train_shifts` says otherwise. See :mod:`metatpt.shapes` for what is drawn.

    Args:
        shift: ``"none"`` (clean pictures), or what becomes of those to validate and test on: ``"rotation"``,
            ``"scale"`` (the object is small), ``"position"`` (it is off-centre), ``"clutter"``, ``"blur"``,
            ``"noise"``, ``"color_cast"``, ``"darkness"`` or ``"outline"`` (a line drawing).
        severity: From 1 (mild) to 5 (severe); clean pictures have none.
        batch_size: See :class:`BaseDataModule`.
        num_workers: See :class:`BaseDataModule`.
        max_samples: See :class:`BaseDataModule`. Eight of each class by default, so that a run ends within minutes on
            two cores; null for all.
        shots: See :class:`BaseDataModule`.
        train_shifts: See :class:`BaseDataModule`.
        train_severities: See :class:`BaseDataModule`.

    Raises:
        ValueError: If there is no such shift or severity.
    """

    def __init__(
        self,
        shift: ShiftName = "scale",
        severity: int = 3,
        batch_size: int = 8,
        num_workers: int = 0,
        max_samples: int | None = 192,
        shots: int | None = None,
        train_shifts: str | list[str] | None = None,
        train_severities: list[int] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            max_samples=max_samples,
            shots=shots,
            train_shifts=train_shifts,
            train_severities=train_severities,
        )
        self.shift = check_shift(shift, SHIFT_NAMES)
        self.severity = check_severity(severity)
        self.class_names = [class_name(combination) for combination in CLASSES]

    def pictures(self, split: Split) -> DrawnPictures:
        """The split: under the shift, or clean to train on."""
        return DrawnPictures(split, "none" if split == "train" else self.shift, self.severity)
