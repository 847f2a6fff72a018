"""ImageNet and its relatives in small copies of their layouts."""

import csv
import random
import re
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
from helpers.fake_data import imagenet as fake
from helpers.fake_data.imagenet import NUMBERS, synsets, write_class_folders

from metatpt.datamodules.imagenet import (
    CORRUPTIONS,
    ImageNetADataModule,
    ImageNetCDataModule,
    ImageNetDataModule,
    ImageNetRDataModule,
    ImageNetSketchDataModule,
    ImageNetV2DataModule,
)
from metatpt.types import Preprocessing

SHARED = Path(__file__).parents[3] / "shared"
IDS = synsets("imagenet")
NAME_OF = {
    folder: name
    for folders in (IDS, NUMBERS)
    for folder, name in zip(folders, open_clip.IMAGENET_CLASSNAMES, strict=True)
}
FEW = ["n01440764", "n02012849", "n03126707"]  # tench; the crane that flies, and the one that lifts
WRITERS = {
    ImageNetDataModule: fake.write_imagenet,
    ImageNetV2DataModule: fake.write_imagenet_v2,
    ImageNetADataModule: fake.write_imagenet_a,
    ImageNetRDataModule: fake.write_imagenet_r,
    ImageNetSketchDataModule: fake.write_imagenet_sketch,
    ImageNetCDataModule: fake.write_imagenet_c,
}
ALL = pytest.mark.parametrize("datamodule_class", WRITERS, ids=lambda each: each.title)


def set_up(datamodule, stage="test"):
    datamodule.preprocessing = Preprocessing(16, (0,) * 3, (1,) * 3)
    datamodule.setup(stage)
    return datamodule


def read_all(datamodule):
    """Paths of the test split and the names of their classes, out of the loader."""
    batches = list(set_up(datamodule).test_dataloader())
    assert not any(any(batch.error) for batch in batches)
    paths = [path for batch in batches for path in batch.path]
    assert [index for batch in batches for index in batch.index.tolist()] == list(range(len(paths)))
    return paths, [datamodule.class_names[label] for batch in batches for label in batch.label.tolist()]


@pytest.fixture(scope="module", params=WRITERS, ids=lambda each: each.title)
def whole(request, tmp_path_factory):
    """A datamodule class, and the root of a data set with all its class folders, to be read only."""
    root = tmp_path_factory.mktemp("whole")
    WRITERS[request.param](root)
    return request.param, root


def test_every_picture_has_the_name_of_its_folder(whole):
    datamodule_class, root = whole
    paths, names = read_all(datamodule_class(root, partial=True, batch_size=50))
    assert len(paths) == len(datamodule_class.folders())
    assert paths == sorted(paths)
    assert names == [NAME_OF[path.split("/")[-2]] for path in paths]


@ALL
def test_the_order_in_which_files_were_made_does_not_matter(datamodule_class, tmp_path):
    found = []
    for seed in (0, 1):
        root = tmp_path / f"{seed}" / "gaussian_noise" / "5"
        write_class_folders(root, datamodule_class.folders()[::25], "{number}.jpg", seed)
        pictures = datamodule_class(root, partial=True).pictures("test")
        found.append((pictures.paths, pictures.labels))
    assert found[0] == found[1]


def test_what_is_known_of_the_classes(tmp_path):
    for module, folders in ((ImageNetDataModule, IDS), (ImageNetV2DataModule, NUMBERS)):
        write_class_folders(tmp_path / module.title, folders[:3], "{number}.jpg")
        names = module(tmp_path / module.title).class_names
        assert len(names) == 1000
        assert (names[0], names[10], names[281], names[999]) == ("tench", "brambling", "tabby cat", "toilet paper")
        assert (names.count("missile"), names.count("sunglasses")) == (2, 2)  # no fault: two classes each
    of_a = ImageNetADataModule(tmp_path / "ImageNet").class_names
    of_r = ImageNetRDataModule(tmp_path / "ImageNet").class_names
    assert len(of_a) == len(of_r) == 200
    assert (of_a[0], of_r[0]) == ("stingray", "goldfish")
    assert ("tench" in of_a, "tench" in of_r, "goldfish" in of_a, "stingray" in of_r) == (False, False, False, True)
    for names, subset in ((of_a, "imagenet_a"), (of_r, "imagenet_r")):
        listed = set(synsets(subset))
        assert names == [NAME_OF[folder] for folder in IDS if folder in listed]


