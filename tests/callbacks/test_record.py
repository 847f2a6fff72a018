import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from metatpt.callbacks.record import RunRecord

SCRIPT = Path(__file__).with_name("toy_run.py")
spec = importlib.util.spec_from_file_location("toy_run", SCRIPT)
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)

RATES = {"images_per_second", "peak_memory_mb"}


def run(folder, command="test", parts=((0, 1, 2, 3, 4, 5, 6),), module=None, callbacks=(), **options):
    record = RunRecord(folder)
    trainer = toy.make_trainer([record, *callbacks])
    getattr(trainer, command)(module or toy.ToyModule(), datamodule=toy.ToyData(parts, **options))
    return record


def read_csv(folder):
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def figures(folder):
    return {key: value for key, value in json.loads((folder / "metrics.json").read_text()).items() if key not in RATES}


@pytest.mark.parametrize("command", ["validate", "test"])
def test_run_leaves_its_files_and_shows_one_table(tmp_path, capsys, command):
    folder = tmp_path / "runs" / "one"
    record = run(folder, command)
    assert sorted(file.name for file in folder.iterdir()) == [
        "metrics.json",
        "predictions.csv",
        "record-rank0.sqlite",
        "setup.json",
    ]
    rows = read_csv(folder)
    assert [row["index"] for row in rows] == list("0123456")
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["skipped", "kept_zero_shot"]
    assert rows[5]["reason"] == "no picture"
    assert rows[5]["label"] == "fox"
    assert rows[6]["prediction"] == rows[6]["zero_shot_prediction"]

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == record.metrics
    assert (metrics["n"], metrics["n_total"], metrics["n_labelled"], metrics["n_skipped"]) == (7, 50, 6, 1)
    hits = [row["prediction_index"] == row["label_index"] for row in rows if row["status"] != "skipped"]
    assert metrics["accuracy"] == pytest.approx(sum(hits) / 6)
    assert metrics["images_per_second"] > 0
    assert 50 < metrics["peak_memory_mb"] < 100_000  # a process with torch; bytes or KB would be far off

    shown = capsys.readouterr().out
    assert f"{command}: ToyModule on ToyData" in shown
    assert "7 of 50" in shown
    assert "5.png: no picture" in shown
    assert str(folder / "predictions.csv") in shown
    assert shown.count("top-1 accuracy") == 1


def test_predict_says_what_and_where_in_a_line(tmp_path, capsys):
    run(tmp_path, "predict")
    assert len(read_csv(tmp_path)) == 7
    assert figures(tmp_path)["n"] == 7
    shown = capsys.readouterr().out
    assert "6 predictions, 7 of 50 pictures, 1 skipped, 1 kept zero-shot" in shown
    assert "5.png: no picture" in shown
    assert "accuracy" not in shown


@pytest.mark.parametrize("command", ["test", "predict"])
def test_without_labels(tmp_path, capsys, command):
    data = toy.ToyData([[0, 1, 2]])
    data.labelled = False
    getattr(toy.make_trainer([RunRecord(tmp_path)]), command)(toy.ToyModule(), datamodule=data)
    assert figures(tmp_path) == {"n": 3, "n_total": 50, "n_labelled": 0, "n_skipped": 0}
    assert {row["label"] + row["label_index"] + row["label_rank"] for row in read_csv(tmp_path)} == {""}
    shown = capsys.readouterr().out
    assert ("no labels" in shown) == (command == "test")
    assert "accuracy" not in shown


def test_plain_dataloader_without_names_or_total(tmp_path):
    loader = DataLoader(toy.Indices([3, 0, 1]), batch_size=2, collate_fn=toy.collate)
    toy.make_trainer([RunRecord(tmp_path)]).test(toy.ToyModule(), loader)
    rows = read_csv(tmp_path)
    assert [row["path"] for row in rows] == ["0.png", "1.png", "3.png"]
    assert [row["label"] for row in rows] == ["0", "1", "3"]
    assert figures(tmp_path)["n_total"] == 3


def test_names_may_come_from_the_module(tmp_path):
    module = toy.ToyModule()
    module.class_names = [name.upper() for name in toy.CLASS_NAMES]
    toy.make_trainer([RunRecord(tmp_path)]).test(module, DataLoader(toy.Indices([2]), collate_fn=toy.collate))
    assert read_csv(tmp_path)[0]["label"] == "CAT"


def test_two_runs_in_one_process(tmp_path):
    first = run(tmp_path / "a")
    second = run(tmp_path / "b", parts=[[0, 1]])
    alone = run(tmp_path / "c", parts=[[0, 1]])
    assert figures(tmp_path / "b") == figures(tmp_path / "c")
    assert [first.metrics["n"], second.metrics["n"], alone.metrics["n"]] == [7, 2, 2]


