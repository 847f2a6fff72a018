"""A user's folder of pictures."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from metatpt.datamodules import FolderDataModule
from metatpt.types import Preprocessing

P16 = Preprocessing(16, (0,) * 3, (1,) * 3)


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    """Class folders: 2 cats, 3 dogs, one of them deeper, 1 owl."""
    for number, path in enumerate(
        ["cat/b.png", "cat/a.jpg", "dog/x.png", "dog/more/deep/a.webp", "dog/B.PNG", "owl/1.bmp"]
    ):
        draw(tmp_path / path, number)
    return tmp_path


@pytest.fixture
def flat(tmp_path):
    for number in range(4):
        draw(tmp_path / f"{number}.png", number)
    return tmp_path


def rows(datamodule, stage="test"):
    """Path, label and index of every row."""
    datamodule.preprocessing = P16
    datamodule.setup(stage)
    loader = {"test": datamodule.test_dataloader, "predict": datamodule.predict_dataloader}[stage]()
    return [row for b in loader for row in zip(b.path, b.label.tolist(), b.index.tolist(), strict=True)]


TREE = [
    ("cat/a.jpg", 0, 0),
    ("cat/b.png", 0, 1),
    ("dog/B.PNG", 1, 2),
    ("dog/more/deep/a.webp", 1, 3),
    ("dog/x.png", 1, 4),
    ("owl/1.bmp", 2, 5),
]


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_class_folders(tree, stage):
    datamodule = FolderDataModule(tree, batch_size=4)
    assert datamodule.class_names == ["cat", "dog", "owl"]
    assert rows(datamodule, stage) == TREE
    assert datamodule.n_total == 6


def test_validation_is_the_same_pictures(tree):
    datamodule = FolderDataModule(str(tree))
    datamodule.preprocessing = P16
    datamodule.setup("validate")
    assert [path for batch in datamodule.val_dataloader() for path in batch.path] == [row[0] for row in TREE]


def test_labels_go_by_name_not_by_position(tree):
    datamodule = FolderDataModule(tree, class_names=["owl", "zebra", "Dog", "cat"])
    assert datamodule.class_names == ["owl", "zebra", "Dog", "cat"]
    assert [row[1] for row in rows(datamodule)] == [3, 3, 2, 2, 2, 0]


def test_names_by_folder_from_a_file(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "names.txt"
    path.write_text("owl a night bird\ndog a pet\ncat a pet\n")
    datamodule = FolderDataModule(tree, class_names=str(path))
    assert datamodule.class_names == ["a pet", "a pet", "a night bird"]
    assert rows(datamodule) == TREE


def test_a_folder_that_is_no_class(tree):
    with pytest.raises(ValueError, match=r"2 class names for 3 class folders.*: owl \(none is like it\)"):
        FolderDataModule(tree, class_names="cat,dog")


def test_one_class_only(tmp_path):
    draw(tmp_path / "cat" / "a.png")
    datamodule = FolderDataModule(tmp_path)
    assert datamodule.class_names == ["cat"]
    assert rows(datamodule) == [("cat/a.png", 0, 0)]


@pytest.mark.parametrize("names", ["cat,dog", ["cat", "dog"]])
def test_flat_folder_has_no_labels(flat, names):
    datamodule = FolderDataModule(flat, class_names=names)
    assert datamodule.class_names == ["cat", "dog"]
    assert rows(datamodule) == [(f"{number}.png", -1, number) for number in range(4)]


def test_flat_folder_needs_class_names(flat):
    with pytest.raises(ValueError, match="4 pictures and no class folders, so class_names is needed"):
        FolderDataModule(flat)


def test_pictures_beside_class_folders_have_no_label(tree):
    draw(tree / "dab.png")
    labels = {path: label for path, label, _ in rows(FolderDataModule(tree))}
    assert labels.pop("dab.png") == -1
    assert labels == {path: label for path, label, _ in TREE}


def test_stray_files_and_folders(tree):
    draw(tree / ".ipynb_checkpoints" / "a.png")
    draw(tree / "cat" / ".ipynb_checkpoints" / "a.png")
    draw(tree / "__MACOSX" / "cat" / "a.png")
    draw(tree / "dog" / "._1.png")
    draw(tree / "._1.png")
    for name in (".DS_Store", "Thumbs.db", "cat/.DS_Store", "owl/Thumbs.db", "desktop.ini"):
        (tree / name).write_bytes(b"nothing")
    datamodule = FolderDataModule(tree)
    assert datamodule.class_names == ["cat", "dog", "owl"]
    assert rows(datamodule) == TREE


@pytest.fixture
def log(caplog):
    """What Lightning's logger, which does not hand on to the root, was told."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def test_what_is_passed_over_is_counted(tree, log):
    (tree / "readme.txt").write_text("about")
    (tree / "cat" / "a.txt").write_text("a cat")
    (tree / "cat" / "LICENSE").write_text("free")
    (tree / "papers").mkdir()
    datamodule = FolderDataModule(tree)
    assert datamodule.class_names == ["cat", "dog", "owl"]
    assert "6 pictures; 3 classes; passed over 3 other files (2 .txt, 1 no ending)" in log.text
    assert "folders without pictures are no classes: papers" in log.text


