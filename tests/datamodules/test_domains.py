"""Data sets of several domains in small copies of their layouts."""

import hashlib
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.fake_data import domains as fake

from metatpt.datamodules.domains import (
    DomainNetDataModule,
    OfficeHomeDataModule,
    PACSDataModule,
    TerraIncognitaDataModule,
    VLCSDataModule,
)
from metatpt.rng import sample_generator
from metatpt.types import Preprocessing

SHARED = Path(__file__).parents[3] / "shared"
WRITERS = {
    PACSDataModule: fake.write_pacs,
    VLCSDataModule: fake.write_vlcs,
    OfficeHomeDataModule: fake.write_office_home,
    TerraIncognitaDataModule: fake.write_terra_incognita,
    DomainNetDataModule: fake.write_domain_net,
}
ALL = pytest.mark.parametrize("datamodule_class", WRITERS, ids=lambda each: each.title)


@pytest.fixture
def exact(monkeypatch):
    """Writes a small data set, whose numbers of pictures then are the published ones."""

    def exact(datamodule_class, root):
        WRITERS[datamodule_class](root)
        domains, sizes = datamodule_class.domains, {}
        for name in domains:
            (folder,) = [path for path in root.rglob(name) if path.is_dir()]
            sizes[name] = sum(path.is_file() for path in folder.rglob("*"))
        monkeypatch.setattr(
            datamodule_class, "domains", {name: domains[name]._replace(size=sizes[name]) for name in domains}
        )
        if datamodule_class is DomainNetDataModule:
            numbers = {
                name: [len((root / f"{name}_{part}.txt").read_text().splitlines()) for part in ("train", "test")]
                for name in domains
            }
            monkeypatch.setattr(datamodule_class, "listed", numbers)
        return root

    return exact


def set_up(datamodule, stage="test"):
    datamodule.preprocessing = Preprocessing(16, (0,) * 3, (1,) * 3)
    datamodule.setup(stage)
    return datamodule


def class_of(path):
    return path.split("/")[-2]


# All of them


@ALL
def test_the_whole_domain_is_tested(exact, tmp_path, datamodule_class):
    root = exact(datamodule_class, tmp_path)
    kind = {"split": "all"} if datamodule_class is DomainNetDataModule else {}
    for domain in datamodule_class.domains:
        datamodule = set_up(datamodule_class(root, domain=domain, **kind))
        batches = list(datamodule.test_dataloader())
        assert not any(any(batch.error) for batch in batches)
        paths = [path for batch in batches for path in batch.path]
        expected = sorted(path.relative_to(datamodule.root).as_posix() for path in root.rglob(f"{domain}/*/*.jpg"))
        assert paths == expected
        labels = [label for batch in batches for label in batch.label.tolist()]
        assert [datamodule.class_names[label] for label in labels] == list(map(class_of, paths))
        assert [index for batch in batches for index in batch.index.tolist()] == list(range(len(paths)))
        assert len(set(labels)) == len(datamodule.class_names) == datamodule.n_classes
        assert datamodule.source.startswith(domain)


