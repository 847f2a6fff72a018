"""Where a run's time goes, through a Trainer and the command line."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from helpers.batches import NAMES, make_batch
from helpers.clock import Clock
from helpers.command_line import write_pictures
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader, Dataset

from metatpt import timing
from metatpt.callbacks import CostMeter, ResetPrompts, RunRecord
from metatpt.clip import packed
from metatpt.clip.budget import Budget
from metatpt.modules import AdaptationModule, MetaTPTModule, TPTModule, ZeroShotModule
from metatpt.types import Batch

METHODS: dict[str, tuple[type[AdaptationModule], dict[str, Any]]] = {
    "zero-shot": (ZeroShotModule, {}),
    "tpt": (TPTModule, {"n_views": 6, "outer_steps": 2, "selection": 0.5}),
    "sequential": (MetaTPTModule, {"n_views": 6, "outer_steps": 2, "selection": 0.5}),
    "nested": (MetaTPTModule, {"n_views": 6, "outer_steps": 2, "selection": 0.5, "schedule": "nested"}),
    "second order": (
        MetaTPTModule,
        {"n_views": 6, "outer_steps": 2, "selection": 0.5, "schedule": "nested", "order": "second", "inner_steps": 2},
    ),
    "joint": (MetaTPTModule, {"n_views": 6, "outer_steps": 2, "selection": 0.5, "schedule": "joint"}),
}


class Pictures(Dataset[Batch]):
    def __init__(self, sizes: tuple[int, ...] = (2, 1), before: Callable[[], None] = lambda: None) -> None:
        whole = make_batch(sum(sizes), 32)
        parts = torch.arange(len(whole)).split(list(sizes))
        self.batches, self.before = [whole.select(part.tolist()) for part in parts], before

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> Batch:
        self.before()
        return self.batches[place]


def make_trainer(folder: Path, *callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        **{"inference_mode": False, "logger": False, **options}, accelerator="cpu", callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        use_distributed_sampler=False,
    )  # fmt: skip


def loader(pictures: Dataset[Batch] | None = None) -> DataLoader[Batch]:
    return DataLoader(pictures or Pictures(), batch_size=None)


@pytest.fixture
def make(tiny_clip_folder: Path) -> Callable[..., AdaptationModule]:
    def make(method: str) -> AdaptationModule:
        kind, options = METHODS[method]
        return kind(clip=str(tiny_clip_folder), class_names=NAMES, **options)

    return make


@pytest.fixture(params=["kept", "recomputed"])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of the towers: as memory asks for on a device that has enough, and on one that has not."""
    monkeypatch.setattr(Budget, "recompute", lambda *args: request.param == "recomputed")
    monkeypatch.setattr(Budget, "chunk", lambda *args, **kwargs: 2 if request.param == "recomputed" else 100)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_the_same_to_the_last_bit(make, tmp_path: Path, method: str) -> None:
    results = []
    for callbacks in ([], [CostMeter()]):
        trainer = make_trainer(tmp_path, ResetPrompts(), *callbacks)
        results.append(trainer.predict(make(method), loader()))
    for plain, measured in zip(*results, strict=True):
        assert torch.equal(plain.log_probs, measured.log_probs)
        assert torch.equal(plain.zero_shot_log_probs, measured.zero_shot_log_probs)
        for name, figures in plain.diagnostics.items():
            assert torch.equal(figures, measured.diagnostics[name])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The meter's clock, which only moves in known places: both ways through towers, warp and losses."""
    clock = Clock()

    def slow(owner: Any, name: str, part: str, seconds: float) -> None:
        function = getattr(owner, name)

        def spends(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if isinstance(result, tuple):  # of what no gradient flows through
                clock.spend(part, seconds)
                return result
            return clock.through(result, part, seconds)

        monkeypatch.setattr(owner, name, spends)

    slow(sys.modules["metatpt.clip.model"], "encode_pictures", "image_tower", 1.0)
    slow(packed.PackedPrompts, "_encode_tails", "text_tower", 10.0)
    slow(sys.modules["metatpt.views.sampling"], "_crops", "views", 100.0)
    slow(sys.modules["metatpt.modules.views"], "warp", "views", 200.0)
    slow(AdaptationModule, "log_probs", "other", 1000.0)
    monkeypatch.setattr("metatpt.callbacks.cost.stamps", lambda device: clock.stamp)
    return clock


def spent(clock: Clock) -> dict[str, float]:
    return dict.fromkeys(timing.PARTS, 0.0) | clock.books


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("method", METHODS)
def test_time_counts_where_it_is_spent(make, tmp_path: Path, clock: Clock, method: str) -> None:
    class Slow(lightning.Callback):
        def on_test_start(self, *args: Any) -> None:
            clock.spend("before the loop", 7e6)

        def on_test_batch_end(
            self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Batch, i: int
        ) -> None:
            clock.spend("after the loop" if i == last and self is behind else "other", 5e4)

    last, meter, behind = 1, CostMeter(), Slow()
    trainer = make_trainer(tmp_path, ResetPrompts(), Slow(), meter, behind)
    trainer.test(make(method), loader(Pictures((2, 1), lambda: clock.spend("data", 1e4))), verbose=False)
    outside = clock.books.pop("before the loop") + clock.books.pop("after the loop")
    assert meter.cost["seconds"] == spent(clock)
    assert sum(meter.cost["seconds"].values()) == clock.now - outside
    nothing = {"views"} if method == "zero-shot" else set()
    assert {part for part, seconds in spent(clock).items() if not seconds} == nothing


def test_graph_of_an_earlier_run_that_nobody_measured(make, tmp_path: Path, clock: Clock) -> None:
    module, meter = make("tpt"), CostMeter()
    make_trainer(tmp_path, ResetPrompts()).test(module, loader(), verbose=False)
    assert clock.made == 0
    clock.books.clear()
    make_trainer(tmp_path, ResetPrompts(), meter).test(module, loader(), verbose=False)
    assert meter.cost["seconds"] == spent(clock)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_whole_loop_is_told(make, tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str) -> None:
    folder = tmp_path / "run"
    meter, module = CostMeter(), make("sequential")
    trainer = make_trainer(tmp_path, ResetPrompts(), RunRecord(folder), meter)
    options = {} if command == "predict" else {"verbose": False}
    with caplog.at_level(logging.INFO, "metatpt"):
        getattr(trainer, command)(module, loader(Pictures((2, 2, 1), lambda: time.sleep(0.05))), **options)
    cost = json.loads((folder / "cost.json").read_text())
    assert cost == meter.cost
    assert not (tmp_path / "cost.json").exists()
    assert cost["pictures"] == 5
    assert list(cost["seconds"]) == ["data", "views", "image_tower", "text_tower", "other"]
    assert all(seconds > 0 for seconds in cost["seconds"].values())
    assert 0.15 <= cost["seconds"]["data"] < 0.5
    assert sum(cost["seconds"].values()) == pytest.approx(recorded_seconds(folder), abs=0.2)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert cost["peak_memory_mb"] == pytest.approx(metrics["peak_memory_mb"], rel=0.1)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "metatpt.callbacks.cost"]
    assert line.startswith("cost of 5 pictures: ")
    assert "image tower" in line


