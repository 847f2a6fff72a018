"""A run that was stopped goes on (in process; what is killed is in test_kill_and_resume)."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import yaml
from helpers.command_line import CommandLine, Result, rows

from metatpt.results import read_run


def start(metatpt: CommandLine, *arguments: object, command: str = "test") -> Path:
    """A run of which three pictures are done, as a kill would leave it."""
    result = metatpt.small(command, "--model", "TPTModule", "--model.n_views", 4, "--run", "run", *arguments)
    assert result.status == 0, result.err
    whole = Path("whole")
    shutil.copytree("run", whole)
    connection = sqlite3.connect("run/record-rank0.sqlite")
    with connection:
        connection.execute('DELETE FROM rows WHERE "index" NOT IN (0, 2, 5)')
    connection.close()
    for name in ("predictions.csv", "metrics.json"):
        Path("run", name).unlink()
    return whole


def metrics(run: Path) -> dict[str, float]:
    content = json.loads((run / "metrics.json").read_text())
    return {key: value for key, value in content.items() if key not in ("images_per_second", "peak_memory_mb")}


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_what_is_missing_is_done_and_nothing_twice(metatpt: CommandLine, monkeypatch: pytest.MonkeyPatch, command: str):
    whole = start(metatpt, command=command)
    (Path("lightning_config.yaml")).write_text("model: {class_path: ZeroShotModule}")  # not read
    seen: list[int] = []
    from metatpt.modules import TPTModule

    adapt = TPTModule.adapt
    monkeypatch.setattr(TPTModule, "adapt", lambda self, batch: seen.extend(batch.index.tolist()) or adapt(self, batch))
    result = metatpt(command, "--resume", "run", "--data.batch_size", 2)
    assert result.status == 0, result.err
    assert seen == [1, 3, 4, 6]
    assert "config: run/config.yaml\n" in result.err
    assert "going on with run: 3 pictures are done" in result.err
    assert Path("run/predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    assert metrics(Path("run")) == metrics(whole)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data"]["init_args"]["batch_size"] == 8
    assert len(json.loads(Path("run/setup.json").read_text())["sessions"]) == 2
    assert ("top-1 accuracy" in result.out) == (command != "predict")

    seen.clear()
    again = metatpt(command, "--resume", "run")  # nothing is left to do
    assert again.status == 0, again.err
    assert seen == []
    assert metrics(Path("run")) == metrics(whole)


def test_running_figures_and_logged_ones_are_those_of_the_whole_run(metatpt: CommandLine):
    whole = start(metatpt)
    result = metatpt("test", "--resume", "run", "--trainer.logger", "CSVLogger")
    assert result.status == 0, result.err
    (file,) = Path("run").rglob("metrics.csv")
    header, *lines = (line.split(",") for line in file.read_text().splitlines())
    logged = {name: cell for line in lines for name, cell in zip(header, line, strict=True) if cell}
    for name in ("accuracy", "zero_shot_accuracy"):
        assert float(logged[f"test/{name}"]) == pytest.approx(metrics(whole)[name])


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        (("--model.n_views", "5"), "--model.n_views 5 (the run: 4)"),
        (
            ("--model", "ZeroShotModule"),
            "--model 'metatpt.modules.ZeroShotModule' (the run: 'metatpt.modules.TPTModule')\nLeave",
        ),
        (("--seed_everything", "1"), "--seed_everything 1 (the run: 0)"),
        (("--data.max_samples", "5"), "--data.max_samples 5 (the run: None)"),
        (("--trainer.precision", "bf16-mixed"), "--trainer.precision 'bf16-mixed' (the run: None)"),
        (("--reset.policy", "online"), "--reset.policy 'online' (the run: 'episodic')"),
        (("-c", "other.yaml"), "--model.template 'a sketch of a {}.' (the run: 'a photo of a {}.')"),
    ],
)
def test_another_config_is_refused_with_the_difference(metatpt: CommandLine, option: tuple[str, str], shown: str):
    start(metatpt)
    Path("other.yaml").write_text(
        "model: {class_path: metatpt.modules.TPTModule, init_args: {template: 'a sketch of a {}.'}}"
    )
    before = sorted(file.name for file in Path("run").iterdir())
    result = metatpt("test", "--resume", "run", *option)
    assert result.status == 2
    assert shown in result.message
    assert sorted(file.name for file in Path("run").iterdir()) == before


def refused(result: Result, *texts: str) -> None:
    assert result.status in (1, 2), result.err
    for text in texts:
        assert text in result.message


def test_what_cannot_go_on_is_refused(metatpt: CommandLine, pictures: Path, tmp_path: Path):
    start(metatpt)
    refused(metatpt("test", "--resume", "nowhere"), "nowhere is no folder", "--run nowhere")
    Path("empty").mkdir()
    refused(metatpt("test", "--resume", "empty"), "no config.yaml", "--run empty")
    refused(metatpt("predict", "--resume", "run"), "metatpt test --resume run")
    refused(metatpt("test", "--resume", "run", "--run", "other"), "--run and --resume")
    refused(metatpt("test", "--resume", "run", "--trainer.limit_test_batches", 2), "counts batches")
    refused(metatpt.small("test", "--run", "run"), "Go on with it with --resume run")
    moved = shutil.copytree(pictures, tmp_path / "moved")
    assert metatpt("test", "--resume", "run", "--data.root", moved).status == 0
    start_again = sqlite3.connect("run/record-rank0.sqlite")
    with start_again:
        start_again.execute('DELETE FROM rows WHERE "index" = 6')
    start_again.close()
    (moved / "cat" / "0000.png").rename(moved / "cat" / "another.png")
    refused(metatpt("test", "--resume", "run", "--data.root", moved), "The data have changed", "0000.png")


def test_a_refusal_leaves_the_run_as_it_was(metatpt: CommandLine, pictures: Path, tmp_path: Path):
    data = shutil.copytree(pictures, tmp_path / "data")
    (data / "dog" / "last.png").write_bytes(b"")
    tpt = ["--model", "TPTModule", "--model.n_views", 4]
    assert metatpt.small("test", "--data.root", data, *tpt, "--run", "run", "--on_error", "skip").status == 0

    def content() -> dict[Path, object]:
        files = (file for file in Path("run").rglob("*") if file.is_file() and file.suffix != ".sqlite")
        return {**{file: file.read_bytes() for file in files}, Path("rows"): read_run("run").rows}

    before = content()
    (data / "cat" / "0000.png").rename(data / "cat" / "another.png")
    refused(metatpt("test", "--resume", "run"), "The data have changed")
    (data / "cat" / "another.png").rename(data / "cat" / "0000.png")
    refused(metatpt("test", "--resume", "run", "--trainer.limit_test_batches", 1), "counts batches")
    changed = Path("run/config.yaml").read_text().replace("outer_lr: 0.005", "outer_lr: 0.5")
    Path("run/config.yaml").write_text(changed)
    refused(metatpt("test", "--resume", "run"), "options.outer_lr: 0.5 (the run: 0.005)")
    Path("run/config.yaml").write_text(changed.replace("outer_lr: 0.5", "outer_lr: 0.005"))
    assert content() == before
    again = metatpt("test", "--resume", "run")  # the empty file alone is left, and stays so
    assert again.status == 0, again.err
    name = Path("run/metrics.json")  # speed is that of the session that did something
    assert content()[name] == before[name]


def test_a_run_from_python_says_how_it_goes_on(metatpt: CommandLine):
    start(metatpt)
    Path("run/config.yaml").unlink()
    refused(metatpt("test", "--resume", "run"), "started from Python", "RunRecord('run', resume=True)")


def test_names_with_spaces_can_be_copied(metatpt: CommandLine):
    Path("my run").mkdir()
    refused(metatpt("test", "--resume", "my run"), "--run 'my run'")


def test_a_resumed_predict_counts_nothing(metatpt: CommandLine):
    start(metatpt, command="predict")
    logger = ["--trainer.logger", "CSVLogger", "--trainer.log_every_n_steps", 1]
    result = metatpt("predict", "--resume", "run", *logger)
    assert result.status == 0, result.err
    (file,) = Path("run").rglob("metrics.csv")
    assert "running" not in file.read_text()


def test_an_interrupt_has_its_status(metatpt: CommandLine, monkeypatch: pytest.MonkeyPatch):
    from metatpt.modules import ZeroShotModule

    def interrupt(self: ZeroShotModule, batch: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ZeroShotModule, "adapt", interrupt)
    result = metatpt.small("test", "--model", "ZeroShotModule", "--run", "run")
    assert result.status == 130
    assert result.message == "interrupted\n"


def test_other_weights_are_refused(metatpt: CommandLine):
    start(metatpt)
    setup = json.loads(Path("run/setup.json").read_text())
    assert len(setup["clip"]["sha256"]) == 64
    setup["clip"]["sha256"] = "0" * 64
    Path("run/setup.json").write_text(json.dumps(setup))
    refused(metatpt("test", "--resume", "run"), "what it was made with has changed", "clip.sha256:", "0000")


def test_skipped_pictures_are_tried_again(metatpt: CommandLine, pictures: Path, tmp_path: Path):
    data = shutil.copytree(pictures, tmp_path / "data")
    whole = (data / "cat" / "0001.png").read_bytes()
    (data / "cat" / "0001.png").write_bytes(whole[:40])
    options = ["--data.root", data, "--model", "ZeroShotModule", "--run", "run"]
    failed = metatpt.small("test", *options)
    assert failed.status == 1
    assert "1 picture without adapted prediction:\n  cat/0001.png: " in failed.message
    assert "--on_error skip" in failed.message
    assert "top-1 accuracy" in failed.out  # everything else is done
    assert metrics(Path("run"))["n_skipped"] == 1
    (data / "cat" / "0001.png").write_bytes(whole)
    again = metatpt("test", "--resume", "run")
    assert again.status == 0, again.err
    assert [row["status"] for row in rows(Path("run"))] == ["ok"] * 7


@pytest.mark.parametrize(
    ("command", "given", "status"),
    [
        ("test", None, 1),
        ("validate", None, 1),
        ("predict", None, 0),
        ("test", "skip", 0),
        ("predict", "raise", 1),
    ],
)
def test_on_error(metatpt: CommandLine, pictures: Path, tmp_path: Path, command: str, given: str | None, status: int):
    data = shutil.copytree(pictures, tmp_path / "data")
    (data / "dog" / "last.png").write_bytes(b"")
    option = [] if given is None else ["--on_error", given]
    result = metatpt.small(command, "--data.root", data, "--model", "ZeroShotModule", "--run", "run", *option)
    assert result.status == status, result.err
    assert ("dog/last.png: empty file" in result.message) == bool(status)
    assert len(rows(Path("run"))) == 7
