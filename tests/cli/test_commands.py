"""Commands run, and leave what they should."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from helpers.command_line import CommandLine, rows, write_pictures
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from PIL import Image

VIEWS = ("--model.n_views", 4)


def test_test_leaves_a_run_folder_and_one_table(metatpt: CommandLine):
    result = metatpt.small("test", *VIEWS)
    assert result.status == 0, result.err
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-metatpt-folder", run.name)
    assert {file.name for file in run.iterdir()} >= {"config.yaml", "metrics.json", "predictions.csv"}
    assert [row["path"] for row in rows(run)] == [f"cat/000{i}.png" for i in range(3)] + [
        *(f"dog/000{i}.png" for i in range(3)),
        "dog/last.png",
    ]
    assert result.out.count("top-1 accuracy") == 1
    assert str(run) in result.out
    assert "lightning_config.yaml" in result.err
    assert "Traceback" not in result.err


def test_bare_command_is_metatpt_on_shifted_shapes_by_the_packaged_config(metatpt: CommandLine):
    config = metatpt.config()
    assert config["model"]["class_path"] == "metatpt.modules.MetaTPTModule"
    assert config["data"]["class_path"] == "metatpt.datamodules.ShiftedShapesDataModule"
    assert config["data"]["init_args"]["shift"] != "none"
    assert config["seed_everything"] == 0
    assert config["reset"] == {"policy": "episodic"}
    assert config["trainer"]["inference_mode"] is False


def test_default_config_names_classes_and_no_option():
    import metatpt

    default = yaml.safe_load((Path(metatpt.__file__).parent / "lightning_config.yaml").read_text())
    assert set(default) == {"model", "data"}
    assert all(set(section) == {"class_path"} for section in default.values())


def test_validate_is_test_on_the_validation_split(metatpt: CommandLine):
    options = ["--model", "ZeroShotModule", "--model.clip", metatpt.clip, "--data.max_samples", 4]
    for command in ("test", "validate"):
        assert metatpt(command, *options, "--run", command, "--trainer.accelerator", "cpu").status == 0
    n_total = {
        command: json.loads(Path(command, "metrics.json").read_text())["n_total"] for command in ("test", "validate")
    }
    assert n_total == {"test": 960, "validate": 480}


def test_predict_needs_no_labels(metatpt: CommandLine, tmp_path: Path):
    flat = write_pictures(tmp_path / "flat", n=2)
    result = metatpt.small("predict", *VIEWS, "--data.root", flat, "--data.class_names", "cat,dog", "--run", "out")
    assert result.status == 0, result.err
    assert [row["label"] for row in rows(Path("out"))] == ["", ""]
    assert "2 predictions" in result.out


def test_saved_config_runs_again_with_any_command(metatpt: CommandLine):
    assert metatpt.small("test", *VIEWS, "--seed_everything", 3, "--run", "first").status == 0
    for command in ("test", "validate", "predict"):
        result = metatpt(command, "-c", "first/config.yaml", "--run", command)
        assert result.status == 0, result.err
        assert Path(command, "config.yaml").read_text() == Path("first", "config.yaml").read_text()
        assert rows(Path(command)) == rows(Path("first"))
    assert not {"run", "config", "verbose", "ckpt_path"} & set(yaml.safe_load(Path("first/config.yaml").read_text()))


def test_printed_config_is_the_saved_one(metatpt: CommandLine):
    printed = metatpt.small("test", "--print_config", *VIEWS)
    assert not Path("runs").exists()
    assert metatpt.small("test", *VIEWS, "--run", "out").status == 0
    assert printed.out == Path("out/config.yaml").read_text()


def test_seed_decides(metatpt: CommandLine):
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = metatpt.small(
            "predict", "--model", "ViewAverageModule", *VIEWS, "--seed_everything", seed, "--run", run
        )
        assert result.status == 0, result.err
    assert rows(Path("a")) == rows(Path("b")) != rows(Path("c"))


def test_online_policy(metatpt: CommandLine):
    options = ["--model", "TPTModule", *VIEWS, "--model.outer_lr", 0.5, "--data.batch_size", 1]
    assert metatpt.small("test", *options, "--run", "episodic").status == 0
    result = metatpt.small("test", *options, "--reset.policy", "online", "--run", "online")
    assert result.status == 0, result.err
    assert "carried over" in result.err
    episodic, online = rows(Path("episodic")), rows(Path("online"))
    assert online[0] == episodic[0]
    assert online[1:] != episodic[1:]


def test_a_folder_that_holds_a_run_is_refused_before_data_are_read(metatpt: CommandLine):
    Path("out").mkdir()
    Path("out/metrics.json").write_text("{}")
    result = metatpt.small("test", "--run", "out", "--data.root", "nowhere")
    assert result.status == 1
    assert "already holds a run" in result.message
    assert "nowhere" not in result.message


@pytest.mark.parametrize("option", [("--data.root", "nowhere"), ("--model.clip", "ViT-B-99")])
def test_a_run_that_does_not_start_leaves_nothing(metatpt: CommandLine, tmp_path: Path, option: tuple[str, str]):
    assert metatpt.small("test", *option).status == 1
    assert metatpt.small("test", *option, "--run", "out").status == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_data_are_missing_can_be_started_again_in_its_folder(metatpt: CommandLine, tmp_path: Path):
    options = ["--model.clip", metatpt.clip, "--data", "PACSDataModule", "--data.root", "pacs", "--run", "out"]
    assert metatpt("test", *options).status == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("[1, yes, null]", ["1", "yes", "null"]),
        ("1,yes,null", ["1", "yes", "null"]),
        ('["1e3", no, "a, b"]', ["1e3", "no", "a, b"]),
        ("names.txt", ["1", "yes", "null", "1e3"]),
    ],
)
def test_class_names_are_text(metatpt: CommandLine, tmp_path: Path, given: str, names: list[str]):
    Path("names.txt").write_text("1\nyes\nnull\n1e3\n")
    flat = write_pictures(tmp_path / "flat", n=1)
    options = ["--model", "ZeroShotModule", "--data.root", flat, "--data.class_names", given]
    assert metatpt.small("predict", *options, "--run", "first").status == 0
    assert metatpt("predict", "-c", "first/config.yaml", "--run", "again").status == 0  # and in the saved config
    Path("given.yaml").write_text(f"data: {{class_path: FolderDataModule, init_args: {{class_names: {given}}}}}\n")
    if given.startswith("["):  # and in a config written by hand
        result = metatpt.small("predict", "-c", "default", "-c", "given.yaml", *options[:4], "--run", "file")
        assert result.status == 0, result.err
    for run in ("first", "again", "file") if given.startswith("[") else ("first", "again"):
        prediction = rows(Path(run))[0]
        assert prediction["prediction"] == names[int(prediction["prediction_index"])]
        recorded = yaml.safe_load(Path(run, "config.yaml").read_text())["data"]["init_args"]["class_names"]
        assert recorded == (names if given.startswith("[") else given)


CALLBACK = """
from pathlib import Path
from lightning.pytorch import Callback

