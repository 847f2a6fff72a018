"""The ten data sets of CoOp's cross-data-set benchmark. See :class:`.coop.CoOpDataModule` for what they share."""

from __future__ import annotations

from pathlib import Path

from torchvision import datasets

from .benchmark import class_folders
from .coop import CoOpDataModule, Counts, Listing
from .folder import sub_folders

EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}
"""CoOp's class name for each folder of EuroSAT."""


class Caltech101DataModule(CoOpDataModule):
    """Caltech101: pictures of objects. CoOp's 100 classes leave out one of its two of faces.

    Fei-Fei et al., "Learning Generative Visual Models from Few Training Examples" (2004).
    """

    title = "Caltech101"
    aliases = ("caltech-101", "caltech101")
    layout = "101_ObjectCategories/<class>/*.jpg"
    marks = ("101_ObjectCategories",)
    split_file = "split_zhou_Caltech101.json"
    images = "101_ObjectCategories"
    coop_counts = Counts(100, 4128, 1649, 2465)
    coop_template = "a photo of a {}."
    official_counts = Counts(101, None, None, 8677)
    official_source = "all pictures (no official split)"
    torchvision_class = datasets.Caltech101
    torchvision_folder = "caltech101"

    def read_official(self) -> tuple[list[str], Listing]:
        """All pictures, in torchvision's 101 classes: every folder but the background."""
        background = "BACKGROUND_Google"
        names = [name for name in sub_folders(self.root / self.images) if name != background]
        labels = {name: label for label, name in enumerate(names)}
        found = class_folders(self.root, self.images, labels, partial=self.partial, ignore=(background,))
        return names, {"test": list(zip(found.paths, found.labels, strict=True))}


class OxfordPetsDataModule(CoOpDataModule):
    """Oxford-IIIT Pet: 37 breeds of cats and dogs.

    Parkhi et al., "Cats and Dogs" (2012).
    """

    title = "OxfordPets"
    aliases = ("oxford_pets", "oxford-iiit-pet", "OxfordPets", "OxfordIIITPet")
    layout = "images/*.jpg, annotations/trainval.txt and test.txt"
    marks = ("annotations/trainval.txt",)
    split_file = "split_zhou_OxfordPets.json"
    images = "images"
    coop_counts = Counts(37, 2944, 736, 3669)
    coop_template = "a photo of a {}, a type of pet."
    official_counts = Counts(37, 2941, 739, 3669)
    official_splits = ("trainval", "test")
    torchvision_class = datasets.OxfordIIITPet
    torchvision_folder = "oxford-iiit-pet"


class StanfordCarsDataModule(CoOpDataModule):
    """Stanford Cars: 196 models, named as "2012 Acura TL Sedan".

    Krause et al., "3D Object Representations for Fine-Grained Categorization" (2013).
    """

    title = "StanfordCars"
    aliases = ("stanford_cars", "stanford-cars", "StanfordCars")
    layout = "cars_train/*.jpg, cars_test/*.jpg, devkit/ and cars_test_annos_withlabels.mat"
    marks = ("cars_test", "cars_train")
    split_file = "split_zhou_StanfordCars.json"
    coop_counts = Counts(196, 6509, 1635, 8041)
    coop_template = "a photo of a {}."
    official_counts = Counts(196, 6442, 1702, 8041)
    official_splits = ("train", "test")
    torchvision_class = datasets.StanfordCars
    torchvision_folder = "stanford_cars"
    needs_scipy = True
    not_downloadable = "the place that published it is gone"

    @staticmethod
    def readable(name: str) -> str:
        """The year comes first, as CoOp has it."""
        model, _, year = name.rpartition(" ")
        return f"{year} {model}"


class Flowers102DataModule(CoOpDataModule):
    """Oxford 102 Flower: flowers that are common in the United Kingdom.

    Nilsback and Zisserman, "Automated Flower Classification over a Large Number of Classes" (2008).
    """

    title = "Flowers102"
    aliases = ("oxford_flowers", "flowers-102", "Flowers102", "OxfordFlowers")
    layout = "jpg/image_*.jpg, imagelabels.mat and setid.mat"
    marks = ("imagelabels.mat", "setid.mat", "jpg/image_00001.jpg")
    split_file = "split_zhou_OxfordFlowers.json"
    images = "jpg"
    coop_counts = Counts(102, 4093, 1633, 2463)
    coop_template = "a photo of a {}, a type of flower."
    official_counts = Counts(102, 1020, 1020, 6149)
    torchvision_class = datasets.Flowers102
    torchvision_folder = "flowers-102"
    needs_scipy = True

    @staticmethod
    def readable(name: str) -> str:
        """Without the question mark that torchvision has behind "pink-yellow dahlia"."""
        return name.rstrip("?")


class Food101DataModule(CoOpDataModule):
    """Food-101: photos of 101 dishes.

    Bossard et al., "Food-101 - Mining Discriminative Components with Random Forests" (2014).
    """

    title = "Food101"
    aliases = ("food-101", "food101")
    layout = "images/<class>/*.jpg, meta/train.json and test.json"
    marks = ("images/apple_pie", "meta/test.json")
    split_file = "split_zhou_Food101.json"
    images = "images"
    coop_counts = Counts(101, 50500, 20200, 30300)
    coop_template = "a photo of {}, a type of food."
    official_counts = Counts(101, 60600, 15150, 25250)
    official_splits = ("train", "test")
    torchvision_class = datasets.Food101
    torchvision_folder = "food-101"