def test_links_are_followed_but_not_in_a_circle(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    draw(other / "a.png")
    (tree / "zoo").symlink_to(other, target_is_directory=True)
    (tree / "cat" / "back").symlink_to(tree / "cat", target_is_directory=True)
    assert rows(FolderDataModule(tree)) == [*TREE, ("zoo/a.png", 3, 6)]


@pytest.mark.parametrize("files", [[], ["a.txt", "cat/b.txt"]])
def test_empty_folder(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match="No picture in .*found " + ("2 other files" if files else "nothing else")):
        FolderDataModule(tmp_path, class_names="cat,dog")


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No folder .*nowhere"):
        FolderDataModule(tmp_path / "nowhere")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(NotADirectoryError, match=r"got the file .*a\.png"):
        FolderDataModule(tmp_path / "a.png")


def test_unreadable_pictures_keep_their_rows(tree):
    (tree / "cat" / "half.jpg").write_bytes((tree / "cat" / "a.jpg").read_bytes()[:300])
    (tree / "dog" / "text.jpg").write_text("no picture")
    (tree / "owl" / "empty.png").touch()
    datamodule = FolderDataModule(tree, batch_size=9)
    datamodule.preprocessing = P16
    datamodule.setup("test")
    (batch,) = datamodule.test_dataloader()
    errors = {path: error for path, error in zip(batch.path, batch.error, strict=True) if error}
    assert set(errors) == {"cat/half.jpg", "dog/text.jpg", "owl/empty.png"}
    assert "damaged" in errors["cat/half.jpg"]
    assert "not a picture" in errors["dog/text.jpg"]
    assert "empty file" in errors["owl/empty.png"]
    bad = [path in errors for path in batch.path]
    assert batch.image[torch.tensor(bad)].abs().sum() == 0
    assert batch.label.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_half_a_jpeg_among_twenty_with_two_workers(tmp_path):
    for number in range(20):
        draw(tmp_path / f"{number:02}.jpg", number)
    content = (tmp_path / "07.jpg").read_bytes()
    (tmp_path / "07b.jpg").write_bytes(content[: len(content) // 2])
    datamodule = FolderDataModule(tmp_path, class_names="cat,dog", num_workers=2, batch_size=4)
    datamodule.preprocessing = P16
    datamodule.setup("predict")
    loader = datamodule.predict_dataloader()
    batches = list(loader)
    errors = {path: error for batch in batches for path, error in zip(batch.path, batch.error, strict=True)}
    assert len(errors) == 21
    assert [path for path, error in errors.items() if error] == ["07b.jpg"]
    assert [index for batch in batches for index in batch.index.tolist()] == list(range(21))
    # The same pixels as without workers.
    alone = FolderDataModule(tmp_path, class_names="cat,dog", batch_size=4)
    alone.preprocessing = P16
    alone.setup("predict")
    for one, other in zip(alone.predict_dataloader(), batches, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.canvas, other.canvas)
