"""CoOp's cross-data-set benchmarks in small copies of their layouts, and CoOp's own split files where they are."""

import hashlib
import json
import logging
import shutil
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from helpers.fake_data.coop import EUROSAT, WRITERS
from helpers.models import frozen
from torchvision import datasets

from metatpt.datamodules import (
    Caltech101DataModule,
    DTDDataModule,
    EuroSATDataModule,
    FGVCAircraftDataModule,
    Flowers102DataModule,
    Food101DataModule,
    OxfordPetsDataModule,
    StanfordCarsDataModule,
    SUN397DataModule,
    UCF101DataModule,
)
from metatpt.datamodules.coop import read_split_file
from metatpt.datamodules.subsets import held_out
from metatpt.types import Preprocessing

LEAVES = {
    "caltech101": Caltech101DataModule,
    "oxford_pets": OxfordPetsDataModule,
    "stanford_cars": StanfordCarsDataModule,
    "flowers102": Flowers102DataModule,
    "food101": Food101DataModule,
    "fgvc_aircraft": FGVCAircraftDataModule,
    "sun397": SUN397DataModule,
    "dtd": DTDDataModule,
    "eurosat": EuroSATDataModule,
    "ucf101": UCF101DataModule,
}
OFFICIAL = [name for name in LEAVES if name != "ucf101"]
SPLITS = ("train", "val", "test")
SPLIT_FILES = Path(__file__).parents[3] / "shared" / "data" / "splits"
needs_split_files = pytest.mark.skipif(not SPLIT_FILES.is_dir(), reason="CoOp's split files are not here")


def made(name, root, **options):
    datamodule = LEAVES[name](root, **{"partial": True, **options})
    datamodule.preprocessing = Preprocessing(16, (0,) * 3, (1,) * 3)
    return datamodule


