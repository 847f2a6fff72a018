"""PACS in a small copy of its layout."""

import pytest
from PIL import Image

from metatpt.datamodules import PACSDataModule
from metatpt.datamodules.pacs import CLASSES, DOMAINS
from metatpt.types import Preprocessing


@pytest.fixture
def root(tmp_path):
    for domain in DOMAINS:
        for place, name in enumerate(CLASSES):
            folder = tmp_path / domain / name
            folder.mkdir(parents=True)
            for number in range(3 + place):
                Image.new("RGB", (12, 8), (20 * place, 0, 0)).save(folder / f"pic_{number:03}.png")
    return tmp_path


def made(root, **options):
    datamodule = PACSDataModule(root, **options)
    datamodule.preprocessing = Preprocessing(16, (0,) * 3, (1,) * 3)
    return datamodule


def test_class_names_are_known_at_once(tmp_path):
    assert PACSDataModule(tmp_path).class_names == list(CLASSES)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_whole_domain_is_tested(root, domain):
    datamodule = made(root, domain=domain)
    datamodule.setup("test")
    batches = list(datamodule.test_dataloader())
    paths = [path for batch in batches for path in batch.path]
    assert datamodule.n_total == len(paths) == 42
    assert paths == sorted(paths)
    assert {path.split("/")[0] for path in paths} == {domain}
    labels = [label for batch in batches for label in batch.label.tolist()]
    assert [CLASSES[label] for label in labels] == [path.split("/")[1] for path in paths]
    assert [index for batch in batches for index in batch.index.tolist()] == list(range(42))


def test_validation_is_a_fixed_fifth_of_the_other_domains(root, monkeypatch):
    chosen = []
    for seed in ("0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        datamodule = made(root, domain="cartoon")
        datamodule.setup("validate")
        pictures = datamodule.pictures("val")
        chosen.append(pictures.paths)
        assert {path.split("/")[0] for path in pictures.paths} == {"art_painting", "photo", "sketch"}
        assert set(pictures.labels) == set(range(7))
        assert datamodule.n_total == 3 * (1 + 1 + 1 + 2 + 2 + 2 + 2)
        assert sum(len(batch) for batch in datamodule.val_dataloader()) == datamodule.n_total
    assert chosen[0] == chosen[1]


def test_wrong_domain(root):
    with pytest.raises(ValueError, match=r"no domain 'art_paintng' \(nearest: art_painting\): expected one of"):
        PACSDataModule(root, domain="art_paintng")


def test_a_wrong_root_is_reported_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder /no/such/folder"):
        PACSDataModule("/no/such/folder")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="got the file"):
        PACSDataModule(tmp_path / "file")


def test_missing_domain(root):
    (root / "photo").rename(root / "photos")
    with pytest.raises(FileNotFoundError, match=r"No folder photo in .*<root>/<domain>/<class>.*found .*photos"):
        made(root, domain="photo").setup("test")
    with pytest.raises(FileNotFoundError, match="No folder photo in"):
        made(root).setup("validate")
    made(root).setup("test")  # needs it not


def test_missing_and_stray_class_folders(root):
    (root / "sketch" / "horse").rename(root / "sketch" / "zebra")
    message = r"sketch is not PACS: expected .*dog, elephant.*missing: horse; not a class of PACS: zebra"
    with pytest.raises(ValueError, match=message):
        made(root, domain="sketch").setup("test")


def test_what_systems_leave_behind_is_no_class(root):
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (root / "sketch" / name).mkdir()
    (root / "sketch" / ".DS_Store").write_bytes(b"x")
    (root / "sketch" / "dog" / "Thumbs.db").write_bytes(b"x")
    (root / "sketch" / "dog" / "._pic_000.png").write_bytes(b"x")
    datamodule = made(root, domain="sketch")
    datamodule.setup("test")
    assert datamodule.n_total == 42


def test_class_folder_without_pictures(root):
    for path in (root / "photo" / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"No picture in .*photo/dog"):
        made(root, domain="photo").setup("test")