class Watch(Callback):
    def on_predict_end(self, trainer, pl_module):
        names = [type(callback).__name__ for callback in trainer.callbacks]
        collects = trainer.predict_loop.return_predictions
        Path("seen.txt").write_text(f"{names} {collects} {trainer.default_root_dir}")
"""


def test_callbacks_of_the_user_come_beside_ours(metatpt: CommandLine):
    Path("watching.py").write_text(CALLBACK)
    result = metatpt.small("predict", *VIEWS, "--trainer.callbacks+=watching.Watch", "--run", "out")
    assert result.status == 0, result.err
    seen = Path("seen.txt").read_text()
    ours = ("ResetPrompts", "RunRecord", "AdaptationProgressBar", "ViewGallery", "LogResults", "GracefulStop")
    for name in ("Watch", *ours):
        assert seen.count(name) == 1
    assert "False out" in seen  # predictions are not collected; what Lightning writes lies in the run folder


def test_callbacks_that_keep_something_are_set_in_yaml(metatpt: CommandLine):
    callbacks = [
        {"class_path": "metatpt.callbacks.ViewGallery", "init_args": {"n": 1, "max_views": 2}},
        {"class_path": "metatpt.callbacks.CostMeter"},
    ]
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    tpt = ["--model", "TPTModule", "--model.n_views", 6, "--model.selection", 0.9]
    result = metatpt.small("test", "-c", "default", "-c", "more.yaml", *tpt, "--run", "out")
    assert result.status == 0, result.err
    gallery = list(Path("out/views").iterdir())
    assert 1 <= len(gallery) <= 2
    with Image.open(gallery[0]) as strip:
        assert round(strip.width / strip.height) == 3  # the original and two views
    assert json.loads(Path("out/cost.json").read_text())["pictures"] == 7
    default = metatpt.small("test", *tpt, "--run", "plain")
    assert default.status == 0, default.err
    assert len(list(Path("plain/views").iterdir())) > 2
    assert not Path("plain/cost.json").exists()


def test_the_record_serves_another_command_line(tiny_clip_folder: Path, pictures: Path, tmp_path: Path):
    """Lightning's own, with all in YAML."""
    config = {
        "model": {
            "class_path": "metatpt.modules.TPTModule",
            "init_args": {"clip": str(tiny_clip_folder), "n_views": 4, "class_names": ["cat", "dog"]},
        },
        "data": {"class_path": "metatpt.datamodules.FolderDataModule", "init_args": {"root": str(pictures)}},
        "trainer": {
            "accelerator": "cpu",
            "inference_mode": False,
            "use_distributed_sampler": False,
            "logger": False,
            "callbacks": [
                {"class_path": "metatpt.callbacks.ResetPrompts"},
                {"class_path": "metatpt.callbacks.RunRecord", "init_args": {"folder": str(tmp_path / "out")}},
            ],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=["test", "--config", str(tmp_path / "config.yaml")],
    )
    assert [int(row["index"]) for row in rows(tmp_path / "out")] == list(range(7))


@pytest.mark.parametrize("name", ["ResetPrompts", "RunRecord", "GracefulStop"])
def test_callbacks_that_are_always_there_are_refused(metatpt: CommandLine, name: str):
    folder = ["--trainer.callbacks.folder=x"] if name == "RunRecord" else []
    result = metatpt.small("test", f"--trainer.callbacks+={name}", *folder)
    assert result.status == 1
    assert "is always there" in result.message


def test_loggers_write_into_the_run_folder(metatpt: CommandLine, tmp_path: Path):
    result = metatpt.small(
        "test", *VIEWS, "--trainer.logger", "CSVLogger", "--trainer.logger.name", "log", "--run", "a"
    )
    assert result.status == 0, result.err
    assert "test/accuracy" in Path("a/log/version_0/metrics.csv").read_text()
    result = metatpt("test", "-c", "a/config.yaml", "--run", "b")  # not into the folder of the first run
    assert result.status == 0, result.err
    assert Path("b/log/version_0/metrics.csv").exists()
    assert not Path("a/log/version_1").exists()
    Path("log.yaml").write_text(
        "trainer: {logger: [{class_path: CSVLogger}, {class_path: CSVLogger, init_args: {save_dir: own}}]}"
    )
    result = metatpt.small("test", *VIEWS, "-c", "default", "-c", "log.yaml", "--run", "c")
    assert result.status == 0, result.err
    assert Path("c/lightning_logs").exists()
    assert Path("own/lightning_logs").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "own", "log.yaml"}