def test_published_counts(whole, monkeypatch):
    datamodule_class, root = whole
    n = len(datamodule_class.folders())
    datamodule = datamodule_class(root)
    with pytest.raises(ValueError, match=rf"split test: found {n} of {datamodule.n_pictures} .*data.partial true"):
        datamodule.pictures("test")
    monkeypatch.setattr(datamodule_class, "n_pictures", n)
    assert len(datamodule.pictures("test")) == set_up(datamodule).n_total == n
    monkeypatch.setattr(datamodule_class, "n_pictures", n - 1)
    with pytest.raises(ValueError, match=f"found {n} of {n - 1} pictures"):
        datamodule_class(root, partial=True).pictures("test")


@ALL
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_published_counts_are_those_in_the_table(datamodule_class):
    table = (SHARED / "DATASETS.md").read_text()
    (row,) = re.findall(rf"^\| {datamodule_class.title}(?: \(.*?\))? \|.*$", table, re.MULTILINE)
    pictures, classes = row.split("|")[3:5]
    assert datamodule_class.n_pictures == int(pictures.replace(",", "").replace("each", ""))
    assert len(datamodule_class.folders()) == int(classes)


@ALL
def test_a_missing_and_a_stray_class_folder(datamodule_class, tmp_path):
    root = tmp_path / "gaussian_noise" / "5"
    write_class_folders(root, datamodule_class.folders(), "{number}.jpg")
    name = datamodule_class.folders()[7]
    (root / name).rename(root / f"{name}x")
    with pytest.raises(ValueError, match=rf"no class: {name}x \(nearest: .*{name}.*\); missing: {name}\.") as error:
        datamodule_class(root, partial=True).pictures("test")
    assert "look like" not in str(error.value)
    (root / f"{name}x").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"missing: {name}; to run on a part of it, set --data.partial true"):
        datamodule_class(root).pictures("test")
    pictures = datamodule_class(root, partial=True).pictures("test")
    assert len(pictures) == len(datamodule_class.folders()) - 1
    assert 7 not in pictures.labels


