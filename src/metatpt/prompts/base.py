"""The interface of what is tuned. A method knows no learner by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metatpt.clip import FrozenCLIP
from metatpt.timing import timed
from metatpt.types import State

Head = Callable[[Tensor], Tensor]
"""Logits ``[B, V, C]`` of encoded views ``[B, V, D]``, under one state."""

Compute = Callable[[State, int], Tensor]
"""Class features ``[1, U, D]`` under the state of one sample, of so many whose graphs are held at once."""


class TunedParameters(nn.ParameterDict):
    """Parameters that stay in float32 (or float64) whatever precision the towers are cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_precision(tensor: Tensor) -> Tensor:
            target = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            dtype = target.dtype if target.dtype == torch.float64 else torch.float32
            return tensor.to(target.device, dtype)

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]


class PromptLearner(nn.Module, ABC):
    """A prompt over a frozen CLIP.

    Its parameters have no sample dimension: they are what training learns and a checkpoint holds. A *state* is a copy
    of them for each of B samples, ``{name: [B, ...]}``: what a test-time method tunes.

    Args:
        clip: The frozen model.
        column: ``[C]``: the row of each class among the different prompts.
    """

    column: Tensor
    reaches_pixels: bool = False
    """Whether a state changes how pictures are encoded."""

    def __init__(self, clip: FrozenCLIP, column: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("column", column, persistent=False)
        self.tuned = TunedParameters()
        self._kept: _Kept | None = None
        self._spread: tuple[list[tuple[int, int]], dict[str, float]] | None = None

    def initial_state(self, batch_size: int) -> State:
        """The parameters, repeated for each sample."""
        return {name: value.detach().expand(batch_size, *value.shape) for name, value in self.tuned.items()}

    def spread(self) -> dict[str, float]:
        """Standard deviation of each parameter's entries: what a relative learning rate is relative to."""
        versions = self._versions()
        if self._spread is None or self._spread[0] != versions:  # read from the device once, not for every batch
            found = {name: float(value.detach().double().std()) for name, value in self.tuned.items()}
            self._spread = versions, found
        return dict(self._spread[1])

    def encode(self, views: Tensor, state: State | None = None, together: bool = False) -> Tensor:
        """Features of views.

        Args:
            views: ``[B, V, 3, R, R]`` in [0, 1].
            state: Of B samples; None for the initial one. Only a learner that reaches the pixels looks at it.
            together: Encode all samples at once, which is quicker for a view or two of each. How their features are
                rounded then depends on B: not for what a prompt is tuned on.

        Returns:
            ``[B, V, D]`` of unit length.
        """
        if together:
            return self.clip.encode_image(views.flatten(0, 1)).reshape(*views.shape[:2], -1)
        return torch.stack(self.encode_each(list(views), state))

    def encode_each(self, views: Sequence[Tensor], state: State | None = None, graphs: int = 1) -> list[Tensor]:
        """The same for samples with different numbers of views, ``[V, 3, R, R]`` each.

        `graphs` says how many graphs of such views each sample holds at once until the backward pass.

        Sample by sample, so that rounding does not depend on the batch size: tuning multiplies a difference of 1e-7
        in a gradient by 1e5 within a few steps. The views of one sample are many enough to fill a device.
        """
        return [self.clip.encode_image(each, held=graphs * len(views)) for each in views]

    def class_features(self, state: State | None, compute: Compute, keep: bool = True) -> Tensor:
        """Class features under a state, each computed once.

        Those of the initial state are computed once for all samples, for the parameters, device and precision at hand;
        and so is their graph, through which each sample then sends its own gradient.

        Args:
            state: Of B samples; None for the initial one.
            compute: Gives ``[1, U, D]`` for the state of one sample.
            keep: Whether memory allows to keep the graph; else it is made for each batch.

        Returns:
            ``[B, U, D]`` (B = 1 for the initial state).
        """
        if state is not None and not self._is_initial(state):
            # Sample by sample, as views are encoded, and for the same reason.
            size = len(next(iter(state.values())))
            samples = ({name: value[row : row + 1] for name, value in state.items()} for row in range(size))
            return torch.cat([compute(sample, size) for sample in samples])
        graph = state is not None and torch.is_grad_enabled()
        inference = torch.is_inference_mode_enabled()
        key = (self.column.device, self.clip.dtype, self.clip.autocast_dtype, inference, self._versions())
        with_graph = graph and keep
        if self._kept is None or self._kept.key != key or (with_graph and not self._kept.features.requires_grad):
            leaves = {name: value.detach()[None].requires_grad_() for name, value in self.tuned.items()}
            with torch.set_grad_enabled(with_graph):
                self._kept = _Kept(key, leaves, lambda: compute(leaves, 1), compute(leaves, 1))
        if not graph:
            return self._kept.features.detach()
        assert state is not None
        return _FromInitial.apply(self._kept, *(state[name] for name in self.tuned))  # type: ignore[no-any-return]

    def release(self) -> None:
        """Let go of what is kept for the initial state; it is computed again when it is needed."""
        self._kept = None

    def _versions(self) -> list[tuple[int, int]]:
        return [(value.data_ptr(), value._version) for value in self.tuned.values()]

    def _is_initial(self, state: State) -> bool:
        """Whether a state is what :meth:`initial_state` gave: a view of the parameters. Its values are not read."""
        return all(
            value.untyped_storage().data_ptr() == self.tuned[name].untyped_storage().data_ptr()
            for name, value in state.items()
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept: a graph can be neither copied nor pickled."""
        return {**self.__dict__, "_kept": None}

    @abstractmethod
    def head(self, state: State | None = None) -> Head:
        """What turns encoded views into logits.

        Args:
            state: Of B samples; None for the initial state, whose class features are computed once and kept.
        """


@dataclass(frozen=True)
class _Kept:
    """What is computed once for the initial state.

    Attributes:
        key: What it holds for.
        leaves: The state's values, ``[1, ...]`` each.
        compute: Gives the class features of the leaves.
        features: These, ``[1, U, D]``; with their graph where that is kept.
    """

    key: object
    leaves: State
    compute: Callable[[], Tensor]
    features: Tensor


class _FromInitial(torch.autograd.Function):
    """The initial class features as functions of B samples' states, which all have the initial values.

    The forward pass is done already; the backward pass sends each sample's gradient through the one graph.
    """

    @staticmethod
    def forward(ctx: Any, kept: _Kept, *state: Tensor) -> Tensor:
        ctx.kept = kept
        return kept.features.detach().expand(len(state[0]), -1, -1).clone()

    @staticmethod
    @once_differentiable
    @timed("text_tower")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept: _Kept = ctx.kept
        features, leaves = kept.features, list(kept.leaves.values())
        if not features.requires_grad:
            with torch.enable_grad():
                features = kept.compute()
        each = [torch.autograd.grad(features, leaves, sample, retain_graph=True) for sample in gradient.split(1)]
        return None, *(torch.cat(of_samples) for of_samples in zip(*each, strict=True))


def class_head(class_features: Tensor, scale: float, column: Tensor) -> Head:
    """Cosine logits: class features ``[U, D]`` or ``[B, U, D]``, of which class c has row ``column[c]``.

    Equal prompts share a row and so tie to the last bit, whatever the batch size and device.
    """

    def logits(features: Tensor) -> Tensor:
        # A product per sample, so that its rounding does not depend on the batch size; never in autocast's precision.
        with torch.autocast(features.device.type, enabled=False):
            return (scale * features @ class_features.expand(len(features), -1, -1).mT)[..., column]

    return logits
