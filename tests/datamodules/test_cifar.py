"""CIFAR-10, CIFAR-100 and their corrupted test sets in small copies of their files."""

import hashlib
import pickle
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.fake_data import cifar as fake

from metatpt.datamodules.cifar import (
    CIFAR10_CLASSES,
    CIFAR100_CLASSES,
    CIFAR10CDataModule,
    CIFAR10DataModule,
    CIFAR100CDataModule,
    CIFAR100DataModule,
)
from metatpt.types import Preprocessing

PLAIN = pytest.mark.parametrize(
    ("datamodule_class", "write", "files", "key", "n_classes"),
    [
        (
            CIFAR10DataModule,
            fake.write_cifar10,
            {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
            "labels",
            10,
        ),
        (CIFAR100DataModule, fake.write_cifar100, {"train": ["train"], "test": ["test"]}, "fine_labels", 100),
    ],
)
CORRUPTED = pytest.mark.parametrize(
    ("datamodule_class", "write", "n"),
    [(CIFAR10CDataModule, fake.write_cifar10_c, 20), (CIFAR100CDataModule, fake.write_cifar100_c, 100)],
)


def set_up(datamodule, stage="test"):
    datamodule.preprocessing = Preprocessing(32, (0,) * 3, (1,) * 3)
    datamodule.setup(stage)
    return datamodule


def rows_of(loader):
    """Path, label, index and pixels of every row; at 32 x 32 pixels view 0 is the picture itself."""
    return [
        (path, label, index, (image * 255).round().byte().permute(1, 2, 0).numpy())
        for batch in loader
        for path, label, index, image in zip(
            batch.path, batch.label.tolist(), batch.index.tolist(), batch.image, strict=True
        )
    ]


# Class names


def test_class_names_have_the_official_order():
    assert " ".join(CIFAR10_CLASSES) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert len(CIFAR100_CLASSES) == len(set(CIFAR100_CLASSES)) == 100
    assert list(CIFAR100_CLASSES) == sorted(CIFAR100_CLASSES)
    # the fine labels of the coarse classes "trees" and "vehicles 1"
    assert [CIFAR100_CLASSES[label] for label in (47, 52, 56, 59, 96)] == [
        "maple_tree",
        "oak_tree",
        "palm_tree",
        "pine_tree",
        "willow_tree",
    ]
    assert [CIFAR100_CLASSES[label] for label in (8, 13, 48, 58, 90)] == [
        "bicycle",
        "bus",
        "motorcycle",
        "pickup_truck",
        "train",
    ]


@PLAIN
def test_other_class_names_in_the_files(tmp_path, datamodule_class, write, files, key, n_classes):
    write(tmp_path)
    datamodule = datamodule_class(tmp_path, partial=True)
    datamodule.pictures("test")
    meta = datamodule.root / datamodule_class.dataset.meta["filename"]
    content = pickle.loads(meta.read_bytes())
    content[datamodule_class.dataset.meta["key"]].reverse()
    meta.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"meta: expected the class names of {datamodule.title} .*got {n_classes}: "):
        datamodule.pictures("test")


# CIFAR-10 and CIFAR-100