@ALL
def test_validation_and_training_are_parts_of_the_other_domains(exact, tmp_path, monkeypatch, datamodule_class):
    root = exact(datamodule_class, tmp_path)
    kind = {"split": "all"} if datamodule_class is DomainNetDataModule else {}
    chosen = []
    for seed in ("0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        datamodule = set_up(datamodule_class(root, **kind), "fit")
        val, train = datamodule.pictures("val"), datamodule.pictures("train")
        assert val.paths == sorted(val.paths)
        assert train.paths == sorted(train.paths)
        assert [datamodule.class_names[label] for label in train.labels] == list(map(class_of, train.paths))
        assert [datamodule.class_names[label] for label in val.labels] == list(map(class_of, val.paths))
        everything = {path.relative_to(datamodule.root).as_posix() for path in root.rglob("*.jpg")}
        assert {*val.paths, *train.paths} == {
            path for path in everything if not path.startswith(f"{datamodule.domain}/")
        }
        whole = Counter(path.rpartition("/")[0] for path in everything if not path.startswith(datamodule.domain))
        held = Counter(path.rpartition("/")[0] for path in val.paths)
        assert held == {folder: -(-n // 5) for folder, n in whole.items()}
        assert not {*val.paths} & {*train.paths}
        if datamodule_class is PACSDataModule:  # the others have no loaders of their own
            assert sum(len(batch) for batch in datamodule.val_dataloader()) == len(val)
            assert sum(len(batch) for batch in datamodule.train_dataloader()) == len(train)
        chosen.append(val.paths)
    assert chosen[0] == chosen[1]


TOTALS = {PACSDataModule: 9991, VLCSDataModule: 10729, OfficeHomeDataModule: 15588}


@pytest.mark.parametrize("datamodule_class", TOTALS, ids=lambda each: each.title)
def test_published_totals(datamodule_class):
    assert sum(domain.size for domain in datamodule_class.domains.values()) == TOTALS[datamodule_class]


@pytest.mark.parametrize("datamodule_class", TOTALS, ids=lambda each: each.title)
def test_wrong_number_of_pictures(exact, tmp_path, datamodule_class):
    root = exact(datamodule_class, tmp_path)
    first, second = list(datamodule_class.domains)[:2]
    for extra in (False, True):
        path = min(root.rglob(f"{first}/*/*.jpg"))
        content = path.read_bytes()
        path.with_name("another.jpg").write_bytes(content) if extra else path.unlink()
        with pytest.raises(ValueError, match=rf"{datamodule_class.title}, split test: found \d+ of \d+ pictures"):
            datamodule_class(root, domain=first).pictures("test")
        datamodule_class(root, domain=second).pictures("test")
        for split in ("val", "train"):
            with pytest.raises(ValueError, match=rf"domain {first}: found \d+ of \d+ pictures in .*--data.partial"):
                datamodule_class(root, domain=second).pictures(split)
            if not extra:
                datamodule_class(root, domain=second, partial=True).pictures(split)
        path.write_bytes(content)
    with pytest.raises(ValueError, match="found"):
        datamodule_class(root, domain=first, partial=True).pictures("test")


NAMES = [
    (PACSDataModule, "Photo", "photo"),
    (PACSDataModule, "art", "art_painting"),
    (PACSDataModule, "Art Painting", "art_painting"),
    (VLCSDataModule, "caltech", "Caltech101"),
    (VLCSDataModule, "PASCAL", "VOC2007"),
    (VLCSDataModule, "sun_09", "SUN09"),
    (OfficeHomeDataModule, "real", "Real World"),
    (OfficeHomeDataModule, "RealWorld", "Real World"),
    (OfficeHomeDataModule, "Real_World", "Real World"),
    (TerraIncognitaDataModule, "L100", "location_100"),
    (TerraIncognitaDataModule, "38", "location_38"),
    (DomainNetDataModule, "QuickDraw", "quickdraw"),
]


@pytest.mark.parametrize(("datamodule_class", "given", "domain"), NAMES)
def test_names_of_domains_and_their_folders(tmp_path, datamodule_class, given, domain):
    WRITERS[datamodule_class](tmp_path)
    datamodule = datamodule_class(tmp_path, domain=given, partial=True)
    assert datamodule.domain == domain
    paths = datamodule.pictures("test").paths
    other = next(name for name in datamodule.domains if name != domain)
    val = datamodule_class(tmp_path, domain=other, partial=True).pictures("val").paths
    (datamodule.root / domain).rename(datamodule.root / "moved")
    (datamodule.root / "moved").rename(datamodule.root / given)  # in two steps, for disks on which case does not count
    assert datamodule.pictures("test").paths == [path.replace(domain, given, 1) for path in paths]
    renamed = datamodule_class(tmp_path, domain=other, partial=True).pictures("val").paths
    assert renamed == sorted(path.replace(f"{domain}/", f"{given}/", 1) for path in val)


def test_wrong_domain(tmp_path):
    fake.write_pacs(tmp_path)
    with pytest.raises(ValueError, match=r"no domain 'art_paintng' \(nearest: art_painting\): expected one of"):
        PACSDataModule(tmp_path, domain="art_paintng")


def test_missing_domain(tmp_path):
    fake.write_pacs(tmp_path)
    (tmp_path / "photo").rename(tmp_path / "photos")
    message = r"No folder photo in .*PACS as <root>/<domain>/<class>.*found .*photos"
    with pytest.raises(FileNotFoundError, match=message):
        PACSDataModule(tmp_path, domain="photo", partial=True).pictures("test")
    with pytest.raises(FileNotFoundError, match="No folder photo in"):
        PACSDataModule(tmp_path, partial=True).pictures("val")
    assert len(PACSDataModule(tmp_path, partial=True).pictures("test")) == 42  # needs it not


def test_a_domain_that_is_there_twice(tmp_path):
    fake.write_office_home(tmp_path)
    (tmp_path / "Real").mkdir()
    with pytest.raises(ValueError, match=r"2 folders for the domain Real World of Office-Home: Real, Real World"):
        OfficeHomeDataModule(tmp_path, domain="real", partial=True).pictures("test")


@pytest.mark.parametrize("below", ["pacs", "PACS/kfold", "PACS/images", "kfold"])
def test_folders_that_it_lies_in(tmp_path, below):
    fake.write_pacs(tmp_path / below)
    assert PACSDataModule(tmp_path).root == tmp_path / below
    assert PACSDataModule(str(tmp_path / below)).root == tmp_path / below


def test_another_data_sets_folders_beside_it(tmp_path):
    (tmp_path / "sketch" / "n01440764").mkdir(parents=True)  # ImageNet-Sketch
    (tmp_path / "caltech101").mkdir()
    fake.write_pacs(tmp_path / "PACS")
    fake.write_vlcs(tmp_path)
    assert PACSDataModule(tmp_path, domain="sketch").root == tmp_path / "PACS"
    assert VLCSDataModule(tmp_path).root == tmp_path / "VLCS"


def test_a_part_says_of_how_many_it_is(tmp_path):
    fake.write_pacs(tmp_path)
    datamodule = PACSDataModule(tmp_path, partial=True)
    datamodule.preprocessing = Preprocessing(16, (0,) * 3, (1,) * 3)
    datamodule.setup("test")
    assert len(datamodule.pictures("test")) < datamodule.n_total == 2048


def test_a_wrong_root_is_reported_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder /no/such/folder"):
        PACSDataModule("/no/such/folder")
    with pytest.raises(FileNotFoundError, match=r"does not hold PACS as <domain>/<class>/\*.*no folders"):
        PACSDataModule(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="got the file"):
        PACSDataModule(tmp_path / "file")


# Class folders


def test_missing_and_stray_class_folders(exact, tmp_path):
    root = exact(PACSDataModule, tmp_path)
    (root / "sketch" / "horse").rename(root / "sketch" / "zebra")
    message = r"sketch: expected 7 class folders .*; no class: zebra .*; missing: horse; PACS lies as <domain>/<class>"
    for partial in (False, True):
        with pytest.raises(ValueError, match=message):
            PACSDataModule(root, domain="sketch", partial=partial).pictures("test")
    (root / "sketch" / "zebra").rename(root / "zebra")
    with pytest.raises(ValueError, match=r"missing: horse; .*--data.partial true"):
        PACSDataModule(root, domain="sketch").pictures("test")
    datamodule = PACSDataModule(root, domain="sketch", partial=True)
    assert "horse" in datamodule.class_names
    assert {datamodule.class_names[label] for label in datamodule.pictures("test").labels} == {*fake.PACS} - {"horse"}


def test_class_folder_without_pictures(exact, tmp_path):
    root = exact(PACSDataModule, tmp_path)
    for path in (root / "photo" / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"No picture in .*photo/dog"):
        PACSDataModule(root, domain="photo").pictures("test")
    assert len(PACSDataModule(root, domain="photo", partial=True).pictures("test")) == 39


def test_what_systems_leave_behind_is_no_class(exact, tmp_path):
    root = exact(PACSDataModule, tmp_path)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (root / "sketch" / name).mkdir()
    (root / "sketch" / ".DS_Store").write_bytes(b"x")
    (root / "sketch" / "dog" / "Thumbs.db").write_bytes(b"x")
    (root / "sketch" / "dog" / "._pic_000.png").write_bytes(b"x")
    assert set_up(PACSDataModule(root, domain="sketch")).n_total == 42


def test_classes_that_are_read_from_the_disk(tmp_path):
    fake.write_office_home(tmp_path)
    assert OfficeHomeDataModule(tmp_path, domain="Product").class_names == sorted(fake.OFFICE)
    (tmp_path / "Art" / "TV").rename(tmp_path / "Art" / "Television")
    for partial in (False, True):
        # Which of two domains is the right one cannot be told: the first is taken, and the difference named.
        with pytest.raises(ValueError, match=r"no class: TV .*; missing: Television; Office-Home lies as"):
            OfficeHomeDataModule(tmp_path, domain="Product", partial=partial)
    (tmp_path / "Art" / "Television" / "00001.jpg").unlink()
    (tmp_path / "Art" / "Television" / "00002.jpg").unlink()
    (tmp_path / "Art" / "Television").rmdir()
    with pytest.raises(ValueError, match=r"/Art: expected 65 class folders .*found 64; missing: TV;"):
        OfficeHomeDataModule(tmp_path, domain="Product")
    datamodule = OfficeHomeDataModule(tmp_path, domain="Art", partial=True)
    assert datamodule.class_names == sorted(fake.OFFICE)
    assert len(datamodule.pictures("test")) == 2 * 64


def test_no_domain_with_all_classes(tmp_path):
    fake.write_office_home(tmp_path)
    for domain in OfficeHomeDataModule.domains:
        (tmp_path / domain / "another").mkdir()
    for partial in (False, True):
        with pytest.raises(
            ValueError, match=r"65 in each domain, .*found Art 66, Clipart 66, Product 66, Real World 66"
        ):
            OfficeHomeDataModule(tmp_path, partial=partial)


# PACS: which pictures validate must not change


def test_validation_of_pacs_is_drawn_as_ever(tmp_path):
    fake.write_pacs(tmp_path)
    expected = []
    for domain in ("art_painting", "photo", "sketch"):
        for name in fake.PACS:
            paths = sorted(f"{domain}/{name}/{path.name}" for path in (tmp_path / domain / name).iterdir())
            order = torch.randperm(len(paths), generator=sample_generator(0, 0, f"pacs {domain}/{name}"))
            expected += [paths[place] for place in order[: -(-len(paths) // 5)]]
    val = PACSDataModule(tmp_path, domain="cartoon", partial=True).pictures("val")
    assert val.paths == sorted(expected)
    assert [path for path in val.paths if path.startswith("photo/h")] == [
        "photo/horse/pic_002.jpg",
        "photo/horse/pic_003.jpg",
        "photo/house/pic_002.jpg",
        "photo/house/pic_008.jpg",
    ]


@pytest.mark.skipif(not (SHARED / "data" / "pacs128").is_dir(), reason="takes the whole of PACS")
@pytest.mark.parametrize(
    ("domain", "n_test", "n_val", "digest"),
    [
        ("art_painting", 2048, 1596, "f51c78b986f45353"),
        ("cartoon", 2344, 1536, "cf66173ea44ec775"),
        ("photo", 1670, 1670, "f12e5f21e9688d6e"),
        ("sketch", 3929, 1219, "35a388d8d42b01ec"),
    ],
)
def test_the_whole_of_pacs(domain, n_test, n_val, digest):
    datamodule = PACSDataModule(SHARED / "data" / "pacs128", domain=domain)
    assert len(datamodule.pictures("test")) == n_test
    val = datamodule.pictures("val")
    assert len(val) == n_val
    assert len(datamodule.pictures("train")) == 9991 - n_test - n_val
    # of the pictures that validated in the first release
    assert hashlib.sha256("\n".join(val.paths).encode()).hexdigest().startswith(digest)


# VLCS


def number_classes(root):
    """The other layout: numbers for classes, in ``full``, with the same pictures in parts beside it."""
    for domain in VLCSDataModule.domains:
        for number, name in enumerate(fake.VLCS):
            for part in ("train", "crossval", "test"):
                (root / "VLCS" / domain / part / str(number)).mkdir(parents=True)
            (root / "VLCS" / domain / "full").mkdir(exist_ok=True)
            (root / "VLCS" / domain / name).rename(root / "VLCS" / domain / "full" / str(number))


def test_vlcs_with_numbers_for_classes(exact, tmp_path):
    root = exact(VLCSDataModule, tmp_path)
    before = VLCSDataModule(root, domain="SUN09")
    expected = {split: before.pictures(split) for split in ("train", "val", "test")}
    number_classes(root)
    after = VLCSDataModule(root, domain="sun")
    assert after.class_names == before.class_names
    for split, pictures in expected.items():
        found = after.pictures(split)
        assert found.labels == pictures.labels
        assert [path.split("/")[-1] for path in found.paths] == [path.split("/")[-1] for path in pictures.paths]
        assert {path.split("/")[1] for path in found.paths} == {"full"}


def test_vlcs_in_parts_only(tmp_path):
    fake.write_vlcs(tmp_path)
    number_classes(tmp_path)
    (tmp_path / "VLCS" / "SUN09" / "full").rename(tmp_path / "full")
    message = r"no class: crossval, test, train .*VLCS lies as <domain>/<class>/\* or <domain>/full/<0..4>/\*"
    with pytest.raises(ValueError, match=message):
        VLCSDataModule(tmp_path, domain="SUN09", partial=True).pictures("test")


# DomainNet's lists


def listed(root, domain, part):
    lines = (root / f"{domain}_{part}.txt").read_text().splitlines()
    return sorted(line.rsplit(" ", 1)[0] for line in lines)


@pytest.mark.parametrize("below", [".", "splits"])
def test_official_lists(exact, tmp_path, below):
    root = exact(DomainNetDataModule, tmp_path)
    test = listed(root, "painting", "test")
    train = sorted(path for domain in fake.STYLES if domain != "painting" for path in listed(root, domain, "train"))
    (root / below).mkdir(exist_ok=True)
    for file in root.glob("*.txt"):
        file.rename(root / below / file.name)
    datamodule = set_up(DomainNetDataModule(root, domain="painting"), None)
    assert datamodule.source == "painting, official list"
    assert [path for batch in datamodule.test_dataloader() for path in batch.path] == test
    found = {split: datamodule.pictures(split) for split in ("train", "val", "test")}
    assert sorted(found["train"].paths + found["val"].paths) == train
    assert min(map(len, found.values())) > 0
    # Labels go by the folder, whatever numbers the list has.
    for pictures in found.values():
        assert [datamodule.class_names[label] for label in pictures.labels] == list(map(class_of, pictures.paths))
    everything = DomainNetDataModule(root, domain="painting", split="all")
    assert everything.source == "painting, all pictures"
    assert len(everything.pictures("test")) > len(test)


def test_no_official_lists(exact, tmp_path):
    root = exact(DomainNetDataModule, tmp_path)
    (root / "sketch_test.txt").unlink()
    assert DomainNetDataModule(root, domain="sketch").source == "sketch, all pictures"
    with pytest.raises(FileNotFoundError, match=r"No sketch_test\.txt in .*ai\.bu\.edu/M3SDA.*--data\.split all"):
        DomainNetDataModule(root, domain="sketch", split="official").pictures("test")
    (root / "real_train.txt").unlink()
    datamodule = DomainNetDataModule(root, domain="clipart")
    datamodule.pictures("test")
    with pytest.raises(FileNotFoundError, match=r"No real_train\.txt in"):
        datamodule.pictures("val")
    with pytest.raises(ValueError, match=r"Expected split auto, official, all, got 'test'"):
        DomainNetDataModule(root, split="test")


def test_lists_with_duplicates_and_lists_cut_short(exact, tmp_path):
    root = exact(DomainNetDataModule, tmp_path)
    n_train, n_test = DomainNetDataModule.listed["real"]
    file = root / "real_test.txt"
    file.write_text(file.read_text() + "real/t-shirt/more.jpg 327\n")
    for partial in (False, True):
        with pytest.raises(ValueError, match=rf"real_test\.txt names {n_test + 1} pictures, more than the {n_test} "):
            DomainNetDataModule(root, domain="real", partial=partial).pictures("test")
    file.write_text("\n".join(file.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(ValueError, match=rf"split test: found {n_test - 1} of {n_test} pictures"):
        DomainNetDataModule(root, domain="real").pictures("test")
    assert len(DomainNetDataModule(root, domain="real", partial=True).pictures("test")) == n_test - 1
    (root / listed(root, "real", "train")[0]).unlink()
    with pytest.raises(ValueError, match=rf"domain real: found {n_train - 1} of {n_train} pictures"):
        DomainNetDataModule(root, domain="clipart").pictures("train")


def test_published_lists_of_domain_net():
    counts = list(DomainNetDataModule.listed.values())
    assert [sum(count) for count in counts] == [48129, 51605, 72266, 172500, 172947, 69128]  # at ai.bu.edu/M3SDA
    assert [sum(part) for part in zip(*counts, strict=True)] == [409832, 176743]


def test_it_goes_to_workers(tmp_path):
    fake.write_pacs(tmp_path)
    pictures = PACSDataModule(tmp_path, partial=True).pictures("test")
    assert pickle.loads(pickle.dumps(pictures)) == pictures