@pytest.mark.parametrize(
    ("given", "wanted", "folders"),
    [
        ("ImageNet", ImageNetV2DataModule, IDS),
        ("ImageNet-V2", ImageNetDataModule, NUMBERS),
        ("ImageNet-V2", ImageNetSketchDataModule, NUMBERS),
        ("ImageNet", ImageNetADataModule, IDS),
        ("ImageNet-A", ImageNetRDataModule, synsets("imagenet_a")),
        ("ImageNet-R", ImageNetADataModule, synsets("imagenet_r")),
        ("ImageNet-R", ImageNetDataModule, synsets("imagenet_r")),
    ],
)
def test_another_one_of_the_family(given, wanted, folders, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir()
    cause = rf"look like the class folders of {given}, which {given.replace('-', '')}DataModule reads"
    with pytest.raises(ValueError, match=cause):
        wanted(tmp_path).pictures("test")


@pytest.mark.parametrize(
    ("datamodule_class", "given", "place"),
    [
        (ImageNetDataModule, "", "val"),
        (ImageNetDataModule, "", "validation"),
        (ImageNetDataModule, "", "ILSVRC2012_img_val"),
        (ImageNetDataModule, "val", "val"),
        (ImageNetDataModule, "", "ImageNet/val"),
        (ImageNetDataModule, "", "imagenet/images/val"),
        (ImageNetDataModule, "imagenet", "imagenet/images/val"),
        (ImageNetDataModule, "", "ILSVRC/Data/CLS-LOC/val"),
        (ImageNetDataModule, "ILSVRC", "ILSVRC/Data/CLS-LOC/val"),
        (ImageNetDataModule, "", "imagenet-object-localization-challenge/ILSVRC/Data/CLS-LOC/val"),
        (ImageNetV2DataModule, "", "imagenetv2-matched-frequency-format-val"),
        (ImageNetV2DataModule, "", "ImageNetV2-matched-frequency"),
        (ImageNetV2DataModule, "", "imagenetv2/imagenetv2-matched-frequency-format-val"),
        (ImageNetV2DataModule, "imagenetv2", "imagenetv2/imagenetv2-matched-frequency-format-val"),
        (ImageNetV2DataModule, "v2", "v2"),
        (ImageNetADataModule, "", ""),
        (ImageNetADataModule, "", "imagenet-a"),
        (ImageNetADataModule, "", "imagenet-adversarial/imagenet-a"),
        (ImageNetADataModule, "imagenet-adversarial", "imagenet-adversarial/imagenet-a"),
        (ImageNetRDataModule, "", ""),
        (ImageNetRDataModule, "", "imagenet-r"),
        (ImageNetRDataModule, "", "imagenet-rendition/imagenet-r"),
        (ImageNetSketchDataModule, "", ""),
        (ImageNetSketchDataModule, "", "sketch"),
        (ImageNetSketchDataModule, "", "ImageNet-Sketch/sketch"),
        (ImageNetSketchDataModule, "", "imagenet-sketch/images"),
        (ImageNetSketchDataModule, "imagenet-sketch", "imagenet-sketch/images"),
        (ImageNetCDataModule, "", "gaussian_noise/5"),
        (ImageNetCDataModule, "", "noise/gaussian_noise/5"),
        (ImageNetCDataModule, "", "ImageNet-C/noise/gaussian_noise/5"),
        (ImageNetCDataModule, "imagenet-c/gaussian_noise", "imagenet-c/gaussian_noise/5"),
        (ImageNetCDataModule, "imagenet-c/gaussian_noise/5", "imagenet-c/gaussian_noise/5"),
    ],
)  # fmt: skip
def test_layouts_in_use(datamodule_class, given, place, tmp_path):
    folders = ["10", "2"] if datamodule_class is ImageNetV2DataModule else ["n02123597", "n02085620", "n01443537"]
    if datamodule_class is ImageNetADataModule:
        folders = ["n01498041", "n01531178"]
    elif datamodule_class is ImageNetRDataModule:
        folders = ["n01443537", "n01484850"]
    (tmp_path / "other").mkdir()
    write_class_folders(tmp_path / place, folders, "{number}.JPEG")
    if place == "":
        (tmp_path / "other").rmdir()
    datamodule = datamodule_class(tmp_path / given, partial=True)
    paths, names = read_all(datamodule)
    assert names == [NAME_OF[path.split("/")[-2]] for path in paths]
    assert {datamodule.root / path for path in paths} == set((tmp_path / place).rglob("*.JPEG"))


@ALL
def test_nothing_of_the_kind(datamodule_class, tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(FileNotFoundError, match=f"does not hold {datamodule_class.title} as .*Found there: cats"):
        datamodule_class(tmp_path)


def test_validation_of_the_others_is_their_test_split(tmp_path):
    write_class_folders(tmp_path, FEW, "{number}.jpg")
    for each in set(WRITERS) - {ImageNetDataModule}:
        assert each.splits == ("val", "test")
    datamodule = ImageNetSketchDataModule(tmp_path, partial=True)
    assert datamodule.pictures("val") == datamodule.pictures("test")
    with pytest.raises(ValueError, match="has no train split"):
        set_up(datamodule, "fit")


# --- ImageNet: training pictures


@pytest.fixture
def trained(tmp_path):
    """Three classes with 4, 30 and 400 pictures to train on, and one each to test on."""
    for folder, n in zip(FEW, (4, 30, 400), strict=True):
        write_class_folders(tmp_path / "train", [folder], "{folder}_{number}.JPEG", n=n)
    write_class_folders(tmp_path / "val", FEW, "ILSVRC2012_val_{number:08}.JPEG")
    return tmp_path


def test_validation_is_a_fixed_part_of_train(trained, monkeypatch):
    chosen = []
    for seed in ("0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        datamodule = set_up(ImageNetDataModule(trained, partial=True), "fit")
        train, val = datamodule.pictures("train"), datamodule.pictures("val")
        assert [val.labels.count(IDS.index(folder)) for folder in FEW] == [1, 6, 50]
        assert not set(train.paths) & set(val.paths)
        everything = {path.relative_to(trained).as_posix() for path in (trained / "train").rglob("*.JPEG")}
        assert set(train.paths) | set(val.paths) == everything
        for pictures in (train, val):
            assert pictures.paths == sorted(pictures.paths)
            assert [IDS[label] for label in pictures.labels] == [path.split("/")[1] for path in pictures.paths]
        assert sum(len(batch) for batch in datamodule.val_dataloader()) == 57
        chosen.append(val.paths)
    assert chosen[0] == chosen[1]
    assert {path.split("/")[0] for path in datamodule.pictures("test").paths} == {"val"}


def test_a_class_alone_has_the_same_validation_pictures(trained):
    together = ImageNetDataModule(trained, partial=True).pictures("val").paths
    for folder in FEW[:2]:
        (trained / "train" / folder).rename(trained / folder.replace("n", "other"))
    alone = ImageNetDataModule(trained, partial=True).pictures("val").paths
    assert alone == [path for path in together if FEW[2] in path]


def test_counts_of_the_training_pictures(trained, monkeypatch):
    whole = 1_281_167
    datamodule = ImageNetDataModule(trained, partial=True)
    assert datamodule.published("train") + datamodule.published("val") == whole
    assert datamodule.published("val") == 50 * 1000
    monkeypatch.setattr(ImageNetDataModule, "folders", classmethod(lambda cls: FEW))
    monkeypatch.setattr(ImageNetDataModule, "n_train", 50 * 1000 + 377)
    with pytest.raises(ValueError, match="split val: found 57 of 50000 pictures"):
        ImageNetDataModule(trained).pictures("val")
    assert len(ImageNetDataModule(trained).pictures("train")) == 377


def test_no_training_pictures(trained):
    (trained / "train").rename(trained / "trian")
    datamodule = ImageNetDataModule(trained, partial=True)
    for stage in ("fit", "validate"):
        with pytest.raises(FileNotFoundError, match=r"No folder train or .*there are: trian, val\. Training and"):
            set_up(datamodule, stage)
    assert len(read_all(datamodule)[0]) == 3


def test_no_pictures_to_test_on(trained):
    (trained / "val").rename(trained / "elsewhere")
    datamodule = ImageNetDataModule(trained, partial=True)
    assert len(datamodule.pictures("train")) == 377
    with pytest.raises(FileNotFoundError, match="No folder val or validation or"):
        set_up(datamodule)


# --- ImageNet: the validation pictures in one folder


@pytest.fixture
def sorted_root(tmp_path):
    """In class folders; a picture's number says nothing of its class."""
    root = tmp_path / "sorted"
    order = random.Random(0).sample(IDS, 40)
    write_class_folders(root / "val", order, "ILSVRC2012_val_{number:08}.JPEG")
    return root


def flatten(sorted_root, place):
    """The same pictures in one folder; returns the WordNet id of each."""
    place.mkdir(parents=True)
    ids = {}
    for path in (sorted_root / "val").rglob("*.JPEG"):
        (place / path.name).write_bytes(path.read_bytes())
        ids[path.stem] = path.parent.name
    return ids


def write_solution(file, ids):
    with file.open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(["ImageId", "PredictionString"])
        for turn, (stem, wordnet_id) in enumerate(ids.items()):
            rows.writerow([stem, f"{wordnet_id} 10 20 {30 + turn} 40 " * (1 + turn % 3)])


def same_as_sorted(flat, sorted_root):
    """The flat pictures have the index, the file and the name that they have in class folders."""
    paths, names = read_all(flat)
    sorted_paths, sorted_names = read_all(ImageNetDataModule(sorted_root, partial=True))
    assert [Path(path).name for path in paths] == [Path(path).name for path in sorted_paths]
    assert names == sorted_names
    assert len(set(names)) > 30


@pytest.mark.parametrize(
    ("given", "val", "solution"),
    [
        ("", "ILSVRC/Data/CLS-LOC/val", ""),
        ("ILSVRC/Data/CLS-LOC/val", "ILSVRC/Data/CLS-LOC/val", ""),
        ("", "imagenet/val", "imagenet"),
        ("", "val", "val"),
    ],
)
def test_flat_with_the_labels_of_kaggle(given, val, solution, sorted_root, tmp_path):
    root = tmp_path / "flat"
    write_ids = flatten(sorted_root, root / val)
    write_solution(root / solution / "LOC_val_solution.csv", write_ids)
    same_as_sorted(ImageNetDataModule(root / given, partial=True), sorted_root)


def write_devkit(root, ids, scipy_io):
    """The devkit's files: ILSVRC's numbers do not follow the order of the ids, and there are synsets above classes."""
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    numbers = dict(zip(random.Random(1).sample(IDS, 1000), range(1, 1001), strict=True)) | {"n00001740": 1001}
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    table = [(float(number), wordnet_id, "a, b", 0.0) for wordnet_id, number in numbers.items()]
    scipy_io.savemat(data / "meta.mat", {"synsets": np.array(table, dtype=fields)[:, None]})
    lines = [f"{numbers[ids[stem]]}\n" for stem in sorted(ids)]
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))


def test_flat_with_the_labels_of_the_devkit(sorted_root, tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    root = tmp_path / "flat"
    write_devkit(root, flatten(sorted_root, root / "val"), scipy_io)
    same_as_sorted(ImageNetDataModule(root, partial=True), sorted_root)


def test_the_devkit_without_scipy(sorted_root, tmp_path, monkeypatch):
    root = tmp_path / "flat"
    flatten(sorted_root, root / "val")
    (root / "ILSVRC2012_devkit_t12" / "data").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"pip install 'metatpt\[scipy\]'\. Or put Kaggle's LOC_val_solution.csv"):
        ImageNetDataModule(root, partial=True).pictures("test")


def test_flat_without_labels(sorted_root, tmp_path):
    root = tmp_path / "flat"
    flatten(sorted_root, root / "val")
    message = r"flat/val has all .* in one folder: .*LOC_val_solution.csv or .*ILSVRC2012_devkit_t12.* WordNet id"
    with pytest.raises(FileNotFoundError, match=message):
        ImageNetDataModule(root, partial=True).pictures("test")


@pytest.mark.parametrize("change", ["removed", "of another data set"])
def test_flat_with_labels_that_lack_a_picture(change, sorted_root, tmp_path):
    root = tmp_path / "flat"
    ids = flatten(sorted_root, root / "val")
    ids["ILSVRC2012_val_00000005"] = "n99999999"
    if change == "removed":
        del ids["ILSVRC2012_val_00000005"]
    write_solution(root / "LOC_val_solution.csv", ids)
    with pytest.raises(ValueError, match=r"LOC_val_solution.csv has no class .* for 1 pictures in .*00000005.JPEG"):
        ImageNetDataModule(root, partial=True).pictures("test")


# --- ImageNet-V2: variants


@pytest.fixture
def variants(tmp_path):
    """All three, with a picture that is named after its variant in each."""
    for name in ("matched-frequency", "threshold0.7", "top-images"):
        write_class_folders(tmp_path / f"imagenetv2-{name}-format-val", ["10", "9"], f"{name}-{{number}}.jpeg")
    return tmp_path


@pytest.mark.parametrize("variant", ["matched-frequency", "threshold-0.7", "top-images"])
def test_the_variant_decides_the_pictures(variants, variant):
    datamodule = ImageNetV2DataModule(variants, variant=variant, partial=True)
    paths, names = read_all(datamodule)
    assert datamodule.source == variant
    assert names == ["brambling", "ostrich"]
    assert all(path.rpartition("/")[2].startswith(variant.replace("-0", "0")) for path in paths)
    assert len(paths) == 2


def test_a_variant_that_is_not_there(variants):
    with pytest.raises(ValueError, match=r"no variant 'matched' \(nearest: matched-frequency\): expected one of"):
        ImageNetV2DataModule(variants, variant="matched")
    (variants / "imagenetv2-top-images-format-val").rename(variants / "top")
    message = r"No folder imagenetv2-top-images-format-val in .*threshold0.7-format-val, top\. .*--data.variant"
    with pytest.raises(FileNotFoundError, match=message):
        ImageNetV2DataModule(variants, variant="top-images")
    assert ImageNetV2DataModule(variants / "top", variant="top-images", partial=True).n_pictures


def test_the_folder_of_another_variant(variants):
    message = r"is the variant threshold-0.7 .* but variant is matched-frequency: set --data"
    with pytest.raises(ValueError, match=message):
        ImageNetV2DataModule(variants / "imagenetv2-threshold0.7-format-val")


# --- ImageNet-C: corruptions


@pytest.fixture
def corrupted(tmp_path):
    """Two corruptions at two severities, one of them in the folder of its archive."""
    for place in ("snow/1", "snow/3", "extra/spatter/1", "extra/spatter/3"):
        write_class_folders(tmp_path / place, FEW, f"{place.replace('/', '-')}-{{number}}.JPEG")
    return tmp_path


@pytest.mark.parametrize("severity", [1, 3])
@pytest.mark.parametrize(("corruption", "place"), [("snow", "snow"), ("spatter", "extra/spatter")])
def test_corruption_and_severity_decide_the_pictures(corrupted, corruption, place, severity):
    datamodule = ImageNetCDataModule(corrupted, corruption, severity, partial=True)
    paths, names = read_all(datamodule)
    assert [path.rpartition("/")[0] for path in paths] == [f"{place}/{severity}/{folder}" for folder in FEW]
    assert names == [NAME_OF[folder] for folder in FEW]
    assert datamodule.source == f"{corruption} {severity}"


def test_there_are_19_corruptions():
    assert len(set(CORRUPTIONS)) == 19
    assert CORRUPTIONS[:3] == ("gaussian_noise", "shot_noise", "impulse_noise")
    assert CORRUPTIONS[15:] == ("speckle_noise", "gaussian_blur", "spatter", "saturate")


def test_wrong_corruption(corrupted):
    with pytest.raises(ValueError, match=r"no corruption 'gausian_noise' \(nearest: gaussian_noise, .*expected one of"):
        ImageNetCDataModule(corrupted, "gausian_noise")


@pytest.mark.parametrize(("severity", "nearest"), [(0, 1), (6, 5)])
def test_wrong_severity(corrupted, severity, nearest):
    with pytest.raises(ValueError, match=rf"severity {severity} is none of 1, 2, 3, 4, 5; the nearest is {nearest}"):
        ImageNetCDataModule(corrupted, "snow", severity)


def test_a_corruption_that_is_not_there(corrupted):
    message = r"No folder fog/3 in .*, nor in noise or blur .*Found: extra, snow\. .*five parts"
    with pytest.raises(FileNotFoundError, match=message):
        ImageNetCDataModule(corrupted, "fog", 3)
    for place in ("snow", "snow/1"):
        with pytest.raises(FileNotFoundError, match="No folder snow/5 in"):
            ImageNetCDataModule(corrupted / place, "snow", 5)
        with pytest.raises(FileNotFoundError, match="No folder fog/1 in"):
            ImageNetCDataModule(corrupted / place, "fog", 1)


# --- real pictures


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_one_picture_of_each_class():
    datamodule = ImageNetDataModule(SHARED / "data" / "imagenet-samples", partial=True, batch_size=50)
    paths, names = read_all(datamodule)
    assert len(paths) == 1000
    assert datamodule.n_total == 50_000  # a result on them says so
    assert names == [NAME_OF[path.split("/")[0]] for path in paths]
    # A file is n01440764_tench.jpg: seven in ten of these names, which are not open_clip's, are the same.
    told = [Path(path).stem.partition("_")[2].replace("_", " ").casefold() for path in paths]
    assert sum(ours.casefold() == theirs for ours, theirs in zip(names, told, strict=True)) > 700


def test_an_unpackers_folder_around_that_of_the_variant(tmp_path):
    fake.write_imagenet_v2(tmp_path / "plain")
    (variant,) = tmp_path.glob("plain/**/imagenetv2-matched-frequency-format-val")
    outer = tmp_path / "v2" / "imagenetv2-matched-frequency"
    outer.mkdir(parents=True)
    variant.rename(outer / variant.name)
    pictures = ImageNetV2DataModule(tmp_path / "v2", partial=True).pictures("test")
    assert {int(path.split("/")[2]) for path in pictures.paths} == set(range(1000))
    assert all(int(path.split("/")[2]) == label for path, label in zip(pictures.paths, pictures.labels, strict=True))


def test_training_pictures_are_not_tested_on(tmp_path):
    write_class_folders(tmp_path / "train", IDS, "{number}.JPEG")
    with pytest.raises(ValueError, match="training pictures by its name: give the folder that val and train lie in"):
        ImageNetDataModule(tmp_path / "train", partial=True).pictures("test")