@PLAIN
def test_splits(tmp_path, monkeypatch, datamodule_class, write, files, key, n_classes):
    write(tmp_path)
    expected, held = {}, []
    for part, names in files.items():
        contents = [pickle.loads(next(tmp_path.rglob(name)).read_bytes()) for name in names]
        pixels = np.concatenate([content["data"] for content in contents])
        labels = [label for content in contents for label in content[key]]
        for place, (row, label) in enumerate(zip(pixels, labels, strict=True)):
            expected[f"{part}/{place:05d}"] = (label, np.stack(np.split(row, 3), -1).reshape(32, 32, 3))
    for seed in ("0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        datamodule = set_up(datamodule_class(tmp_path, partial=True, batch_size=16), None)
        assert datamodule.class_names == list({10: CIFAR10_CLASSES, 100: CIFAR100_CLASSES}[n_classes])
        found = {
            "train": rows_of(datamodule.train_dataloader()),
            "val": rows_of(datamodule.val_dataloader()),
            "test": rows_of(datamodule.test_dataloader()),
        }
        for part in found.values():
            for path, label, _, pixels in part:
                assert label == expected[path][0]
                assert np.array_equal(pixels, expected[path][1])
        for part in ("val", "test"):
            assert [index for _, _, index, _ in found[part]] == list(range(len(found[part])))
            assert [row[0] for row in found[part]] == sorted(row[0] for row in found[part])
        assert sorted(row[0] for part in found.values() for row in part) == sorted(expected)
        assert {row[0].split("/")[0] for row in found["test"]} == {"test"}
        whole = Counter(label for path, (label, _) in expected.items() if path.startswith("train"))
        assert Counter(row[1] for row in found["val"]) == {label: -(-n // 10) for label, n in whole.items()}
        held.append([row[0] for row in found["val"]])
    assert held[0] == held[1]


@PLAIN
def test_published_numbers(tmp_path, datamodule_class, write, files, key, n_classes):
    write(tmp_path)
    datamodule = datamodule_class(tmp_path)
    # a tenth of each class: 10 x 500 or 100 x 50
    assert [datamodule.published(split) for split in ("train", "val", "test")] == [45_000, 5_000, 10_000]


@PLAIN
def test_checksums(tmp_path, monkeypatch, datamodule_class, write, files, key, n_classes):
    write(tmp_path)
    datamodule = datamodule_class(tmp_path)
    with pytest.raises(ValueError, match=rf"not the published ones of {datamodule.title}: their checksums differ"):
        datamodule.pictures("test")
    for name in ("train_list", "test_list"):
        sums = [[file, md5(datamodule.root / file)] for file, _ in getattr(datamodule.dataset, name)]
        monkeypatch.setattr(datamodule.dataset, name, sums)
    meta = datamodule.dataset.meta
    monkeypatch.setattr(datamodule.dataset, "meta", {**meta, "md5": md5(datamodule.root / meta["filename"])})
    with pytest.raises(ValueError, match=rf"{datamodule.title}, split test: found \d+ of 10000 pictures"):
        datamodule.pictures("test")


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


@PLAIN
def test_roots(tmp_path, datamodule_class, write, files, key, n_classes):
    write(tmp_path)
    folder = datamodule_class.dataset.base_folder
    assert datamodule_class(tmp_path).root == tmp_path / folder
    (tmp_path / folder).rename(tmp_path / "renamed")
    assert len(datamodule_class(tmp_path / "renamed", partial=True).pictures("test")) > 0
    (tmp_path / "renamed" / files["train"][0]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"does not hold {datamodule_class.title} as .*the version for Python"):
        datamodule_class(tmp_path / "renamed", partial=True)


@PLAIN
def test_download(tmp_path, monkeypatch, datamodule_class, write, files, key, n_classes):
    calls = []

    def download(self, root, download):
        assert download
        calls.append(root)
        write(root)

    monkeypatch.setattr(datamodule_class.dataset, "__init__", download)
    new = tmp_path / "a" / "new"
    folder = new / datamodule_class.dataset.base_folder
    for root in (new, new, folder):
        assert datamodule_class(root, download=True).root == folder
    assert calls == [new]


@PLAIN
def test_a_download_that_fails(tmp_path, monkeypatch, datamodule_class, write, files, key, n_classes):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    message = (
        rf"{datamodule_class.title} could not be downloaded by torchvision \(no network\).*Unpack https?://.*\.tar\.gz"
    )
    with pytest.raises(RuntimeError, match=message):
        datamodule_class(tmp_path, download=True)


def test_processes_that_start_together_download_once(tmp_path, monkeypatch):
    calls = []

    def download(self, root, download):
        calls.append(root)
        time.sleep(0.2)
        fake.write_cifar10(root)

    monkeypatch.setattr(CIFAR10DataModule.dataset, "__init__", download)
    together = threading.Barrier(4)  # threads do: the lock is the file's

    def start(_):
        together.wait()
        return CIFAR10DataModule(tmp_path, download=True).root

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(start, range(4))) == [tmp_path / "cifar-10-batches-py"] * 4
    assert calls == [tmp_path]


# CIFAR-10-C and CIFAR-100-C


@CORRUPTED
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_a_severity_is_its_rows(tmp_path, datamodule_class, write, n, severity):
    write(tmp_path)
    (file,) = tmp_path.rglob("gaussian_noise.npy")
    pixels, labels = np.load(file), np.load(file.with_name("labels.npy"))
    datamodule = set_up(datamodule_class(tmp_path, severity=severity, partial=True), None)
    for loader in (datamodule.test_dataloader(), datamodule.val_dataloader()):
        rows = rows_of(loader)
        assert len(rows) == n
        for place, (path, label, index, image) in enumerate(rows):
            row = (severity - 1) * n + place
            assert (path, label, index) == (f"gaussian_noise/{severity}/{place:05d}", labels[row], place)
            assert np.array_equal(image, pixels[row])
    assert datamodule.source == f"gaussian_noise {severity}"
    with pytest.raises(ValueError, match="no train split"):
        datamodule.setup("fit")


def test_corruptions_are_files_of_their_own(tmp_path):
    fake.write_cifar10_c(tmp_path)
    pixels = [
        set_up(CIFAR10CDataModule(tmp_path, corruption=name, partial=True)).pictures("test")[0]
        for name in ("fog", "gaussian_noise")
    ]
    assert [picture.path for picture in pixels] == ["fog/5/00000", "gaussian_noise/5/00000"]
    assert pixels[0].label == pixels[1].label
    assert np.asarray(pixels[0].source).tolist() != np.asarray(pixels[1].source).tolist()


def test_the_published_size(tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    fake.write_corrupted(folder, 10_000, 10, "uint8")
    labels = np.load(folder / "labels.npy")
    array = np.lib.format.open_memmap(folder / "fog.npy", "w+", np.uint8, (50_000, 32, 32, 3))  # sparse on the disk
    array[20_042] = 7
    del array
    pictures = CIFAR10CDataModule(folder, corruption="fog", severity=3).pictures("test")
    assert len(pictures) == 10_000
    assert pictures.labels == labels[20_000:30_000].tolist()
    assert pictures[42].path == "fog/3/00042"
    assert (np.asarray(pictures[42].source) == 7).all()
    assert (np.asarray(pictures[41].source) == 0).all()
    # 150 MB in the file; workers get names and labels
    assert len(pickle.dumps(pictures)) < 1_000_000
    assert np.array_equal(pickle.loads(pickle.dumps(pictures))[42].source, pictures[42].source)


@CORRUPTED
def test_too_few_pictures(tmp_path, datamodule_class, write, n):
    write(tmp_path)
    with pytest.raises(ValueError, match=rf"{datamodule_class.title}, split test: found {n} of 10000 pictures"):
        datamodule_class(tmp_path).pictures("test")


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5, "x"])
def test_no_such_severity(tmp_path, severity):
    fake.write_cifar10_c(tmp_path)
    with pytest.raises(ValueError, match=r"severity .* is none of 1, 2, 3, 4, 5"):
        CIFAR10CDataModule(tmp_path, severity=severity)


def test_no_such_corruption(tmp_path):
    fake.write_cifar10_c(tmp_path)
    with pytest.raises(ValueError, match=r"no corruption 'gausian_noise' \(nearest: gaussian_noise.*expected one of"):
        CIFAR10CDataModule(tmp_path, corruption="gausian_noise")
    with pytest.raises(FileNotFoundError, match=r"No file snow\.npy in .*there are: fog, gaussian_noise"):
        CIFAR10CDataModule(tmp_path, corruption="snow").pictures("test")


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((100, 32, 32, 3), np.float32), r"float32 \[100, 32, 32, 3\]"),
        (np.zeros((100, 3, 32, 32), np.uint8), r"uint8 \[100, 3, 32, 32\]"),
        (np.zeros((101, 32, 32, 3), np.uint8), r"uint8 \[101, 32, 32, 3\]"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"uint8 \[0, 32, 32, 3\]"),
        (np.uint8(3), r"uint8 \[\]"),
    ],
)
def test_wrong_arrays(tmp_path, array, found):
    fake.write_cifar10_c(tmp_path)
    np.save(tmp_path / "CIFAR-10-C" / "fog.npy", array)
    with pytest.raises(ValueError, match=rf"fog\.npy: expected uint8 \[50000, 32, 32, 3\].*got {found}"):
        CIFAR10CDataModule(tmp_path, corruption="fog", partial=True).pictures("test")


