"""What crosses folders: a batch of pictures, what a method makes of it, and the preprocessing between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Everything that is tuned, one row per sample: a dictionary of tensors ``[B, ...]``."""

Status = Literal["ok", "skipped", "kept_zero_shot"]


@dataclass(frozen=True)
class Preprocessing:
    """How pixels of a picture become the input of an image tower; it belongs to the weights.

    Attributes:
        size: Side R of the square input, in pixels.
        mean: Subtracted from pixels in [0, 1], per channel.
        std: Divided by, per channel.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize_mode: ``"shortest"`` (shorter side to R, centre crop), ``"longest"`` (longer side to R, pad) or
            ``"squash"`` (both sides to R, aspect ratio lost).
        fill_color: Grey level in [0, 255] that pads where ``resize_mode`` is ``"longest"``.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0


class Batch:
    """B pictures on their way to a method.

    A plain class on purpose: Lightning moves it to the device (it has :meth:`to`) and pins it (:meth:`pin_memory`),
    but leaves its dtypes alone under ``--trainer.precision bf16-true``, where it casts every tensor that it finds in a
    dictionary or dataclass; an aspect ratio in bfloat16 would be off by up to 0.4 %.

    Attributes:
        image: ``[B, 3, R, R]`` float32 in [0, 1]: view 0, the model's own preprocessing before normalisation.
        canvas: ``[B, 3, S, S]`` uint8: the whole upright picture resized to S x S, from which views are warped.
        aspect: ``[B]`` float32: width / height of the original.
        label: ``[B]`` int64: class index, -1 where unknown.
        index: ``[B]`` int64: the sample's number in its split; -1 for a filler row that nothing counts.
        path: Where each picture came from.
        error: Why a picture could not be read, or None. Such a row has zeros for pixels.
        epoch: ``[B]`` int64: the epoch of training that a picture is met in, which seeds its randomness together with
            its index; 0 outside training, and where it is not given.
    """

    def __init__(
        self,
        image: Tensor,
        canvas: Tensor,
        aspect: Tensor,
        label: Tensor,
        index: Tensor,
        path: list[str],
        error: list[str | None],
        epoch: Tensor | None = None,
    ) -> None:
        self.image = image
        self.canvas = canvas
        self.aspect = aspect
        self.label = label
        self.index = index
        self.path = path
        self.error = error
        self.epoch = torch.zeros_like(index) if epoch is None else epoch

    def __len__(self) -> int:
        return len(self.path)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; a copy to a GPU does not wait."""
        non_blocking = torch.device(device).type == "cuda"  # the other way round it would hand out unwritten memory
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return self._map(Tensor.pin_memory)

    def select(self, rows: list[int]) -> Batch:
        """The batch of the given rows, in that order."""
        picked = self._map(lambda tensor: tensor[rows])
        picked.path = [self.path[row] for row in rows]
        picked.error = [self.error[row] for row in rows]
        return picked

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            image=function(self.image),
            canvas=function(self.canvas),
            aspect=function(self.aspect),
            label=function(self.label),
            index=function(self.index),
            path=self.path,
            error=self.error,
            epoch=function(self.epoch),
        )


@dataclass
class Adaptation:
    """What a method returns for a batch.

    Attributes:
        log_probs: ``[B, C]`` float32, after adaptation.
        zero_shot_log_probs: ``[B, C]`` float32, of the original view at the initial prompt.
        averaged_log_probs: ``[B, C]`` float32, of the confident views averaged at the initial prompt (the control
            that costs nothing more), or None for a method without views.
        views: ``[B, K, 3, R, R]`` in [0, 1]: the selected views as they ended, where they were asked for.
        diagnostics: Per-sample figures by name, each ``[B]`` float32 (entropies, view statistics, ...).
        status: What became of each sample. A method need not set it: the base module does, also where `log_probs`
            are not finite.
        reason: Why a status is not "ok", else "".
    """

    log_probs: Tensor
    zero_shot_log_probs: Tensor
    averaged_log_probs: Tensor | None = None
    views: Tensor | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    status: list[Status] = field(default_factory=list)
    reason: list[str] = field(default_factory=list)
