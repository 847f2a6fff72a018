"""Every shipped config runs as it is named, with a small model in place of a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.command_line import CommandLine, rows
from helpers.fake_data import cifar, coop, domains, imagenet, shards
from lightning.pytorch import LightningModule

from metatpt.cli.classes import find_class, known_classes, option_types
from metatpt.cli.request import shipped_configs

CONFIGS = sorted(name for name, file in shipped_configs().items() if file.parent.name != "data")
AREAS = (cifar, coop, domains, imagenet, shards)
DATA = sorted(name for name, file in shipped_configs().items() if file.parent.name == "data")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs(metatpt: CommandLine, tmp_path: Path, name: str):
    content = yaml.safe_load(shipped_configs()[name].read_text())
    options: list[object] = ["--model.clip", metatpt.clip, "--model.pretrained", "null", "--trainer.accelerator", "cpu"]
    data = content["data"]["class_path"].rpartition(".")[2]
    if data == "FolderDataModule":
        options += ["--data.root", metatpt.pictures]
    method = find_class("model", content["model"]["class_path"])
    if "n_views" in option_types(method):
        options += ["--model.n_views", 4]
    options += ["--data.max_samples", 3]
    if method.training_step is not LightningModule.training_step:  # what is trained is tested in the end
        few = ["--data.batch_size", 2, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2]
        result = metatpt("fit", "-c", name, *options, *few, "--run", "fit")
        assert result.status == 0, result.err
        options += ["--ckpt_path", "fit/checkpoints/last.ckpt"]
    result = metatpt("test", "-c", name, *options, "--run", "out")
    assert result.status == 0, result.err
    assert len(rows(Path("out"))) == 3
    saved = yaml.safe_load(Path("out/config.yaml").read_text())
    assert saved["model"]["class_path"] == content["model"]["class_path"]
    assert saved["reset"]["policy"] == content.get("reset", {}).get("policy", "episodic")


@pytest.mark.parametrize("name", DATA)
def test_config_of_a_data_set_runs_on_its_layout(metatpt: CommandLine, tmp_path: Path, name: str):
    root = tmp_path / "data"
    root.mkdir()
    write = next(getattr(area, f"write_{name}") for area in AREAS if hasattr(area, f"write_{name}"))
    write(root)
    if name == "webdataset":
        where = ["--data.shards", root, "--data.class_names", ",".join(shards.CLASSES)]
    else:
        where = ["--data.root", root, "--data.partial", "true"]
    model = ["--model.clip", metatpt.clip, "--model.pretrained", "null", "--model.n_views", 4]
    result = metatpt("doctor", "-c", name, *where, "--pictures", "all")
    assert result.status == 0, result.out + result.err
    run = ["--data.max_samples", 3, "--trainer.accelerator", "cpu", "--run", "out"]
    result = metatpt("test", "-c", name, *where, *model, *run)
    assert result.status == 0, result.err
    assert [row["status"] for row in rows(Path("out"))] == ["ok"] * 3
    assert all(row["label"] for row in rows(Path("out")))


def test_every_data_set_has_a_config():
    classes = {yaml.safe_load(file.read_text())["data"]["class_path"] for file in shipped_configs().values()}
    ours = {
        f"metatpt.datamodules.{name}" for name, each in known_classes("data").items() if "metatpt." in each.__module__
    }
    assert classes == ours


def test_there_is_one_for_each_task():
    assert set(CONFIGS) >= {
        "default",
        "zero_shot",
        "view_average",
        "tpt",
        "metatpt",
        "online",
        "folder",
        "meta",
        "few_shot",
        "maple",
        "mmrl",
    }


@pytest.mark.parametrize("name", ["zero_shot", "view_average", "tpt", "metatpt"])
def test_what_is_spelled_out_is_the_default(metatpt: CommandLine, name: str):
    config = metatpt.config("-c", name)
    assert config == metatpt.config("--model", config["model"]["class_path"])


@pytest.mark.parametrize("name", [*CONFIGS, *DATA])
def test_config_says_what_it_is_for(name: str):
    assert shipped_configs()[name].read_text().startswith("# ")
