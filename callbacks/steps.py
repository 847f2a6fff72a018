"""What callbacks share that follow `validate`, `test` and `predict` batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from metatpt.types import Adaptation, Batch

STAGES = (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING)
"""What leaves a record; the validation within `fit` does not."""

C = TypeVar("C", bound=Callback)
T = TypeVar("T")


def find_callback(trainer: Trainer, kind: type[C]) -> C | None:
    """The first of the trainer's callbacks that is a `kind`, if there is any."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def read_step(callback: Callback, pl_module: LightningModule, outputs: Any, batch: Any) -> tuple[Batch, Adaptation]:
    """What a step was given and what it made of it.

    Args:
        callback: Who asks.
        pl_module: Whose step it was.
        outputs: An adaptation, as `predict_step` returns it, or ``{"adaptation": ...}``, as the other steps do.
        batch: What the dataloader has yielded.

    Raises:
        TypeError: They are something else.
    """
    asks = type(callback).__name__
    adaptation = outputs.get("adaptation") if isinstance(outputs, dict) else outputs
    if not isinstance(adaptation, Adaptation):
        raise TypeError(
            f"{asks} expected an Adaptation from predict_step, or {{'adaptation': Adaptation}} from validation_step "
            f"and test_step, of {type(pl_module).__name__}, got {type(outputs).__name__}."
        )
    if not isinstance(batch, Batch):
        raise TypeError(f"{asks} expected the dataloader to yield metatpt.types.Batch, got {type(batch).__name__}.")
    return batch, adaptation


def on_rank_zero(trainer: Trainer, function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, on all ranks; its error too, so that none waits for a rank that has failed."""
    result: T | Exception | None = None
    if trainer.is_global_zero:
        try:
            result = function()
        except Exception as error:
            result = error
    result = trainer.strategy.broadcast(result)
    if isinstance(result, Exception):
        raise result
    assert result is not None
    return result


def raise_together(trainer: Trainer, error: Exception | None) -> None:
    """Raises on all ranks where one has failed, so that none waits for it.

    Args:
        trainer: The trainer.
        error: What this rank has met, if it has failed.

    Raises:
        Exception: `error`.
        RuntimeError: Another rank has failed, and says why.
    """
    failed = torch.tensor(float(error is not None), device=trainer.strategy.root_device)
    n_failed = int(trainer.strategy.reduce(failed, reduce_op="sum"))
    if error is not None:
        raise error
    if n_failed:
        raise RuntimeError(f"{n_failed} of {trainer.world_size} processes could not start; each says why.")
