"""``--model.prompt``: which learner runs, with which options, from which place; and what comes from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command_line import CommandLine, rows, write_pictures
from helpers.models import save_folder
from helpers.training import write_training

MINE = "my_prompt.MyPrompt"
TEXT = "metatpt.prompts.TextPrompt"


OF_TEXT = {"n_context": None, "init": "words", "per_class": False, "position": "end"}
"""Its options by default."""


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    """The user's own files, in the working folder."""
    write_training(tmp_path)


def write(name: str, prompt: Any, model: str = "TPTModule", **options: Any) -> str:
    section = {"class_path": model, "init_args": {**options, "prompt": prompt}}
    Path(name).write_text(yaml.safe_dump({"model": section, "data": "ShiftedShapesDataModule"}))
    return name


def prompt_of(metatpt: CommandLine, *options: object) -> Any:
    """Class and options of the learner that would run."""
    model: Any = metatpt.config(*options)["model"]
    prompt = model["init_args"]["prompt"]
    return prompt and (prompt["class_path"], prompt.get("init_args", {}))


def test_where_a_prompt_and_its_options_stand(metatpt: CommandLine):
    tpt = ["--model", "TPTModule"]
    assert prompt_of(metatpt, *tpt) is None
    assert prompt_of(metatpt, *tpt, "--model.prompt", "TextPrompt") == (TEXT, OF_TEXT)
    scaled = (MINE, {"scale": 0.5, "kind": None})
    for options in (
        ["--model.prompt", MINE, "--model.prompt.scale", 0.5],
        ["--model.prompt.scale", 0.5, "--model.prompt", MINE],
        ["--model.init_args.prompt", MINE, "--model.init_args.prompt.init_args.scale", 0.5],
        ["--model.prompt.class_path", MINE, "--model.prompt.init_args.scale", 0.5],
        ["--model.prompt", f"{{class_path: {MINE}, init_args: {{scale: 0.5}}}}"],
        ["-c", write("a.yaml", {"class_path": MINE, "init_args": {"scale": 0.5}})],
        ["-c", write("b.yaml", MINE), "--model.prompt.scale", 0.5],
    ):
        assert prompt_of(metatpt, *tpt, *options) == scaled, options


def test_a_prompt_chosen_starts_from_its_own_defaults(metatpt: CommandLine):
    file = write("a.yaml", {"class_path": MINE, "init_args": {"scale": 0.5, "kind": "x"}})
    assert prompt_of(metatpt, "-c", file, "--model.prompt", "my_prompt.Other") == ("my_prompt.Other", {"n": 3})
    assert prompt_of(metatpt, "-c", file, "--model.prompt", "TextPrompt") == (TEXT, OF_TEXT)
    assert prompt_of(metatpt, "-c", file, "--model.prompt", "null") is None
    # The same one keeps its section, and another method has none of it.
    again = prompt_of(metatpt, "-c", file, "--model.prompt", MINE, "--model.prompt.scale", 0.7)
    assert again == (MINE, {"scale": 0.7, "kind": "x"})
    assert prompt_of(metatpt, "-c", file, "--model", "MetaTPTModule") is None
    # Files add up in the same way.
    more = write("b.yaml", {"init_args": {"scale": 0.9}})
    assert prompt_of(metatpt, "-c", file, "-c", more) == (MINE, {"scale": 0.9, "kind": "x"})
    other = write("c.yaml", {"class_path": "my_prompt.Other"})
    assert prompt_of(metatpt, "-c", file, "-c", other) == ("my_prompt.Other", {"n": 3})


def test_a_run_says_which_prompt_it_was(metatpt: CommandLine):
    options = ["--model", "TPTModule", "--model.n_views", 2, "--model.prompt", MINE, "--model.prompt.scale", 0.5]
    result = metatpt.small("test", *options, "--run", "a")
    assert result.status == 0, result.err
    whole = {"class_path": MINE, "init_args": {"scale": 0.5, "kind": None}}
    assert yaml.safe_load(Path("a/config.yaml").read_text())["model"]["init_args"]["prompt"] == whole
    assert json.loads(Path("a/setup.json").read_text())["options"]["prompt"] == whole
    assert metatpt.small("test", "-c", "a/config.yaml", "--run", "b").status == 0
    assert rows(Path("a")) == rows(Path("b"))
    assert metatpt.small("test", *options[:4], "--run", "c").status == 0
    assert rows(Path("a")) != rows(Path("c"))


