"""Training over two processes is training on one with twice the batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.command_line import write_pictures
from helpers.fork_server import ForkServer
from helpers.training import write_training

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

SECONDS = 200
"""Time that a run may take, on a machine that has other things to do."""


@pytest.fixture
def options(tiny_clip_folder: Path, tmp_path: Path) -> list[object]:
    write_training(tmp_path)
    pictures = write_pictures(tmp_path / "pictures", "cat", "dog")
    given: list[object] = ["fit", "--model.clip", tiny_clip_folder, "--data", "pets.Pets", "--data.root", pictures]
    return [*given, "--trainer.accelerator", "cpu", "--trainer.max_epochs", 3]


def train(server: ForkServer, folder: Path, processes: int, options: list[object]) -> Path:
    """The checkpoint after the last epoch; six pictures a step, an epoch."""
    log = folder.with_suffix(".log")
    whole = [*options, "--data.batch_size", 6 // processes, "--run", folder]
    if processes == 1:
        started = [server.start(folder.parent, whole, log)]
    else:
        started = server.start_ranks(folder.parent, whole, log, processes)
    status = [server.status(process, SECONDS) for process in started]
    logs = "\n".join(file.read_text() for file in folder.parent.glob(f"{folder.name}.log*"))
    assert status == [0] * processes, logs
    assert logs.count("to test it: ") == 1
    for noise in ("Warning", "sync_dist", "Traceback"):
        assert noise not in logs
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    checkpoints = {"checkpoints/last.ckpt", "checkpoints/best.ckpt"}
    assert files == {"config.yaml", "log/metrics.csv", "log/hparams.yaml", *checkpoints}
    return folder / "checkpoints" / "last.ckpt"


def assert_equal(alone: Path, together: Path) -> None:
    one, two = (torch.load(file, weights_only=True) for file in (alone, together))
    assert one["global_step"] == two["global_step"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=1e-5)


def test_two_processes_train_as_one(options: list[object], tmp_path: Path):
    options += ["--model", "PromptTrainingModule", "--model.training_views", "original"]
    options += ["--model.lr", 0.05, "--model.warmup_epochs", 0]
    with ForkServer() as server:
        first = [*options, "--trainer.max_steps", 2]
        one, two = train(server, tmp_path / "one", 1, first), train(server, tmp_path / "two", 2, first)
        more = train(server, tmp_path / "more", 1, [*options, "--ckpt_path", one])
        more_of_two = train(server, tmp_path / "more-of-two", 2, [*options, "--ckpt_path", two])
    assert_equal(one, two)
    assert_equal(more, more_of_two)
    before, after = (torch.load(file, weights_only=True)["state_dict"] for file in (one, more))
    assert (before["prompt.tuned.context"] - after["prompt.tuned.context"]).abs().max() > 1e-3


def test_meta_training_too_where_views_get_no_gradient(options: list[object], tmp_path: Path):
    options += ["--model", "MetaTrainingModule", "--model.augmentation", "fixed", "--model.predict", "original"]
    options += ["--model.n_views", 4, "--model.outer_steps", 1, "--model.learned_rates", "one", "--model.lr", 1e-3]
    with ForkServer() as server:
        assert_equal(*(train(server, tmp_path / str(number), number, options) for number in (1, 2)))
