"""Errors: one message, with what was given, what was expected, the nearest names."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers.command_line import CommandLine
from helpers.training import PROMPT

from metatpt.cli.errors import is_check, is_lost_process, root_cause, words

TYPED = {
    # commands
    "tset": ["There is no command 'tset'", "Did you mean test?"],
    "train": ["no command 'train'", "fit, test, validate, predict"],
    "--model TPTModule test": ["The command comes first"],
    "test now": ["Unexpected 'now'"],
    # classes
    "test --model TPTModul": ["--model", "no method is called 'TPTModul'", "Did you mean TPTModule"],
    "test --data PACS": ["--data", "no data set is called 'PACS'", "PACSDataModule"],
    "test --model AdaptationModule": ["'AdaptationModule'", "it is a base class"],
    "test --model metatpt.modules.TPTModul": ["metatpt.modules has no TPTModul", "Did you mean TPTModule"],
    "test --model metatpt.modules.ViewModule": ["is a base class", "does not define adapt"],
    "test --model nowhere.MyModule": ["there is no module nowhere"],
    "test --model json.JSONDecoder": ["json.JSONDecoder is no method", "AdaptationModule"],
    "test --model metatpt.datamodules.PACSDataModule": ["is no method"],
    "test --trainer.logger CSVLoger": ["--trainer.logger", "'CSVLoger'", "Did you mean CSVLogger"],
    "test --trainer.callbacks+=LearningRateMonito": ["--trainer.callbacks", "Did you mean LearningRateMonitor"],
    "test --trainer.callbacks+=nowhere.Mine": ["--trainer.callbacks", "No module named 'nowhere'"],
    "test --trainer.callbacks+=EarlyStopping": ["--trainer.callbacks.monitor must be given"],
    "test --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr x": [
        "callbacks.monitr",
        "Did you mean monitor?",
    ],
    # options
    "test --model.n_veiws 3": ["--model.n_veiws", "MetaTPTModule has no such option", "Did you mean n_views?"],
    "test --model.init_args.n_veiws 3": ["--model.n_veiws", "Did you mean n_views?"],
    "test --model ZeroShotModule --model.n_views 3": [
        "ZeroShotModule has no such option",
        "of MetaTPTModule, MetaTrainingModule, TPTModule",
    ],
    "test --model.bounds.rotatoin 1": ["--model.bounds.rotatoin", "Did you mean rotation?"],
    "test --data.shfit noise": ["--data.shfit", "ShiftedShapesDataModule has no such option", "Did you mean shift"],
    "test --data.shift.x noise": ["--data.shift.x"],
    "test --n_views 3": ["--n_views", "Did you mean --model.n_views?"],
    "test --devices 3": ["Did you mean --trainer.devices?"],
    "test --trainer.devises 3": ["--trainer.devises", "Did you mean --trainer.devices"],
    "test --reset.polcy online": ["Did you mean --reset.policy?"],
    "test --mod.n_views 3": ["--mod.n_views", "Did you mean --model.n_views?"],
    "test --seed 3": ["--seed", "there is no such option"],
    "test --model.n_views": ["--model.n_views needs a value"],
    "test --model.n_views --model.memory 3": ["--model.n_views needs a value"],
    "test --model.class_names [a,b]": ["--model.class_names", "--data.class_names"],
    "test --data PACSDataModule": ["--data.root must be given (for PACSDataModule)"],
    # prompts
    "test --model.prompt TextPromp": [
        "--model.prompt",
        "no prompt learner is called 'TextPromp'",
        "Did you mean TextP",
    ],
    "test --model.prompt nowhere.Mine": ["--model.prompt", "there is no module nowhere"],
    "test --model.prompt metatpt.prompts.TextPromp": ["metatpt.prompts has no TextPromp", "Did you mean TextPrompt"],
    "test --model.prompt json.JSONDecoder": ["json.JSONDecoder is no prompt learner", "PromptLearner"],
    "test --model.prompt json.dumps": ["json.dumps is no prompt learner"],
    "test --model.prompt PromptLearner": ["'PromptLearner'", "it is a base class"],
    "test --model.prompt TPTModule": ["no prompt learner is called 'TPTModule'"],
    "test --model.prompt TemplatePrompt": ["TemplatePrompt learns nothing", "--model.template"],
    "test --model.prompt metatpt.prompts.TemplatePrompt": ["learns nothing", "--model.template"],
    "test --model.prompt [TextPrompt]": ["--model.prompt", "no prompt learner is called '[TextPrompt]'"],
    "test --model.prompt.n_context 3": ["--model.prompt.n_context", "none is named", "--model.prompt", "TextPrompt"],
    "test --model.prompt my_prompt.MyPrompt --model.prompt.scal 3": ["--model.prompt.scal", "Did you mean scale?"],
    "test --model.prompt my_prompt.MyPrompt --model.prompt.scale x": [
        "--model.prompt.scale: expected a number, got 'x'"
    ],
    "test --model.prompt my_prompt.MyPrompt --model.prompt.template x": ["MyPrompt has no such option"],
    "test --model.prompt my_prompt.MyPrompts": ["my_prompt has no MyPrompts", "Did you mean MyPrompt"],
    "test -c prompt_class.yaml": ["model.prompt in prompt_class.yaml", "Did you mean TextPrompt"],
    "test -c prompt_option.yaml": ["model.prompt.scal in prompt_option.yaml", "Did you mean scale?"],
    "test -c prompt_beside.yaml": ["model.prompt in prompt_beside.yaml", "scale stands beside class_path"],
    "test -c prompt_value.yaml": ["model.prompt.scale in prompt_value.yaml", "a number", "x"],
    # values
    "test --model.n_views three": ["--model.n_views: expected a whole number, got 'three'"],
    "test --model.n_views 4.5": ["expected a whole number, got '4.5'"],
    "test --model.init crpo": ["expected crop or affine, got 'crpo'", "Did you mean crop?"],
    "test --model.inner_loss [1]": ["--model.inner_loss", "text or a mapping", "'[1]'"],
    "test --model.bounds.rotation x": ["--model.bounds.rotation", "a number", "'x'"],
    "test --data.shift rotatoin": ["--data.shift", "Did you mean rotation?"],
    "test --data.severity x": ["--data.severity: expected a whole number"],
    "test --reset.policy onlin": ["expected episodic or online, got 'onlin'", "Did you mean online?"],
    "test --trainer.max_epochs x": ["--trainer.max_epochs: expected a whole number or null, got 'x'"],
    "test --trainer.precision 17": ["--trainer.precision", "32-true", "'17'"],
    "test --seed_everything x": ["--seed_everything: expected a whole number, got 'x'"],
    "test --seed_everything -1": ["--seed_everything", "from 0 to 4294967295", "-1"],
    "test --seed_everything 4294967296": ["from 0 to 4294967295"],
    # files
    "test -c nowhere": ["-c nowhere", "there is no file nowhere", "metatpt"],
    "test -c tp": ["Did you mean tpt"],
    "test -c nowhere.yaml": ["-c nowhere.yaml", "there is no file"],
    "test -c .": [". is a folder"],
    "test -c broken.yaml": ["broken.yaml, line 2"],
    "test -c list.yaml": ["list.yaml holds no options"],
    "test -c section.yaml": ["modle in section.yaml", "Did you mean model?"],
    "test -c option.yaml": ["model.n_veiws in option.yaml", "Did you mean n_views?"],
    "test -c beside.yaml": ["model in beside.yaml", "n_views stands beside class_path"],
    "test -c value.yaml": ["model.init in value.yaml: expected crop or affine, got 'crpo'"],
    "test -c trainer.yaml": ["trainer.devises in trainer.yaml", "--trainer.devices"],
    "test -c names.yaml": ["model.class_names in names.yaml", "--data.class_names"],
    "test --model nowhere.yaml": ["--model", "there is no file nowhere.yaml"],
    "test --model {class_path:": ["{class_path:, line", "no YAML"],
    "test --ckpt_path nowhere.ckpt": ["--ckpt_path nowhere.ckpt", "there is no such file"],
    "test --ckpt_path list.yaml": ["--ckpt_path list.yaml", "not a checkpoint"],
}
FILES = {
    "broken.yaml": "model: {class_path: TPTModule\ndata: x",
    "list.yaml": "[1, 2]",
    "section.yaml": "modle: TPTModule",
    "option.yaml": "{model: {class_path: TPTModule, init_args: {n_veiws: 3}}, data: ShiftedShapesDataModule}",
    "beside.yaml": "{model: {class_path: TPTModule, n_views: 3}, data: ShiftedShapesDataModule}",
    "value.yaml": "{model: {class_path: TPTModule, init_args: {init: crpo}}, data: ShiftedShapesDataModule}",
    "trainer.yaml": "{model: TPTModule, data: ShiftedShapesDataModule, trainer: {devises: 3}}",
    "names.yaml": "{model: {class_path: TPTModule, init_args: {class_names: [a]}}, data: ShiftedShapesDataModule}",
    "prompt_class.yaml": "{model: {class_path: TPTModule, init_args: {prompt: TextPromp}}}",
    "prompt_option.yaml": "{model: {class_path: TPTModule, init_args: {prompt: "
    "{class_path: my_prompt.MyPrompt, init_args: {scal: 3}}}}}",
    "prompt_beside.yaml": "{model: {class_path: TPTModule, init_args: {prompt: "
    "{class_path: my_prompt.MyPrompt, scale: 3}}}, data: ShiftedShapesDataModule}",
    "prompt_value.yaml": "{model: {class_path: TPTModule, init_args: {prompt: "
    "{class_path: my_prompt.MyPrompt, init_args: {scale: x}}}}, data: ShiftedShapesDataModule}",
    "my_prompt.py": PROMPT,
}


@pytest.mark.parametrize("line", TYPED)
def test_what_is_mistyped_gets_one_message(metatpt: CommandLine, tmp_path: Path, line: str):
    for name, text in FILES.items():
        Path(name).write_text(text)
    result = metatpt(*line.split())
    assert result.status == 2
    for part in TYPED[line]:
        assert part in result.message
    assert len(result.message) < 500
    assert "Traceback" not in result.err
    assert "usage" not in result.err
    assert result.out == ""
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == set(FILES)


REFUSED = {
    "--data.root nowhere": ["No folder nowhere"],
    "--model.clip ViT-B-99": ["'ViT-B-99'", "ViT-B-32"],
    "--model.clip ViT-B-32": ["--model.pretrained", "laion2b_s34b_b79k"],
    "--model.inner_loss anchr": ["inner_loss", "'anchr'", "anchor"],
    "--model.outer_lr -1": ["outer_lr", "-1"],
    "--model.n_views 0": ["n_views", "0"],
    "--data.batch_size 0": ["batch_size", "0"],
    "--data.class_names cat,cat": ["cat", "0", "1"],
    "--run file/run": ["file/run cannot be made", "--run"],
    "--run file": ["file"],
    "--trainer.accelerator gppu": ["gppu", "cpu"],
    "--trainer.devices 0": ["devices"],
    "--trainer.devices many": ["--trainer.devices 'many': ", "int > 0"],
    "--trainer.inference_mode true": ["needs gradients", "inference_mode=False"],
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_a_class_refuses_gets_its_message_alone(metatpt: CommandLine, options: str):
    Path("file").touch()
    result = metatpt.small("test", *options.split())
    assert result.status == 1
    for part in REFUSED[options]:
        assert part in result.message
    assert "Traceback" not in result.err
    assert "Union" not in result.err
    assert result.out == ""


def test_an_error_in_the_users_own_code_keeps_its_traceback(metatpt: CommandLine):
    Path("buggy.py").write_text(
        "from metatpt.modules import ZeroShotModule\n\n"
        "class Make(ZeroShotModule):\n    def __init__(self, **kwargs):\n        super().__init__(**kwargs)\n"
        "        self.nothing.here\n\n"
        "class Run(ZeroShotModule):\n    def adapt(self, batch):\n        return batch.image @ batch.image[:, :, :3]\n"
    )
    with pytest.raises(AttributeError, match="nothing"):
        metatpt.small("test", "--model", "buggy.Make")
    with pytest.raises(RuntimeError, match="size"):
        metatpt.small("test", "--model", "buggy.Run")


def test_a_file_of_the_user_that_cannot_be_imported(metatpt: CommandLine):
    Path("needy.py").write_text("import nowhere_to_be_found")
    Path("typo.py").write_text("def f(:\n")
    assert "needs nowhere_to_be_found" in metatpt("test", "--model", "needy.Mine").message
    assert "SyntaxError" in metatpt("test", "--model", "typo.Mine").message


def test_traceback_on_request(metatpt: CommandLine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("METATPT_TRACEBACK", "1")
    result = metatpt.small("test", "--data.root", "nowhere")
    assert result.status == 1
    assert "Traceback" in result.err
    assert "No folder nowhere" in result.err


def test_a_checkpoint_with_code_is_not_run(metatpt: CommandLine):
    import torch

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, ("hacked",)

    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, "evil.ckpt")
    result = metatpt.small("test", "--ckpt_path", "evil.ckpt")
    assert result.status == 2
    assert "without running code" in result.message
    assert not Path("hacked").exists()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "a whole number"),
        (float | None, "a number or null"),
        (Literal["a", "b", "c"], "a, b or c"),
        (str | list[str], "text or a list of text"),
        (dict[str, float], "a mapping"),
        (Path | str, "a path or text"),
    ],
)
def test_types_in_words(kind: object, text: str):
    assert words(kind) == text


def test_checks_are_told_from_errors_of_libraries():
    import torch

    from metatpt.modules.checks import check_number

    with pytest.raises(ValueError, match="n is") as check:
        check_number("n", -1, 0)
    assert is_check(check.value)
    with pytest.raises(RuntimeError) as library:
        torch.ones(2) @ torch.ones(3)
    assert not is_check(library.value)
    assert root_cause(check.value) is check.value


def test_help(metatpt: CommandLine):
    text = metatpt("--help").out
    for name in (
        "fit",
        "validate",
        "test",
        "predict",
        "MetaTPTModule",
        "TextPrompt",
        "PACSDataModule",
        "metatpt test",
        "tpt",
        "default",
    ):
        assert name in text
    assert max(map(len, text.splitlines())) <= 110
    assert metatpt().out.startswith("usage")
    for option in ("--model", "--run", "--seed_everything", "--ckpt_path", "--reset.policy"):
        assert option in metatpt("predict", "--help").out
    text = metatpt("fit", "--help").out
    assert "last.ckpt" in text
    assert "max_epochs" in text
    for option in ("--resume", "--on_error", "--reset.policy"):
        assert option not in text
    assert max(map(len, text.splitlines())) <= 120
    Path("my_prompt.py").write_text(PROMPT)
    text = metatpt("test", "--model.prompt.help", "my_prompt.MyPrompt").out
    assert "--model.prompt.scale" in text
    for given in ("clip", "class_names", "template"):
        assert f"--model.prompt.{given}" not in text
    text = metatpt("test", "--model.help", "TPTModule").out
    assert "--model.outer_lr" in text
    assert "--model.class_names" not in text
    assert "`" not in text
    assert "--data.domain" in metatpt("test", "--data", "PACSDataModule", "--data.help").out
    assert "--trainer.devices" in metatpt("test", "--trainer.help").out
    assert "--trainer.logger.save_dir" in metatpt("test", "--trainer.logger.help", "CSVLogger").out
    assert "--model.bounds.rotation" in metatpt("test", "--model.bounds.help").out
    assert metatpt("test", "--model.n_views.help").status == 2
    assert "Did you mean TPTModule" in metatpt("test", "--model.help", "TPTModul").message


def test_version(metatpt: CommandLine):
    import metatpt as package

    assert metatpt("--version").out == f"metatpt {package.__version__}\n"


def test_status_reaches_the_shell(monkeypatch: pytest.MonkeyPatch):
    import metatpt as package

    monkeypatch.setattr(sys, "argv", ["metatpt", "tset"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(Path(package.__file__).with_name("__main__.py")), run_name="__main__")
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("a check"), False),
    ],
)
def test_a_process_that_was_lost_is_told_from_other_errors(error: Exception, lost: bool):
    assert is_lost_process(error) == lost
