"""``metatpt fit``: what it leaves, what its checkpoint is good for, how it goes on, what it refuses."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from helpers.command_line import CommandLine, Result, rows
from helpers.training import write_training


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    """The user's own files, in the working folder."""
    write_training(tmp_path)


def fit(metatpt: CommandLine, *options: object, data: str = "Pets", epochs: int = 3, run: str = "fit") -> Result:
    whole = ["--model", "training.Training", "--model.clip", metatpt.clip, "--trainer.accelerator", "cpu"]
    whole += ["--data", f"pets.{data}", "--data.root", metatpt.pictures, "--data.batch_size", 4]
    return metatpt("fit", *whole, "--trainer.max_epochs", epochs, "--run", run, *options)


def curve(run: str, name: str) -> list[float]:
    """What was logged under a name, in order."""
    with Path(run, "log/metrics.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


def load(file: str) -> dict[str, object]:
    content: dict[str, object] = torch.load(file, weights_only=True)
    return content


def test_fit_leaves_checkpoints_curves_and_a_config_and_no_record(metatpt: CommandLine):
    result = fit(metatpt)
    assert result.status == 0, result.err
    files = {str(path.relative_to("fit")) for path in Path("fit").rglob("*") if path.is_file()}
    assert files == {
        *("config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "log/metrics.csv", "log/hparams.yaml"),
    }
    for name in ("train/loss", "val/accuracy", "val/gain", "lr-SGD"):
        assert len(curve("fit", name)) == 3, name
    assert curve("fit", "lr-SGD") == pytest.approx([0.05, 0.045, 0.0405])
    assert curve("fit", "train/loss")[-1] < curve("fit", "train/loss")[0]
    for noise in ("Traceback", "Warning", "RunRecord"):
        assert noise not in result.err
    best, last = load("fit/checkpoints/best.ckpt"), load("fit/checkpoints/last.ckpt")
    assert set(best["state_dict"]) == {"prompt.tuned.context"}
    assert last["epoch"] == 2
    assert best["epoch"] == curve("fit", "val/accuracy").index(max(curve("fit", "val/accuracy")))


def test_what_is_printed_in_the_end_tests_the_checkpoint(metatpt: CommandLine):
    result = fit(metatpt)
    assert "fit/checkpoints/last.ckpt" in result.out
    (line,) = [line for line in result.out.splitlines() if line.startswith("to test it: metatpt ")]
    assert line.endswith("-c fit/config.yaml --ckpt_path fit/checkpoints/best.ckpt")
    test = metatpt(*shlex.split(line)[4:], "--run", "test")
    assert test.status == 0, test.err
    score = max(curve("fit", "val/accuracy"))
    assert json.loads(Path("test/metrics.json").read_text())["accuracy"] == pytest.approx(score)  # the same pictures
    assert f"best (val/accuracy {score:.4f})" in result.out


@pytest.mark.parametrize("first", ["fit", "test"])
def test_saved_config_runs_with_the_other_command(metatpt: CommandLine, first: str):
    second = "test" if first == "fit" else "fit"
    options = ["--model", "training.Training", "--model.clip", metatpt.clip, "--model.lr", 0.3]
    options += ["--data", "pets.Pets", "--data.root", metatpt.pictures, "--data.batch_size", 3]
    options += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", 1]
    assert metatpt(first, *options, "--run", "a").status == 0
    result = metatpt(second, "-c", "a/config.yaml", "--run", "b")
    assert result.status == 0, result.err
    saved = [yaml.safe_load(Path(run, "config.yaml").read_text()) for run in "ab"]
    assert saved[0] == saved[1]
    assert Path("a" if first == "fit" else "b", "checkpoints/last.ckpt").exists()
    assert len(rows(Path("b" if first == "fit" else "a"))) == 7


def test_max_epochs_is_not_lightnings_thousand(metatpt: CommandLine):
    assert metatpt.config()["trainer"]["max_epochs"] == 50


def test_training_that_goes_on_is_as_if_it_had_not_stopped(metatpt: CommandLine):
    assert fit(metatpt, epochs=4, run="whole").status == 0
    # Two sessions, of as many epochs in all.
    assert fit(metatpt, epochs=2, run="first").status == 0
    going_on = ["--ckpt_path", "first/checkpoints/last.ckpt"]
    result = fit(metatpt, *going_on, epochs=4, run="second")
    assert result.status == 0, result.err
    assert "Warning" not in result.err
    whole, second = load("whole/checkpoints/last.ckpt"), load("second/checkpoints/last.ckpt")
    assert torch.equal(whole["state_dict"]["prompt.tuned.context"], second["state_dict"]["prompt.tuned.context"])
    assert second["global_step"] == whole["global_step"]
    assert curve("first", "train/loss") + curve("second", "train/loss") == curve("whole", "train/loss")
    assert curve("second", "lr-SGD") == curve("whole", "lr-SGD")[2:]
    # The best of all epochs, whichever session it was in.
    best = [load(f"{run}/checkpoints/best.ckpt") for run in ("whole", "second")]
    assert best[0]["epoch"] == best[1]["epoch"]
    assert torch.equal(*(each["state_dict"]["prompt.tuned.context"] for each in best))
    assert "ckpt_path" not in yaml.safe_load(Path("second/config.yaml").read_text())


def test_the_best_checkpoint_of_an_earlier_session_stays_the_best(metatpt: CommandLine):
    assert fit(metatpt, epochs=2, run="first").status == 0
    # From here on everything gets worse: the best one is copied.
    going_on = ["--ckpt_path", "first/checkpoints/last.ckpt", "--trainer.callbacks+=spoil.Spoil"]
    Path("spoil.py").write_text(
        "from lightning.pytorch import Callback\n\n"
        "class Spoil(Callback):\n"
        "    def on_train_batch_end(self, trainer, pl_module, *args):\n"
        "        pl_module.prompt.tuned['context'].data.fill_(float('nan'))\n"
    )
    result = fit(metatpt, *going_on, epochs=3, run="second")
    assert result.status == 0, result.err
    first, second = (load(f"{run}/checkpoints/best.ckpt") for run in ("first", "second"))
    assert torch.equal(first["state_dict"]["prompt.tuned.context"], second["state_dict"]["prompt.tuned.context"])
    # Where it is gone, that is said.
    Path("first/checkpoints/best.ckpt").unlink()
    result = fit(metatpt, *going_on[:2], epochs=3, run="third")
    assert result.status == 0, result.err
    assert "is gone: the best one is that from here on" in result.err


@pytest.mark.parametrize("how", ["options", "file"])
def test_early_stopping_by_name(metatpt: CommandLine, how: str):
    # Nothing gets better at a learning rate of 0.
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/accuracy", "mode": "max", "patience": 1}}
    Path("stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stopping]}}))
    options = ["-c", "default", "-c", "stop.yaml"]
    if how == "options":
        options = [f"--trainer.callbacks+={stopping['class_path']}"]
        options += [f"--trainer.callbacks.{name}={value}" for name, value in stopping["init_args"].items()]
    result = fit(metatpt, *options, "--model.lr", 0.0, epochs=9)
    assert result.status == 0, result.err
    assert len(curve("fit", "train/loss")) == 2
    # And does not disturb a test with the same config.
    assert metatpt("test", "-c", "fit/config.yaml", "--run", "test").status == 0


@pytest.mark.parametrize("data", ["Unvalidated", "Pets"])
def test_without_validation(metatpt: CommandLine, data: str):
    result = fit(metatpt, *(["--trainer.limit_val_batches", 0] if data == "Pets" else []), data=data)
    assert result.status == 0, result.err
    assert not Path("fit/checkpoints/best.ckpt").exists()
    assert "--ckpt_path fit/checkpoints/last.ckpt" in result.out
    assert len(curve("fit", "train/loss")) == 3


def test_callbacks_and_loggers_of_the_user_take_the_place_of_ours(metatpt: CommandLine):
    options = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename={epoch}"]
    result = fit(metatpt, *options, "--trainer.logger", "CSVLogger", epochs=1)
    assert result.status == 0, result.err
    (checkpoint,) = Path("fit").rglob("*.ckpt")
    assert checkpoint.name == "epoch=0.ckpt"
    assert f"--ckpt_path {checkpoint}" in result.out
    assert not Path("fit/log").exists()
    assert list(Path("fit").rglob("metrics.csv"))
    assert metatpt("test", "-c", "fit/config.yaml", "--run", "test").status == 0


def test_nothing_is_kept_where_nothing_is_wanted(metatpt: CommandLine):
    result = fit(metatpt, "--trainer.enable_checkpointing", "false", "--trainer.logger", "false", epochs=1)
    assert result.status == 0, result.err
    assert [file.name for file in Path("fit").iterdir()] == ["config.yaml"]
    assert "No checkpoint was kept" in result.err


def test_online_policy_is_for_testing(metatpt: CommandLine):
    result = fit(metatpt, "--reset.policy", "online", epochs=1)
    assert result.status == 0, result.err
    assert "validation within fit is episodic" in result.err


def test_a_tuning_method_validates_within_fit_from_the_prompt_at_hand(metatpt: CommandLine):
    Path("tuning.py").write_text(
        "from typing import Any\nfrom metatpt.modules import TPTModule\nfrom training import Training\n\n"
        "class Tuning(TPTModule):\n"
        '    """TPT, trained."""\n\n'
        "    training_step = Training.training_step\n"
        "    lr = 0.05\n"
        "    configure_optimizers = Training.configure_optimizers\n"
    )
    options = ["--model", "tuning.Tuning", "--model.n_views", 2]
    result = fit(metatpt, *options, epochs=2)
    assert result.status == 0, result.err
    assert len(curve("fit", "val/accuracy")) == 2
    test = metatpt("test", "-c", "fit/config.yaml", "--ckpt_path", "fit/checkpoints/last.ckpt", "--run", "test")
    assert test.status == 0, test.err
    assert json.loads(Path("test/metrics.json").read_text())["accuracy"] == pytest.approx(
        curve("fit", "val/accuracy")[-1]
    )


REFUSED = {
    "--model ZeroShotModule": ["ZeroShotModule has no training_step", "--model ", "Training"],
    "--model MetaTPTModule": ["MetaTPTModule has no training_step", "PromptTrainingModule"],
    "--model hand.HandWritten": ["HandWritten", "has nothing to learn", "TextPrompt"],
    "--data FolderDataModule": ["has no train split"],
    "--data.root nowhere": ["nowhere"],
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_trained_is_one_message(metatpt: CommandLine, options: str):
    Path("hand.py").write_text(
        "from training import Training\nfrom metatpt.modules import ZeroShotModule\n\n"
        "class HandWritten(Training):\n"
        '    """Nothing to learn."""\n\n'
        "    configure_prompt = ZeroShotModule.configure_prompt\n"
    )
    result = fit(metatpt, *options.split())
    assert result.status == 1
    for part in REFUSED[options]:
        assert part in result.message
    assert "Traceback" not in result.err
    assert not Path("fit").exists()


def test_what_training_cannot_go_on_from(metatpt: CommandLine):
    assert fit(metatpt, epochs=2).status == 0
    result = fit(metatpt, "--ckpt_path", "fit/checkpoints/last.ckpt", epochs=2, run="b")
    assert result.status == 2
    assert "has seen 2 epochs, and --trainer.max_epochs is 2" in result.message
    torch.save({**load("fit/checkpoints/last.ckpt"), "optimizer_states": []}, "bare.ckpt")
    result = fit(metatpt, "--ckpt_path", "bare.ckpt", epochs=3, run="b")
    assert result.status == 2
    assert "no state of an optimiser" in result.message
    assert not Path("b").exists()


def test_options_of_other_commands(metatpt: CommandLine):
    assert fit(metatpt, epochs=1).status == 0
    result = metatpt("fit", "--resume", "fit")
    assert result.status == 2
    assert "--ckpt_path" in result.message
    assert "no option of fit" in metatpt("fit", "--on_error", "skip").message
    for command in ("test", "predict"):
        result = metatpt(command, "--resume", "fit")
        assert result.status == 2
        assert "it is a run of fit" in result.message
        assert "--ckpt_path fit/checkpoints/last.ckpt" in result.message
    again = fit(metatpt, epochs=1)
    assert again.status == 1
    assert "already holds a run" in again.message


def test_training_that_breaks_says_how_to_go_on(metatpt: CommandLine):
    Path("breaking.py").write_text(
        "from lightning.pytorch import Callback\n\n"
        "class Break(Callback):\n"
        "    def on_train_epoch_start(self, trainer, pl_module):\n"
        "        if trainer.current_epoch == 1:\n"
        "            raise KeyboardInterrupt\n"
    )
    result = fit(metatpt, "--trainer.callbacks+=breaking.Break")
    assert result.status == 130
    command = "metatpt fit -c fit/config.yaml --ckpt_path fit/checkpoints/last.ckpt"
    assert command in result.err
    Path("breaking.py").write_text(Path("breaking.py").read_text().replace("== 1", "== 99"))
    again = metatpt(*command.split()[1:], "--run", "more", "--trainer.callbacks", "null")
    assert again.status == 0, again.err
    assert load("more/checkpoints/last.ckpt")["epoch"] == 2
