"""What methods share that look at a picture from several views."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from metatpt.functional import entropy, entropy_weighted_mean, select_confident, take_views
from metatpt.timing import timed
from metatpt.types import Adaptation, Batch, State
from metatpt.views import N_PARAMETERS, ViewBounds, affine, bounded, sample_views, warp
from metatpt.views.sampling import Init
from metatpt.views.warp import Padding

from .base import AdaptationModule
from .checks import check_choice, check_number


@dataclass
class Look:
    """The views of B pictures, encoded at the initial prompt, and the confident ones (S) among them.

    Attributes:
        features: ``[B, V, D]``; view 0 is the original.
        log_probs: ``[B, V, C]`` at the initial prompt.
        chosen: ``[B, K]``: the views of S.
        original: ``[B, K]`` bool: which of S is the original.
        raw: ``[B, K, 6]`` unbounded parameters of S, zeros for the original; None for views that were given.
        flip: ``[B, K]`` bool, likewise.
        pixels: ``[B, 1, 3, R, R]``: the original, where a prompt is tuned that reaches the pixels.
        seen: ``[B, K, 3, R, R]``: the views of S, likewise, or where they were given.
    """

    features: Tensor
    log_probs: Tensor
    chosen: Tensor
    original: Tensor
    raw: Tensor | None
    flip: Tensor | None
    pixels: Tensor | None
    seen: Tensor | None

    @cached_property
    def still(self) -> list[int | None]:
        """For each picture the original's place in S, if it is there: the view that never moves. Read once."""
        return [row.index(True) if True in row else None for row in self.original.tolist()]

    @property
    def counted(self) -> Tensor:
        """``[B, 1 + K]`` bool: the original, and S without it: the original counts once."""
        return torch.cat([torch.ones_like(self.original[:, :1]), ~self.original], dim=1)


