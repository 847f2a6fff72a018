"""Run folders without a model: predictions are random, and favour the label."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from metatpt.results import Record, export, make_rows
from metatpt.results.rows import Row
from metatpt.types import Adaptation, Batch


def make_samples(
    n: int,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    labelled: bool = True,
    averaged: bool = True,
    skipped: Collection[int] = (),
    path: str = "{}.png",
) -> list[Row]:
    """Rows of n samples; those of an index are the same however many there are."""
    rows: list[Row] = []
    for index in range(n):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        label = index % len(class_names)
        logits = 2 * torch.randn(3, 1, len(class_names), generator=generator)
        logits[:, 0, label] += torch.tensor([4.0, 3.0, 2.0])
        adapted, mean, zero_shot = logits.log_softmax(-1)
        batch = Batch(
            image=torch.zeros(1, 3, 2, 2),
            canvas=torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
            aspect=torch.ones(1),
            label=torch.tensor([label if labelled else -1]),
            index=torch.tensor([index]),
            path=[path.format(index)],
            error=["truncated <file>" if index in skipped else None],
        )
        made = make_rows(batch, Adaptation(adapted, zero_shot, mean if averaged else None), class_names)
        rows += [row | {"milliseconds": None if index in skipped else 50.0 + index} for row in made]
    return rows


def write_run(
    folder: Path,
    rows: Sequence[Row],
    class_names: Sequence[str],
    *,
    complete: bool = True,
    config: str = "",
    **setup: Any,
) -> Path:
    """A run folder that holds these rows."""
    folder.mkdir(parents=True)
    known = {"stage": "test", "method": "MetaTPTModule", "data": "PetsDataModule", "split": None}
    content = {
        **known,
        "class_names": list(class_names),
        "sessions": [{"started": "2026-01-02T03:04:05+00:00"}],
        **setup,
    }
    (folder / "setup.json").write_text(json.dumps(content))
    if config:
        (folder / "config.yaml").write_text(config)
    record = Record(folder)
    record.append(rows)
    record.note(n_total=2 * len(rows), n_classes=len(class_names))
    if complete:
        record.note(session=1, seconds=4.0, n_predicted=len(rows), peak_memory_mb=1234.0)
    record.close()
    if complete:
        export(folder)
    return folder
