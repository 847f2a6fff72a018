"""`metatpt doctor` on whole and on damaged data."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.command_line import CommandLine, write_pictures
from helpers.fake_data import shards
from PIL import Image

from metatpt.checkup import contact_sheet, examine
from metatpt.datamodules import FolderDataModule, PACSDataModule, ShiftedShapesDataModule, WebDatasetDataModule
from metatpt.datamodules import shards as datamodules_shards
from metatpt.datamodules.base import FilePictures


def line(out: str, what: str) -> str:
    return next(each for each in out.splitlines() if each.startswith(what))


def test_a_good_folder(metatpt: CommandLine, tmp_path: Path) -> None:
    result = metatpt("doctor", "--data", "FolderDataModule", "--data.root", metatpt.pictures, "--sheet", "sheet.png")
    assert result.status == 0, result.err
    assert line(result.out, "test  ").split()[-1] == "7"
    assert "3 to 4" in line(result.out, "test: of each class")
    assert "0 of 7 looked at" in line(result.out, "test: cannot be read")
    assert "2: cat, dog" in line(result.out, "classes")
    assert "Nothing is wrong." in result.out
    assert Image.open("sheet.png").width > 4 * 128


def test_what_is_wrong_is_named(metatpt: CommandLine, tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pets", "cat", "dog")
    (root / "cat" / "0001.png").write_bytes(b"no picture")
    names = tmp_path / "names.txt"
    names.write_text(f"cat cat\ndog {' '.join(['very'] * 80)}\n")
    options = ["--data.root", root, "--data.class_names", names, "--pictures", "all"]
    result = metatpt("doctor", "--data", "FolderDataModule", *options)
    assert result.status == 1
    assert "WRONG: 1 of 6 looked at: cat/0001.png: not a picture" in " ".join(result.out.split())
    assert "WRONG: 1 (with 'a photo of a {}.', of 77 tokens): very very" in " ".join(result.out.split())
    assert "Nothing is wrong" not in result.out


def test_a_data_set_that_is_not_there(metatpt: CommandLine) -> None:
    result = metatpt("doctor", "--data", "PACSDataModule", "--data.root", "nowhere")
    assert result.status == 1
    assert "No folder nowhere" in result.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures", "none"], "--pictures: expected a whole number of at least 1, or all; got 'none'."),
        (["--model.clip", "builtin"], "doctor looks at data only"),
        (["--trainer.devices", "2"], "doctor looks at data only"),
        (["--data.no_such", "2"], "FolderDataModule has no such option"),
        (["--data.batch_size", "two"], "--data.batch_size: expected a whole number, got 'two'"),
        (["--sheet", "sheet.nothing"], "--sheet sheet.nothing: the picture cannot be written"),
    ],
)
def test_wrong_options(metatpt: CommandLine, options: list[str], message: str) -> None:
    result = metatpt("doctor", "--data", "FolderDataModule", "--data.root", metatpt.pictures, *options)
    assert result.status == 2
    assert message in result.message


def test_the_bundled_data(metatpt: CommandLine) -> None:
    result = metatpt("doctor", "--pictures", 24)
    assert result.status == 0, result.err
    assert "960" in line(result.out, "test  ")
    assert Path("doctor-ShiftedShapesDataModule.png").is_file()


@pytest.mark.parametrize(("missing", "wrong"), [("train", False), ("test", True)])
def test_only_the_split_that_is_tested_on_must_be_there(missing: str, wrong: bool) -> None:
    class Without(ShiftedShapesDataModule):
        splits = ("train", "test")

        def pictures(self, split):
            if split == missing:
                raise FileNotFoundError(f"no {split} here")
            return super().pictures("val" if split == "train" else "test")

    report = examine(Without(), pictures=1)
    assert report.is_wrong == wrong
    assert [(each.what, each.wrong) for each in report.findings if "here" in each.found] == [(missing, wrong)]


def test_a_damaged_training_split_is_wrong(tmp_path: Path) -> None:
    for domain in PACSDataModule.domains:
        write_pictures(tmp_path / domain, *PACSDataModule.classes, n=1)
    (tmp_path / "sketch" / "zebra").mkdir()
    report = examine(PACSDataModule(tmp_path, domain="photo", partial=True))
    assert report.is_wrong
    assert "zebra" in next(each for each in report.findings if each.what == "train").found


def test_training_on_the_test_pictures_is_wrong(tmp_path: Path) -> None:
    class Both(FolderDataModule):
        splits = ("train", "val", "test")

    report = examine(Both(write_pictures(tmp_path / "pets", "cat", "dog")))
    same = [(each.what, each.wrong) for each in report.findings if each.found == "the pictures of test"]
    assert same == [("train", True), ("val", False)]


def test_a_shard_is_read_from_its_front_for_all_pictures_at_once(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("webdataset")
    shards.write_shards(tmp_path, 30, 20)
    data = WebDatasetDataModule(str(tmp_path), ",".join(shards.CLASSES))
    read = []
    samples = datamodules_shards.read_samples
    monkeypatch.setattr(datamodules_shards, "read_samples", lambda shard: read.append(shard.name) or samples(shard))
    assert not examine(data, pictures=None).is_wrong
    assert len(read) < 10


def test_names_that_stand_twice_are_noted() -> None:
    data = ShiftedShapesDataModule()
    data.class_names[3] = data.class_names[0] = "missile"
    report = examine(data, pictures=1)
    assert any(each.found.startswith("missile;") and not each.wrong for each in report.findings)


def test_the_sheet_shows_each_picture_over_its_name(tmp_path: Path) -> None:
    colors = [(250, 0, 0), (0, 250, 0)]
    for number, color in enumerate(colors):
        Image.new("RGB", (40, 20), color).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"")
    pictures = FilePictures(tmp_path, ["0.png", "1.png", "2.png"], [0, 1, -1])
    sheet = contact_sheet(pictures, [0, 1, 2], ["red", "a green thing with a long name of words"])
    assert sheet.size == (3 * 128, 160)
    assert [sheet.getpixel((64 + 128 * place, 64)) for place in range(3)] == [(250, 0, 0), (0, 250, 0), (255, 0, 0)]
    for place in range(3):  # there is text under each of them
        assert sheet.crop((128 * place, 128, 128 * place + 128, 160)).convert("L").getextrema()[0] < 100


def test_a_flat_folder_without_labels(tmp_path: Path) -> None:
    write_pictures(tmp_path / "flat")
    report = examine(FolderDataModule(tmp_path / "flat", class_names="cat,dog"))
    assert not report.is_wrong
    assert not any("of each class" in each.what for each in report.findings)
    assert report.sheet is not None
