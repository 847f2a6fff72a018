"""WebDataset shards: each sample once, its place, its label, and what can be wrong with a shard."""

import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from helpers.fake_data.shards import CLASSES, picture, sample, write_shard, write_shards, write_webdataset
from PIL import Image

from metatpt.datamodules import shard_files
from metatpt.datamodules import shards as shards_module
from metatpt.datamodules.shard_files import find_shards
from metatpt.datamodules.shards import WebDatasetDataModule
from metatpt.types import Preprocessing

pytest.importorskip("webdataset", reason="the extra webdataset is not installed")

P16 = Preprocessing(16, (0,) * 3, (1,) * 3)


def made(given, rank=0, processes=1, **options):
    """A datamodule as it is on one of several processes, set up for a test."""
    datamodule = WebDatasetDataModule(given if isinstance(given, list) else str(given), list(CLASSES), **options)
    datamodule.trainer = SimpleNamespace(
        world_size=processes,
        global_rank=rank,
        lightning_module=SimpleNamespace(preprocessing=P16),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    datamodule.prepare_data()
    datamodule.setup("test")
    return datamodule


def concatenated(root):
    """Name, colour and label of every sample, by tarfile alone: what the places are."""
    found = []
    for file in sorted(Path(root).glob("*.tar")):
        by_key = {}
        with tarfile.open(file) as archive:
            for member in archive:
                key, _, ending = member.name.partition(".")
                by_key.setdefault(key, {})[ending] = archive.extractfile(member).read()
        for key, content in by_key.items():
            colour = Image.open(io.BytesIO(content["png"])).getpixel((0, 0))
            found.append((f"{file.name}/{key}", colour, int(content["cls"])))
    return found


def samples_of(batches):
    """The same of batches, by index; an index that comes twice fails."""
    found = {}
    for batch in batches:
        for row in range(len(batch)):
            index = int(batch.index[row])
            assert index not in found
            colour = tuple((255 * batch.image[row, :, 8, 8]).round().int().tolist())
            found[index] = (batch.path[row], colour, int(batch.label[row]))
    return found


def indices(batches):
    return [index for batch in batches for index in batch.index.tolist()]


def stamp_changed(file):
    """A time of change that surely is another."""
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


@pytest.fixture
def opened(monkeypatch):
    """Names of the shards that are opened, in order."""
    names = []
    contents = shard_files._contents

    def watched(shard):
        names.append(shard.name)
        return contents(shard)

    monkeypatch.setattr(shard_files, "_contents", watched)
    return names


# Each sample once


@pytest.mark.parametrize("sizes", [(11,), (4, 7), (1, 5, 0, 3, 2), (2,)], ids=str)
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_sample_is_taken_once(tmp_path, monkeypatch, processes, workers, sizes):
    write_shards(tmp_path, *sizes)
    rows, fillers = [], 0
    for rank in range(processes):
        loader = made(tmp_path, rank, processes, batch_size=2).test_dataloader()
        n_batches = 0
        of_rank = []
        for worker in range(max(workers, 1)):
            info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
            monkeypatch.setattr(shards_module, "get_worker_info", lambda info=info: info)
            samples = list(loader.dataset)
            assert [each.index for each in samples] == sorted(each.index for each in samples)
            n_batches += -(-len(samples) // 2)
            of_rank += samples
        assert len(of_rank) == len(loader.dataset)
        assert n_batches == len(loader)
        assert len(of_rank) >= 1  # each process takes part in what all of them reduce
        fillers += sum(each.index == -1 for each in of_rank)
        rows += [each for each in of_rank if each.index != -1]
    assert fillers == max(0, processes - sum(sizes))
    expected = concatenated(tmp_path)
    assert len(expected) == sum(sizes)
    assert sorted(each.index for each in rows) == list(range(sum(sizes)))
    for each in rows:
        colour = tuple((255 * each.image[:, 8, 8]).round().int().tolist())
        assert (each.path, colour, each.label) == expected[each.index]


@pytest.mark.parametrize("sizes", [(7,), (2, 3, 2)], ids=str)
def test_in_real_workers(tmp_path, sizes):
    write_shards(tmp_path, *sizes)
    expected = dict(enumerate(concatenated(tmp_path)))
    loader = made(tmp_path, num_workers=2, batch_size=2).test_dataloader()
    assert loader.persistent_workers
    for _ in range(2):
        batches = list(loader)
        assert samples_of(batches) == expected
        assert len(batches) == len(loader) == 4
    assert indices(made(tmp_path, num_workers=0, batch_size=2).test_dataloader()) == list(range(7))


def test_only_shards_that_are_needed_are_opened(tmp_path, opened):
    write_shards(tmp_path, 2, 2, 2, 2)
    made(tmp_path)
    for rank, expected in ((0, ["val-0000.tar", "val-0001.tar"]), (1, ["val-0002.tar", "val-0003.tar"])):
        datamodule = made(tmp_path, rank, 2)
        opened.clear()
        list(datamodule.test_dataloader())
        assert opened == expected


def test_a_subset_is_balanced_and_keeps_places(tmp_path):
    write_shards(tmp_path, 20, 13)
    expected = concatenated(tmp_path)
    rows = {}
    for rank in range(2):
        datamodule = made(tmp_path, rank, 2, max_samples=9)
        assert datamodule.n_total == 33
        rows |= samples_of(datamodule.test_dataloader())
    assert Counter(label for _, _, label in rows.values()) == {0: 3, 1: 3, 2: 3}
    assert all(row == expected[index] for index, row in rows.items())


def test_one_place_alone(tmp_path):
    write_webdataset(tmp_path)
    pictures = made(tmp_path).pictures("test")
    assert pictures[5] == (picture(5), 2, "val-0001.tar/000005")
    with pytest.raises(IndexError, match="0 to 6, got 7"):
        pictures[7]


class Probe(pl.LightningModule):
    """Remembers the batches that it gets."""

    preprocessing = P16

    def __init__(self):
        super().__init__()
        self.batches = []

    def step(self, batch, batch_idx):
        self.batches.append(batch)

    validation_step = test_step = predict_step = step


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`")  # it is exact here
@pytest.mark.parametrize("distributed_sampler", [False, True])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_in_a_trainer(tmp_path, verb, distributed_sampler):
    write_webdataset(tmp_path)
    probe = Probe()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        use_distributed_sampler=distributed_sampler,
    )  # fmt: skip
    datamodule = WebDatasetDataModule(str(tmp_path), list(CLASSES), batch_size=3)
    getattr(trainer, verb)(probe, datamodule=datamodule)
    assert samples_of(probe.batches) == dict(enumerate(concatenated(tmp_path)))
    assert datamodule.n_total == 7


@pytest.mark.timeout(300)
def test_two_processes(tmp_path):
    write_shards(tmp_path / "7", 7)
    write_shards(tmp_path / "1", 1)
    script = """
        import sys
        from pathlib import Path

        import lightning.pytorch as pl

        from metatpt.datamodules.shards import WebDatasetDataModule
        from metatpt.types import Preprocessing


        class Probe(pl.LightningModule):
            preprocessing = Preprocessing(16, (0,) * 3, (1,) * 3)

            def step(self, batch, batch_idx):
                with open(self.out / f"rank{self.global_rank}", "a") as file:
                    file.writelines(f"{index} " for index in batch.index.tolist())

            test_step = predict_step = step


        if __name__ == "__main__":
            root = Path(sys.argv[1])
            trainer = pl.Trainer(
                accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
                enable_progress_bar=False,
            )
            for n, workers in (("7", 2), ("1", 0)):
                for verb in ("test", "predict"):
                    probe = Probe()
                    probe.out = root / f"out-{n}-{verb}"
                    probe.out.mkdir(exist_ok=True)
                    datamodule = WebDatasetDataModule(str(root / n), "cat,dog,owl", batch_size=2, num_workers=workers)
                    getattr(trainer, verb)(probe, datamodule=datamodule)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for verb in ("test", "predict"):
        for n, parts in ((7, [[0, 1, 2], [3, 4, 5, 6]]), (1, [[-1], [0]])):
            found = [(tmp_path / f"out-{n}-{verb}" / f"rank{rank}").read_text().split() for rank in (0, 1)]
            assert [sorted(int(index) for index in part) for part in found] == parts


# Where shards are


def test_shards_are_in_the_order_of_their_names(tmp_path):
    for name in ("b/1.tar", "b/0.tar", "a/1.tar", "a/._1.tar", "a/2.tar"):
        write_shard(tmp_path / name, [])
    by_kind = {
        "folder": [str(tmp_path / "a")],
        "file": [str(tmp_path / "a" / "1.tar")],
        "braces": [str(tmp_path / "{b,a}" / "{1..1}.tar")],
        "braces around paths": [f"{{{tmp_path / 'b' / '0.tar'},{tmp_path / 'a'}}}"],
        "glob": [str(tmp_path / "*" / "?.tar")],
        "list": [str(tmp_path / "b"), str(tmp_path / "a" / "2.tar")],
        "addresses": ["https://host/d/{b,a}-{08..10}.tar?key=1/2"],
    }
    found = {kind: find_shards(given) for kind, given in by_kind.items()}
    names = {kind: [shard.name for shard in shards] for kind, shards in found.items()}
    assert names == {
        "folder": ["1.tar", "2.tar"],
        "file": ["1.tar"],
        "braces": ["a/1.tar", "b/1.tar"],
        "braces around paths": ["a/1.tar", "a/2.tar", "b/0.tar"],
        "glob": ["a/1.tar", "a/2.tar", "b/0.tar", "b/1.tar"],
        "list": ["a/2.tar", "b/0.tar", "b/1.tar"],
        "addresses": ["a-08.tar", "a-09.tar", "a-10.tar", "b-08.tar", "b-09.tar", "b-10.tar"],
    }
    assert found["list"][0].url == (tmp_path / "a" / "2.tar").as_posix()
    assert found["addresses"][0].url == "https://host/d/a-08.tar?key=1/2"
    assert str(found["addresses"][0]) == "https://host/d/a-08.tar"  # the key stays out of messages


def test_paths_from_the_working_folder(tmp_path, monkeypatch):
    write_webdataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert samples_of(made("data/val-{0000..0001}.tar").test_dataloader()) == dict(
        enumerate(concatenated(tmp_path / "data"))
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["val-{0000..0003}.tar"], FileNotFoundError, r"No shard .*val-0002.tar, .*val-0003.tar; 2 others"),
        (["none-*.tar"], FileNotFoundError, r"No shard .*none-\*.tar"),
        (["empty"], FileNotFoundError, "No .tar file in the folder .*empty"),
        ([".", "val-0001.tar"], ValueError, "stand twice in what was given: .*val-0001.tar"),
        ([], ValueError, "at least one shard"),
        (["http://host/a.tar"], ValueError, "Shards on the web need index_file"),
    ],
)
def test_shards_that_are_not_there(tmp_path, monkeypatch, given, error, message):
    write_webdataset(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        WebDatasetDataModule(given, "cat,dog,owl")


def test_there_is_no_training_split(tmp_path):
    write_webdataset(tmp_path)
    with pytest.raises(ValueError, match="no train split"):
        made(tmp_path).setup("fit")


@pytest.mark.parametrize("name", ["webdataset", "braceexpand"])
def test_the_package_is_missing(tmp_path, monkeypatch, name):
    write_webdataset(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape('pip install "metatpt[webdataset]"')):
        WebDatasetDataModule(str(tmp_path / "val-{0000..0001}.tar"), "cat,dog,owl")


# The index file


def test_shards_are_counted_once(tmp_path, opened):
    write_webdataset(tmp_path)
    made(tmp_path)
    assert opened == ["val-0000.tar", "val-0001.tar"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metatpt-index.json", "val-0000.tar", "val-0001.tar"]
    again = made(tmp_path)
    assert len(opened) == 2
    assert samples_of(again.test_dataloader()) == dict(enumerate(concatenated(tmp_path)))


def test_what_has_changed_is_counted_again(tmp_path, monkeypatch, opened):
    said = []
    monkeypatch.setattr(shard_files, "rank_zero_info", said.append)
    write_webdataset(tmp_path)
    made(tmp_path)
    # As long as it was: tar files come in blocks, so their size alone would not tell.
    size = (tmp_path / "val-0000.tar").stat().st_size
    write_shard(tmp_path / "val-0000.tar", [(key, sample(8)) for key in "abcde"])
    assert (tmp_path / "val-0000.tar").stat().st_size == size
    stamp_changed(tmp_path / "val-0000.tar")
    opened.clear()
    datamodule = made(tmp_path)
    assert opened == ["val-0000.tar"]
    assert "in 1 of 2 shards (changed since the last time: val-0000.tar)" in said[-1]
    assert samples_of(datamodule.test_dataloader()) == dict(enumerate(concatenated(tmp_path)))


def test_other_shards_of_the_folder(tmp_path, opened):
    write_shards(tmp_path, 1, 2, 3)
    assert len(made(tmp_path / "val-0001.tar").pictures("test")) == 2
    assert len(made(tmp_path / "val-000[02].tar").pictures("test")) == 4
    assert opened == ["val-0001.tar", "val-0000.tar", "val-0002.tar"]
    assert len(made(tmp_path).pictures("test")) == 6
    assert len(opened) == 3


def test_counts_before_a_broken_shard_are_kept(tmp_path, opened):
    write_shards(tmp_path, 1, 2)
    (tmp_path / "val-0001.tar").write_bytes(b"no tar file")
    for expected in (["val-0000.tar", "val-0001.tar"], ["val-0001.tar"]):
        opened.clear()
        with pytest.raises(OSError, match=r"Shard .*val-0001.tar cannot be read"):
            made(tmp_path)
        assert opened == expected


def test_index_file_elsewhere(tmp_path):
    write_webdataset(tmp_path / "data")
    made(tmp_path / "data", index_file=tmp_path / "counts.json")
    assert "metatpt-index.json" not in os.listdir(tmp_path / "data")
    assert list(json.loads((tmp_path / "counts.json").read_text())["metatpt_shards"]) == [
        "val-0000.tar",
        "val-0001.tar",
    ]


def test_index_file_that_cannot_be(tmp_path):
    write_webdataset(tmp_path)
    with pytest.raises(PermissionError, match=r"Cannot write .*no/counts.json.*--data.index_file"):
        made(tmp_path, index_file=tmp_path / "no" / "counts.json")
    for content in ("nonsense", "[]", '{"shards": []}'):
        (tmp_path / "metatpt-index.json").write_text(content)
        with pytest.raises(ValueError, match="metatpt-index.json is no index of shards"):
            made(tmp_path)


# Labels


@pytest.mark.parametrize(
    ("contents", "label"),
    [
        ({"cls": b"2"}, 2),
        ({"cls": b" 1\n"}, 1),
        ({"cls": b"owl"}, 2),
        ({"json": b'{"label": 1}'}, 1),
        ({"json": b'{"label": "dog"}'}, 1),
        ({"cls": b"0", "json": b'{"label": 1}'}, 0),
        ({"json": b'{"caption": "cat"}'}, -1),
        ({"json": b'{"label": null}'}, -1),
        ({"txt": b"dog"}, -1),
        ({}, -1),
    ],
    ids=str,
)
def test_kinds_of_labels(tmp_path, contents, label):
    write_shard(tmp_path / "a.tar", [("x", {"png": picture(1), **contents})])
    batch = next(iter(made(tmp_path).test_dataloader()))
    assert batch.label.tolist() == [label]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"cls": b"3"}, "Sample b.tar/y has the label 3: expected a class's number, 0 to 2, or its name"),
        ({"cls": b"-1"}, "Sample b.tar/y has the label -1"),
        ({"cls": b"owls"}, r"Sample b.tar/y has the label 'owls'.*nearest: owl"),
        ({"cls": b""}, "Sample b.tar/y has the label ''"),
        ({"cls": b"\xff"}, "label of sample b.tar/y cannot be read"),
        ({"json": b'{"label": 1.5}'}, "Sample b.tar/y has the label 1.5: expected the number or the name"),
        ({"json": b'{"label": true}'}, "Sample b.tar/y has the label True"),
        ({"json": b"{"}, "label of sample b.tar/y cannot be read"),
    ],
    ids=str,
)
def test_labels_that_are_none(tmp_path, contents, message):
    write_shard(tmp_path / "a.tar", [("x", sample(0))])
    write_shard(tmp_path / "b.tar", [("x", sample(0)), ("y", {"png": picture(1), **contents})])
    with pytest.raises(ValueError, match=message):
        made(tmp_path)


def test_a_name_that_two_classes_have(tmp_path):
    (tmp_path / "names.txt").write_text("n00000001 cat\nn00000002 owl\nn00000003 cat\n")
    write_shard(
        tmp_path / "a.tar", [("x", {"png": picture(1), "cls": b"owl"}), ("y", {"png": picture(1), "cls": b"cat"})]
    )
    datamodule = WebDatasetDataModule(str(tmp_path), str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match=r"a.tar/y has the label 'cat'.*where no other class has the same"):
        datamodule.pictures("test")


# Pictures and shards that are broken


def test_an_unreadable_picture_is_a_row(tmp_path):
    broken = {"jpg": b"no picture", "cls": b"1"}
    write_shard(tmp_path / "a.tar", [("x", sample(0)), ("y", broken), ("z", sample(2))])
    batch = next(iter(made(tmp_path).test_dataloader()))
    assert batch.error == [None, "not a picture that Pillow can read (10 bytes)", None]
    assert (batch.index.tolist(), batch.label.tolist()) == ([0, 1, 2], [0, 1, 2])


def test_decoded_as_files_are(tmp_path):
    stream = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(stream, "png")
    write_shard(tmp_path / "a.tar", [("x", {"PNG": stream.getvalue()})])  # in whatever case
    for decode, colour in (("upright", [1, 1, 1]), ("plain", [1, 0, 0])):
        batch = next(iter(made(tmp_path, decode=decode).test_dataloader()))
        assert batch.image[0, :, 0, 0].tolist() == colour


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"cls": b"1"}, r"Sample a.tar/x has 0 pictures, expected one; its endings: cls\."),
        ({"png": b"1", "jpg": b"2"}, r"Sample a.tar/x has 2 pictures, expected one; its endings: png, jpg\."),
        ({"seg.png": b"1"}, r"Sample a.tar/x has 0 pictures.*its endings: seg.png\."),
    ],
)
def test_not_one_picture(tmp_path, contents, message):
    write_shard(tmp_path / "a.tar", [("x", contents)])
    with pytest.raises(ValueError, match=message):
        made(tmp_path)


def test_no_sample(tmp_path):
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(ValueError, match="No sample in .*a.tar"):
        made(tmp_path)


def cut_places(file):
    """Where a shard may be cut off: in a picture, between two samples, in a header, before its end is marked."""
    with tarfile.open(file) as archive:
        members = archive.getmembers()
        end = members[-1].offset_data + 512
        return {
            "picture": members[3].offset_data + 10,
            "between": members[3].offset,
            "header": members[3].offset + 100,
            "end": end,
        }


@pytest.mark.parametrize("where", ["picture", "between", "header", "end"])
def test_a_shard_that_is_cut_off_is_not_counted(tmp_path, where):
    write_shards(tmp_path, 3, 3)
    file = tmp_path / "val-0000.tar"
    os.truncate(file, cut_places(file)[where])
    with pytest.raises(OSError, match="Shard .*val-0000.tar cannot be read"):
        made(tmp_path)


@pytest.mark.parametrize("where", ["picture", "between", "header"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_off_since(tmp_path, workers, where):
    write_shards(tmp_path, 3, 3)
    loader = made(tmp_path, num_workers=workers).test_dataloader()
    file = tmp_path / "val-0000.tar"
    os.truncate(file, cut_places(file)[where])
    with pytest.raises(OSError, match="Shard .*val-0000.tar (cannot be read|ended early)"):
        list(loader)


def test_a_whole_shard_with_fewer_samples_since(tmp_path):
    write_shards(tmp_path, 3)
    loader = made(tmp_path).test_dataloader()
    write_shards(tmp_path, 2)
    with pytest.raises(OSError, match="Shard .*val-0000.tar ended early: it had 3 samples"):
        list(loader)


def test_compressed_shards_are_refused(tmp_path):
    write_shards(tmp_path, 3)
    with tarfile.open(tmp_path / "val-0000.tar") as plain, tarfile.open(tmp_path / "a.tar", "w:gz") as compressed:
        for member in plain:
            compressed.addfile(member, plain.extractfile(member))
    with pytest.raises(OSError, match="a.tar cannot be read: .*compressed, as shards are not"):
        made(tmp_path / "a.tar")


# On the web

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads addresses with curl")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; of those in `cut` only so many bytes arrive."""

    cut: dict[str, int] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        name = Path(self.path.partition("?")[0]).name
        self.asked.append(name)
        content = source.read()
        outputfile.write(content[: self.cut.get(name, len(content))])


@pytest.fixture
def web(tmp_path):
    """A folder, and the address that it is served at."""
    folder = tmp_path / "served"
    handler = type("OneTest", (Handler,), {"cut": {}, "asked": []})
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield SimpleNamespace(folder=folder, address=f"http://127.0.0.1:{server.server_port}", handler=handler)
    server.shutdown()
    server.server_close()
    thread.join()


@needs_curl
def test_shards_on_the_web(web, tmp_path):
    write_shards(web.folder, 4, 3)
    given = f"{web.address}/val-{{0000..0001}}.tar?key=secret"
    options = {"index_file": tmp_path / "counts.json", "num_workers": 1, "batch_size": 2}
    rows = {}
    for rank in range(2):
        web.handler.asked.clear()
        datamodule = made(given, rank, 2, **options)
        assert web.handler.asked == (["val-0000.tar", "val-0001.tar"] if rank == 0 else [])  # counted once
        rows |= samples_of(datamodule.test_dataloader())
    assert rows == dict(enumerate(concatenated(web.folder)))
    assert "secret" not in (tmp_path / "counts.json").read_text()


@needs_curl
def test_a_changed_shard_on_the_web(web, tmp_path):
    write_shards(web.folder, 4)
    options = {"index_file": tmp_path / "counts.json"}
    made(f"{web.address}/val-0000.tar", **options)
    write_shards(web.folder, 3)
    stamp_changed(web.folder / "val-0000.tar")
    datamodule = made(f"{web.address}/val-0000.tar", **options)
    assert samples_of(datamodule.test_dataloader()) == dict(enumerate(concatenated(web.folder)))


@needs_curl
@pytest.mark.parametrize("where", ["picture", "between", "header", "end"])
def test_a_connection_that_breaks(web, tmp_path, where):
    write_shards(web.folder, 3)
    given, options = f"{web.address}/val-0000.tar", {"index_file": tmp_path / "counts.json"}
    web.handler.cut["val-0000.tar"] = cut_places(web.folder / "val-0000.tar")[where]
    with pytest.raises(OSError, match="Shard http.*val-0000.tar cannot be read: curl ended with status 18"):
        made(given, **options)
    cut = web.handler.cut.pop("val-0000.tar")
    loader = made(given, **options).test_dataloader()
    if where != "end":  # else all that it has samples of comes
        web.handler.cut["val-0000.tar"] = cut
        with pytest.raises(OSError, match="Shard http.*val-0000.tar (cannot be read|ended early)"):
            list(loader)


@needs_curl
def test_no_such_address(web, tmp_path):
    write_shards(web.folder, 3)
    given = f"{web.address}/val-{{0000..0001}}.tar"
    with pytest.raises(OSError, match="No answer about shard http.*val-0001.tar: HTTP Error 404"):
        made(given, index_file=tmp_path / "counts.json")
    loader = made(f"{web.address}/val-0000.tar", index_file=tmp_path / "counts.json").test_dataloader()
    (web.folder / "val-0000.tar").unlink()
    with pytest.raises(OSError, match="Shard http.*val-0000.tar cannot be read"):
        list(loader)
