"""Which class of ImageNet a folder or a picture is: WordNet ids, names, and labels of the validation pictures.

The ids are timm's and the names open_clip's, of which "missile" and "sunglasses" stand for two classes each.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

_DEVKIT = "ILSVRC2012_devkit_t12"
_SOLUTION = "LOC_val_solution.csv"
_ABOVE = 4  # as far as Kaggle's is above ILSVRC/Data/CLS-LOC/val


@cache
def wordnet_ids(subset: str) -> tuple[str, ...]:
    """WordNet ids of classes in the order of the labels, which is that of the ids.

    Args:
        subset: ``imagenet``, ``imagenet_a`` or ``imagenet_r``.
    """
    return tuple(resources.files("timm.data").joinpath("_info", f"{subset}_synsets.txt").read_text().split())


def names_by_id() -> dict[str, str]:
    """Name of each of the 1000 classes by its WordNet id."""
    from open_clip import IMAGENET_CLASSNAMES  # takes seconds, which a worker that reads pictures need not spend

    return dict(zip(wordnet_ids("imagenet"), IMAGENET_CLASSNAMES, strict=True))


def validation_labels(place: Path) -> tuple[dict[str, str], Path]:
    """WordNet ids of the validation pictures, by their file names without the ending, and where they are from.

    Args:
        place: Folder of the pictures; it and those above it are searched.

    Raises:
        FileNotFoundError: There is neither Kaggle's file nor the devkit.
        ImportError: The devkit's needs scipy.
        ValueError: The devkit's is damaged.
    """
    for folder in (place, *place.absolute().parents[:_ABOVE]):
        for source, read in ((folder / _SOLUTION, _kaggle), (folder / _DEVKIT / "data", _devkit)):
            if source.exists():
                rank_zero_info(f"{place}: labels from {source}.")
                return read(source), source
    raise FileNotFoundError(
        f"{place} has all of ImageNet's validation pictures in one folder: their labels are needed. Put Kaggle's "
        f"{_SOLUTION} or the unpacked devkit, the folder {_DEVKIT}, beside it; or sort the pictures into a folder for "
        "each WordNet id."
    )


def _kaggle(file: Path) -> dict[str, str]:
    # ILSVRC2012_val_00000001,n01751748 111 108 230 366 : a class and the corners of a box, once or several times
    with file.open(newline="", encoding="utf-8") as lines:
        return {row[0]: row[1].partition(" ")[0] for row in csv.reader(lines) if len(row) == 2}


def _devkit(data: Path) -> dict[str, str]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"Only scipy can read the labels in {data}: pip install 'metatpt[scipy]'. Or put Kaggle's {_SOLUTION} "
            "beside the pictures, which needs nothing."
        ) from error
    # The numbers are ILSVRC's own: no labels, for they do not follow the order of the WordNet ids.
    file = data / "meta.mat"
    try:
        synsets = loadmat(file, squeeze_me=True)["synsets"]
    except Exception as error:  # whatever the damage led scipy to
        raise ValueError(f"{file} is not the devkit's: scipy reads no table synsets in it ({error}).") from error
    by_number = {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    numbers = (data / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
    return {f"ILSVRC2012_val_{place:08}": by_number[int(number)] for place, number in enumerate(numbers, 1)}