# Checkpoints


@pytest.fixture
def checkpoint(metatpt: CommandLine) -> str:
    """One that was trained with options that are not the defaults."""
    options = ["--model", "training.Training", "--model.clip", metatpt.clip, "--model.lr", 0.2]
    options += ["--model.template", "a sketch of a {}.", "--model.prompt", MINE, "--model.prompt.scale", 0.5]
    options += ["--data", "pets.Pets", "--data.root", metatpt.pictures, "--trainer.accelerator", "cpu"]
    result = metatpt("fit", *options, "--trainer.max_epochs", 1, "--run", "fit")
    assert result.status == 0, result.err
    return "fit/checkpoints/last.ckpt"


def test_what_a_checkpoint_holds_for_comes_from_it(metatpt: CommandLine, checkpoint: str, tmp_path: Path):
    other = write_pictures(tmp_path / "other", "bird", "fish")
    options = ["--model", "TPTModule", "--model.n_views", 2, "--model.prompt", MINE, "--ckpt_path", checkpoint]
    options += ["--data", "FolderDataModule", "--data.root", other, "--trainer.accelerator", "cpu"]
    result = metatpt("test", *options, "--model.outer_lr", 0.9, "--run", "test")
    assert result.status == 0, result.err
    model = yaml.safe_load(Path("test/config.yaml").read_text())["model"]["init_args"]
    assert model["clip"] == str(metatpt.clip)
    assert model["template"] == "a sketch of a {}."
    assert model["prompt"] == {"class_path": MINE, "init_args": {"scale": 0.5, "kind": None}}
    assert model["outer_lr"] == 0.9
    assert {row["label"] for row in rows(Path("test"))} == {"bird", "fish"}
    assert "model.clip, model.pretrained, model.template, model.prompt" in result.err
    assert "class names: bird, fish (checkpoint: cat, dog)" in result.err
    assert "model: metatpt.modules.TPTModule (checkpoint: training.Training)" in result.err
    assert "model.prompt:" not in result.err
    assert metatpt("test", "-c", "test/config.yaml", "--run", "again").status == 0
    assert rows(Path("test")) == rows(Path("again"))


def test_what_the_user_says_wins_over_a_checkpoint(metatpt: CommandLine, checkpoint: str):
    before = ["--model", "TPTModule", "--ckpt_path", checkpoint]
    Path("named.yaml").write_text("model: {class_path: TPTModule, init_args: {template: 'a {}.'}}")
    in_folder = {"class_path": "TPTModule", "init_args": {"clip": "x", "template": "b {}.", "outer_steps": 2}}
    Path("lightning_config.yaml").write_text(
        yaml.safe_dump({"model": in_folder, "data": {"class_path": "ShiftedShapesDataModule"}})
    )

    def model(*options: object) -> Any:
        config: Any = metatpt.config(*before, *options)
        return config["model"]["init_args"]

    import my_prompt  # type: ignore[import-not-found]  # noqa: F401  (known to this process by now)

    found = model()  # from a file that nobody has named
    assert (found["template"], found["clip"], found["outer_steps"]) == ("a sketch of a {}.", str(metatpt.clip), 2)
    assert model("--model.template", "c {}.")["template"] == "c {}."
    assert model("-c", "default", "-c", "named.yaml")["template"] == "a {}."
    assert model("--model.prompt.scale", 0.7)["prompt"]["init_args"] == {"scale": 0.7, "kind": None}
    assert model("--model.prompt", "TextPrompt")["prompt"]["class_path"] == TEXT
    assert model("--model.prompt", MINE)["prompt"]["init_args"]["scale"] == 0.5
    assert model("-c", write("a.yaml", "my_prompt.Other"))["prompt"] == {
        "class_path": "my_prompt.Other",
        "init_args": {"n": 3},
    }


