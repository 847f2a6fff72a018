"""ImageNet and its relatives in their layouts: all class folders, with a tiny picture or two in each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import timm
from PIL import Image

NUMBERS = [str(number) for number in range(1000)]


def synsets(name: str) -> list[str]:
    """Lines of one of timm's lists of WordNet ids."""
    return (Path(timm.__file__).parent / "data" / "_info" / f"{name}_synsets.txt").read_text().splitlines()


def write_class_folders(place: Path, folders: Sequence[str], file: str, seed: int = 0, n: int = 1) -> None:
    """Pictures in class folders, made in a random order.

    Args:
        place: Where the class folders are made.
        folders: Their names.
        file: Name of a picture, with ``{folder}`` and ``{number}``: counted from 1 over all, in the order of
            `folders`.
        seed: Seed of the order and of the colours.
        n: Pictures in each folder.
    """
    shuffled = random.Random(seed)
    pictures = [(folder, n * turn + copy) for turn, folder in enumerate(folders) for copy in range(1, n + 1)]
    for folder, number in shuffled.sample(pictures, len(pictures)):
        path = place / folder / file.format(folder=folder, number=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 8), tuple(shuffled.randbytes(3))).save(path)


def write_imagenet(root: Path) -> None:
    """Validation and training folders."""
    write_class_folders(root / "val", synsets("imagenet"), "ILSVRC2012_val_{number:08}.JPEG")
    write_class_folders(root / "train", synsets("imagenet"), "{folder}_{number}.JPEG", n=2)


def write_imagenet_v2(root: Path) -> None:
    """The variant that its archive is named after."""
    write_class_folders(root / "imagenetv2-matched-frequency-format-val", NUMBERS, "{number:040x}.jpeg")


def write_imagenet_a(root: Path) -> None:
    """Class folders and a text; file names have blanks in them."""
    write_class_folders(root, synsets("imagenet_a"), "0.{number:06}_digital clock _ mask_0.87.jpg")
    (root / "README.txt").write_text("Natural adversarial examples.\n")


def write_imagenet_r(root: Path) -> None:
    """Class folders and a text."""
    write_class_folders(root, synsets("imagenet_r"), "art_{number}.jpg")
    (root / "README.txt").write_text("Renditions.\n")


def write_imagenet_sketch(root: Path) -> None:
    """The archive's folder."""
    write_class_folders(root / "sketch", synsets("imagenet"), "sketch_{number}.JPEG")


def write_imagenet_c(root: Path) -> None:
    """One corruption at its severest."""
    write_class_folders(root / "gaussian_noise" / "5", synsets("imagenet"), "ILSVRC2012_val_{number:08}.JPEG")
