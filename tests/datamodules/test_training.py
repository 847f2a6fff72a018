"""What a training epoch shows: its order, its pictures under shifts, and where its random numbers come from."""

from __future__ import annotations

import hashlib
from collections import Counter

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.fake_data.cifar import write_cifar10
from helpers.fake_data.coop import write_dtd, write_eurosat
from helpers.fake_data.domains import write_pacs
from helpers.fake_data.imagenet import synsets, write_class_folders
from helpers.noise import Noise, NoiseDataModule
from PIL import Image
from torch.utils.data import DistributedSampler

from metatpt.datamodules import (
    CIFAR10DataModule,
    DTDDataModule,
    EuroSATDataModule,
    FolderDataModule,
    ImageNetDataModule,
    ImageNetV2DataModule,
    PACSDataModule,
    ShiftedShapesDataModule,
)
from metatpt.datamodules.sampler import TrainingSampler
from metatpt.images import to_sample
from metatpt.rng import numpy_generator, sample_generator
from metatpt.shifts import SHIFTS, apply_shift
from metatpt.types import Preprocessing

P16 = Preprocessing(16, (0,) * 3, (1,) * 3)


def prepared(datamodule, stage="fit"):
    datamodule.preprocessing = P16
    datamodule.setup(stage)
    return datamodule


def epoch_of(loader, epoch):
    """The batches of an epoch, as Lightning asks for them."""
    loader.sampler.set_epoch(epoch)
    return list(loader)


def shown(batches):
    """What of each picture was shown in which epoch."""
    return {
        (epoch, index): hashlib.sha256(image.numpy().tobytes() + canvas.numpy().tobytes()).hexdigest()
        for batch in batches
        for epoch, index, image, canvas in zip(
            batch.epoch.tolist(), batch.index.tolist(), batch.image, batch.canvas, strict=True
        )
    }


# Random numbers


def test_they_come_from_seed_epoch_and_index_alone(monkeypatch):
    runs = []
    for seed, workers, size in (("0", 0, 4), ("0", 2, 1), ("0", 0, 9), ("1", 0, 4)):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        datamodule = NoiseDataModule(train_shifts=list(SHIFTS), num_workers=workers, batch_size=size)
        loader = prepared(datamodule).train_dataloader()
        runs.append({})
        for epoch in (0, 1, 2):  # workers live on from one to the next
            runs[-1] |= shown(epoch_of(loader, epoch))
    assert sorted(runs[0]) == [(epoch, index) for epoch in range(3) for index in range(9)]
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0].values())) == 27
    assert not set(runs[0].values()) & set(runs[3].values())


def test_in_evaluation_they_are_those_of_no_epoch():
    """They are published: with an epoch's place in the seed, every number would be another."""
    words = np.random.SeedSequence([2**62, 7, 300981383])  # the last is the checksum of "views"
    expected = torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1)).initial_seed()
    assert sample_generator(2**62, 7, "views").initial_seed() == expected
    seeds = {sample_generator(0, index, "views", epoch).initial_seed() for index in range(9) for epoch in range(9)}
    assert len(seeds) == 81
    batches = list(prepared(NoiseDataModule(train_shifts="noise")).val_dataloader())
    assert {epoch for batch in batches for epoch in batch.epoch.tolist()} == {0}
    assert shown(batches) == shown([*prepared(NoiseDataModule(), "test").test_dataloader()])


class Learner(pl.LightningModule):
    """Remembers what it is shown."""

    preprocessing = P16

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * batch.image.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(epochs, folder, resume=None, **options):
    learner = Learner()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, max_epochs=epochs, limit_val_batches=0,
        callbacks=[pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")],
    )  # fmt: skip
    trainer.fit(learner, datamodule=NoiseDataModule(train_shifts="noise,blur", **options), ckpt_path=resume)
    return learner.batches


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(tmp_path, workers):
    whole = fitted(3, tmp_path / "whole", num_workers=workers, batch_size=4)
    fitted(2, tmp_path / "stopped", num_workers=workers, batch_size=4)
    rest = fitted(3, tmp_path / "rest", tmp_path / "stopped" / "epoch=1.ckpt", num_workers=workers, batch_size=4)
    assert [batch.epoch.tolist() for batch in whole] == [[epoch] * n for epoch in range(3) for n in (4, 4, 1)]
    assert [batch.index.tolist() for batch in rest] == [batch.index.tolist() for batch in whole[6:]]
    assert shown(rest) == shown(whole[6:])