def test_what_does_not_fit_a_checkpoint_is_refused(metatpt: CommandLine, checkpoint: str, tmp_path: Path):
    other = save_folder("openai_vit", tmp_path / "clip", seed=1)
    result = metatpt.small("test", "--ckpt_path", checkpoint, "--model.prompt", MINE, "--model.clip", other)
    assert result.status == 1
    assert "choose that model with --model.clip" in result.message
    template = ["--model.clip", metatpt.clip, "--model.template", "a {}."]
    result = metatpt.small("test", "--ckpt_path", checkpoint, "--model.prompt", MINE, *template)
    assert result.status == 1
    assert "the checkpoint holds" in result.message


def test_a_checkpoints_prompt_must_be_known(metatpt: CommandLine, checkpoint: str):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["prompt"]["class_path"] = "nowhere.Prompt"
    torch.save(content, "a.ckpt")
    result = metatpt.small("test", "--ckpt_path", "a.ckpt")
    assert result.status == 2
    assert "nowhere.Prompt, which is not known here: give it with --model.prompt" in result.message
    # One that has moved is named.
    options = ["--model", "TPTModule", "--model.n_views", 2, "--model.prompt", MINE, "--model.clip", metatpt.clip]
    result = metatpt.small("test", "--ckpt_path", "a.ckpt", *options)
    assert result.status == 0, result.err
    for broken in ("TextPrompt", {"class_path": TEXT}, {"class_path": TEXT, "init_args": 3}, ["x"]):
        content["hyper_parameters"]["prompt"] = broken
        torch.save(content, "a.ckpt")
        result = metatpt.small("test", "--ckpt_path", "a.ckpt")
        assert result.status == 2, broken
        assert "its prompt is no class with options" in result.message
    content["hyper_parameters"]["prompt"] = {"class_path": TEXT, "init_args": {"nothing": 3}}
    torch.save(content, "a.ckpt")
    assert "model.prompt.nothing in the checkpoint a.ckpt" in metatpt.small("test", "--ckpt_path", "a.ckpt").message


def cut(content: Any) -> bytes:
    torch.save(content, "whole.ckpt")
    return Path("whole.ckpt").read_bytes()[:-700]


def empty(content: Any) -> bytes:
    return b""


def flipped(content: Any) -> bytes:
    torch.save(content, "whole.ckpt")
    whole = bytearray(Path("whole.ckpt").read_bytes())
    place = whole.index(b"data.pkl") + 70
    whole[place : place + 200] = bytes(200)
    return bytes(whole)


BROKEN: dict[str, tuple[Any, str]] = {
    "cut": (cut, "not a checkpoint that loads"),
    "empty": (empty, "not a checkpoint that loads"),
    "flipped": (flipped, "not a checkpoint that loads"),
    "a tensor": (lambda content: torch.zeros(3), "it has no state_dict"),
    "weights": (lambda content: content["state_dict"], "it has no state_dict"),
    "no tensors": (lambda content: content | {"state_dict": {"prompt.tuned.context": [1.0]}}, "more than tensors"),
    "list for state": (lambda content: content | {"state_dict": [torch.zeros(3)]}, "more than tensors"),
    "options": (lambda content: content | {"hyper_parameters": [1]}, "its hyper_parameters are no options"),
    "clip": (lambda content: content | {"clip": "ViT"}, "which CLIP it was made for"),
    "half a clip": (lambda content: content | {"clip": {"name": "ViT"}}, "which CLIP it was made for"),
    "type": (
        lambda content: content | {"hyper_parameters": content["hyper_parameters"] | {"clip": 3}},
        "model.clip in",
    ),
}


def test_a_broken_checkpoint_is_one_message(metatpt: CommandLine, checkpoint: str):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["prompt"] = None
    folders = set(Path.cwd().iterdir())
    for name, (change, message) in BROKEN.items():
        changed = change(dict(content))
        if isinstance(changed, bytes):
            Path("broken.ckpt").write_bytes(changed)
        else:
            torch.save(changed, "broken.ckpt")
        for command in ("test", "fit"):
            result = metatpt(command, "--model", "training.Training", "--ckpt_path", "broken.ckpt")
            assert result.status == 2, (name, result.err)
            assert message in result.message, name
            assert "Traceback" not in result.err
    assert {path for path in set(Path.cwd().iterdir()) - folders if path.is_dir()} == set()
