import csv
import importlib.util
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.batches import NAMES, make_batch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader

from metatpt.callbacks import ResetPrompts, RunRecord, ViewGallery
from metatpt.modules import MetaTPTModule, TPTModule, ViewAverageModule

spec = importlib.util.spec_from_file_location("views_run", Path(__file__).with_name("views_run.py"))
views_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(views_run)

ALL = list(range(30))  # one cannot be read, and one keeps its zero-shot prediction


@pytest.fixture(scope="module")
def module(tiny_clip_folder):
    return views_run.Views(str(tiny_clip_folder))


def run(folder, module, command="test", indices=ALL, batch_size=4, labelled=True, resume=False, **options):
    data = views_run.Data([indices], batch_size=batch_size)
    data.labelled = labelled
    gallery = ViewGallery(**options)
    trainer = views_run.make_trainer([ResetPrompts(), RunRecord(folder, resume=resume), gallery])
    getattr(trainer, command)(module, datamodule=data)


def changes(folder):
    """What each picture gained, from the table alone."""
    with (folder / "predictions.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["status"] != "skipped"]
    found = {}
    for row in rows:
        if row["label"]:
            found[int(row["index"])] = float(row["label_probability"]) - float(row["zero_shot_label_probability"])
        else:
            found[int(row["index"])] = float(row["zero_shot_entropy"]) - float(row["entropy"])
    return found


def most_changed(found, n):
    order = sorted(found, key=found.get)
    return {i for i in order[:n] if found[i] < 0} | {i for i in order[::-1][:n] if found[i] > 0}


def strips(folder):
    """The strips by index; nothing else lies beside them."""
    files = list((folder / "views").iterdir())
    assert {file.suffix for file in files} <= {".png"}
    return {int(file.stem): np.asarray(Image.open(file)) for file in files}


def cells(strip, size):
    """The pictures in a strip: between two lie two white pixels."""
    assert strip.shape[0] == size + 4
    assert (strip[:2] == 255).all()
    return [strip[2 : 2 + size, x : x + size] for x in range(2, strip.shape[1], size + 2)]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("command", "batch_size"), [("validate", 1), ("test", 4), ("predict", 30)])
def test_keeps_the_largest_gains_and_losses(tmp_path, module, command, batch_size, labelled):
    run(tmp_path, module, command, batch_size=batch_size, labelled=labelled, n=3)
    found = changes(tmp_path)
    assert len(found) == 29
    kept = strips(tmp_path)
    assert set(kept) == most_changed(found, 3)
    assert len(kept) == 6
    for index, strip in kept.items():
        original, *views = cells(strip, 2)
        assert (original == 0).all()
        assert [set(view.flatten()) for view in views] == [{views_run.pixel(index, view)} for view in range(3)]
    assert not module.keep_views


def test_few_pictures_and_few_views(tmp_path, module):
    run(tmp_path, module, indices=[-1, 5, 6, 7, 8], n=10, max_views=2)
    found = changes(tmp_path)
    assert found.pop(6) == 0  # kept its zero-shot prediction
    kept = strips(tmp_path)
    assert set(kept) == set(found) == {7, 8}  # the filler and the picture that cannot be read are left out
    assert {len(cells(strip, 2)) for strip in kept.values()} == {3}


def test_no_picture_can_be_read(tmp_path, module):
    run(tmp_path, module, indices=[5])
    assert not (tmp_path / "views").exists()


@pytest.mark.parametrize("method", [ViewAverageModule, TPTModule, MetaTPTModule])
@pytest.mark.parametrize("policy", ["episodic", "online"])
def test_strip_is_the_original_and_the_views_that_the_method_ends_with(tmp_path, tiny_clip_folder, method, policy):
    batches = [make_batch(1, 32, seed=i, first_index=i) for i in range(4)]
    module = method(clip=str(tiny_clip_folder), class_names=NAMES, n_views=12, selection=0.5)
    loader = DataLoader(batches, batch_size=None)
    trainer = views_run.make_trainer([ResetPrompts(policy), RunRecord(tmp_path), ViewGallery(n=2)])
    trainer.test(module, loader)

    again = views_run.make_trainer([ResetPrompts(policy)])
    module.keep_views = True
    predicted = again.predict(module, loader)
    kept = strips(tmp_path)
    assert set(kept) == most_changed(changes(tmp_path), 2)
    assert kept
    for index, strip in kept.items():
        expected = torch.cat([batches[index].image, predicted[index].views[0]])
        assert len(expected) == 7
        for cell, view in zip(cells(strip, 32), expected, strict=True):
            difference = cell - 255 * view.float().permute(1, 2, 0).numpy()
            assert np.abs(difference).max() <= 0.51


