"""CoOp's ten cross-data-set benchmarks in small: the real folders and label files, three tiny pictures of each class.

Each function writes the data set as CoOp lays it out, with its split file; with ``official=True`` as the data set is
published and torchvision has it. It returns what there is: the class name of every path of each split.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import Flowers102

Truth = dict[str, dict[str, str]]

COOP = ("train", "val", "test")
EUROSAT = {
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


def write_caltech101(root: Path, official: bool = False) -> Truth:
    renamed = {"Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane"}
    folders = sorted([*renamed, "Faces_easy", *(f"thing_{number}" for number in range(96))])
    base = root / ("caltech101" if official else "caltech-101")
    files = {name: [f"101_ObjectCategories/{name}/image_{k:04}.jpg" for k in (1, 2, 3)] for name in folders}
    _pictures(base, files.values())
    _pictures(base, [[f"101_ObjectCategories/BACKGROUND_Google/image_{k:04}.jpg" for k in (1, 2)]])
    if official:
        return {"test": {path: name for name, paths in files.items() for path in paths}}
    del files["Faces_easy"]
    by_class = {renamed.get(name, name): paths for name, paths in files.items()}
    return _coop(base, "Caltech101", by_class, "101_ObjectCategories/")


def write_oxford_pets(root: Path, official: bool = False) -> Truth:
    breeds = ["Abyssinian", "american_bulldog", "Egyptian_Mau", *(f"pug_{number:02}" for number in range(34))]
    base = root / ("oxford-iiit-pet" if official else "oxford_pets")
    files = {name: [f"images/{name}_{k}.jpg" for k in (1, 10, 2)] for name in breeds}
    _pictures(base, files.values())
    (base / "annotations").mkdir()
    names = {name: " ".join(word.title() for word in name.split("_")) for name in breeds}
    truth = _parts({names[name]: paths for name, paths in files.items()}, "trainval", "trainval", "test")
    for split, by_path in truth.items():
        numbers = {name: number for number, name in enumerate(names.values(), 1)}
        lines = [f"{Path(path).stem} {numbers[name]} 1 1\n" for path, name in by_path.items()]
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
    if official:
        return truth
    return _coop(base, "OxfordPets", {name.lower(): paths for name, paths in files.items()}, "images/")


def write_stanford_cars(root: Path, official: bool = False) -> Truth:
    base = root / "stanford_cars"
    cars = [("2000", "AM General Hummer SUV"), *(("2012", f"Audi A{number} Coupe") for number in range(195))]
    files = {
        f"{year} {model}": [f"cars_{part}/{3 * number + k:05}.jpg" for k, part in enumerate(("train", "train", "test"))]
        for number, (year, model) in enumerate(cars)
    }
    _pictures(base, files.values())
    if not official:
        return _coop(base, "StanfordCars", files, "")
    from scipy.io import savemat

    (base / "devkit").mkdir()
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array([f"{m} {y}" for y, m in cars], dtype=object)})
    truth = _parts(files, "train", "train", "test")
    kind = [("fname", object), ("class", np.uint8)]
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        numbers = {name: number for number, name in enumerate(files, 1)}
        rows = [(Path(path).name, numbers[name]) for path, name in truth[split].items()]
        savemat(base / file, {"annotations": np.array(rows, dtype=kind)})
    return truth


def write_flowers102(root: Path, official: bool = False) -> Truth:
    base = root / ("flowers-102" if official else "oxford_flowers")
    names = [name.rstrip("?") for name in Flowers102.classes]
    order = np.random.default_rng(0).permutation(306)  # a flower's number says nothing about its class
    files = {name: [f"jpg/image_{order[3 * i + k] + 1:05}.jpg" for k in range(3)] for i, name in enumerate(names)}
    _pictures(base, files.values())
    if not official:
        return _coop(base, "OxfordFlowers", files, "jpg/")
    from scipy.io import savemat

    labels = np.zeros(306, dtype=np.uint8)
    labels[order] = np.arange(306) // 3 + 1
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", {key: order[k::3] + 1 for k, key in enumerate(("trnid", "valid", "tstid"))})
    return _parts(files, *COOP)


def write_food101(root: Path, official: bool = False) -> Truth:
    base = root / "food-101"
    files = {name: [f"images/{name}/{k}.jpg" for k in (10, 11, 9)] for name in ["apple_pie", *_named("dish_", 100)]}
    _pictures(base, files.values())
    truth = _parts(files, "train", "train", "test")
    (base / "meta").mkdir()
    for split, by_path in truth.items():
        listed: dict[str, list[str]] = {}
        for path, name in by_path.items():
            listed.setdefault(name, []).append(path.removeprefix("images/").removesuffix(".jpg"))
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
    return truth if official else _coop(base, "Food101", files, "images/")


def write_fgvc_aircraft(root: Path, official: bool = False) -> Truth:
    base = root / ("fgvc-aircraft-2013b/data" if official else "fgvc_aircraft")
    names = ["707-320", "Boeing 717", "F/A-18", *_named("Cessna ", 97)]
    files = {name: [f"images/{3 * i + k:07}.jpg" for k in (2, 0, 1)] for i, name in enumerate(names)}
    _pictures(base, files.values())
    (base / "variants.txt").write_text("".join(f"{name}\n" for name in names))
    truth = _parts(files, *COOP)
    for split, by_path in truth.items():
        lines = [f"{Path(path).stem} {name}\n" for path, name in by_path.items()]
        (base / f"images_variant_{split}.txt").write_text("".join(lines))
    return truth


def write_sun397(root: Path, official: bool = False) -> Truth:
    base = root / ("SUN397" if official else "sun397/SUN397")
    folders = {"a/abbey": "abbey", "a/apse/indoor": "indoor apse", "a/apse/outdoor": "outdoor apse"}
    folders.update((f"z/{name}", name) for name in _named("zoo_", 394))
    files = {name: [f"{folder}/sun_{k}.jpg" for k in "abc"] for folder, name in folders.items()}
    _pictures(base, files.values())
    (base / "ClassName.txt").write_text("".join(f"/{folder}\n" for folder in folders))
    if official:
        return {"test": {path: name for name, paths in files.items() for path in paths}}
    return _coop(base.parent, "SUN397", files, "")


def write_dtd(root: Path, official: bool = False) -> Truth:
    base = root / ("dtd/dtd" if official else "dtd")
    files = {name: [f"images/{name}/{name}_{k:04}.jpg" for k in (3, 1, 2)] for name in ["banded", *_named("dots-", 46)]}
    _pictures(base, files.values())
    truth = _parts(files, *COOP)
    (base / "labels").mkdir()
    for split, by_path in truth.items():
        lines = [path.removeprefix("images/") + "\n" for path in by_path]
        (base / "labels" / f"{split}1.txt").write_text("".join(lines))
    return truth if official else _coop(base, "DescribableTextures", files, "images/")


def write_eurosat(root: Path, official: bool = False) -> Truth:
    base = root / "eurosat"
    files = {name: [f"2750/{folder}/{folder}_{k}.jpg" for k in (1, 10, 2)] for folder, name in EUROSAT.items()}
    _pictures(base, files.values())
    if official:
        return {"test": {path: name for name, paths in files.items() for path in paths}}
    return _coop(base, "EuroSAT", files, "2750/")


def write_ucf101(root: Path) -> Truth:
    base = root / "ucf101"
    files = {name: [f"UCF-101-midframes/{name}/v_{k}.jpg" for k in (1, 2, 3)] for name in _named("Tai_Chi_", 101)}
    _pictures(base, files.values())
    return _coop(base, "UCF101", files, "UCF-101-midframes/")


WRITERS: dict[str, Callable[..., Truth]] = {
    "caltech101": write_caltech101,
    "oxford_pets": write_oxford_pets,
    "stanford_cars": write_stanford_cars,
    "flowers102": write_flowers102,
    "food101": write_food101,
    "fgvc_aircraft": write_fgvc_aircraft,
    "sun397": write_sun397,
    "dtd": write_dtd,
    "eurosat": write_eurosat,
    "ucf101": write_ucf101,
}
"""By the names of their configs."""


def _named(prefix: str, number: int) -> list[str]:
    return [f"{prefix}{k:03}" for k in range(number)]


def _pictures(base: Path, files: Iterable[list[str]]) -> None:
    """Pictures of random pixels, out of a few."""
    random = np.random.default_rng(0)
    encoded = []
    for _ in range(7):
        with io.BytesIO() as stream:
            Image.fromarray(random.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(stream, "JPEG")
            encoded.append(stream.getvalue())
    for path, content in zip((path for paths in files for path in paths), cycle(encoded), strict=False):
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_bytes(content)


def _parts(files: Mapping[str, list[str]], *splits: str) -> Truth:
    """The first picture of each class in the first split, and so on."""
    truth: Truth = {}
    for place, split in enumerate(splits):
        truth.setdefault(split, {}).update((paths[place], name) for name, paths in files.items())
    return truth


def _coop(base: Path, name: str, files: Mapping[str, list[str]], below: str) -> Truth:
    """Write CoOp's split file, whose pictures stand in no order that a list of files has."""
    truth = _parts(files, *COOP)
    labels = {class_name: label for label, class_name in enumerate(files)}
    random = np.random.default_rng(1)
    content = {}
    for split, by_path in truth.items():
        rows = [[path.removeprefix(below), labels[name], name] for path, name in by_path.items()]
        content[split] = [rows[place] for place in random.permutation(len(rows))]
    (base / f"split_zhou_{name}.json").write_text(json.dumps(content))
    return truth