def test_the_command_line_wins_over_a_checkpoint(metatpt: CommandLine, tmp_path: Path):
    Path("saving.py").write_text(
        "from lightning.pytorch import Callback\n\n"
        "class Save(Callback):\n"
        "    def on_test_end(self, trainer, pl_module):\n"
        "        trainer.save_checkpoint('a.ckpt')\n"
    )
    options = ["--model", "TPTModule", *VIEWS]
    result = metatpt.small("test", *options, "--model.outer_lr", 0.1, "--trainer.callbacks+=saving.Save", "--run", "a")
    assert result.status == 0, result.err
    saved = torch.load("a.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["outer_lr"] == 0.1
    assert saved["hyper_parameters"]["class_names"] == ["cat", "dog"]

    other = write_pictures(tmp_path / "other", "bird", "fish")
    changed = ["--ckpt_path", "a.ckpt", "--model.outer_lr", 0.9, "--data.root", other]
    result = metatpt.small("test", *options, *changed, "--run", "b")
    assert result.status == 0, result.err
    config = yaml.safe_load(Path("b/config.yaml").read_text())
    assert config["model"]["init_args"]["outer_lr"] == 0.9
    assert config["ckpt_path"] == "a.ckpt"
    assert {row["label"] for row in rows(Path("b"))} == {"bird", "fish"}
    assert float(rows(Path("b"))[0]["outer_lr"]) == pytest.approx(0.9)
    assert "model.outer_lr: 0.9 (checkpoint: 0.1)" in result.err
    assert "class names: bird, fish (checkpoint: cat, dog)" in result.err
    # The checkpoint's learned prompt and nothing else decides: as without one, since nothing was learned here.
    without = metatpt.small("test", *options, *changed[2:], "--run", "c")
    assert without.status == 0
    assert rows(Path("b")) == rows(Path("c"))


def test_nothing_is_left_behind_in_the_process(metatpt: CommandLine):
    logs = [logging.getLogger(name) for name in ("metatpt", "lightning.pytorch.utilities.rank_zero")]

    def state() -> object:
        handlers = [(log.level, log.propagate, list(log.handlers), list(log.filters)) for log in logs]
        return list(sys.path), dict(os.environ), os.getcwd(), list(sys.argv), list(warnings.filters), handlers

    before = state()
    assert metatpt.small("test", *VIEWS).status == 0
    assert metatpt("test", "--no_such_option", 3).status == 2
    assert state() == before


def test_predict_on_many_pictures_keeps_its_memory(metatpt: CommandLine, tmp_path: Path):
    many = write_pictures(tmp_path / "many", n=2000, size=(8, 8))
    Path("memory.py").write_text(
        "import os\nfrom pathlib import Path\nfrom lightning.pytorch import Callback\n\n"
        "class Memory(Callback):\n"
        "    def on_predict_batch_end(self, *args):\n"
        "        pages = int(Path('/proc/self/statm').read_text().split()[1])\n"
        "        with open('memory.txt', 'a') as stream:\n"
        "            print(pages * os.sysconf('SC_PAGE_SIZE') / 2**20, file=stream)\n"
    )
    options = [
        "--model",
        "ZeroShotModule",
        "--data.root",
        many,
        "--data.class_names",
        "cat,dog",
        "--data.batch_size",
        50,
    ]
    result = metatpt.small("predict", *options, "--trainer.callbacks+=memory.Memory", "--run", "out")
    assert result.status == 0, result.err
    used = [float(line) for line in Path("memory.txt").read_text().split()]
    assert used[-1] - used[3] < 50
    assert [int(row["index"]) for row in rows(Path("out"))] == list(range(2000))


def test_a_data_set_of_the_user(metatpt: CommandLine):
    Path("my_data.py").write_text(
        "from dataclasses import replace\n"
        "from typing import Any\n\n"
        "from metatpt.datamodules import FolderDataModule\n\n"
        "class MyData(FolderDataModule):\n"
        '    """Every second picture."""\n\n'
        "    def __init__(self, step: int = 2, **kwargs: Any) -> None:\n"
        "        super().__init__(**kwargs)\n"
        "        self.step = step\n\n"
        "    def pictures(self, split: Any) -> Any:\n"
        "        whole = super().pictures(split)\n"
        "        return replace(whole, paths=whole.paths[:: self.step], labels=whole.labels[:: self.step])\n"
    )
    options = ["--data", "my_data.MyData", "--data.root", metatpt.pictures, "--data.step", 3, *VIEWS]
    result = metatpt("test", "--model.clip", metatpt.clip, "--trainer.accelerator", "cpu", *options, "--run", "out")
    assert result.status == 0, result.err
    assert len(rows(Path("out"))) == 3
    assert yaml.safe_load(Path("out/config.yaml").read_text())["data"]["init_args"]["step"] == 3


def test_the_record_shows_what_options_stand_for(metatpt, tmp_path):
    import json

    result = metatpt.small("test", "--run", tmp_path / "run", "--model", "ZeroShotModule")
    assert result.status == 0, result.err
    setup = json.loads((tmp_path / "run" / "setup.json").read_text())
    assert setup["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert setup["preprocessing"]["resize_mode"] == "shortest"
    assert setup["preprocessing"]["interpolation"] == "bicubic"
    assert setup["template"] == "a photo of a {}."
    assert setup["clip"]["name"] == str(metatpt.clip)
    assert setup["class_names"] == ["cat", "dog"]