def named(datamodule, split):
    """Class name of each path of a split."""
    pictures = datamodule.pictures(split)
    names = [datamodule.class_names[label] for label in pictures.labels]
    return dict(zip(pictures.paths, names, strict=True))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a data set into a folder; torchvision takes the label files of ours for the published ones."""

    def written(name, **options):
        if options.get("official") and LEAVES[name].needs_scipy:
            pytest.importorskip("scipy")
        truth = WRITERS[name](tmp_path, **options)
        files = dict(datasets.Flowers102._file_dict)
        for key in ("label", "setid"):
            path = tmp_path / "flowers-102" / files[key][0]
            if path.exists():
                files[key] = (path.name, hashlib.md5(path.read_bytes()).hexdigest())
        monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
        return truth

    return written


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


# CoOp's split


@pytest.mark.parametrize("name", LEAVES)
def test_coop_split(tmp_path, write, name):
    truth = write(name)
    datamodule = made(name, tmp_path)
    for split in SPLITS:
        assert named(datamodule, split) == truth[split]
        assert all((datamodule.root / path).is_file() for path in truth[split])
    if name != "fgvc_aircraft":  # has text files
        (file,) = tmp_path.rglob("split_zhou_*.json")
        assert datamodule.source == f"coop split ({file.name})"
        for split, rows in json.loads(file.read_text()).items():
            pictures = datamodule.pictures(split)
            assert pictures.labels == [label for _, label, _ in rows]  # in the order of the file
            assert all(path.endswith(row[0]) for path, row in zip(pictures.paths, rows, strict=True))
            assert {(label, datamodule.class_names[label]) for label in pictures.labels} == {(y, n) for _, y, n in rows}


def test_batches(tmp_path, write):
    truth = write("eurosat")
    datamodule = made("eurosat", tmp_path, batch_size=4)
    datamodule.setup("test")
    batches = list(datamodule.test_dataloader())
    rows = [(path, label) for batch in batches for path, label in zip(batch.path, batch.label.tolist(), strict=True)]
    assert {path: datamodule.class_names[label] for path, label in rows} == truth["test"]
    assert [index for batch in batches for index in batch.index.tolist()] == list(range(10))
    assert [error for batch in batches for error in batch.error] == [None] * 10


@needs_split_files
@pytest.mark.parametrize("leaf", LEAVES.values())
def test_real_split_file(leaf):
    file = SPLIT_FILES / leaf.split_file
    if not file.exists():
        pytest.skip(f"no {leaf.split_file}")
    names, listing = read_split_file(file, leaf.images)
    rows = json.loads(file.read_text())
    for split in SPLITS:
        assert len(listing[split]) == len(rows[split]) == getattr(leaf.coop_counts, split)
    assert len(names) == len(set(names)) == leaf.coop_counts.classes
    for split in SPLITS:
        assert [(path, names[label]) for path, label in listing[split]] == [
            (f"{leaf.images}/{path}".lstrip("/"), name) for path, _, name in rows[split]
        ]


@needs_split_files
def test_real_flowers():
    names, listing = read_split_file(SPLIT_FILES / "split_zhou_OxfordFlowers.json")
    assert dict(part for split in SPLITS for part in listing[split])["image_00005.jpg"] == 76
    assert names[76] == "passion flower"
    assert names[59] == "pink-yellow dahlia"
    assert names == [Flowers102DataModule.readable(name) for name in datasets.Flowers102.classes]
    assert {a: b for a, b in zip(datasets.Flowers102.classes, names, strict=True) if a != b} == {
        "pink-yellow dahlia?": "pink-yellow dahlia"
    }


@needs_split_files
def test_real_caltech():
    names, listing = read_split_file(SPLIT_FILES / "split_zhou_Caltech101.json")
    by_folder = {path.split("/")[0]: names[label] for split in SPLITS for path, label in listing[split]}
    renamed = {folder: name for folder, name in by_folder.items() if folder != name}
    assert renamed == {"Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane"}
    assert not {"BACKGROUND_Google", "Faces_easy"} & set(by_folder)


@needs_split_files
def test_real_eurosat_has_the_names_that_the_official_split_gets():
    names, listing = read_split_file(SPLIT_FILES / "split_zhou_EuroSAT.json")
    assert {path.split("/")[0]: names[label] for path, label in listing["test"]} == EUROSAT
    assert names == list(EUROSAT.values())


@needs_split_files
def test_real_cars_have_the_year_first():
    names, _ = read_split_file(SPLIT_FILES / "split_zhou_StanfordCars.json")
    assert names[0] == StanfordCarsDataModule.readable("AM General Hummer SUV 2000") == "2000 AM General Hummer SUV"


@needs_split_files
@pytest.mark.parametrize("leaf", [OxfordPetsDataModule, StanfordCarsDataModule])
def test_counts_of_held_out_pictures(leaf):
    # CoOp took train and val out of the official training pictures.
    _, listing = read_split_file(SPLIT_FILES / leaf.split_file)
    per_class = Counter(label for split in ("train", "val") for _, label in listing[split])
    held = sum(len(held_out([str(k) for k in range(n)], "any")) for n in per_class.values())
    assert (leaf.official_counts.train, leaf.official_counts.val) == (per_class.total() - held, held)
    assert leaf.official_counts.test == len(listing["test"])


def test_number_of_test_pictures_of_either_split():
    counts = {
        name: (leaf.coop_counts.classes, leaf.coop_counts.test, leaf.official_counts and leaf.official_counts.test)
        for name, leaf in LEAVES.items()
    }
    assert counts == {
        "caltech101": (100, 2465, 8677),
        "oxford_pets": (37, 3669, 3669),
        "stanford_cars": (196, 8041, 8041),
        "flowers102": (102, 2463, 6149),
        "food101": (101, 30300, 25250),
        "fgvc_aircraft": (100, 3333, 3333),
        "sun397": (397, 19850, 108754),
        "dtd": (47, 1692, 1880),
        "eurosat": (10, 8100, 27000),
        "ucf101": (101, 3783, None),
    }


def test_coop_template():
    classes = {"flowers102": "rose", "food101": "ice_cream", "dtd": "banded", "eurosat": "River", "ucf101": "Diving"}
    assert {name: LEAVES[name].coop_template.format(word) for name, word in classes.items()} == {
        "flowers102": "a photo of a rose, a type of flower.",
        "food101": "a photo of ice_cream, a type of food.",
        "dtd": "banded texture.",
        "eurosat": "a centered satellite photo of River.",
        "ucf101": "a photo of a person doing Diving.",
    }


# The official split


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_split(tmp_path, write, name):
    truth = write(name, official=True)
    datamodule = made(name, tmp_path, split="official")
    test = datamodule.pictures("test")
    assert named(datamodule, "test") == truth["test"]
    assert test.paths == sorted(test.paths)
    assert all(type(label) is int for label in test.labels)
    train = truth.get("train", truth.get("trainval"))
    if train is None:
        with pytest.raises(
            FileNotFoundError, match=rf"no official.*: there is no val split.*put {datamodule.split_file}"
        ):
            datamodule.pictures("val")
    elif "val" in truth:
        assert named(datamodule, "train") == train
        assert named(datamodule, "val") == truth["val"]
    else:
        held = named(datamodule, "val")
        assert {**named(datamodule, "train"), **held} == train
        assert Counter(held.values()) == dict.fromkeys(datamodule.class_names, 1)  # of two pictures each
        assert not held.keys() & named(datamodule, "train").keys()


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_split_in_a_folder_of_another_name(tmp_path, write, name):
    truth = write(name, official=True)
    (tmp_path / LEAVES[name].torchvision_folder).rename(tmp_path / "moved")
    datamodule = made(name, tmp_path / "moved", split="official")
    assert datamodule.root == tmp_path / "moved"
    assert named(datamodule, "test") == truth["test"]


def test_official_split_through_torchvision(tmp_path, write):
    """Those that we read by folder are what torchvision reads."""
    write("caltech101", official=True)
    theirs = datasets.Caltech101(tmp_path)
    ours = made("caltech101", tmp_path)
    assert ours.class_names == theirs.categories
    assert ours.pictures("test").labels == theirs.y
    write("eurosat", official=True)
    theirs = datasets.EuroSAT(tmp_path)
    ours = made("eurosat", tmp_path).pictures("test")
    assert list(zip(map(str, map(ours.root.joinpath, ours.paths)), ours.labels, strict=True)) == theirs.samples


def test_held_out_pictures_do_not_depend_on_the_seed(tmp_path, write, monkeypatch):
    write("food101", official=True)
    chosen = []
    for seed in ("0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        chosen.append(made("food101", tmp_path).pictures("val").paths)
    assert chosen[0] == chosen[1]


def test_flowers_names_and_labels_start_at_0(tmp_path, write):
    write("flowers102", official=True)
    datamodule = made("flowers102", tmp_path)
    assert datamodule.class_names[59] == "pink-yellow dahlia"
    assert set(datamodule.pictures("test").labels) == set(range(102))


def test_caltech_has_101_classes_in_torchvision_and_100_in_coop(tmp_path, write):
    write("caltech101")
    official = made("caltech101", tmp_path, split="official").class_names
    coop = made("caltech101", tmp_path).class_names
    assert (len(official), len(coop)) == (101, 100)
    assert "Faces_easy" in official
    assert set(coop) >= {"face", "leopard", "motorbike", "airplane"}


def test_what_systems_leave_behind_is_no_class(tmp_path, write):
    for name in ("caltech101", "eurosat"):
        truth = write(name, official=True)
        folder = tmp_path / name / LEAVES[name].images
        (folder / ".ipynb_checkpoints").mkdir()
        picture = next(folder.rglob("*.jpg"))
        (folder / ".ipynb_checkpoints" / "x.jpg").write_bytes(picture.read_bytes())
        (folder / ".DS_Store").touch()
        (picture.parent / "Thumbs.db").touch()
        assert named(made(name, tmp_path), "test") == truth["test"]


def test_eurosat_with_a_stray_folder(tmp_path, write):
    write("eurosat", official=True)
    (tmp_path / "eurosat" / "2750" / "River").rename(tmp_path / "eurosat" / "2750" / "Rivers")
    with pytest.raises(ValueError, match=r"expected 10 class folders.*no class: Rivers \(nearest: River"):
        made("eurosat", tmp_path)


# Which split


def test_coop_split_is_taken_where_it_is(tmp_path, write, log):
    write("dtd", official=True)
    assert made("dtd", tmp_path).source == "official split (torchvision)"
    assert f"DTD: official split (torchvision) in {tmp_path / 'dtd' / 'dtd'}." in log.messages
    coop = write("dtd")
    assert made("dtd", tmp_path).source == "coop split (split_zhou_DescribableTextures.json)"
    assert "coop split" in log.messages[-1]
    assert named(made("dtd", tmp_path, split="coop"), "test") == coop["test"]
    assert made("dtd", tmp_path, split="official").source == "official split (torchvision)"


def test_split_file_in_the_folder_above(tmp_path, write):
    truth = write("eurosat")
    file = tmp_path / "eurosat" / EuroSATDataModule.split_file
    file.rename(tmp_path / file.name)
    datamodule = made("eurosat", tmp_path)
    assert datamodule.source.startswith("coop")
    assert named(datamodule, "val") == truth["val"]


@pytest.mark.parametrize("name", LEAVES)
def test_coop_split_without_its_file(tmp_path, write, name):
    if name == "fgvc_aircraft":
        pytest.skip("its text files are the data set's own")
    write(name)
    for file in tmp_path.rglob("split_zhou_*.json"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"No {LEAVES[name].split_file} in .*KaiyangZhou/CoOp.*DATASETS.md"):
        made(name, tmp_path, split="coop")


def test_ucf101_has_coops_split_only(tmp_path, write):
    write("ucf101")
    with pytest.raises(ValueError, match=r"UCF101 has no official split.*--data.split coop"):
        made("ucf101", tmp_path, split="official")
    (tmp_path / "ucf101" / UCF101DataModule.split_file).unlink()
    with pytest.raises(FileNotFoundError, match="No split_zhou_UCF101.json"):
        made("ucf101", tmp_path)


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="Expected split auto, coop, official, got 'zhou'"):
        EuroSATDataModule(tmp_path, split="zhou")


def test_without_scipy(tmp_path, write, monkeypatch):
    truth = write("flowers102")
    monkeypatch.setitem(sys.modules, "scipy", None)  # importing it fails
    monkeypatch.setattr("metatpt.datamodules.coop.find_spec", lambda name: None)
    assert named(made("flowers102", tmp_path), "test") == truth["test"]
    write("stanford_cars")
    for name in ("flowers102", "stanford_cars"):
        with pytest.raises(ImportError, match=rf"need scipy: pip install.*metatpt\[scipy\].*{LEAVES[name].split_file}"):
            made(name, tmp_path, split="official")


# Where it is


@pytest.mark.parametrize("name", LEAVES)
def test_root_under_any_of_its_names(tmp_path, write, name):
    write(name)
    leaf = LEAVES[name]
    base = made(name, tmp_path).root
    expected = made(name, base).pictures("test").paths
    if name == "sun397":
        assert made(name, tmp_path / "sun397").pictures("test").paths == expected
        return
    for alias in leaf.aliases:
        base = base.rename(tmp_path / "moved")
        folder = tmp_path / "elsewhere" / alias
        folder.parent.mkdir(parents=True, exist_ok=True)
        base = base.rename(folder)
        for root in (tmp_path / "elsewhere", folder):
            found = made(name, root)
            assert found.root == folder
            assert found.pictures("test").paths == expected


def test_root_without_it(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match=r"OxfordPets as images/\*.jpg.*Found there: photos.*oxford_pets"):
        OxfordPetsDataModule(tmp_path)


# What is wrong with it


@pytest.mark.parametrize("name", LEAVES)
def test_too_few_pictures(tmp_path, write, name):
    truth = write(name)
    found, expected = len(truth["test"]), LEAVES[name].coop_counts.test
    with pytest.raises(ValueError, match=rf"split test: found {found} of {expected} pictures.*--data.partial true"):
        made(name, tmp_path, partial=False).pictures("test")


@pytest.mark.parametrize("official", [False, True])
def test_missing_pictures(tmp_path, write, official):
    truth = write("food101", official=official)["test"]
    gone = [path for path, name in truth.items() if name in ("apple_pie", "dish_007")]
    for path in gone:
        (tmp_path / "food-101" / path).unlink()
    message = r"of the 101 pictures of split test, 2 are missing in .*: images/(apple_pie|dish_007)/.*data.partial true"
    with pytest.raises(ValueError, match=message):
        made("food101", tmp_path, partial=False).pictures("test")
    partial = made("food101", tmp_path)
    assert named(partial, "test") == {path: name for path, name in truth.items() if path not in gone}
    assert len(partial.class_names) == 101


def test_a_part_without_pictures(tmp_path, write):
    for path in write("food101")["test"]:
        (tmp_path / "food-101" / path).unlink()
    with pytest.raises(FileNotFoundError, match="of the 101 pictures of split test, 101 are missing"):
        made("food101", tmp_path).pictures("test")


@pytest.mark.parametrize("place", ["EuroSAT_RGB", ""])
@pytest.mark.parametrize("official", [False, True])
def test_eurosat_as_other_archives_have_it(tmp_path, write, official, place):
    truth = write("eurosat", official=official)["test"]
    root = tmp_path / "eurosat"
    if place:
        (root / "2750").rename(root / place)
    else:
        for folder in sorted((root / "2750").iterdir()):
            folder.rename(root / folder.name)
        (root / "2750").rmdir()
    found = named(made("eurosat", root, split="official" if official else "coop"), "test")
    assert {path.removeprefix(f"{place}/"): name for path, name in found.items()} == {
        path.removeprefix("2750/"): name for path, name in truth.items()
    }


def test_every_template_of_coop_can_be_filled_and_all_but_one_tuned():
    clip = frozen("openai_vit")
    for name, leaf in LEAVES.items():
        tokens = clip.tokenize(leaf.coop_template, ["a name", "another"])
        assert (tokens.n_context > 0) == (name != "dtd")


def test_a_split_file_above_the_folder_is_enough(tmp_path, write):
    truth = write("oxford_pets")["test"]
    root = tmp_path / "oxford_pets"
    (root / "split_zhou_OxfordPets.json").rename(tmp_path / "split_zhou_OxfordPets.json")
    if (root / "annotations").exists():
        shutil.rmtree(root / "annotations")
    assert named(made("oxford_pets", root), "test") == truth


def test_missing_label_file(tmp_path, write):
    write("dtd", official=True)
    (tmp_path / "dtd" / "dtd" / "labels" / "val1.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"torchvision does not find the official split of DTD.*val1.txt.*labels/"
    ):
        made("dtd", tmp_path)


def test_too_few_classes(tmp_path, write):
    write("ucf101")
    file = tmp_path / "ucf101" / UCF101DataModule.split_file
    content = {split: [row for row in rows if row[1] < 100] for split, rows in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"UCF101, coop split.*: expected 101 classes, found 100 \(Tai_Chi_000"):
        made("ucf101", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ('{"train": [], "val": []}', "'test'"),
        ('{"train": [["a.jpg", 0]], "val": [], "test": []}', "not enough values"),
        ('{"train": [["a", 0, "x"]], "val": [], "test": [["b", 0, "y"]]}', "label 0 is 'x' and 'y'"),
        ('{"train": [["a", 1, "x"]], "val": [], "test": []}', "labels are not 0 to 0"),
    ],
)
def test_wrong_split_file(tmp_path, content, message):
    file = tmp_path / "split.json"
    file.write_text(content)
    with pytest.raises(
        ValueError, match=rf"split.json is not a split file of CoOp's \({message}.*\[path, label, class name\]"
    ):
        read_split_file(file)


# Download


class Download:
    """Stands for torchvision's EuroSAT."""

    def __init__(self):
        self.calls = 0
        self.at_once = 0

    def __call__(self, root, download):
        assert download
        self.at_once += 1
        assert self.at_once == 1
        if not (root / "eurosat").exists():
            self.calls += 1
            threading.Event().wait(0.2)
            WRITERS["eurosat"](root, official=True)
        self.at_once -= 1


