import csv
import dataclasses
import importlib.util
import json
import logging
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from metatpt.callbacks import CostMeter, LogResults, ResetPrompts, RunRecord, ViewGallery

SCRIPT = Path(__file__).with_name("views_run.py")
spec = importlib.util.spec_from_file_location("views_run", SCRIPT)
views_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(views_run)

ALL = list(range(30))  # one cannot be read, and one keeps its zero-shot prediction
CONFIG = {"model": {"class_path": "Views", "init_args": {"clip": "builtin"}}, "data": {"root": "pictures"}}
KINDS = ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR")


@pytest.fixture(scope="module")
def module(tiny_clip_folder):
    return views_run.Views(str(tiny_clip_folder))


def wandb_environment(folder):
    """Variables that keep W&B off the network and within a folder."""
    return {f"WANDB_{kind}": str(folder) for kind in KINDS} | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """W&B, whose run ends with the test."""
    for name, value in wandb_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    import wandb

    yield wandb
    wandb.finish()


def run(folder, module, loggers, indices=ALL, command="test", resume=False, batch_size=4, callbacks=(), **options):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.dump(CONFIG))
    data = views_run.Data([indices], batch_size=batch_size)
    record = RunRecord(folder, resume=resume)
    ours = [ResetPrompts(), record, ViewGallery(2), CostMeter(), LogResults(**options), *callbacks]
    trainer = views_run.make_trainer(ours, logger=loggers, log_every_n_steps=2)
    getattr(trainer, command)(module, datamodule=data)
    return record


def final_figures(folder, stage="test"):
    """What a run came to, from its files."""
    seconds = json.loads((folder / "cost.json").read_text())["seconds"]
    metrics = json.loads((folder / "metrics.json").read_text())
    return {f"{stage}/{name}": value for name, value in metrics.items()} | {
        f"{stage}/seconds/{part}": value for part, value in seconds.items()
    }