@pytest.mark.parametrize("before", [False, True])
def test_module_is_left_as_it_was(tmp_path, module, before):
    module.keep_views = before
    run(tmp_path, module)
    assert module.keep_views == before
    module.keep_views = False


def test_run_that_stops_has_its_gallery_and_goes_on(tmp_path, module):
    order = ALL[::-1]
    module.stops_at = 4
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "run", module, indices=order, batch_size=3, n=3)
    module.stops_at = None
    assert not module.keep_views
    run(tmp_path / "whole", module, indices=ALL, n=3)
    found = changes(tmp_path / "whole")
    so_far = {index: change for index, change in found.items() if index in order[:12]}
    assert set(strips(tmp_path / "run")) == most_changed(so_far, 3) != most_changed(found, 3)

    (tmp_path / "run/views/17.png.partial").touch()  # what a killed process may leave
    run(tmp_path / "run", module, indices=ALL, n=3, resume=True)
    assert changes(tmp_path / "run") == found
    resumed, whole = strips(tmp_path / "run"), strips(tmp_path / "whole")
    assert set(resumed) == set(whole)
    assert all((resumed[index] == whole[index]).all() for index in whole)


def test_files_of_the_user_stay(tmp_path, module):
    """Whatever their names: without a record the folder may be anybody's."""
    views = tmp_path / "views"
    views.mkdir()
    for name in ("2024.png", "0007.png", "8.png.partial"):
        (views / name).touch()
    views_run.make_trainer([ViewGallery(n=1)], default_root_dir=tmp_path).test(
        module, datamodule=views_run.Data([[1, 2, 3, 4]])
    )
    assert {"2024.png", "0007.png", "8.png.partial"} < {file.name for file in views.iterdir()}


def test_without_a_record(tmp_path, module):
    trainer = views_run.make_trainer([ResetPrompts(), ViewGallery(n=2)], default_root_dir=tmp_path / "alone")
    for indices in (ALL[:20], ALL):  # an earlier run's pictures do not stay
        trainer.test(module, datamodule=views_run.Data([indices]))
    run(tmp_path / "run", module, n=2)
    assert set(strips(tmp_path / "alone")) == most_changed(changes(tmp_path / "run"), 2)


def test_method_without_views_says_so_once(tmp_path, caplog):
    from_toy = views_run.ToyModule()
    trainer = views_run.make_trainer([RunRecord(tmp_path), ViewGallery()])
    with caplog.at_level(logging.INFO, "metatpt"):
        trainer.test(from_toy, datamodule=views_run.Data([ALL]))
    said = [record.getMessage() for record in caplog.records if "gallery" in record.getMessage()]
    assert said == ["ToyModule looks at no views: there will be no gallery"]
    assert not (tmp_path / "views").exists()


def test_fit_and_its_validation_keep_nothing(tmp_path, tiny_clip_folder):
    class Fits(views_run.Views):
        def training_step(self, batch, batch_idx):
            assert not self.keep_views
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD([self.weight], 0.1)

    class WithTraining(LightningDataModule):
        def train_dataloader(self):
            return DataLoader([make_batch(1, 2)], batch_size=None)

        val_dataloader = train_dataloader

    module = Fits(str(tiny_clip_folder))
    module.weight = torch.nn.Parameter(torch.zeros(1))
    options = {"max_epochs": 1, "default_root_dir": tmp_path / "root"}
    views_run.make_trainer([ResetPrompts(), ViewGallery()], **options).fit(module, datamodule=WithTraining())
    assert not (tmp_path / "root/views").exists()


def test_folder_that_cannot_be_written_is_named(tmp_path, module):
    (tmp_path / "views").mkdir()
    (tmp_path / "views/1.png").mkdir()
    trainer = views_run.make_trainer([ViewGallery()], default_root_dir=tmp_path)
    with pytest.raises(OSError, match=r"views[/\\]1\.png"):
        trainer.test(module, datamodule=views_run.Data([[1, 2]]))
    assert os.listdir(tmp_path / "views") == ["1.png"]
    assert not module.keep_views


def test_gallery_of_none(tmp_path, module):
    run(tmp_path, module, n=0)
    assert not (tmp_path / "views").exists()


@pytest.mark.parametrize(("name", "value", "lowest"), [("n", -1, 0), ("max_views", 0, 1)])
def test_options_that_cannot_work_are_refused(name, value, lowest):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected a number of at least {lowest}"):
        ViewGallery(**{name: value})