def recorded_seconds(folder: Path) -> float:
    """What the record says that the loops of all processes took."""
    seconds = 0.0
    for file in folder.glob("record-rank*.sqlite"):
        connection = sqlite3.connect(file)
        ((value,),) = connection.execute("SELECT value FROM facts WHERE name = 'seconds'")
        seconds += json.loads(value)
        connection.close()
    return seconds


def test_without_a_record_and_with_fillers(make, tmp_path: Path) -> None:
    pictures = Pictures()
    pictures.batches[1].index[:] = -1
    meter = CostMeter()
    make_trainer(tmp_path / "root", meter, ResetPrompts()).test(make("tpt"), loader(pictures), verbose=False)
    assert json.loads((tmp_path / "root" / "cost.json").read_text())["pictures"] == 2


def test_nothing_is_left_behind(make, tmp_path: Path, clock: Clock) -> None:
    module, profiler = make("second order"), SimpleProfiler(tmp_path, "profile")
    trainer = make_trainer(tmp_path, ResetPrompts(), CostMeter(), profiler=profiler)
    trainer.test(module, loader(), verbose=False)
    assert timing._meter is None
    assert trainer.profiler is profiler
    assert len(profiler.recorded_durations["[_EvaluationLoop].test_next"]) == 2  # it is told as before
    made = clock.made
    assert made > 0
    make_trainer(tmp_path, ResetPrompts()).test(module, loader(), verbose=False)
    assert clock.made == made