class FGVCAircraftDataModule(CoOpDataModule):
    """FGVC-Aircraft: 100 variants of aircraft. CoOp's split is the official one.

    Maji et al., "Fine-Grained Visual Classification of Aircraft" (2013).
    """

    title = "FGVCAircraft"
    aliases = ("fgvc_aircraft", "fgvc-aircraft-2013b/data", "FGVCAircraft", "data")
    layout = "images/*.jpg, variants.txt and images_variant_*.txt"
    marks = ("variants.txt",)
    split_file = "variants.txt"
    coop_counts = Counts(100, 3334, 3333, 3333)
    coop_template = "a photo of a {}, a type of aircraft."
    official_counts = coop_counts
    official_source = "official split, which is CoOp's"
    torchvision_class = datasets.FGVCAircraft
    torchvision_folder = "fgvc-aircraft-2013b/data"

    @property
    def coop_source(self) -> str:
        """The same."""
        return self.official_source

    def read_coop(self, file: Path) -> tuple[list[str], Listing]:
        """The official split."""
        return self.read_official()


class SUN397DataModule(CoOpDataModule):
    """SUN397: scenes, from abbey to zoo, named as "indoor apse".

    Xiao et al., "SUN Database: Large-scale Scene Recognition from Abbey to Zoo" (2010).
    """

    title = "SUN397"
    aliases = ("SUN397", "sun397/SUN397")
    layout = "a/abbey/*.jpg and so on, and ClassName.txt"
    marks = ("a/abbey",)
    split_file = "split_zhou_SUN397.json"
    coop_counts = Counts(397, 15880, 3970, 19850)
    coop_template = "a photo of a {}."
    official_counts = Counts(397, None, None, 108754)
    official_source = "all pictures (no official split), CoOp's order of words"
    official_splits = ()
    torchvision_class = datasets.SUN397
    torchvision_folder = "SUN397"

    @staticmethod
    def readable(name: str) -> str:
        """``apse/indoor`` is "indoor apse", as CoOp has it."""
        return " ".join(reversed(name.split("/")))


class DTDDataModule(CoOpDataModule):
    """Describable Textures: 47 textures by their adjectives. The official split is the first of its ten.

    Cimpoi et al., "Describing Textures in the Wild" (2014).
    """

    title = "DTD"
    aliases = ("dtd", "dtd/dtd", "DescribableTextures")
    layout = "images/<class>/*.jpg, labels/train1.txt, val1.txt and test1.txt"
    marks = ("images/banded", "labels/test1.txt")
    split_file = "split_zhou_DescribableTextures.json"
    images = "images"
    coop_counts = Counts(47, 2820, 1128, 1692)
    coop_template = "{} texture."
    official_counts = Counts(47, 1880, 1880, 1880)
    torchvision_class = datasets.DTD
    torchvision_folder = "dtd/dtd"


class EuroSATDataModule(CoOpDataModule):
    """EuroSAT: satellite pictures of ten uses of land. The class names are CoOp's, with either split.

    Helber et al., "EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use and Land Cover Classification"
    (2019).
    """

    title = "EuroSAT"
    aliases = ("eurosat", "EuroSAT_RGB")
    layout = "2750/<class>/*.jpg (or EuroSAT_RGB/<class>/*, or <class>/*)"
    marks = ("2750/AnnualCrop", "EuroSAT_RGB/AnnualCrop", "AnnualCrop")
    split_file = "split_zhou_EuroSAT.json"
    images = "2750"
    coop_counts = Counts(10, 13500, 5400, 8100)
    coop_template = "a centered satellite photo of {}."
    official_counts = Counts(10, None, None, 27000)
    official_source = "all pictures (no official split), CoOp's class names"
    torchvision_class = datasets.EuroSAT
    torchvision_folder = "eurosat"

    def images_folder(self) -> str:
        """Where the class folders are, below the root: archives differ in it."""
        return next(
            (mark.rpartition("/")[0] for mark in self.marks if (self.root / mark).is_dir()),
            self.images,
        )

    def read_official(self) -> tuple[list[str], Listing]:
        """All pictures."""
        labels = {folder: label for label, folder in enumerate(EUROSAT_NAMES)}
        found = class_folders(self.root, self.images_folder(), labels, partial=self.partial)
        return list(EUROSAT_NAMES.values()), {"test": list(zip(found.paths, found.labels, strict=True))}


class UCF101DataModule(CoOpDataModule):
    """UCF101: the middle frames of videos of 101 human actions, as CoOp publishes them.

    Soomro et al., "UCF101: A Dataset of 101 Human Actions Classes From Videos in The Wild" (2012).
    """

    title = "UCF101"
    aliases = ("ucf101", "UCF-101")
    layout = "UCF-101-midframes/<class>/*.jpg"
    marks = ("UCF-101-midframes",)
    split_file = "split_zhou_UCF101.json"
    images = "UCF-101-midframes"
    coop_counts = Counts(101, 7639, 1898, 3783)
    coop_template = "a photo of a person doing {}."
    official_counts = None
    not_downloadable = "CoOp has cut its pictures out of the videos, and publishes them where no program can fetch them"
