"""Loaders, subsets, preprocessing and the command line's view of a datamodule."""

import subprocess
import sys
import textwrap
from collections import Counter

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

from metatpt.datamodules import BaseDataModule, FolderDataModule, PACSDataModule
from metatpt.datamodules.base import Picture
from metatpt.datamodules.names import quote_class_names, quote_entries
from metatpt.datamodules.subsets import balanced_subset, few_shots
from metatpt.types import Batch, Preprocessing

P16 = Preprocessing(16, (0,) * 3, (1,) * 3)


class Drawn:
    """Pictures without files."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Picture(Image.new("RGB", (20, 10), (index, 0, 0)), self.labels[index], f"drawn {index}")


class DrawnDataModule(BaseDataModule):
    """A leaf as small as one can be."""

    def __init__(self, n=7, **kwargs):
        super().__init__(**kwargs)
        self.class_names = ["cat", "dog", "owl"]
        self.n = n

    def pictures(self, split):
        return Drawn([index % 3 for index in range(self.n if split == "test" else 4)])


class Probe(pl.LightningModule):
    """Remembers the batches that it gets."""

    def __init__(self, preprocessing=P16):
        super().__init__()
        self.preprocessing = preprocessing
        self.batches = []

    def step(self, batch, batch_idx):
        self.batches.append(batch)

    validation_step = test_step = predict_step = step


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, **options
    )


def indices(batches):
    return [index for batch in batches for index in batch.index.tolist()]


def prepared(datamodule, stage="test"):
    datamodule.preprocessing = P16
    datamodule.setup(stage)
    return datamodule


@pytest.mark.parametrize("distributed_sampler", [False, True])
@pytest.mark.parametrize(("verb", "n"), [("validate", 4), ("test", 7), ("predict", 7)])
def test_in_a_trainer(verb, n, distributed_sampler):
    probe, datamodule = Probe(), DrawnDataModule(batch_size=3)
    run = getattr(trainer(use_distributed_sampler=distributed_sampler), verb)
    run(probe, datamodule=datamodule)
    assert all(isinstance(batch, Batch) for batch in probe.batches)
    assert indices(probe.batches) == list(range(n))
    assert datamodule.n_total == n
    assert datamodule.preprocessing == P16
    assert probe.batches[0].image.shape == (3, 3, 16, 16)
    assert probe.batches[0].canvas.shape == (3, 3, 32, 32)


def test_preprocessing_is_that_of_the_model_in_use():
    datamodule = DrawnDataModule()
    for size in (16, 24):
        probe = Probe(Preprocessing(size, (0,) * 3, (1,) * 3))
        trainer().test(probe, datamodule=datamodule)
        assert probe.batches[0].image.shape[-1] == size


def test_preprocessing_unset():
    message = r"DrawnDataModule does not know .*set datamodule.preprocessing = module.preprocessing before setup\(\)"
    with pytest.raises(RuntimeError, match=message):
        DrawnDataModule().setup("test")
    with pytest.raises(RuntimeError, match=message):
        trainer().test(Probe(preprocessing=None), datamodule=DrawnDataModule())


def test_without_a_trainer():
    datamodule = prepared(DrawnDataModule(batch_size=2), None)
    assert indices(datamodule.val_dataloader()) == list(range(4))
    assert indices(datamodule.test_dataloader()) == indices(datamodule.predict_dataloader()) == list(range(7))
    assert datamodule.n_total == 7


def test_loader_before_setup():
    with pytest.raises(RuntimeError, match="The test split is not set up"):
        DrawnDataModule().test_dataloader()
    with pytest.raises(RuntimeError, match="The val split is not set up"):
        prepared(DrawnDataModule(), "test").val_dataloader()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"num_workers": -1}, "num_workers of at least 0, got -1"),
        ({"max_samples": 0}, "max_samples of at least 1 .*got 0"),
        ({"shots": 0}, "shots of at least 1 .*got 0"),
        ({"decode": "raw"}, "'upright' or 'plain', got 'raw'"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        DrawnDataModule(**option)


def test_workers_change_nothing(tmp_path):
    for number in range(7):
        Image.new("RGB", (20, 10), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
    expected = None
    for workers, size in ((0, 4), (1, 1), (3, 4)):
        datamodule = FolderDataModule(tmp_path, "cat,dog", num_workers=workers, batch_size=size)
        loader = prepared(datamodule).test_dataloader()
        assert loader.persistent_workers is (workers > 0)
        batches = list(loader)
        found = {
            path: (index, image)
            for batch in batches
            for path, index, image in zip(batch.path, batch.index.tolist(), batch.image, strict=True)
        }
        expected = expected or found
        assert found.keys() == expected.keys()
        for path, (index, image) in found.items():
            assert index == expected[path][0]
            assert torch.equal(image, expected[path][1])


def test_decode_plain(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    images = [
        next(iter(prepared(FolderDataModule(tmp_path, "cat", decode=decode)).test_dataloader())).image[0, :, 0, 0]
        for decode in ("upright", "plain")
    ]
    assert images[0].tolist() == [1, 1, 1]
    assert images[1].tolist() == [1, 0, 0]


# Subsets


def test_subset_is_seeded_balanced_and_in_order(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    datamodule = prepared(DrawnDataModule(n=60, max_samples=15, batch_size=4))
    chosen = indices(datamodule.test_dataloader())
    assert chosen == sorted(set(chosen))
    assert Counter(index % 3 for index in chosen) == {0: 5, 1: 5, 2: 5}
    assert datamodule.n_total == 60
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.path == [f"drawn {index}" for index in chosen[:4]]
    assert chosen == indices(prepared(DrawnDataModule(n=60, max_samples=15)).test_dataloader())
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert chosen != indices(prepared(DrawnDataModule(n=60, max_samples=15)).test_dataloader())


def test_subset_of_uneven_classes():
    labels = [0] * 50 + [1] * 2 + [2] * 5
    chosen = balanced_subset(labels, 12, seed=0)
    assert Counter(labels[place] for place in chosen) == {0: 5, 1: 2, 2: 5}
    assert Counter(labels[place] for place in balanced_subset(labels, 2, seed=0)).most_common(1)[0][1] == 1
    assert set(balanced_subset(labels, 11, seed=0)) < set(chosen)


def test_subset_without_labels():
    assert len(set(balanced_subset([-1] * 30, 7, seed=0))) == 7


@pytest.mark.parametrize(("size", "logged"), [(7, []), (None, []), (1000, ["max_samples is 1000; all 7 pictures"])])
def test_more_than_there_are_is_all(monkeypatch, size, logged):
    said = []
    monkeypatch.setattr("metatpt.datamodules.base.rank_zero_info", said.append)
    assert indices(prepared(DrawnDataModule(max_samples=size)).test_dataloader()) == list(range(7))
    assert [line[: len(wanted)] for line, wanted in zip(said, logged, strict=True)] == logged


# Many processes


@pytest.mark.timeout(300)
def test_shots_are_seeded_and_of_each_class():
    labels = [0] * 50 + [1] * 30 + [2] * 3
    chosen = few_shots(labels, 4, seed=0)
    assert Counter(labels[place] for place in chosen) == {0: 4, 1: 4, 2: 3}
    assert chosen == sorted(chosen) == few_shots(labels, 4, seed=0)
    assert chosen != few_shots(labels, 4, seed=1)
    assert set(chosen) < set(few_shots(labels, 8, seed=0))
    assert few_shots(labels, None, seed=0) == list(range(83))


class TrainedDataModule(DrawnDataModule):
    def pictures(self, split):
        return Drawn([index % 3 for index in range(12 if split == "train" else 4)])


def test_training_pictures_come_in_another_order_each_epoch():
    datamodule = prepared(TrainedDataModule(shots=3, batch_size=2), "fit")
    loader = datamodule.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(indices(loader))
    assert sorted(epochs[0]) == sorted(epochs[1]) == few_shots([index % 3 for index in range(12)], 3, seed=0)
    assert epochs[0] == epochs[2] != epochs[1]
    assert indices(datamodule.val_dataloader()) == list(range(4))


def test_each_process_trains_on_its_share(monkeypatch):
    shares = []
    for rank in (0, 1):
        datamodule = prepared(TrainedDataModule(), "fit")
        monkeypatch.setattr(datamodule, "_place", lambda rank=rank: (2, rank))
        shares.append(indices(datamodule.train_dataloader()))
    assert sorted(shares[0] + shares[1]) == list(range(12))
    assert len(shares[0]) == len(shares[1])


def test_fit_needs_a_training_split():
    class OnlyTested(DrawnDataModule):
        splits = ("val", "test")

    with pytest.raises(ValueError, match="OnlyTested has no train split, only val and test"):
        prepared(OnlyTested(), "fit")
    prepared(OnlyTested(), None)


def test_two_processes_take_each_picture_once(tmp_path):
    for number in range(9):  # of which two are held out to validate on
        (tmp_path / "learn" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(tmp_path / "learn" / "cat" / f"{number}.png")
    for n in (7, 1):
        for number in range(n):
            (tmp_path / f"{n}").mkdir(exist_ok=True)
            Image.new("RGB", (20, 10)).save(tmp_path / f"{n}" / f"{number}.png")
    script = """
        import sys
        from pathlib import Path

        import lightning.pytorch as pl
        import torch

        from metatpt.datamodules import FolderDataModule
        from metatpt.types import Preprocessing


        class Probe(pl.LightningModule):
            preprocessing = Preprocessing(16, (0,) * 3, (1,) * 3)

            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(()))

            def training_step(self, batch, batch_idx):
                self.step(batch, batch_idx)
                with open(self.out / f"epochs{self.global_rank}", "a") as file:
                    file.writelines(f"{epoch} " for epoch in batch.epoch.tolist())
                return self.weight * batch.image.mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

            def step(self, batch, batch_idx):
                with open(self.out / f"rank{self.global_rank}", "a") as file:
                    file.writelines(f"{index} " for index in batch.index.tolist())

            test_step = predict_step = step


        if __name__ == "__main__":
            root = Path(sys.argv[1])
            trainer = pl.Trainer(
                accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
                use_distributed_sampler=sys.argv[2] == "true", enable_progress_bar=False, max_epochs=2,
                limit_val_batches=0,
            )
            probe = Probe()
            probe.out = root / "out-fit"
            probe.out.mkdir(exist_ok=True)
            data = FolderDataModule(root / "1", train_root=root / "learn", batch_size=2)
            trainer.fit(probe, datamodule=data)
            for n in ("7", "1"):
                for verb in ("test", "predict"):
                    probe = Probe()
                    probe.out = root / f"out-{n}-{verb}"
                    probe.out.mkdir(exist_ok=True)
                    getattr(trainer, verb)(probe, datamodule=FolderDataModule(root / n, "cat,dog", batch_size=2))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    # Whatever the Trainer's flag says, since it is easy to forget.
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), "true"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    taken = [list(map(int, (tmp_path / "out-fit" / f"rank{rank}").read_text().split())) for rank in (0, 1)]
    for epoch in (slice(4), slice(4, 8)):  # 7 pictures, one of them twice
        assert set(taken[0][epoch] + taken[1][epoch]) == {*taken[0][:4], *taken[1][:4]}
        assert len({*taken[0][epoch], *taken[1][epoch]}) == 7
    assert taken[0][:4] != taken[0][4:]
    for rank in (0, 1):
        assert (tmp_path / "out-fit" / f"epochs{rank}").read_text() == "0 0 0 0 1 1 1 1 "
    for verb in ("test", "predict"):
        for n, shards in ((7, [[0, 2, 4, 6], [1, 3, 5]]), (1, [[0], [-1]])):
            found = [(tmp_path / f"out-{n}-{verb}" / f"rank{rank}").read_text().split() for rank in (0, 1)]
            assert [[int(index) for index in shard] for shard in found] == shards


