"""Every shipped config runs as it is named, with a small model in place of a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.command_line import CommandLine, rows, write_pictures

from metatpt.cli.request import shipped_configs
from metatpt.datamodules.pacs import CLASSES

CONFIGS = sorted(shipped_configs())


@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs(metatpt: CommandLine, tmp_path: Path, name: str):
    content = yaml.safe_load(shipped_configs()[name].read_text())
    options: list[object] = ["--model.clip", metatpt.clip, "--model.pretrained", "null", "--trainer.accelerator", "cpu"]
    data = content["data"]["class_path"].rpartition(".")[2]
    if data == "PACSDataModule":
        options += ["--data.root", write_pictures(tmp_path / "pacs" / "art_painting", *CLASSES, n=1).parent]
    elif data == "FolderDataModule":
        options += ["--data.root", metatpt.pictures]
    if not content["model"]["class_path"].endswith("ZeroShotModule"):
        options += ["--model.n_views", 4]
    result = metatpt("test", "-c", name, *options, "--data.max_samples", 3, "--run", "out")
    assert result.status == 0, result.err
    assert len(rows(Path("out"))) == 3
    saved = yaml.safe_load(Path("out/config.yaml").read_text())
    assert saved["model"]["class_path"] == content["model"]["class_path"]
    assert saved["reset"]["policy"] == content.get("reset", {}).get("policy", "episodic")


def test_there_is_one_for_each_task():
    assert set(CONFIGS) >= {"default", "zero_shot", "view_average", "tpt", "metatpt", "online", "pacs", "folder"}


@pytest.mark.parametrize("name", ["zero_shot", "view_average", "tpt", "metatpt"])
def test_what_is_spelled_out_is_the_default(metatpt: CommandLine, name: str):
    config = metatpt.config("-c", name)
    assert config == metatpt.config("--model", config["model"]["class_path"])


@pytest.mark.parametrize("name", CONFIGS)
def test_config_says_what_it_is_for(name: str):
    assert shipped_configs()[name].read_text().startswith("# ")
