"""A data set without files. Workers can import it, as they cannot what stands in a test's own file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from metatpt.datamodules import BaseDataModule
from metatpt.datamodules.base import Picture, Split


class Noise:
    """Pictures of three classes in turn, some of which cannot be read."""

    def __init__(self, n: int, unreadable: Sequence[int] = (), labels: Sequence[int] | None = None) -> None:
        self.labels = [index % 3 for index in range(n)] if labels is None else labels
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (24, 32, 3), dtype=np.uint8))

    def __getitem__(self, index: int) -> Picture:
        source = b"" if index in self.unreadable else self.picture(index)
        return Picture(source, self.labels[index], f"{index}")


class NoiseDataModule(BaseDataModule):
    """The same pictures in every split."""

    def __init__(
        self, n: int = 9, unreadable: Sequence[int] = (), labels: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.class_names = ["cat", "dog", "owl"]
        self.all = Noise(n, unreadable, labels)

    def pictures(self, split: Split) -> Noise:
        return self.all