def test_filler_row():
    dataset = prepared(DrawnDataModule()).test_dataloader().dataset
    filler = dataset[-1]
    assert (filler.index, filler.label, filler.path, filler.error) == (-1, -1, "", None)
    assert filler.image.shape == dataset[0].image.shape


# The command line


@pytest.fixture
def parse():
    """jsonargparse as the command line sets it up, on a datamodule."""
    plain = jsonargparse.get_loader("yaml")
    jsonargparse.set_loader("yaml", lambda text: plain(quote_class_names(text)))

    def parse(*args):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_subclass_arguments(BaseDataModule, "data")
        config = parser.parse_args(list(args))
        return parser, config, parser.instantiate(config).data

    yield parse
    jsonargparse.set_loader("yaml", plain)


@pytest.fixture
def flat(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return ["--data=FolderDataModule", f"--data.root={tmp_path}"]


def test_names_with_commas(parse, flat):
    assert parse(*flat, "--data.class_names=a,b")[2].class_names == ["a", "b"]
    assert parse(*flat, "--data.class_names", "yes,no,1")[2].class_names == ["yes", "no", "1"]
    assert parse(*flat, "--data.class_names=1")[2].class_names == ["1"]


def test_names_file(parse, flat, tmp_path):
    (tmp_path / "names.txt").write_text("a\nyes\n")
    assert parse(*flat, f"--data.class_names={tmp_path / 'names.txt'}")[2].class_names == ["a", "yes"]
    # jsonargparse wraps what a constructor raises
    with pytest.raises((FileNotFoundError, ValueError), match=r"nothing\.txt.*does not exist"):
        parse(*flat, "--data.class_names=nothing.txt")


NAMES = ["1", "yes", "null", "cat", "010", "1.50", "~", "a: b"]


def test_names_in_yaml_are_text(parse, flat, tmp_path):
    listed = "[1, yes, null, cat, 010, 1.50, ~, 'a: b']"
    path = tmp_path / "data.yaml"
    path.write_text(
        f"data:\n  class_path: FolderDataModule\n  init_args:\n    root: {tmp_path}\n    class_names: {listed}\n"
    )
    for args in ([f"--config={path}"], [*flat, f"--data.class_names={quote_entries(listed)}"]):
        parser, config, datamodule = parse(*args)
        assert datamodule.class_names == NAMES
        # what is saved runs again
        path.with_name("saved.yaml").write_text(parser.dump(config))
        assert parse(f"--config={path.with_name('saved.yaml')}")[2].class_names == NAMES


def test_options_of_the_base_reach_a_leaf(parse, tmp_path):
    (tmp_path / "photo").mkdir()
    root = f"--data.root={tmp_path}"
    datamodule = parse("--data=PACSDataModule", root, "--data.domain=photo", "--data.max_samples=5")[2]
    assert isinstance(datamodule, PACSDataModule)
    assert (datamodule.domain, datamodule.max_samples, datamodule.batch_size) == ("photo", 5, 8)
    with pytest.raises(jsonargparse.ArgumentError, match="class_names"):
        parse("--data=PACSDataModule", root, "--data.class_names=a,b")


@pytest.mark.parametrize("listed", ["rotation,none", "[rotation, none]"])
def test_shifts_to_train_under(parse, tmp_path, listed):
    config = tmp_path / "data.yaml"
    config.write_text(f"data:\n  class_path: ShiftedShapesDataModule\n  init_args:\n    train_shifts: {listed}\n")
    for args in (["--data=ShiftedShapesDataModule", f"--data.train_shifts={listed}"], [f"--config={config}"]):
        shift = parse(*args, "--data.train_severities=[2,5]")[2].train_shift
        assert (shift.names, shift.severities) == (("rotation", "none"), (2, 5))
    with pytest.raises((jsonargparse.ArgumentError, ValueError), match="the nearest is 'noise'"):
        parse("--data=ShiftedShapesDataModule", "--data.train_shifts=nois")