def predictions(folder):
    with (folder / "predictions.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def same(cell, text):
    """Whether a cell of a table is what stands in predictions.csv."""
    return cell is None if text == "" else str(cell) == text


def offline_run(folder):
    """The folder of the only offline run in a folder."""
    (found,) = (folder / "wandb").glob("offline-run-*")
    return found


def records(folder, seconds=60):
    """What an offline run will upload, once it is whole: W&B writes the last block a moment after ``finish``."""
    (file,) = folder.glob("run-*.wandb")
    limit = time.monotonic() + seconds
    while not (found := whole_records(file.read_bytes())) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < limit, f"{file} has no end after {seconds} s: {len(found)} records"
        time.sleep(0.05)
    return found


def whole_records(content):
    """Those of LevelDB's log format, behind a header of seven bytes, up to where the file ends."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, part, found = 7, b"", []
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        if place + 7 + size > len(content):
            break
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def key(item):
    return item.key or "/".join(item.nested_key)


def history(folder):
    """The points that were logged, in order."""
    of_kind = [each.history.item for each in records(folder) if each.WhichOneof("record_type") == "history"]
    return [{key(item): json.loads(item.value_json) for item in items} for items in of_kind]


def config(folder):
    of_kind = [each.config.update for each in records(folder) if each.WhichOneof("record_type") == "config"]
    return {key(item): json.loads(item.value_json) for items in of_kind for item in items}


def table(folder, name):
    (file,) = (folder / "files/media/table").glob(f"{name}_*.table.json")
    content = json.loads(file.read_text())
    return [dict(zip(content["columns"], cells, strict=True)) for cells in content["data"]]


def pictures(folder, name):
    """The pictures of a key, as W&B lists them."""
    (point,) = [point for point in history(folder) if f"{name}/_type" in point]
    return [np.asarray(Image.open(folder / "files" / file)) for file in point[f"{name}/filenames"]]


def check_whole(logged, folder):
    """An offline run holds all that a run of 30 pictures came to."""
    summary = {name: value for point in history(logged) for name, value in point.items()}
    expected = final_figures(folder)
    assert {name: summary[name] for name in expected} == expected
    rows = predictions(folder)
    logged_rows = table(logged, "predictions")
    assert len(logged_rows) == len(rows) == 30
    for row, cells in zip(rows, logged_rows, strict=True):
        assert all(same(cells[name], text) for name, text in row.items())
    assert [row["milliseconds"] is None for row in logged_rows] == [row["status"] == "skipped" for row in rows]
    assert len(pictures(logged, "views")) == 4


def test_wandb_offline_holds_everything(tmp_path, module, wandb):
    run(tmp_path, module, WandbLogger(save_dir=tmp_path, offline=True))
    wandb.finish()
    logged = offline_run(tmp_path)
    check_whole(logged, tmp_path)

    settings = config(logged)
    assert settings["config"] == CONFIG
    assert settings["setup"] == json.loads((tmp_path / "setup.json").read_text())

    points = [point for point in history(logged) if "test/running_accuracy" in point]
    assert [point["trainer/global_step"] for point in points] == [8, 16, 24, 30]
    assert all(point["test/milliseconds"] > 0 for point in points)
    rows = predictions(tmp_path)
    for point, start, end in zip(points, (0, 8, 16, 24), (8, 16, 24, 30), strict=True):
        so_far = [row for row in rows[:end] if row["status"] != "skipped"]
        right, before = (
            np.mean([row[f"{kind}prediction_index"] == row["label_index"] for row in so_far])
            for kind in ("", "zero_shot_")
        )
        assert point["test/running_accuracy"] == pytest.approx(right, abs=1e-6)
        assert point["test/running_gain"] == pytest.approx(right - before, abs=1e-6)
        since = [row for row in so_far if int(row["index"]) >= start]
        for name in ("entropy", "zero_shot_entropy"):
            expected = np.mean([float(row[name]) for row in since])
            assert point[f"test/{name}"] == pytest.approx(expected, abs=1e-5)

    gains = [float(row["label_probability"]) - float(row["zero_shot_label_probability"]) for row in so_far]
    changed = table(logged, "largest_changes")
    assert [row["change"] for row in changed] == [*sorted(gains)[:-9:-1], *sorted(gains)[:8]]
    assert changed[7]["change"] > 0 > changed[8]["change"]
    assert [row["path"] for row in changed if row["picture"] == "Image"] == [
        changed[place]["path"] for place in (0, 1, 8, 9)
    ]
    files = [tmp_path / "views" / Path(changed[place]["path"]).name for place in (0, 1, 8, 9)]
    for picture, file in zip(pictures(logged, "views"), files, strict=True):
        assert (picture == np.asarray(Image.open(file))).all()
    (point,) = [point for point in history(logged) if "views/captions" in point]
    assert changed[0]["path"] in point["views/captions"][0]

    by_class = {row["label"]: row for row in table(logged, "gains_by_class")}
    cats = [row for row in rows if row["label"] == "cat"]
    assert by_class["cat"]["n"] == len(cats) == 5
    assert by_class["cat"]["adapted"] == pytest.approx(np.mean([row["prediction"] == "cat" for row in cats]))
    for name in ("reliability_diagram", "class_gains", "entropies"):
        (plot,) = pictures(logged, name)
        assert len(np.unique(plot)) > 10


def test_wandb_uploads_no_weights(tmp_path, module, wandb, tiny_clip_folder):
    run(tmp_path, module, WandbLogger(save_dir=tmp_path, offline=True))
    wandb.finish()
    files = [file for file in offline_run(tmp_path).rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".wandb", ".json", ".png", ".txt", ".log"}
    assert sum(file.stat().st_size for file in files) < 1_000_000
    weight = next(iter(module.clip.model.visual.parameters())).detach().numpy().tobytes()
    whole = tmp_path.rglob("*")  # what tables refer to lies elsewhere until it is uploaded
    assert not any(weight[:64] in file.read_bytes() for file in whole if file.is_file())
    assert weight[:64] in (tiny_clip_folder / "open_clip_model.safetensors").read_bytes()


def test_resumed_run_logs_all_of_it_anew(tmp_path, module, wandb):
    module.stops_at = 3
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, module, WandbLogger(save_dir=tmp_path / "first", offline=True, id="one", resume="must"))
    module.stops_at = None
    wandb.finish()
    run(tmp_path, module, WandbLogger(save_dir=tmp_path / "second", offline=True), resume=True)
    wandb.finish()
    check_whole(offline_run(tmp_path / "second"), tmp_path)
    assert not (offline_run(tmp_path / "first") / "files/media").exists()


def test_rows_over_the_cap_are_left_out(tmp_path, module, wandb, caplog):
    with caplog.at_level(logging.INFO, "metatpt"):
        run(tmp_path, module, WandbLogger(save_dir=tmp_path, offline=True), max_rows=7, max_pictures=2)
    wandb.finish()
    logged = offline_run(tmp_path)
    assert [row["index"] for row in table(logged, "predictions")] == ALL[:7]
    assert len(table(logged, "largest_changes")) == len(pictures(logged, "views")) == 2
    assert "the first 7 of 30 rows" in caplog.text


def test_csv_logger_has_the_figures(tmp_path, module, monkeypatch):
    for needless in ("wandb", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, needless, None)
    run(tmp_path, module, CSVLogger(tmp_path, name=None, version="log"), command="validate")
    with (tmp_path / "log/metrics.csv").open(newline="") as stream:
        points = list(csv.DictReader(stream))
    expected = {name: str(value) for name, value in final_figures(tmp_path, "val").items()}
    (last,) = [point for point in points if point["val/n"]]
    assert {name: last[name] for name in expected} == expected
    assert [point["step"] for point in points if point["val/running_gain"]] == ["8", "16", "24", "30"]
    assert yaml.safe_load((tmp_path / "log/hparams.yaml").read_text())["config"] == CONFIG


def test_tensorboard_has_figures_and_pictures(tmp_path, module):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, module, TensorBoardLogger(tmp_path, name="", version="log"))
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"images": 0, "scalars": 0}).Reload()
    expected = final_figures(tmp_path)
    scalars = {name: events.Scalars(name)[-1] for name in expected}
    assert {name: scalar.value for name, scalar in scalars.items()} == pytest.approx(expected)
    assert {scalar.step for scalar in scalars.values()} == {30}
    names = {f"views/{file.stem}" for file in (tmp_path / "views").iterdir()}
    assert len(names) == 4
    assert set(events.Tags()["images"]) == names | {"reliability_diagram", "class_gains", "entropies"}
    for name in names:
        (image,) = events.Images(name)
        with Image.open(tmp_path / f"{name}.png") as strip:
            assert (image.width, image.height) == strip.size


class Known(Logger):
    """A logger that this package does not know, and that takes nothing but finite numbers."""

    name, version = "known", 0

    def __init__(self):
        super().__init__()
        self.metrics, self.parameters = {}, {}

    def log_metrics(self, metrics, step=None):
        assert all(math.isfinite(value) for value in metrics.values())
        self.metrics |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        self.parameters |= params


def test_unknown_logger_gets_figures_and_parameters(tmp_path, module):
    logger = Known()
    run(tmp_path, module, [logger], command="predict")
    expected = final_figures(tmp_path, "predict")
    assert {name: logger.metrics[name] for name in expected} == expected
    assert logger.parameters["config"] == CONFIG


def test_what_is_not_finite_reaches_no_logger(tmp_path, module, wandb, monkeypatch):
    def adapt(self, batch):
        result = views_run.ToyModule.adapt(self, batch)
        infinite = {"ratio": torch.full((len(batch),), torch.inf)}
        return dataclasses.replace(result, log_probs=result.log_probs * torch.nan, views=None, diagnostics=infinite)

    monkeypatch.setattr(views_run.Views, "adapt", adapt)
    monkeypatch.setattr(views_run.Views, "running", {"accuracy": math.nan, "gain": math.inf})
    logger = Known()
    run(tmp_path, module, [WandbLogger(save_dir=tmp_path, offline=True), logger])
    wandb.finish()
    assert "test/running_accuracy" not in logger.metrics
    assert logger.metrics["test/gain"] == 0
    content = table(offline_run(tmp_path), "predictions")
    assert {row["ratio"] for row in content} == {None}
    assert not table(offline_run(tmp_path), "largest_changes")


def test_run_without_a_logger_is_the_same(tmp_path, module):
    for folder, loggers in (("with", CSVLogger(tmp_path / "log")), ("without", False)):
        run(tmp_path / folder, module, loggers)
    assert (tmp_path / "with/predictions.csv").read_bytes() == (tmp_path / "without/predictions.csv").read_bytes()
    names = [{file.name for file in (tmp_path / folder).iterdir()} for folder in ("with", "without")]
    assert names[0] == names[1]


def test_run_without_labels(tmp_path, module, wandb):
    data = views_run.Data([ALL])
    data.labelled = False
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    views_run.make_trainer([ResetPrompts(), RunRecord(tmp_path), ViewGallery(1), LogResults()], logger=logger).predict(
        module, datamodule=data
    )
    wandb.finish()
    logged = offline_run(tmp_path)
    keys = {name.partition("/")[0] for point in history(logged) for name in point}
    assert {"predictions", "largest_changes", "views", "entropies"} <= keys
    assert not keys & {"reliability_diagram", "class_gains", "gains_by_class"}
    assert len(pictures(logged, "views")) == 2


def test_needs_a_record_where_there_is_a_logger(tmp_path, module):
    data = views_run.Data([[0]])
    with pytest.raises(ValueError, match=r"RunRecord has recorded: add metatpt\.callbacks\.RunRecord"):
        views_run.make_trainer([ResetPrompts(), LogResults()], logger=CSVLogger(tmp_path)).test(module, datamodule=data)
    views_run.make_trainer([ResetPrompts(), LogResults()], default_root_dir=tmp_path).test(module, datamodule=data)


@pytest.mark.parametrize(("name", "lowest"), [("max_rows", 1), ("max_pictures", 2)])
def test_options_that_cannot_work_are_refused(name, lowest):
    with pytest.raises(ValueError, match=f"{name} is 0; expected a number of at least {lowest}"):
        LogResults(**{name: 0})


def test_two_processes_leave_one_offline_run(tmp_path, module, tiny_clip_folder):
    environment = {**os.environ, **wandb_environment(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder = tmp_path / "run"
    command = [sys.executable, SCRIPT, tiny_clip_folder, folder, json.dumps([ALL[::2], ALL[1::2]])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("offline-run-*"))) == 1
    logged = offline_run(folder)
    assert len(table(logged, "predictions")) == 30
    run(tmp_path / "alone", module, False)
    alone = {file.name: file.read_bytes() for file in (tmp_path / "alone/views").iterdir()}
    assert {file.name: file.read_bytes() for file in (folder / "views").iterdir()} == alone