def test_two_runs_of_one_meter(make, tmp_path: Path) -> None:
    meter = CostMeter()
    trainer = make_trainer(tmp_path, ResetPrompts(), meter)
    trainer.test(make("tpt"), loader(Pictures((2, 2), lambda: time.sleep(0.2))), verbose=False)
    first = meter.cost
    trainer.validate(make("tpt"), loader(Pictures((1,))), verbose=False)
    assert (first["pictures"], meter.cost["pictures"]) == (4, 1)
    assert first["seconds"]["data"] > 0.4 > meter.cost["seconds"]["data"]


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), SystemExit(143)], ids=["error", "stopped"])
def test_a_run_that_breaks_leaves_nothing(make, tmp_path: Path, error: BaseException) -> None:
    def breaks() -> None:
        raise error

    trainer = make_trainer(tmp_path, ResetPrompts(), CostMeter())
    before = trainer.profiler
    with pytest.raises(type(error)):
        trainer.test(make("tpt"), loader(Pictures(before=breaks)), verbose=False)
    assert timing._meter is None
    assert trainer.profiler is before
    assert not (tmp_path / "cost.json").exists()


def test_fit_is_not_measured(tmp_path: Path) -> None:
    class Trained(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.weight.sum()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert timing._meter is None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = make_trainer(tmp_path, CostMeter(), max_epochs=1)
    trainer.fit(Trained(), loader(), loader())
    assert not (tmp_path / "cost.json").exists()


def test_folder_that_cannot_be_written_is_named(make, tmp_path: Path) -> None:
    (tmp_path / "root" / "cost.json").mkdir(parents=True)
    trainer = make_trainer(tmp_path / "root", ResetPrompts(), CostMeter())
    with pytest.raises(OSError, match=r"Cannot write .*cost\.json"):
        trainer.test(make("tpt"), loader(), verbose=False)


def test_several_processes_sum(tiny_clip_folder: Path, tmp_path: Path) -> None:
    """From YAML; 5 pictures on two processes."""
    config = {
        "model": {"class_path": "TPTModule", "init_args": {"clip": str(tiny_clip_folder), "n_views": 6}},
        "data": {
            "class_path": "FolderDataModule",
            "init_args": {"root": str(write_pictures(tmp_path / "pictures", "cat", n=5)), "num_workers": 0},
        },
        "trainer": {
            "accelerator": "cpu",
            "strategy": "ddp",
            "devices": 2,
            "callbacks": [{"class_path": "metatpt.callbacks.CostMeter"}],
        },
    }
    (tmp_path / "cost.yaml").write_text(yaml.safe_dump(config))
    result = subprocess.run(
        [sys.executable, "-m", "metatpt", "test", "-c", "cost.yaml", "--run", "out"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    cost = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert cost["pictures"] == 5
    assert sum(cost["seconds"].values()) == pytest.approx(recorded_seconds(tmp_path / "out"), rel=0.2)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert cost["peak_memory_mb"] == pytest.approx(metrics["peak_memory_mb"], rel=0.1)
    assert result.stderr.count("cost of 5 pictures: ") == 1