class ViewModule(AdaptationModule):
    """Base of methods with views.

    Args:
        n_views: Number of views, the original included.
        selection: Share of the views that are confident (of lowest entropy): at least one is kept.
        init: Where views start: ``crop`` (random resized crops with flips) or ``affine`` (drawn within the bounds).
        bounds: How far a view may go; those of :class:`ViewBounds` by default.
        spread: Of ``init: affine``: the share of its bound within which each parameter is drawn.
        padding: What lies outside of the picture.
        ensemble_temperature: In nats: in an ensemble a view's weight is softmax(-entropy / temperature).
        **kwargs: See :class:`AdaptationModule`.
    """

    def __init__(
        self,
        n_views: int = 64,
        selection: float = 0.1,
        init: Init = "crop",
        bounds: ViewBounds | None = None,
        spread: float = 0.5,
        padding: Padding = "reflection",
        ensemble_temperature: float = 0.3,
        **kwargs: Any,
    ) -> None:
        check_number("n_views", n_views, 1)
        check_number("selection", selection, 0, 1, open_low=True)
        check_number("spread", spread, 0, 0.9, open_low=True)
        check_number("ensemble_temperature", ensemble_temperature, 0, open_low=True)
        check_choice("init", init, get_args(Init))
        check_choice("padding", padding, get_args(Padding))
        super().__init__(**kwargs)
        self.n_views = n_views
        self.selection = selection
        self.init: Init = init
        # A checkpoint holds them as a dictionary.
        self.bounds = ViewBounds(**bounds) if isinstance(bounds, dict) else bounds or ViewBounds()
        self.spread = spread
        self.padding: Padding = padding
        self.ensemble_temperature = ensemble_temperature
        self.keep_views = False
        """Whether an adaptation holds the pixels of its selected views."""

    def look(self, batch: Batch) -> Look:
        """Draw the views of each picture, encode them without a graph, and choose the confident ones."""
        numbers, epochs = batch.index.tolist(), batch.epoch.tolist()
        raw, flip = sample_views(
            self.init, self.bounds, self.n_views - 1, batch.aspect, numbers, self.run_seed(), self.spread, epochs
        )
        raw = self.start_views(batch, raw.to(self.clip.head_dtype))
        original = batch.image[:, None].to(raw.dtype)
        with torch.no_grad():
            views = torch.cat([original, self.warp(batch, raw, flip)], dim=1) if self.n_views > 1 else original
            look = self._choose(views, keep=self.tunes and self.prompt.reaches_pixels)
        # The original has no parameters: a row of zeros stands in its place.
        raw = torch.cat([raw.new_zeros(len(batch), 1, N_PARAMETERS), raw], dim=1)
        flip = torch.cat([flip.new_zeros(len(batch), 1), flip], dim=1)
        look.raw, look.flip = take_views(raw, look.chosen), flip.gather(1, look.chosen)
        return look

    def look_at(self, views: Tensor) -> Look:
        """The same for views ``[B, V, 3, R, R]`` in [0, 1] that are given, view 0 the original."""
        with torch.no_grad():
            return self._choose(views, keep=True)

    def original_features(self, look: Look, state: State | None) -> Tensor:
        """Features ``[B, 1, D]`` of the original under a state: those at hand, unless the state reaches the pixels."""
        if state is None or not self.prompt.reaches_pixels:
            return look.features[:, :1]
        assert look.pixels is not None
        return self.prompt.encode(look.pixels, state)

    def selected_features(self, look: Look, state: State | None) -> Tensor:
        """Features ``[B, K, D]`` of the views of S, where they started, under a state."""
        if state is None or not self.prompt.reaches_pixels:
            return take_views(look.features, look.chosen)
        assert look.seen is not None
        return self.prompt.encode(look.seen, state)

    def start_views(self, batch: Batch, raw: Tensor) -> Tensor:
        """Where the drawn views ``[B, V - 1, 6]`` of a batch start."""
        return raw

    @timed("views")
    def warp(self, batch: Batch, raw: Tensor, flip: Tensor) -> Tensor:
        """Pixels ``[B, V, 3, R, R]`` of views ``[B, V, 6]``."""
        matrices = affine(bounded(raw, self.bounds), flip, batch.aspect)
        return warp(batch.canvas, matrices, self.preprocessing.size, self.padding)

    def selected_pixels(self, batch: Batch, look: Look, raw: Tensor) -> Tensor:
        """Pixels ``[B, K, 3, R, R]`` of the views of S at parameters `raw`; the original never moves."""
        assert look.flip is not None
        warped = self.warp(batch, raw, look.flip)
        return torch.where(look.original[..., None, None, None], batch.image[:, None].to(warped.dtype), warped)

    def ensemble(self, look: Look, log_probs: Tensor) -> Tensor:
        """Entropy-weighted mean ``[B, C]`` of the original and S, given as ``[B, 1 + K, C]``."""
        return entropy_weighted_mean(log_probs, self.ensemble_temperature, look.counted)

    def averaged(self, look: Look) -> Tensor:
        """The free control: the ensemble at the initial prompt and the initial views."""
        selected = take_views(look.log_probs, look.chosen)
        return self.ensemble(look, torch.cat([look.log_probs[:, :1], selected], dim=1))

    def conclude(self, look: Look, log_probs: Tensor, views: Tensor | None, **diagnostics: Tensor) -> Adaptation:
        """An adaptation whose prediction is `log_probs` ``[B, C]``."""
        return Adaptation(
            log_probs=log_probs.float(),
            zero_shot_log_probs=look.log_probs[:, 0].float(),
            averaged_log_probs=self.averaged(look).float(),
            views=views if self.keep_views else None,
            diagnostics={
                "selected_entropy": entropy(take_views(look.log_probs, look.chosen)).mean(1),
                **diagnostics,
            },
        )

    def _choose(self, views: Tensor, keep: bool) -> Look:
        """A look at views ``[B, V, 3, R, R]``; `keep` says whether it holds their pixels."""
        features = self.prompt.encode(views)
        log_probs = self.log_probs(self.prompt.head(), features)
        chosen = select_confident(log_probs, self.selection)
        pixels = (views[:, :1], take_views(views, chosen)) if keep else (None, None)
        return Look(features, log_probs, chosen, chosen == 0, None, None, *pixels)
