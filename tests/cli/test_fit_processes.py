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


def test_two_processes_train_as_one(tiny_clip_folder: Path, tmp_path: Path):
    write_training(tmp_path)
    pictures = write_pictures(tmp_path / "pictures", "cat", "dog")
    options: list[object] = ["fit", "--model", "PromptTrainingModule", "--model.training_views", "original"]
    options += ["--model.lr", 0.05, "--model.warmup_epochs", 0, "--model.clip", tiny_clip_folder]
    options += ["--data", "pets.Pets", "--data.root", pictures, "--trainer.accelerator", "cpu"]
    options += ["--trainer.max_epochs", 3]
    first, last = ["--trainer.max_steps", 2], ["--ckpt_path"]  # an epoch is a step
    with ForkServer() as server:

        def train(run: str, batch_size: int, processes: int, *more: object) -> Path:
            folder, log = tmp_path / run, tmp_path / f"{run}.log"
            whole = [*options, *more, "--data.batch_size", batch_size, "--run", folder]
            if processes == 1:
                started = [server.start(tmp_path, whole, log)]
            else:
                started = server.start_ranks(tmp_path, whole, log, processes)
            status = [server.status(process, SECONDS) for process in started]
            logs = "\n".join(file.read_text() for file in tmp_path.glob(f"{run}.log*"))
            assert status == [0] * processes, logs
            assert logs.count("to test it: ") == 1
            for noise in ("Warning", "sync_dist", "Traceback"):
                assert noise not in logs
            files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
            checkpoints = {"checkpoints/last.ckpt", "checkpoints/best.ckpt"}
            assert files == {"config.yaml", "log/metrics.csv", "log/hparams.yaml", *checkpoints}
            return folder / "checkpoints" / "last.ckpt"

        one, two = train("one", 6, 1, *first), train("two", 3, 2, *first)
        going_on = train("going-on", 6, 1, *last, one), train("going-on-2", 3, 2, *last, two)
    for pair in ((one, two), going_on):
        alone, together = (torch.load(file, weights_only=True) for file in pair)
        assert alone["global_step"] == together["global_step"]
        contexts = [each["state_dict"]["prompt.tuned.context"] for each in (alone, together)]
        torch.testing.assert_close(*contexts, rtol=0, atol=1e-5)
    before, after = (torch.load(file, weights_only=True)["state_dict"] for file in (one, going_on[0]))
    assert (before["prompt.tuned.context"] - after["prompt.tuned.context"]).abs().max() > 1e-3