def test_folder_with_a_run_is_refused_before_anything_is_read(tmp_path, capsys):
    run(tmp_path)
    before = (tmp_path / "predictions.csv").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds a run.*--run"):
        run(tmp_path, parts=[[0]])
    assert (tmp_path / "predictions.csv").read_bytes() == before


def test_config_that_the_command_line_wrote_is_no_run(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert run(tmp_path).metrics["n"] == 7


def test_fit_and_its_validation_write_nothing(tmp_path):
    class Trained(toy.ToyModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch, batch_idx):
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = DataLoader(toy.Indices([0, 1]), collate_fn=toy.collate)
    folder = tmp_path / "run"
    toy.make_trainer([RunRecord(folder)], max_epochs=1, default_root_dir=tmp_path).fit(Trained(), loader, loader)
    assert not folder.exists()


def test_run_that_breaks_keeps_its_rows(tmp_path):
    class Breaks(toy.ToyModule):
        def test_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return super().test_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="out of luck"):
        run(tmp_path, module=Breaks())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["record-rank0.sqlite", "setup.json"]
    from metatpt.results import export

    assert export(tmp_path).metrics["n"] == 4


def test_wrong_outputs_and_batches_are_named(tmp_path):
    class Wrong(toy.ToyModule):
        def test_step(self, batch, batch_idx):
            return torch.zeros(1)

    with pytest.raises(TypeError, match=r"Adaptation.* of Wrong, got Tensor"):
        run(tmp_path / "a", module=Wrong())

    class Careless(toy.ToyModule):
        def test_step(self, batch, batch_idx):
            return {"adaptation": self.adapt(toy.collate([0]))}

    with pytest.raises(TypeError, match=r"to yield metatpt\.types\.Batch, got Tensor"):
        toy.make_trainer([RunRecord(tmp_path / "b")]).test(Careless(), DataLoader(torch.zeros(2, 1)))


def test_several_dataloaders_are_refused(tmp_path):
    loader = DataLoader(toy.Indices([0]), collate_fn=toy.collate)

    class Two(toy.ToyModule):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            return {"adaptation": self.adapt(batch)}

    with pytest.raises(ValueError, match="one split per run"):
        toy.make_trainer([RunRecord(tmp_path)]).test(Two(), [loader, loader])


def test_table_comes_after_other_callbacks_have_ended(tmp_path, capsys):
    class Late(Callback):
        def on_test_end(self, trainer, pl_module):
            print("the bar is closed")

    run(tmp_path, callbacks=[Late()])
    shown = capsys.readouterr().out
    assert shown.index("the bar is closed") < shown.index("top-1 accuracy")


JOBS = {
    "4 and 3": ("test", [[0, 2, 4, 6], [1, 3, 5]]),
    "7 and 0": ("test", [[6, 0, 1, 2, 3, 4, 5], []]),
    "0 and 7": ("validate", [[], [0, 1, 2, 3, 4, 5, 6]]),
    "predict": ("predict", [[0, 2, 4, 6], [1, 3, 5]]),
    "refused": ("test", [[0, 1], [2]]),
}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The folders of runs over two processes, and what each run printed."""
    folders = {name: tmp_path_factory.mktemp("many") for name in JOBS}
    (folders["refused"] / "predictions.csv").touch()
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps([(str(folders[name]), *job) for name, job in JOBS.items()])],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = dict(zip(JOBS, done.stdout.split("job ")[1:], strict=True))
    return {name: (folders[name], shown[name]) for name in JOBS}


@pytest.mark.parametrize("name", ["4 and 3", "7 and 0", "0 and 7", "predict"])
def test_uneven_processes_leave_what_one_leaves(tmp_path, many, name):
    folder, shown = many[name]
    command, _ = JOBS[name]
    run(tmp_path, command)
    assert (folder / "predictions.csv").read_bytes() == (tmp_path / "predictions.csv").read_bytes()
    assert figures(folder) == figures(tmp_path)
    assert [row["index"] for row in read_csv(folder)] == list("0123456")
    assert {file.name for file in folder.glob("*.sqlite*")} == {"record-rank0.sqlite", "record-rank1.sqlite"}
    assert shown.count("7 of 50") == 1  # rank 0 alone speaks
    assert "rank 0 n=7" in shown  # and both know
    assert "rank 1 n=7" in shown


def test_refused_folder_ends_all_processes(many):
    folder, shown = many["refused"]
    assert "already holds a run (predictions.csv)" in shown
    assert [file.name for file in folder.iterdir()] == ["predictions.csv"]
