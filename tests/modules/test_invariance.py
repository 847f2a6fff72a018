"""Predictions of the bundled model on the bundled benchmark depend on no other sample, and on no front end."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from metatpt import Classifier
from metatpt.callbacks import ResetPrompts
from metatpt.cli import main
from metatpt.datamodules import ShiftedShapesDataModule
from metatpt.modules import AdaptationModule, MetaTPTModule, TPTModule, ViewAverageModule, ZeroShotModule


def probabilities(module: AdaptationModule, batch_size: int, num_workers: int = 0) -> torch.Tensor:
    data = ShiftedShapesDataModule(batch_size=batch_size, num_workers=num_workers, max_samples=8)
    data.preprocessing = module.preprocessing
    data.setup("test")
    return torch.cat([module.process(batch).log_probs for batch in data.test_dataloader()]).exp()


@pytest.mark.parametrize(
    ("kind", "options", "threads"),
    [
        (ViewAverageModule, {}, 1),
        (TPTModule, {"outer_lr": None, "outer_lr_relative": 0.5, "outer_steps": 4}, 1),
        (MetaTPTModule, {}, 1),
        (MetaTPTModule, {}, 2),
        (MetaTPTModule, {"schedule": "nested", "order": "second", "outer_steps": 3}, 1),
        (MetaTPTModule, {"outer_optimizer": "normalised_sgd"}, 1),
    ],
    ids=str,
)
def test_batch_size(kind: type[AdaptationModule], options: dict[str, Any], threads: int) -> None:
    names = ShiftedShapesDataModule().class_names
    module = kind(class_names=names, n_views=12, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = probabilities(module, 1)
        for size in (3, 8):
            torch.testing.assert_close(probabilities(module, size), alone, atol=1e-5, rtol=0)
    finally:
        torch.set_num_threads(before)


def test_an_earlier_run_in_another_precision_leaves_nothing() -> None:
    """Class features are kept, but not from one precision to another."""

    def low(module: AdaptationModule) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return probabilities(module, 8)

    names = ShiftedShapesDataModule().class_names
    used = ZeroShotModule(class_names=names)
    probabilities(used, 8)
    assert torch.equal(low(used), low(ZeroShotModule(class_names=names)))


def test_workers() -> None:
    module = MetaTPTModule(class_names=ShiftedShapesDataModule().class_names, n_views=8, outer_steps=2)
    torch.testing.assert_close(probabilities(module, 4, 2), probabilities(module, 4), atol=1e-6, rtol=0)


def test_the_classifier_gives_the_numbers_of_the_command_line(tmp_path: Path) -> None:
    data = ShiftedShapesDataModule(max_samples=6)
    pictures = data.pictures("test")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        pictures[number * 5].source.save(folder / f"{number}.png")
    names = ",".join(data.class_names)
    options = ["--model.n_views", "8", "--model.outer_steps", "2", "--run", str(tmp_path / "run")]
    source = ["--data", "FolderDataModule", "--data.root", str(folder), "--data.class_names", names]
    assert main(["predict", *source, "--trainer.accelerator", "cpu", *options]) == 0
    rows = list(csv.DictReader((tmp_path / "run" / "predictions.csv").open()))
    classify = Classifier(data.class_names, n_views=8, outer_steps=2, device="cpu", batch_size=4)
    result = classify(sorted(folder.iterdir()))
    assert [row["prediction"] for row in rows] == result.labels
    for row, adapted, zero_shot in zip(rows, result.probabilities, result.zero_shot_probabilities, strict=True):
        assert float(row["probability"]) == pytest.approx(float(adapted.max()), abs=1e-5)
        assert float(row["zero_shot_probability"]) == pytest.approx(float(zero_shot.max()), abs=1e-5)


@cache
def predictions(kind: type[AdaptationModule], precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted classes, and what adapting has changed."""
    data = ShiftedShapesDataModule(shift="none", max_samples=24)
    options = {} if kind is ZeroShotModule else {"n_views": 4, "selection": 1.0}
    module = kind(class_names=data.class_names, **options)
    trainer = lightning.Trainer(
        precision=precision, inference_mode=False, use_distributed_sampler=False, logger=False, accelerator="cpu",
        callbacks=[ResetPrompts()], enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    results = trainer.predict(module, datamodule=data)
    assert results is not None
    log_probs = torch.cat([result.log_probs for result in results])
    return log_probs.argmax(-1), log_probs - torch.cat([result.zero_shot_log_probs for result in results])


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("kind", [ZeroShotModule, TPTModule, MetaTPTModule])
def test_towers_in_low_precision(kind: type[AdaptationModule], precision: str) -> None:
    (top1, change), (exact_top1, exact_change) = predictions(kind, precision), predictions(kind, "32-true")
    assert (top1 == exact_top1).float().mean() >= 0.95
    if kind is not ZeroShotModule:  # all views are selected, so that rounding changes no choice: what adapting does
        assert exact_change.abs().max() > 0.1
        similar = torch.nn.functional.cosine_similarity(change, exact_change, dim=-1)
        assert similar.min() > 0.8