def test_damaged_arrays(tmp_path):
    fake.write_cifar10_c(tmp_path)
    file = tmp_path / "CIFAR-10-C" / "fog.npy"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"<html>"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"fog\.npy: expected an array .*damaged"):
            CIFAR10CDataModule(tmp_path, corruption="fog", partial=True).pictures("test")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(99) % 10, r"an integer for each of the 100 rows of fog\.npy, got int64 \[99\]"),
        (np.arange(100.0) % 10, r"an integer for each of the 100 rows of fog\.npy, got float64 \[100\]"),
        (np.arange(100) % 11, r"labels from 0 to 9, each of them, got 11 from 0 to 10\. Is it another data set's"),
        (np.arange(100) % 10 - 1, r"labels from 0 to 9, each of them, got 10 from -1 to 8"),
        (np.repeat(np.arange(10), 10), r"the same labels at each of the 5 severities, in order"),
    ],
)
def test_wrong_labels(tmp_path, labels, message):
    fake.write_cifar10_c(tmp_path)
    np.save(tmp_path / "CIFAR-10-C" / "labels.npy", labels)
    with pytest.raises(ValueError, match=rf"labels\.npy: expected {message}"):
        CIFAR10CDataModule(tmp_path, corruption="fog", partial=True).pictures("test")


def test_the_labels_of_the_other_data_set(tmp_path):
    fake.write_cifar10_c(tmp_path / "ten")
    with pytest.raises(ValueError, match=r"labels from 0 to 99, each of them, got 10 from 0 to 9"):
        CIFAR100CDataModule(tmp_path / "ten" / "CIFAR-10-C").pictures("test")
    fake.write_cifar100_c(tmp_path / "hundred")
    with pytest.raises(ValueError, match=r"labels from 0 to 9, each of them, got 100 from 0 to 99"):
        CIFAR10CDataModule(tmp_path / "hundred" / "CIFAR-100-C", partial=True).pictures("test")


def test_workers_change_nothing(tmp_path):
    fake.write_cifar10_c(tmp_path)
    alone, with_workers = (
        rows_of(set_up(CIFAR10CDataModule(tmp_path, partial=True, num_workers=workers)).test_dataloader())
        for workers in (0, 2)
    )
    for one, other in zip(alone, with_workers, strict=True):
        assert one[:3] == other[:3]
        assert np.array_equal(one[3], other[3])
