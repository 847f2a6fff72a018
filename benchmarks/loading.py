"""Pictures a second out of a datamodule, against a plain ImageFolder with the same preprocessing.

    python benchmarks/loading.py --workers 2

Both decode JPEG files of 500 x 375 pixels, resize and crop them to view 0, and make the canvas that views are warped
from; the plain way does so with torchvision's transforms. Without `--root` the files are drawn.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import costs, parser
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize, ToTensor

from metatpt.datamodules import FolderDataModule
from metatpt.types import Preprocessing


class Plain:
    """View 0 and canvas by torchvision's transforms."""

    def __init__(self, size: int) -> None:
        bicubic = InterpolationMode.BICUBIC
        self.image = Compose([Resize(size, bicubic), CenterCrop(size), ToTensor()])
        self.canvas = Compose([Resize((2 * size, 2 * size), bicubic), PILToTensor()])

    def __call__(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """Both, of one picture."""
        return self.image(picture), self.canvas(picture)


def draw(root: Path, n: int) -> Path:
    """Smooth noise, which takes about as many bytes as a photograph."""
    random = np.random.default_rng(0)
    for number in range(n):
        folder = root / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (75, 100, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg", quality=90)
    return root


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--root", type=Path, help="class folders of pictures")
    arguments.add_argument("--pictures", type=int, default=1000)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--size", type=int, default=224)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or draw(Path(folder), options.pictures)
        data = FolderDataModule(root, num_workers=options.workers, batch_size=32)
        data.preprocessing = Preprocessing(options.size, (0.5,) * 3, (0.5,) * 3)
        data.setup("test")
        plain: DataLoader[Any] = DataLoader(
            ImageFolder(str(root), Plain(options.size)),
            batch_size=32,
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
        )
        loaders = {"datamodule": data.test_dataloader(), "ImageFolder": plain}

        def run(loader: DataLoader[Any]) -> None:
            for _ in loader:
                pass

        for loader in loaders.values():
            run(loader)  # starts the workers
        cost = costs({name: (lambda each=each: run(each)) for name, each in loaders.items()}, options.repeats)
    n = data.n_total
    print(f"{n} pictures, {options.workers} workers, torch {torch.__version__}, median of {options.repeats}\n")
    print("| | pictures a second | of ImageFolder |\n|---|---|---|")
    for name, each in cost.items():
        print(f"| {name} | {n / each.seconds:.0f} | {cost['ImageFolder'].seconds / each.seconds:.2f} x |")


if __name__ == "__main__":
    main()