# Order


@pytest.mark.parametrize("n", [1, 2, 7, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_process_gets_equally_many(n, processes):
    samplers = [TrainingSampler(range(10, 10 + n), 0, processes, rank) for rank in range(processes)]
    for epoch in (0, 5):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {-(-n // processes)} == {len(sampler) for sampler in samplers}
        assert {each for share in shares for each, _ in share} == {epoch}
        times = Counter(index for share in shares for _, index in share)
        assert sorted(times) == list(range(10, 10 + n))
        assert max(times.values()) - min(times.values()) <= 1


def test_orders_differ_by_epoch_and_by_seed():
    """Also those of neighbouring epochs and seeds, which PyTorch's sampler adds up."""
    orders = set()
    for seed in range(3):
        sampler = TrainingSampler(range(50), seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            assert list(sampler) == list(sampler)
            orders.add(tuple(index for _, index in sampler))
    assert len(orders) == 9


def test_lightning_keeps_the_sampler():
    """It replaces any other kind by its own, whose samples have no epoch."""
    assert isinstance(prepared(NoiseDataModule()).train_dataloader().sampler, DistributedSampler)


# Shifts


def test_a_picture_is_shifted_before_it_is_resized():
    datamodule = prepared(NoiseDataModule(train_shifts="rotation", train_severities=[5], batch_size=9))
    (batch,) = epoch_of(datamodule.train_dataloader(), 3)
    for row, index in enumerate(batch.index.tolist()):
        generator = numpy_generator(0, index, "training shift", 3)
        generator.integers(1), generator.integers(1)  # which shift, and how severe
        expected = to_sample(apply_shift("rotation", Noise(9).picture(index), 5, generator), P16)
        assert torch.equal(batch.image[row], expected.image)
        assert torch.equal(batch.canvas[row], expected.canvas)
        assert batch.label[row] == index % 3
        assert batch.aspect[row] == pytest.approx(32 / 24)


def test_without_a_shift_pictures_are_as_they_are():
    clean = shown(epoch_of(prepared(NoiseDataModule()).train_dataloader(), 0))
    assert clean == shown(epoch_of(prepared(NoiseDataModule(train_shifts="none")).train_dataloader(), 0))
    assert clean == shown(prepared(NoiseDataModule(), "test").test_dataloader())
    half = shown(epoch_of(prepared(NoiseDataModule(n=60, train_shifts="none,noise")).train_dataloader(), 0))
    clean = shown(prepared(NoiseDataModule(n=60), "test").test_dataloader())
    assert 15 < sum(half[key] == clean[key] for key in clean) < 45


def test_a_picture_that_cannot_be_read_keeps_its_row():
    datamodule = NoiseDataModule(unreadable=(4,), train_shifts="noise", batch_size=9)
    (batch,) = epoch_of(prepared(datamodule).train_dataloader(), 2)
    row = batch.index.tolist().index(4)
    assert [error for error in batch.error if error] == [batch.error[row]] == ["empty file (0 bytes)"]
    assert (batch.image[row].abs().sum(), batch.label[row], batch.epoch[row]) == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_shifts": "noise, rotatoin"},
            r"shift 'rotatoin' is none of none, rotation, .*; the nearest is 'rotation'",
        ),
        ({"train_shifts": ["scale"]}, "shift 'scale' is none of"),
        ({"train_shifts": []}, "at least one shift"),
        ({"train_shifts": "noise", "train_severities": []}, "and one severity"),
        ({"train_shifts": "noise", "train_severities": [3, 6]}, "severity 6 is none of 1, 2, 3, 4, 5"),
        ({"train_severities": [3]}, r"train_severities \[3\] are those of train_shifts"),
    ],
)
def test_no_such_shift(options, message):
    with pytest.raises(ValueError, match=message):
        NoiseDataModule(**options)


# Which pictures


def test_pictures_without_a_label_are_not_trained_on():
    datamodule = NoiseDataModule(labels=[-1, 0, -1, 1, 2, -1, -1, 0, 1])
    batches = epoch_of(prepared(datamodule).train_dataloader(), 0)
    assert sorted(index for batch in batches for index in batch.index.tolist()) == [1, 3, 4, 7, 8]
    unlabelled = NoiseDataModule(labels=[-1] * 9)
    with pytest.raises(ValueError, match="None of the 9 pictures of NoiseDataModule to train on has a label"):
        prepared(unlabelled)
    prepared(unlabelled, "test")


@pytest.mark.parametrize(("shots", "of_each"), [(1, 1), (4, 4), (16, 4), (None, 20)])
def test_validation_in_few_shot_training_is_as_small_as_usual(shots, of_each):
    datamodule = prepared(NoiseDataModule(n=60, shots=shots))
    labels = Counter(label for batch in datamodule.val_dataloader() for label in batch.label.tolist())
    assert labels == dict.fromkeys(range(3), of_each)
    whole = prepared(NoiseDataModule(n=60, shots=shots), "validate")
    assert sum(len(batch) for batch in whole.val_dataloader()) == 60
    fewer = prepared(NoiseDataModule(n=60, shots=shots, max_samples=3))
    assert sum(len(batch) for batch in fewer.val_dataloader()) == 3


def write_imagenet_parts(root):
    write_class_folders(root / "train", synsets("imagenet")[:3], "{folder}_{number}.JPEG", n=7)
    write_class_folders(root / "val", synsets("imagenet")[:3], "{folder}_{number}.JPEG", n=1)


def write_two_folders(root):
    for folder in ("learn", "test"):
        for number, name in enumerate(("cat", "dog", "owl")):
            (root / folder / name).mkdir(parents=True)
            for picture in range(6):
                Image.new("RGB", (9, 8), (40 * picture, 90 * number, 0)).save(root / folder / name / f"{picture}.png")


KINDS = {
    "bundled": (lambda root: ShiftedShapesDataModule, lambda root: None, range(24)),
    "folder": (lambda root: lambda **o: FolderDataModule(root / "test", train_root=root / "learn", **o), write_two_folders, range(3)),
    "domains": (lambda root: lambda **o: PACSDataModule(root, partial=True, **o), write_pacs, range(7)),
    "coop": (lambda root: lambda **o: EuroSATDataModule(root, partial=True, **o), write_eurosat, None),
    "official": (
        lambda root: lambda **o: DTDDataModule(root, partial=True, **o), lambda root: write_dtd(root, official=True), None,
    ),
    "cifar": (lambda root: lambda **o: CIFAR10DataModule(root, partial=True, **o), write_cifar10, range(10)),
    "imagenet": (lambda root: lambda **o: ImageNetDataModule(root, partial=True, **o), write_imagenet_parts, range(3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_of_every_kind(tmp_path, kind):
    make, write, labels = KINDS[kind]
    write(tmp_path)
    datamodule = prepared(make(tmp_path)(shots=2, train_shifts="noise", train_severities=[3], batch_size=5))
    batches = epoch_of(datamodule.train_dataloader(), 1)
    found = Counter(label for batch in batches for label in batch.label.tolist())
    assert set(found) == set(range(len(datamodule.class_names)) if labels is None else labels)
    assert max(found.values()) <= 2
    assert {error for batch in batches for error in batch.error} == {None}
    assert all(batch.image.std((1, 2, 3)).min() > 0.05 for batch in batches), "the noise shows"
    trained, names = {path for batch in batches for path in batch.path}, datamodule.class_names
    assert not trained & {path for batch in datamodule.val_dataloader() for path in batch.path}
    tested = prepared(make(tmp_path)(), "test")
    if kind not in ("folder", "bundled"):  # whose names begin in another folder
        assert not trained & set(tested.pictures("test").paths)
    assert tested.class_names == names


def test_only_the_split_to_test_on_must_be_there(tmp_path):
    write_class_folders(tmp_path / "val", synsets("imagenet")[:3], "{folder}_{number}.JPEG", n=1)
    datamodule = prepared(ImageNetDataModule(tmp_path, partial=True), None)
    assert sum(len(batch) for batch in datamodule.test_dataloader()) == 3
    for loader in (datamodule.train_dataloader, datamodule.val_dataloader):
        with pytest.raises(FileNotFoundError, match="No folder train or .*; there are: val"):
            loader()
    with pytest.raises(FileNotFoundError, match="No folder train or"):
        prepared(ImageNetDataModule(tmp_path, partial=True), "fit")


def test_what_is_there_to_test_on_says_so(tmp_path):
    write_class_folders(tmp_path / "imagenetv2-matched-frequency-format-val", ["0"], "{number}.jpeg", n=1)
    with pytest.raises(ValueError, match="ImageNetV2DataModule has no train split, only val and test"):
        prepared(ImageNetV2DataModule(tmp_path, partial=True), "fit")


# A folder to train on beside the one to test on


def test_parts_of_a_folder(tmp_path, monkeypatch):
    write_two_folders(tmp_path)
    Image.new("RGB", (9, 8)).save(tmp_path / "learn" / "loose.png")
    (tmp_path / "learn" / "rare").mkdir()
    Image.new("RGB", (9, 8)).save(tmp_path / "learn" / "rare" / "only.png")
    names = ["owl", "zebra", "cat", "dog", "rare"]
    held = []
    for seed in ("0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        datamodule = FolderDataModule(tmp_path / "test", names, train_root=str(tmp_path / "learn"), batch_size=99)
        datamodule.preprocessing = P16
        datamodule.setup()
        assert datamodule.class_names == names
        (train,), (val,), (test,) = (
            datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader()
        )  # fmt: skip
        for batch in (train, val, test):
            assert [path.split("/")[0] for path in batch.path] == [names[label] for label in batch.label.tolist()]
        assert Counter(train.label.tolist()) == {0: 4, 2: 4, 3: 4, 4: 1}, "a class's only picture is trained on"
        assert Counter(val.label.tolist()) == {0: 2, 2: 2, 3: 2}
        assert Counter(test.label.tolist()) == {0: 6, 2: 6, 3: 6}
        assert not {*train.path} & {*val.path}
        held.append(val.path)
    assert held[0] == held[1]


def test_classes_are_those_of_the_folder_to_test_on(tmp_path):
    write_two_folders(tmp_path)
    (tmp_path / "test" / "zebra").mkdir()
    Image.new("RGB", (9, 8)).save(tmp_path / "test" / "zebra" / "1.png")
    names = ["cat", "dog", "owl", "zebra"]
    assert FolderDataModule(tmp_path / "test", train_root=tmp_path / "learn").class_names == names
    with pytest.raises(
        ValueError, match=r"class folders that .*learn lacks: zebra \(none is like it\)\. Give class_names"
    ):
        FolderDataModule(tmp_path / "learn", train_root=tmp_path / "test")
    with pytest.raises(ValueError, match="for 4 class folders"):
        FolderDataModule(tmp_path / "learn", ["cat", "dog", "owl"], train_root=tmp_path / "test")


def test_a_flat_folder_takes_the_names_of_the_one_to_train_on(tmp_path):
    write_two_folders(tmp_path)
    flat = tmp_path / "test" / "cat"
    assert FolderDataModule(flat, train_root=tmp_path / "learn").class_names == ["cat", "dog", "owl"]
    with pytest.raises(ValueError, match=r"train_root .*cat has no class folders"):
        FolderDataModule(tmp_path / "learn", train_root=flat)


@pytest.mark.parametrize(("root", "train_root"), [("test", "test"), (".", "test"), ("test/cat", "learn/../test")])
def test_pictures_that_are_trained_on_are_not_tested_on(tmp_path, root, train_root):
    write_two_folders(tmp_path)
    with pytest.raises(ValueError, match="have pictures in common"):
        FolderDataModule(tmp_path / root, train_root=tmp_path / train_root)


def test_a_folder_alone_has_nothing_to_train_on(tmp_path):
    write_two_folders(tmp_path)
    with pytest.raises(ValueError, match=r"FolderDataModule has no train split.*train_root"):
        prepared(FolderDataModule(tmp_path / "test"))
