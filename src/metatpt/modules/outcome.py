"""What becomes of each sample of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metatpt.types import Adaptation, Batch


def settle(result: Adaptation) -> Adaptation:
    """Give every sample a status; one that is not finite keeps its zero-shot prediction. All figures are float32."""
    size = len(result.log_probs)
    result.log_probs, result.zero_shot_log_probs = result.log_probs.float(), result.zero_shot_log_probs.float()
    if result.averaged_log_probs is not None:
        result.averaged_log_probs = result.averaged_log_probs.float()
    result.diagnostics = {name: values.detach().float() for name, values in result.diagnostics.items()}
    result.status, result.reason = result.status or ["ok"] * size, result.reason or [""] * size
    broken = result.log_probs.isnan().any(-1)
    blind = result.zero_shot_log_probs.isnan().any(-1)
    if bool((broken | blind).any()):
        result.log_probs = torch.where(broken[:, None], result.zero_shot_log_probs, result.log_probs)
        for row in range(size):
            if bool(blind[row]):
                result.status[row], result.reason[row] = "skipped", "the model's output is not finite (NaN)"
            elif bool(broken[row]):
                result.status[row], result.reason[row] = "kept_zero_shot", "loss or gradient not finite (NaN)"
    return result


def spread(result: Adaptation, rows: list[int], batch: Batch) -> Adaptation:
    """Put the results of some rows of a batch back to their places."""

    def place(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        full = values.new_full((len(batch), *values.shape[1:]), torch.nan)
        full[rows] = values
        return full

    status: list[Any] = ["skipped"] * len(batch)
    reason = [error or "filler" for error in batch.error]
    for row, (its_status, its_reason) in zip(rows, zip(result.status, result.reason, strict=True), strict=True):
        status[row], reason[row] = its_status, its_reason
    adapted, zero_shot = place(result.log_probs), place(result.zero_shot_log_probs)
    assert adapted is not None
    assert zero_shot is not None
    figures: Mapping[str, Tensor | None] = {name: place(values) for name, values in result.diagnostics.items()}
    return Adaptation(
        log_probs=adapted,
        zero_shot_log_probs=zero_shot,
        averaged_log_probs=place(result.averaged_log_probs),
        views=place(result.views),
        diagnostics={name: values for name, values in figures.items() if values is not None},
        status=status,
        reason=reason,
    )
