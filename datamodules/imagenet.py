"""ImageNet and the test sets that have its classes: ImageNet-V2, -A, -R, -Sketch and -C."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from metatpt.shifts import check_severity

from .base import FilePictures, Split
from .benchmark import BenchmarkDataModule, class_folders
from .folder import find_pictures, sub_folders
from .imagenet_labels import names_by_id, validation_labels, wordnet_ids
from .names import some
from .subsets import held_out_of_classes

Variant = Literal["matched-frequency", "threshold-0.7", "top-images"]
VARIANTS: tuple[str, ...] = get_args(Variant)

Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
]
CORRUPTIONS: tuple[str, ...] = get_args(Corruption)
"""The 15 of the benchmark, then its 4 extra ones."""

ARCHIVES = ("noise", "blur", "weather", "digital", "extra")
"""What ImageNet-C is downloaded as, each of which some unpack into a folder of its own."""

_CLASS_FOLDER = re.compile(r"n\d{8}|\d{1,3}")
_TRAIN = ("train", "ILSVRC2012_img_train")
_VAL = ("val", "validation", "ILSVRC2012_img_val")
_HELD_OUT = 50  # training pictures of each class that validation has


class _ImageNetFamily(BenchmarkDataModule):
    """Base of ImageNet and its relatives.

    Args:
        root: Folder of the data set, or the one that it lies in under a name in use.
        **kwargs: See :class:`BenchmarkDataModule`.
    """

    splits: tuple[Split, ...] = ("val", "test")
    coop_template = "a photo of a {}."

    subset: ClassVar[str] = "imagenet"
    """Which classes there are, as in :func:`wordnet_ids`."""

    n_pictures: ClassVar[int]
    """How many there are to test on."""

    def __init__(self, root: str | Path, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        names = names_by_id()
        self.class_names = [names[wordnet_id] for wordnet_id in wordnet_ids(self.subset)]
        self.below = ""  # where the class folders are, below the root

    @classmethod
    def folders(cls) -> Sequence[str]:
        """Names of the class folders, in the order of the labels."""
        return wordnet_ids(cls.subset)

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether there are class folders: of any of the family, so that the error can say of which."""
        return _has_class_folders(folder)

    def published(self, split: Split) -> int:
        """How many pictures a split has."""
        return self.n_pictures

    def read(self, split: Split) -> FilePictures:
        """The pictures to test on, which stand for validation too: there are no others."""
        return self._in_class_folders(self.below)

    def _in_class_folders(self, below: str) -> FilePictures:
        labels = {folder: label for label, folder in enumerate(self.folders())}
        hint = _likely_cause(sub_folders(self.root / below), type(self))
        return class_folders(self.root, below, labels, partial=self.partial, hint=hint)


