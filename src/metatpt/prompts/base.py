"""The interface of what is tuned. A method knows no learner by name."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metatpt.class_paths import class_path
from metatpt.clip import FrozenCLIP
from metatpt.clip.blocks import IDENTITY, BlockHook
from metatpt.timing import timed
from metatpt.types import State

Head = Callable[[Tensor], Tensor]
"""Logits ``[B, V, C]`` of encoded views ``[B, V, D]``, under one state."""

Compute = Callable[[State, int], Tensor]
"""Class features ``[1, U, D]`` for the values of one sample, of so many whose graphs are held at once."""


Part = Literal["text", "visual", "both"]
"""Of the text tower's prompt, of the image tower's, or of both."""


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

    Its parameters (:meth:`learn`) have no sample dimension: they are what training learns and a checkpoint holds. A
    *state* is a copy of them for each of B samples, ``{name: [B, ...]}``: what a test-time method tunes. It may be a
    part of them (:meth:`choose_part`); the others are then used as they are.

    A learner writes :meth:`head`, and where it changes how pictures are encoded :meth:`image_hook`. Its options are the
    arguments of its constructor behind `clip`, `class_names` and `template`.

    Args:
        clip: The frozen model.
        column: ``[C]``: the row of each class among the different prompts.
    """

    column: Tensor
    options: dict[str, Any]
    """What the constructor was given, or its defaults, but for `clip`, `class_names` and `template`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the options, before a constructor can change them."""
        learner = super().__new__(cls)
        given = inspect.signature(cls.__init__).bind_partial(learner, *args, **kwargs)
        given.apply_defaults()
        options = {**given.arguments, **given.arguments.get("kwargs", {})}
        not_options = ("self", "clip", "class_names", "template", "templates", "args", "kwargs")
        learner.__dict__["options"] = {name: value for name, value in options.items() if name not in not_options}
        return learner

    def __init__(self, clip: FrozenCLIP, column: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("column", column, persistent=False)
        self.tuned = TunedParameters()
        self._parts: dict[str, Part] = {}
        self._sees_pixels: set[str] = set()
        self._sees_classes: set[str] = set()
        self._part: Part = "both"
        self.graphs_held = 1
        """How many graphs of the prompt and of each view a sample holds at once: memory is shared among them."""
        self._kept: _Kept | None = None
        self._spread: tuple[list[tuple[int, int]], dict[str, float]] | None = None

    # Parameters and states

    def learn(
        self,
        name: str,
        value: Tensor,
        part: Part = "text",
        reaches_pixels: bool | None = None,
        reaches_classes: bool | None = None,
    ) -> None:
        """Make `value` a parameter.

        Args:
            name: Its name in states and checkpoints.
            value: Where it starts.
            part: Whose it is: of the text tower's prompt, of the image tower's, or shared by both.
            reaches_pixels: Whether it changes how pictures are encoded; by default all but those of the text do.
            reaches_classes: Whether it changes class features; by default all but the visual ones do.
        """
        self.tuned[name] = nn.Parameter(value.detach().clone())
        self._parts[name] = part
        if part != "text" if reaches_pixels is None else reaches_pixels:
            self._sees_pixels.add(name)
        if part != "visual" if reaches_classes is None else reaches_classes:
            self._sees_classes.add(name)

    @property
    def config(self) -> dict[str, Any]:
        """The class and its options, as a config has them: what a checkpoint needs to make the learner again."""
        return {"class_path": class_path(type(self)), "init_args": dict(self.options)}

    def choose_part(self, part: Part) -> None:
        """Say what of the parameters a state holds; what both towers share is only in both.

        Raises:
            ValueError: The learner has nothing of that part.
        """
        if part != "both" and part not in self._parts.values():
            has = ", ".join(sorted({each for each in self._parts.values()}))
            raise ValueError(f"{type(self).__name__} has no {part} part to tune, only {has or 'nothing'}")
        self._part = part

    @property
    def state_names(self) -> list[str]:
        """The parameters that a state holds."""
        return [name for name, part in self._parts.items() if self._part in ("both", part)]

    @property
    def reaches_pixels(self) -> bool:
        """Whether a state changes how pictures are encoded: features then hold for one state only."""
        return not self._sees_pixels.isdisjoint(self.state_names)

    @property
    def encoded_names(self) -> list[str]:
        """The parameters of a state that do nothing but change how pictures are encoded."""
        return [name for name in self.state_names if name in self._sees_pixels - self._sees_classes]

    def initial_state(self, batch_size: int) -> State:
        """The parameters, repeated for each sample."""
        return {name: self._repeated(name, batch_size).detach() for name in self.state_names}

    def live_state(self, batch_size: int) -> State:
        """All parameters, repeated for each sample, with their graph: what training differentiates."""
        return {name: self._repeated(name, batch_size) for name in self.tuned}

    def values(self, state: State | None) -> State:
        """All parameters under a state: its own ``[B, ...]``, the others ``[1, ...]`` without a graph."""
        return {name: self.tuned[name].detach()[None] for name in self.tuned} | (state or {})

    def _repeated(self, name: str, batch_size: int) -> Tensor:
        value: Tensor = self.tuned[name]
        return value.expand(batch_size, *value.shape)

    def spread(self) -> dict[str, float]:
        """Standard deviation of each parameter's entries (0 for one): what a relative learning rate is relative to."""
        versions = self._versions(list(self._parts))
        if self._spread is None or self._spread[0] != versions:  # read from the device once, not for every batch
            several = {name: value.detach().double() for name, value in self.tuned.items() if value.numel() > 1}
            found = {name: float(value.std()) for name, value in several.items()}
            self._spread = versions, found
        return {name: self._spread[1].get(name, 0.0) for name in self.tuned}

    # Pictures

    def image_hook(self, values: State) -> BlockHook:
        """What the prompt changes inside the image tower; by default nothing.

        Args:
            values: All parameters of one sample, ``[1, ...]`` each.
        """
        return IDENTITY

    def encode(self, views: Tensor, state: State | None = None, together: bool = False) -> Tensor:
        """Features of views.

        Args:
            views: ``[B, V, 3, R, R]`` in [0, 1].
            state: Of B samples; None for the initial one.
            together: Encode all samples at once under the initial state, which is quicker for a view or two of each.
                How their features are rounded then depends on B: not for what a prompt is tuned on.

        Returns:
            ``[B, V, D]`` of unit length.
        """
        if together:
            hook = self.image_hook(self.values(None))
            return self._features(views.flatten(0, 1), hook, 1).reshape(*views.shape[:2], -1)
        return torch.stack(self.encode_each(list(views), state))

    def encode_each(self, views: Sequence[Tensor], state: State | None = None, graphs: int = 1) -> list[Tensor]:
        """The same for samples with different numbers of views, ``[V, 3, R, R]`` each.

        `graphs` says how many graphs of such views each sample holds at once until the backward pass.

        Sample by sample, so that rounding does not depend on the batch size: tuning multiplies a difference of 1e-7
        in a gradient by 1e5 within a few steps. The views of one sample are many enough to fill a device.
        """
        hooks = self._hooks(len(views), state)
        held = graphs * len(views) * self.graphs_held
        return [self._features(each, hook, held) for each, hook in zip(views, hooks, strict=True)]

    def _hooks(self, size: int, state: State | None) -> list[BlockHook]:
        """The hook of each sample; one for all where the state does not reach the pixels."""
        if state is None or self._sees_pixels.isdisjoint(state):
            return [self.image_hook(self.values(None))] * size
        return [self.image_hook(self.values(sample)) for sample in _samples(state)]

    def _features(self, images: Tensor, hook: BlockHook, held: int) -> Tensor:
        """Features ``[N, D]`` of pictures, of unit length; several of a picture stand side by side in them."""
        features = self.clip.encode_image(images, hook=hook, held=held)
        return features if features.ndim == 2 else features.flatten(1) / math.sqrt(features.shape[1])

    # Classes

    @abstractmethod
    def head(self, state: State | None = None) -> Head:
        """What turns encoded views into logits.

        Args:
            state: Of B samples; None for the initial state, whose class features are computed once and kept.
        """

    def class_features(self, state: State | None, compute: Compute, keep: bool = True) -> Tensor:
        """Class features under a state, each computed once.

        Those of the initial state are computed once for all samples, for the parameters, device and precision at hand;
        and so is their graph, through which each sample then sends its own gradient.

        Args:
            state: Of B samples; None for the initial one.
            compute: Gives ``[1, U, D]`` for all parameters of one sample.
            keep: Whether memory allows to keep the graph; else it is made for each batch.

        Returns:
            ``[B, U, D]`` (B = 1 for the initial state).
        """
        moved = {name: value for name, value in (state or {}).items() if name in self._sees_classes}
        if moved and not self._is_initial(moved):
            # Sample by sample, as views are encoded, and for the same reason.
            size = len(next(iter(moved.values()))) * self.graphs_held
            return torch.cat([compute(self.values(sample), size) for sample in _samples(moved)])
        graph = bool(moved) and torch.is_grad_enabled()
        inference = torch.is_inference_mode_enabled()
        names = tuple(moved) if graph else ()
        device, precision = self.column.device, (self.clip.dtype, self.clip.autocast_dtype)
        seen = [name for name in self.tuned if name in self._sees_classes]
        key = (device, *precision, inference, self.training, self._versions(seen))
        with_graph = graph and keep
        if self._kept is None or self._kept.key != key or (graph and self._kept.names != names) or (
            with_graph and not self._kept.features.requires_grad
        ):  # fmt: skip
            leaves = {name: self.tuned[name].detach()[None].requires_grad_() for name in names}
            values = self.values(leaves)
            with torch.set_grad_enabled(with_graph):
                self._kept = _Kept(key, names, leaves, lambda: compute(values, 1), compute(values, 1))
        if not graph:
            return self._kept.features.detach()
        return _FromInitial.apply(self._kept, *moved.values())  # type: ignore[no-any-return]

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What supervised training descends: cross-entropy, to which a learner may add its own regularisers.

        Args:
            images: ``[N, 3, R, R]`` in [0, 1].
            labels: ``[N]`` int64.

        Returns:
            The mean loss, and logits ``[N, C]``.
        """
        state = self.live_state(1)
        logits = self.head(state)(self.encode(images[None], state))[0]
        return F.cross_entropy(logits, labels), logits

    def trained_on(self, class_names: Sequence[str]) -> None:
        """Told when parameters that were trained on these classes are loaded; by default any classes will do.

        Raises:
            ValueError: They hold for those classes only.
        """

    def release(self) -> None:
        """Let go of what is kept for the initial state; it is computed again when it is needed."""
        self._kept = self._spread = None

    def _versions(self, names: Sequence[str]) -> list[tuple[int, int]]:
        return [(self.tuned[name].data_ptr(), self.tuned[name]._version) for name in names]

    def _is_initial(self, state: State) -> bool:
        """Whether a state is what :meth:`initial_state` gave: a view of the parameters. Its values are not read."""
        return all(
            value.grad_fn is None
            and value.untyped_storage().data_ptr() == self.tuned[name].untyped_storage().data_ptr()
            for name, value in state.items()
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept: a graph can be neither copied nor pickled."""
        return {**self.__dict__, "_kept": None}


@dataclass(frozen=True)
class _Kept:
    """What is computed once for the initial state.

    Attributes:
        key: What it holds for.
        names: Of the state's values.
        leaves: These, ``[1, ...]`` each.
        compute: Gives the class features of the leaves.
        features: These, ``[1, U, D]``; with their graph where that is kept.
    """

    key: object
    names: tuple[str, ...]
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


def _samples(state: State) -> Iterator[State]:
    """The state of each sample, ``[1, ...]``."""
    for row in range(len(next(iter(state.values())))):
        yield {name: value[row : row + 1] for name, value in state.items()}


def plain_names(class_names: Sequence[str]) -> list[str]:
    """Class names as prompts have them, by which two lists of classes are compared: underscores are spaces."""
    return [name.replace("_", " ") for name in class_names]


def class_head(class_features: Tensor, scale: float, column: Tensor) -> Head:
    """Cosine logits: class features ``[U, D]`` or ``[B, U, D]``, of which class c has row ``column[c]``.

    Equal prompts share a row and so tie to the last bit, whatever the batch size and device.
    """

    def logits(features: Tensor) -> Tensor:
        # A product per sample, so that its rounding does not depend on the batch size; never in autocast's precision.
        with torch.autocast(features.device.type, enabled=False):
            return (scale * features @ class_features.expand(len(features), -1, -1).mT)[..., column]

    return logits
