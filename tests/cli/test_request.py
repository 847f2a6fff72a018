"""Files, classes and options: what wins over what."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import CommandLine

SHARED = {"clip": "x", "template": "a sketch of a {}.", "memory": 99}
VIEWS = {**SHARED, "n_views": 5, "selection": 0.7, "init": "affine", "spread": 0.2, "ensemble_temperature": 0.9}
TUNING = {**VIEWS, "outer_lr": 0.9, "outer_lr_relative": 0.1, "outer_steps": 3, "outer_optimizer": "sgd"}
METHODS: dict[str, dict[str, Any]] = {
    "ZeroShotModule": SHARED,
    "ViewAverageModule": VIEWS,
    "TPTModule": TUNING,
    "MetaTPTModule": {**TUNING, "inner_loss": {"entropy": 1.0}, "predict": "original"},
}
LOADING = {"batch_size": 3, "num_workers": 2, "max_samples": 9}
DATA: dict[str, dict[str, Any]] = {
    "FolderDataModule": {**LOADING, "root": "x", "decode": "plain", "class_names": ["a", "b"]},
    "PACSDataModule": {**LOADING, "root": "x", "decode": "plain", "domain": "sketch"},
    "ShiftedShapesDataModule": {**LOADING, "shift": "noise", "severity": 5},
}


def write(name: str, **content: Any) -> str:
    Path(name).write_text(yaml.safe_dump(content))
    return name


@pytest.mark.parametrize(("in_file", "chosen"), list(itertools.permutations(METHODS, 2)))
def test_a_method_chosen_starts_from_its_own_defaults(metatpt: CommandLine, in_file: str, chosen: str):
    config = write(
        "a.yaml",
        model={"class_path": in_file, "init_args": METHODS[in_file]},
        data={"class_path": "ShiftedShapesDataModule"},
    )
    from_file = metatpt.config("-c", config)["model"]["init_args"]
    assert from_file | METHODS[in_file] == from_file
    assert metatpt.config("-c", config, "--model", chosen) == metatpt.config("--model", chosen)


@pytest.mark.parametrize(("in_file", "chosen"), list(itertools.permutations(DATA, 2)))
def test_data_chosen_start_from_their_own_defaults(metatpt: CommandLine, in_file: str, chosen: str):
    config = write(
        "a.yaml",
        model={"class_path": "MetaTPTModule"},
        data={"class_path": f"metatpt.datamodules.{in_file}", "init_args": DATA[in_file]},
    )
    root = [] if chosen == "ShiftedShapesDataModule" else ["--data.root", "y"]
    assert metatpt.config("-c", config, "--data", chosen, *root) == metatpt.config("--data", chosen, *root)


@pytest.mark.parametrize("name", ["TPTModule", "metatpt.modules.TPTModule", "metatpt.modules.tpt.TPTModule"])
def test_the_same_class_keeps_its_section(metatpt: CommandLine, name: str):
    write(
        "lightning_config.yaml", model={"class_path": "TPTModule", "init_args": {"n_views": 5}}, data="PACSDataModule"
    )
    options = ["--model", name, "--model.outer_steps", 4, "--data.root", "x"]
    model = metatpt.config(*options)["model"]
    assert model["class_path"] == "metatpt.modules.TPTModule"
    assert (model["init_args"]["n_views"], model["init_args"]["outer_steps"]) == (5, 4)


def test_the_command_line_wins_wherever_the_file_stands(metatpt: CommandLine):
    config = write(
        "a.yaml",
        model={"class_path": "TPTModule", "init_args": {"n_views": 5}},
        data="ShiftedShapesDataModule",
        seed_everything=4,
    )
    for options in (["-c", config, "--model.n_views", 6], ["--model.n_views", 6, f"--config={config}"]):
        read = metatpt.config(*options)
        assert (read["model"]["init_args"]["n_views"], read["seed_everything"]) == (6, 4)


def test_files_add_up_and_the_last_wins(metatpt: CommandLine):
    first = write(
        "a.yaml",
        model={"class_path": "TPTModule", "init_args": {"n_views": 5, "outer_steps": 2}},
        data="ShiftedShapesDataModule",
        trainer={"devices": 1, "precision": "32-true"},
    )
    second = write("b.yaml", model={"init_args": {"n_views": 6}}, trainer={"precision": "64-true"})
    third = write("c.yaml", model={"class_path": "MetaTPTModule"})
    config = metatpt.config("-c", first, "-c", second)
    assert (config["model"]["init_args"]["n_views"], config["model"]["init_args"]["outer_steps"]) == (6, 2)
    assert (config["trainer"]["devices"], config["trainer"]["precision"]) == (1, "64-true")
    config = metatpt.config("-c", first, "-c", second, "-c", third)
    assert config["model"] == metatpt.config("--model", "MetaTPTModule")["model"]


def test_a_section_with_nothing_in_it_says_nothing(metatpt: CommandLine):
    Path("a.yaml").write_text("trainer:\nreset:\nseed_everything:\n")
    assert metatpt.config("-c", "default", "-c", "a.yaml") == metatpt.config()


def test_a_section_in_a_file_of_its_own(metatpt: CommandLine):
    Path("sub").mkdir()
    write("sub/model.yaml", class_path="TPTModule", init_args={"n_views": 7})
    write("sub/all.yaml", model="model.yaml", data="ShiftedShapesDataModule")
    for options in (["-c", "sub/all.yaml"], ["--model", "sub/model.yaml"]):
        assert metatpt.config(*options)["model"]["init_args"]["n_views"] == 7
    inline = "{class_path: TPTModule, init_args: {n_views: 7}}"
    assert metatpt.config("--model", inline)["model"]["init_args"]["n_views"] == 7


def test_lightning_config_of_the_working_folder_is_read_and_named(metatpt: CommandLine):
    write("lightning_config.yaml", model="ZeroShotModule", data="ShiftedShapesDataModule")
    assert metatpt.config()["model"]["class_path"] == "metatpt.modules.ZeroShotModule"
    result = metatpt("test", "--model.clip", "nowhere")
    assert result.err.startswith("config: lightning_config.yaml\n")
    assert metatpt.config("-c", "default")["model"]["class_path"] == "metatpt.modules.MetaTPTModule"


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"class_path": "anomalib.models.Padim"}, "data": {"class_path": "anomalib.data.MVTec"}},
        {"model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}},
        {"fit": {"trainer": {"max_epochs": 3}}},
        {"trainer": {"max_epochs": 3}, "optimizer": {"class_path": "torch.optim.Adam"}},
        ["a"],
        None,
    ],
)
def test_lightning_config_of_another_project_is_named(metatpt: CommandLine, content: Any):
    Path("lightning_config.yaml").write_text(yaml.safe_dump(content))
    result = metatpt("test")
    assert result.status == 2
    assert str(Path("lightning_config.yaml").resolve()) in result.message
    assert "-c" in result.message
    assert not Path("runs").exists()
    assert metatpt.config("-c", "default") == metatpt.config("-c", "default.yaml")


@pytest.mark.parametrize("section", ["model", "data"])
def test_a_file_without_a_class(metatpt: CommandLine, section: str):
    whole = {"model": "TPTModule", "data": "ShiftedShapesDataModule"}
    del whole[section]
    config = write("a.yaml", **whole)
    result = metatpt("test", "-c", config)
    assert result.status == 2
    assert f"a.yaml names no class for {section}" in result.message


@pytest.mark.parametrize("place", ["option", "file"])
def test_coop_template_is_that_of_the_data_set(metatpt: CommandLine, place: str):
    write("coop.yaml", model={"class_path": "TPTModule", "init_args": {"template": "coop"}}, data="EuroSATDataModule")
    options = ["-c", "coop.yaml"] if place == "file" else ["--data", "EuroSATDataModule", "--model.template", "coop"]
    config = metatpt.config(*options, "--data.root", "eurosat")
    assert config["model"]["init_args"]["template"] == "a centered satellite photo of {}."
    result = metatpt("test", *options, "--data", "ShiftedShapesDataModule")
    assert result.status == 2
    assert "CoOp has no template for ShiftedShapesDataModule, only for" in result.message
    assert "EuroSATDataModule" in result.message


def test_text_that_looks_like_a_number_stays_text(metatpt: CommandLine):
    options = ["--data", "PACSDataModule", "--data.root", "1e3", "--model.template", "2024 {}"]
    Path("a.yaml").write_text(metatpt("test", "--print_config", *options).out)
    config = metatpt.config("-c", "a.yaml")
    assert config["data"]["init_args"]["root"] == "1e3"
    assert config == metatpt.config(*options)