class ImageNetDataModule(_ImageNetFamily):
    """ImageNet (ILSVRC 2012) in the layout ``<root>/val/<wnid>/*.JPEG``, with ``train`` beside ``val`` to learn from.

    Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge" (2015).

    Test has the 50,000 pictures of ``val``; `root` may be that folder itself. Validation never sees them: it has 50
    pictures of each class of ``train``, drawn once and for all (whatever the seed of the run), and training the rest.
    Of a class of which a partial copy has few, it has a fifth.

    The pictures of ``val`` may all lie in one folder, as in the archive. Their labels are then read from Kaggle's
    ``LOC_val_solution.csv`` or from the devkit (``ILSVRC2012_devkit_t12``, which takes scipy), in that folder or above
    it. A picture has the same index in both layouts.
    """

    splits = ("train", "val", "test")
    title = "ImageNet"
    layout = "val/<wnid>/*.JPEG, train/<wnid>/*.JPEG"
    aliases = (
        "imagenet",
        "imagenet/images",
        "images",
        "ILSVRC/Data/CLS-LOC",
        "Data/CLS-LOC",
        "imagenet/ILSVRC/Data/CLS-LOC",
        "imagenet-object-localization-challenge/ILSVRC/Data/CLS-LOC",
        "imagenet-1k",
        "imagenet1k",
        "ILSVRC2012",
    )
    n_pictures = 50_000
    n_train: ClassVar[int] = 1_281_167
    """How many pictures the train folder has."""

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether there are class folders or a flat validation folder: right here, or in the folder of a split."""
        return any(_has_class_folders(each) or _is_flat(each) for each in _and_below(folder, (*_VAL, *_TRAIN)))

    def published(self, split: Split) -> int:
        """How many pictures a split has."""
        n_val = _HELD_OUT * len(self.class_names)
        return {"train": self.n_train - n_val, "val": n_val, "test": self.n_pictures}[split]

    def read(self, split: Split) -> FilePictures:
        """The pictures of ``val`` to test on; of ``train`` the part held out to validate on, or the rest.

        Raises:
            FileNotFoundError: The folder is missing, or the labels of a flat one.
            ImportError: The labels of a flat one are the devkit's, and there is no scipy.
        """
        if split != "test":
            return self._train[split]
        if self.root.resolve().name in _TRAIN:
            raise ValueError(
                f"{self.root} has ImageNet's training pictures by its name: give the folder that val and train lie in."
            )
        below = "" if _has_class_folders(self.root) or _is_flat(self.root) else self._folder(_VAL)
        return self._flat(below) if _is_flat(self.root / below) else self._in_class_folders(below)

    @cached_property
    def _train(self) -> Mapping[Split, FilePictures]:
        """Both parts of the train folder: `fit` takes both, and it takes a while to list over a million files."""
        whole = self._in_class_folders(self._folder(_TRAIN))
        draws = [f"{self.title} {folder}" for folder in self.folders()]
        chosen = held_out_of_classes(whole.paths, whole.labels, draws, most=_HELD_OUT)

        def part(is_held_out: bool) -> FilePictures:
            places = [place for place, path in enumerate(whole.paths) if (path in chosen) == is_held_out]
            return FilePictures(self.root, [whole.paths[i] for i in places], [whole.labels[i] for i in places])

        return {"train": part(False), "val": part(True)}

    def _folder(self, names: Sequence[str]) -> str:
        for name in names:
            if (self.root / name).is_dir():
                return name
        raise FileNotFoundError(
            f"No folder {' or '.join(names)} in {self.root}; there are: {some(sub_folders(self.root)) or 'none'}. "
            "Training and validation take their pictures from train, test from val."
        )

    def _flat(self, below: str) -> FilePictures:
        place = self.root / below
        id_of, source = validation_labels(place)
        label_of = {wordnet_id: label for label, wordnet_id in enumerate(self.folders())}
        names = find_pictures(place, recursive=False)[0]
        unknown = [name for name in names if id_of.get(Path(name).stem) not in label_of]
        if unknown:
            raise ValueError(
                f"{source} has no class of ImageNet for {len(unknown)} pictures in {place}: {some(unknown)}. Is it "
                "complete, and are these ImageNet's validation pictures?"
            )
        labels = {name: label_of[id_of[Path(name).stem]] for name in names}
        names.sort(key=lambda name: (labels[name], name))  # as if they lay in class folders
        prefix = f"{below}/" if below else ""
        return FilePictures(self.root, [prefix + name for name in names], [labels[name] for name in names])


class ImageNetV2DataModule(_ImageNetFamily):
    """ImageNet-V2 in the layout ``imagenetv2-<variant>-format-val/<0..999>/*.jpeg``: a folder's number is its label.

    Recht et al., "Do ImageNet Classifiers Generalize to ImageNet?" (2019).

    Validation and test are the same pictures: there are no others.

    Args:
        root: Folder with that of the variant in it, or that of the variant itself.
        variant: Which of the three selections of pictures. Accuracies on them differ by points.
        **kwargs: See :class:`BenchmarkDataModule`.

    Raises:
        FileNotFoundError: If the variant is not there.
        ValueError: If there is no such variant, or `root` is another one.
    """

    title = "ImageNet-V2"
    layout = "imagenetv2-<variant>-format-val/<0..999>/*.jpeg"
    aliases = ("imagenetv2", "imagenet-v2", "imagenet_v2")
    n_pictures = 10_000

    def __init__(self, root: str | Path, variant: Variant = "matched-frequency", **kwargs: Any) -> None:
        self.check_known("variant", variant, VARIANTS)
        super().__init__(root, **kwargs)
        self.variant = variant
        self.source = variant
        self.below = self._below()

    @classmethod
    def folders(cls) -> Sequence[str]:
        """0 to 999, in the order of the labels: as text they would sort 0, 1, 10, 100."""
        return [str(number) for number in range(1000)]

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether there is a variant, or class folders."""
        return any(map(_variant, sub_folders(folder))) or super().holds(folder)

    def _below(self) -> str:
        below = ""
        # Some unpackers make a folder of the archive's name around that of the variant.
        while inside := [name for name in sub_folders(self.root / below) if _variant(name) == self.variant]:
            below = f"{below}/{inside[0]}".lstrip("/")
        if below:
            return below
        if not _has_class_folders(self.root):
            raise FileNotFoundError(
                f"No folder imagenetv2-{self.variant}-format-val in {self.root}; there are: "
                f"{some(sub_folders(self.root))}. Unpack it there, or set --data.variant to one that is there."
            )
        own = _variant(self.root.resolve().name)
        if own not in (None, self.variant):
            raise ValueError(
                f"By its name {self.root} is the variant {own} of ImageNet-V2, but variant is {self.variant}: set "
                f"--data.variant {own}, or give the other folder."
            )
        return ""


class ImageNetADataModule(_ImageNetFamily):
    """ImageNet-A in the layout ``<wnid>/*.jpg``: 200 classes, and only these to choose from.

    Hendrycks et al., "Natural Adversarial Examples" (2021).

    Validation and test are the same pictures: there are no others.
    """

    title = "ImageNet-A"
    layout = "<wnid>/*.jpg"
    aliases = ("imagenet-a", "imagenet_a", "imageneta", "imagenet-adversarial/imagenet-a", "imagenet-adversarial")
    subset = "imagenet_a"
    n_pictures = 7_500


class ImageNetRDataModule(_ImageNetFamily):
    """ImageNet-R in the layout ``<wnid>/*.jpg``: 200 classes, and only these to choose from.

    Hendrycks et al., "The Many Faces of Robustness" (2021).

    Validation and test are the same pictures: there are no others.
    """

    title = "ImageNet-R"
    layout = "<wnid>/*.jpg"
    aliases = ("imagenet-r", "imagenet_r", "imagenetr", "imagenet-rendition/imagenet-r", "imagenet-rendition")
    subset = "imagenet_r"
    n_pictures = 30_000


class ImageNetSketchDataModule(_ImageNetFamily):
    """ImageNet-Sketch in the layout ``sketch/<wnid>/*.JPEG``.

    Wang et al., "Learning Robust Global Representations by Penalizing Local Predictive Power" (2019).

    Validation and test are the same pictures: there are no others.
    """

    title = "ImageNet-Sketch"
    layout = "sketch/<wnid>/*.JPEG"
    aliases = (
        "sketch",
        "images",
        "imagenet-sketch/sketch",
        "imagenet-sketch/images",
        "imagenet-sketch",
        "imagenet_sketch/sketch",
        "imagenet_sketch/images",
        "imagenet_sketch",
    )
    n_pictures = 50_889


class ImageNetCDataModule(_ImageNetFamily):
    """ImageNet-C in the layout ``<corruption>/<severity>/<wnid>/*.JPEG``, tested on one corruption at one severity.

    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019).

    Corruptions may lie in the folder of their archive, ``noise/gaussian_noise``. Validation and test are the same
    pictures: there are no others. CoOp does not have this data set; its template is that of ImageNet.

    Args:
        root: Folder with the corruptions in it; or that of the corruption, or of its severity.
        corruption: One of the 15 of the benchmark, or of its 4 extra ones: ``speckle_noise``, ``gaussian_blur``,
            ``spatter``, ``saturate``.
        severity: 1 to 5.
        **kwargs: See :class:`BenchmarkDataModule`.

    Raises:
        FileNotFoundError: If this corruption at this severity is not there.
        ValueError: If there is no such corruption or severity.
    """

    title = "ImageNet-C"
    layout = "<corruption>/<severity>/<wnid>/*.JPEG"
    aliases = ("imagenet-c", "imagenet_c", "imagenetc")
    n_pictures = 50_000

    def __init__(
        self, root: str | Path, corruption: Corruption = "gaussian_noise", severity: int = 5, **kwargs: Any
    ) -> None:
        self.check_known("corruption", corruption, CORRUPTIONS)
        severity = check_severity(severity)
        super().__init__(root, **kwargs)
        self.corruption = corruption
        self.severity = severity
        self.source = f"{corruption} {severity}"
        self.below = self._below()

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether there is a corruption, or the folder is one, or the severity of one."""
        inside = (each / corruption for each in _and_below(folder, ARCHIVES) for corruption in CORRUPTIONS)
        own = folder.resolve()
        return own.name in CORRUPTIONS or own.parent.name in CORRUPTIONS or any(each.is_dir() for each in inside)

    def _below(self) -> str:
        wanted = f"{self.corruption}/{self.severity}"
        places = [wanted, *(f"{archive}/{wanted}" for archive in ARCHIVES)]
        own = self.root.resolve()
        if own.name == self.corruption:
            places.append(str(self.severity))
        if f"{own.parent.name}/{own.name}" == wanted:
            places.append("")
        for place in places:
            if (self.root / place).is_dir():
                return place
        raise FileNotFoundError(
            f"No folder {wanted} in {self.root}, nor in {' or '.join(ARCHIVES)} there. Found: "
            f"{some(sub_folders(self.root)) or 'no folders'}. ImageNet-C is downloaded in these five parts: unpack the "
            "one that has it, or give the folder with all corruptions in it."
        )


def _and_below(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder, *(folder / name for name in names)]


def _has_class_folders(folder: Path) -> bool:
    # by the names first: there may be 50,000 files, each of which takes a look at the disk
    return folder.is_dir() and any(_CLASS_FOLDER.fullmatch(each.name) and each.is_dir() for each in folder.iterdir())


def _is_flat(folder: Path) -> bool:
    """Whether it has ImageNet's validation pictures as the archive does, all in one folder."""
    return any(folder.glob("ILSVRC2012_val_*")) and not _has_class_folders(folder)


def _variant(folder: str) -> str | None:
    """The variant of ImageNet-V2 that a folder is by its name: ``ImageNetV2-threshold-0.7`` is in use too."""
    name = _letters_and_digits(folder)
    return next((each for each in VARIANTS if name.startswith(f"imagenetv2{_letters_and_digits(each)}")), None)


def _letters_and_digits(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _likely_cause(found: Sequence[str], expected: type[_ImageNetFamily]) -> str:
    """Whose class folders these are, where they are rather another's than the expected ones."""
    family: list[type[_ImageNetFamily]] = [expected, ImageNetDataModule, ImageNetV2DataModule]
    family += [ImageNetADataModule, ImageNetRDataModule]

    def likeness(each: type[_ImageNetFamily]) -> float:
        return len(set(found) & set(each.folders())) / len(set(found) | set(each.folders()))

    likely = max(family, key=likeness)
    if likeness(likely) == likeness(expected):
        return ""
    return f"these look like the class folders of {likely.title}, which {likely.__name__} reads"