@pytest.fixture
def download(monkeypatch):
    fake = Download()
    monkeypatch.setattr(EuroSATDataModule, "torchvision_class", fake)
    return fake


def test_download_once_for_processes_that_start_together(tmp_path, download):
    root = tmp_path / "new"
    found = []
    ranks = [
        threading.Thread(target=lambda: found.append(made("eurosat", root, download=True).pictures("test")))
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert download.calls == 1
    assert [len(pictures) for pictures in found] == [30] * 3


@pytest.mark.parametrize("below", ["", "EuroSAT"])
def test_nothing_is_downloaded_that_is_there_under_another_name(tmp_path, write, monkeypatch, below):
    write("eurosat")
    (tmp_path / "eurosat").rename(tmp_path / "EuroSAT")
    monkeypatch.setattr(EuroSATDataModule, "torchvision_class", None)  # calling it would fail
    assert made("eurosat", tmp_path / below, download=True).root == tmp_path / "EuroSAT"


def test_failed_download(tmp_path, monkeypatch):
    def fail(root, download):
        raise OSError("no route to host")

    monkeypatch.setattr(EuroSATDataModule, "torchvision_class", fail)
    with pytest.raises(
        RuntimeError, match=r"EuroSAT could not be downloaded by torchvision \(no route to host\).*2750/"
    ):
        made("eurosat", tmp_path, download=True)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("stanford_cars", r"stanford_cars/ by hand, with cars_train/\*.jpg, cars_test/"),
        ("ucf101", "UCF-101-midframes/"),
    ],
)
def test_what_cannot_be_downloaded(tmp_path, name, layout):
    message = rf"cannot be downloaded: .*{layout}.*{LEAVES[name].split_file} goes there too"
    with pytest.raises(ValueError, match=message):
        LEAVES[name](tmp_path, download=True)
