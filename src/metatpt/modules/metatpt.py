"""Meta test-time prompt tuning (MetaTPT, arXiv 2512.12268): a reconstruction from its abstract.

The inner loop learns, for one picture and without its label, the affine views that it is looked at from; the outer loop
tunes the prompt so that predictions agree across these views. The paper's losses, steps and rates are not public, so
they are options.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from metatpt.functional import normalise
from metatpt.prompts import Head, TunedParameters
from metatpt.rng import run_seed, sample_generator
from metatpt.types import Adaptation, Batch, State
from metatpt.views import N_PARAMETERS, clamp_start

from .checks import check_choice, check_number
from .inner import InnerOptimizer, ViewSteps, view_steps
from .losses import INNER, OUTER, Predictions, combine, teacher, weighted_losses
from .starts import LearnedDistribution, LearnedPolicy, StartKind, ViewStart
from .tuning import PromptSteps, PromptTuningModule
from .views import Look

Schedule = Literal["sequential", "nested", "joint"]
Order = Literal["first", "second"]
Augmentation = Literal["episodic", "fixed", "random_step", "online", "offline"]
LearnedRates = Literal["none", "one", "per_parameter"]
Predict = Literal["original", "ensemble"]

_STILL = ("fixed", "offline")  # augmentations without an inner step


@dataclass
class Learned:
    """Views of S as an inner loop left them.

    Attributes:
        raw: ``[B, K, 6]``; None for views that were given.
        features: ``[B, K, D]`` under the prompt that they were learned under. With ``order: second`` on the tape of the
            inner loop; where that prompt reaches the pixels, on the tape of the prompt.
    """

    raw: Tensor | None
    features: Tensor

    def detach(self) -> Learned:
        """The same views off the tape."""
        return Learned(None if self.raw is None else self.raw.detach(), self.features.detach())


class MetaTPTModule(PromptTuningModule):
    """Learn the views of each picture, and tune the prompt until predictions agree across them.

    S are the confident views, chosen once under the initial views and prompt.

    Args:
        selection: Share of the views in S.
        inner_loss: What the views descend: a name, or names with weights, of ``marginal_entropy``, ``entropy``,
            ``anchor``, ``consistency``, ``diversity`` and ``adversarial``.
        inner_lr: Step on the raw view parameters.
        inner_steps: Steps on the views.
        inner_optimizer: ``normalised_sgd`` (each view's gradient at length 1), ``sgd``, or ``adam`` (first order only).
        inner_momentum: Of the two kinds of SGD.
        outer_loss: What the prompt descends: a name, or names with weights, of ``consistency`` (cross-entropy from
            the frozen mean prediction), ``marginal_entropy``, ``kl`` and ``js``.
        outer_steps: Steps on the prompt.
        schedule: ``sequential`` (views learned once), ``nested`` (learned anew, from their start, before every outer
            step under the current prompt) or ``joint`` (one stage: views and prompt step together on both losses).
        order: ``second``: the prompt's gradient flows through the inner loop; ``first``: it does not.
        augmentation: ``episodic`` (learned for each sample), ``fixed`` (no inner step), ``random_step`` (as far as
            the inner loop goes, in a random direction: the control), ``online`` (what the inner loops have added to
            the views of the samples before, averaged over S and summed up, moves the start of the next ones) or
            ``offline`` (no inner step from a start that meta training has learned).
        view_start: Where views start: as ``drawn``, or as meta training learns it: drawn from one ``distribution`` for
            all pictures, or moved by a ``policy`` of the picture's own features.
        learned_rates: Whether meta training learns both step sizes: ``none``, ``one`` factor for each loop, or one
            ``per_parameter``.
        learned_loss_weights: Whether meta training learns the weights of the inner losses.
        predict: ``original`` (the original view at the tuned prompt) or ``ensemble`` (with the views of S, weighted
            by their entropy).
        **kwargs: See :class:`PromptTuningModule`.
    """

    checkpoint_options: ClassVar[tuple[str, ...]] = (
        *PromptTuningModule.checkpoint_options,
        # What there is to load, and the steps that it was trained for.
        *("view_start", "learned_rates", "learned_loss_weights", "inner_loss", "tuned_part"),
        *("outer_loss", "outer_optimizer", "outer_lr", "outer_lr_relative", "outer_steps"),
        *("inner_optimizer", "inner_lr", "inner_steps", "inner_momentum", "schedule", "order", "augmentation"),
    )

    def __init__(
        self,
        selection: float = 0.3,
        inner_loss: str | dict[str, float] = "marginal_entropy",
        inner_lr: float = 0.3,
        inner_steps: int = 1,
        inner_optimizer: InnerOptimizer = "normalised_sgd",
        inner_momentum: float = 0.0,
        outer_loss: str | dict[str, float] = "consistency",
        outer_steps: int = 8,
        schedule: Schedule = "sequential",
        order: Order = "first",
        augmentation: Augmentation = "episodic",
        predict: Predict = "ensemble",
        view_start: StartKind = "drawn",
        learned_rates: LearnedRates = "none",
        learned_loss_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("inner_optimizer", inner_optimizer, get_args(InnerOptimizer))
        check_choice("schedule", schedule, get_args(Schedule))
        check_choice("order", order, get_args(Order))
        check_choice("augmentation", augmentation, get_args(Augmentation))
        check_choice("predict", predict, get_args(Predict))
        check_choice("view_start", view_start, get_args(StartKind))
        check_choice("learned_rates", learned_rates, get_args(LearnedRates))
        check_number("inner_lr", inner_lr, 0)
        check_number("inner_steps", inner_steps, 0)
        check_number("inner_momentum", inner_momentum, 0, 1)
        if inner_optimizer == "adam" and (order == "second" or learned_rates != "none"):
            raise ValueError(
                "inner_optimizer adam cannot be differentiated through where a gradient entry is zero (its square root "
                "has no derivative there), and has no rate that can be learned; with order second or learned rates use "
                "normalised_sgd or sgd"
            )
        _check_schedule(schedule, order, inner_steps, augmentation)
        _check_start(augmentation, view_start)
        inner_weights = weighted_losses("inner_loss", inner_loss, INNER)
        self.outer_weights = weighted_losses("outer_loss", outer_loss, OUTER)
        super().__init__(selection=selection, outer_steps=outer_steps, **kwargs)
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.inner_optimizer: InnerOptimizer = inner_optimizer
        self.inner_momentum = inner_momentum
        self.schedule = schedule
        self.order = order
        self.augmentation = augmentation
        self.predict = predict
        self.view_start = self._view_start(view_start)
        self.learned_rates = learned_rates
        self._inner_weights = inner_weights
        self.learned = TunedParameters()
        """What meta training learns beside the prompt and the start: logarithms of factors, so 0 at first."""
        if learned_rates != "none":
            each = learned_rates == "per_parameter"
            self.learned["inner_lr"] = torch.zeros(N_PARAMETERS if each else ())
            for name in self.prompt.state_names:
                self.learned[f"outer_lr_{name}"] = torch.zeros(self.prompt.tuned[name].shape if each else ())
        if learned_loss_weights:
            self.learned.update({f"inner_loss_{name}": torch.zeros(()) for name in inner_weights})
        self._offset: Tensor | None = None

    # The two loops

    def inner_loop(self, batch: Batch | None, look: Look, state: State | None, head: Head) -> Learned:
        """Learn the views of S under a prompt, from their start, with a fresh optimiser.

        With ``order: second`` what it returns is a differentiable function of `state`. Only fixed views need no batch.

        Args:
            batch: The pictures.
            look: Their views.
            state: The prompt; None for the initial one.
            head: The head under that prompt, which the outer loop has at hand.
        """
        if self.augmentation in _STILL or not self.inner_steps:
            return Learned(look.raw, self._selected_at(batch, look, look.raw, state))
        assert batch is not None
        assert look.raw is not None
        # Of a random step only the length counts, which nothing is differentiated through.
        second = self.order == "second" and state is not None and self.augmentation != "random_step"
        second = second or self.tape is not None
        fixed = state if second or state is None else {name: value.detach() for name, value in state.items()}
        original = self.original_features(look, fixed)
        twice, self.clip.double_backward = self.clip.double_backward, second and self.tape != "first"
        try:
            with self._view_steps(look.raw, second) as (views, step):
                for _ in range(self.inner_steps):
                    features = self._encode_selected(batch, look, views(), fixed, original)
                    predictions = self._predict_views(head, original, features, look)
                    step(combine(self.inner_weights(), INNER, predictions).sum())
                raw = views()
        finally:
            self.clip.double_backward = twice
        if self.augmentation == "random_step":
            raw = self._random_step(batch, look, raw)
        raw = raw if second else raw.detach()
        return Learned(raw, self._selected_at(batch, look, raw, state, second))

    def outer_loop(self, batch: Batch | None, look: Look, state: State) -> tuple[PromptSteps, Learned]:
        """Tune the prompt on the views; returns its steps, and the views as they ended."""
        learned: Learned | None = None
        target: Tensor | None = None
        steps = PromptSteps(self, state)
        for _ in range(self.outer_steps):
            at = steps.differentiated()
            head = self.prompt.head(at)
            if learned is None or self.schedule == "nested":
                # On a tape the prompt behind the step, of whose gradient these views are no part.
                aside = self.tape is not None and self.order == "first"
                learned = (
                    self.inner_loop(batch, look, steps.state, self.prompt.head(steps.state))
                    if aside
                    else self.inner_loop(batch, look, at, head)
                )
                if aside and self.prompt.reaches_pixels:
                    learned.features = self._selected_at(batch, look, learned.raw, at)
            elif self.prompt.reaches_pixels:
                learned.features = self._selected_at(batch, look, learned.raw, at)
            predictions = self._predict_views(head, self.original_features(look, at), learned.features, look)
            target = teacher(predictions.log_probs, look.counted) if target is None else target
            predictions.teacher = target
            steps.take(at, combine(self.outer_weights, OUTER, predictions))
            if self.tape is None:
                learned = learned.detach()  # frees the tape: no later step's gradient goes through it
        if learned is None:  # no outer step was asked for
            under = None if self.tape is None else steps.state
            learned = self.inner_loop(batch, look, under, self.prompt.head(steps.state))
        return steps, learned

    def joint_loop(self, batch: Batch, look: Look, state: State) -> tuple[PromptSteps, Learned]:
        """One stage: in each step views and prompt descend the sum of both losses together."""
        assert look.raw is not None
        steps = PromptSteps(self, state)
        target: Tensor | None = None
        moves = self.augmentation not in _STILL
        with self._view_steps(look.raw, False) as (views, step_views):
            for _ in range(self.outer_steps):
                at = steps.differentiated()
                original = self.original_features(look, at)
                if moves:
                    features = self._encode_selected(batch, look, views(), at, original)
                else:
                    features = self.selected_features(look, at)
                predictions = self._predict_views(self.prompt.head(at), original, features, look)
                target = teacher(predictions.log_probs, look.counted) if target is None else target
                predictions.teacher = target
                loss = combine(self.inner_weights(), INNER, predictions)
                loss = loss + combine(self.outer_weights, OUTER, predictions)
                steps.take(at, loss, keep=moves)
                if moves:
                    step_views(loss.sum())
            raw = views().detach() if moves else look.raw
        with torch.no_grad():
            learned = Learned(raw, self._selected_at(batch, look, raw, steps.state))
        return steps, learned

    # The method

    def adapt(self, batch: Batch) -> Adaptation:
        """Learn each picture's views, tune its prompt on them, and predict it."""
        look = self.look(batch)
        assert look.raw is not None
        start = self.start_state(len(batch))
        loop = self.joint_loop if self.schedule == "joint" else self.outer_loop
        steps, learned = loop(batch, look, start)
        state, diagnostics = steps.finish()
        self.finish_state(state)
        assert learned.raw is not None
        if self.augmentation == "online":
            self._carry_views(look, learned.raw)
        diagnostics["view_shift"] = (learned.raw - look.raw).detach().norm(dim=-1).mean(1)
        pixels = self.selected_pixels(batch, look, learned.raw) if self.keep_views else None
        return self.conclude(look, self.predicted(batch, look, learned, state), pixels, **diagnostics)

    def adapt_views(self, views: Tensor) -> Adaptation:
        """Tune on given views ``[B, V, 3, R, R]`` in [0, 1], view 0 the original. They cannot move.

        Raises:
            ValueError: An augmentation other than ``fixed``, or a schedule that moves views.
        """
        if self.augmentation != "fixed" or self.schedule == "joint":
            raise ValueError(
                f"given views cannot be moved; use augmentation fixed, not {self.augmentation}, and schedule "
                f"sequential, not {self.schedule}"
            )
        look = self.look_at(views)
        steps, learned = self.outer_loop(None, look, self.start_state(len(views)))
        state, diagnostics = steps.finish()
        self.finish_state(state)
        return self.conclude(look, self.predicted(None, look, learned, state), look.seen, **diagnostics)

    def carries_over(self) -> str | None:
        """The option that makes one sample depend on the ones before it, if any does."""
        return "augmentation 'online'" if self.augmentation == "online" else super().carries_over()

    def start_run(self, online: bool = False) -> None:
        """See :meth:`AdaptationModule.start_run`."""
        super().start_run(online)
        self._offset = None

    def stream(self) -> State | None:
        """See :meth:`AdaptationModule.stream`."""
        stream = super().stream()
        if stream is not None and self._offset is not None:
            stream["offset"] = self._offset
        return stream

    def resume_stream(self, stream: State) -> None:
        """See :meth:`AdaptationModule.resume_stream`."""
        super().resume_stream(stream)
        self._offset = stream.get("offset")

    def start_views(self, batch: Batch, raw: Tensor) -> Tensor:
        """Where the drawn views start: moved by what earlier samples or meta training have learned."""
        if self._offset is not None:
            return clamp_start(raw + self._offset.to(raw))
        if self.view_start is None or not raw.shape[1]:
            return raw
        noise = self._drawn(batch, "view_start", raw.shape[1:]).to(raw)
        features = None
        if self.view_start.probes is not None:
            probes = self.view_start.probes.to(raw).expand(len(batch), -1, -1)
            flip = torch.zeros(probes.shape[:2], dtype=torch.bool, device=raw.device)
            with torch.no_grad():
                features = self.prompt.encode(self.warp(batch, probes, flip))
        moved: Tensor = self.view_start(raw, noise, features)
        return moved if self.tape is not None else moved.detach()

    def inner_weights(self) -> dict[str, float | Tensor]:
        """The inner losses and their weights, with what meta training has learned of them."""
        return {name: weight * self._factor(f"inner_loss_{name}") for name, weight in self._inner_weights.items()}

    def rates(self, state: State) -> State:
        """See :meth:`PromptTuningModule.rates`; with what meta training has learned of them."""
        return {name: rate * self._factor(f"outer_lr_{name}") for name, rate in super().rates(state).items()}

    def _factor(self, name: str) -> Tensor | float:
        """A learned factor, off the tape but in meta training; 1 where it is not learned."""
        if name not in self.learned:
            return 1.0
        value: Tensor = self.learned[name].to(self.clip.head_dtype).exp()
        return value if self.tape is not None else value.detach()

    def _view_start(self, kind: StartKind) -> ViewStart | None:
        if kind == "drawn":
            return None
        if kind == "distribution":
            return LearnedDistribution()
        size = self.preprocessing.size
        with torch.no_grad():
            width = self.prompt.encode(torch.zeros(1, 1, 3, size, size)).shape[-1]
        return LearnedPolicy(width, sample_generator(run_seed(), 0, "policy"))

    def _carry_views(self, look: Look, raw: Tensor) -> None:
        assert look.raw is not None
        moved = (~look.original)[..., None].to(raw.dtype)
        added = ((raw - look.raw) * moved).sum((0, 1)) / moved.sum().clamp(min=1)
        # `look.raw` holds what was carried over already; the sum is what the stream has added to the drawn views.
        if bool(added.isfinite().all()):
            self._offset = added if self._offset is None else self._offset + added

    def _view_steps(self, raw: Tensor, differentiable: bool) -> AbstractContextManager[ViewSteps]:
        lr = self.inner_lr * self._factor("inner_lr")
        constant = self.tape == "first"
        return view_steps(raw, self.inner_optimizer, lr, self.inner_momentum, differentiable, constant)

    def _drawn(self, batch: Batch, stream: str, shape: torch.Size) -> Tensor:
        """Standard normal numbers ``[B, ...]`` of (seed, epoch, index)."""
        places = zip(batch.index.tolist(), batch.epoch.tolist(), strict=True)
        generators = [self.generator(number, stream, epoch) for number, epoch in places]
        return torch.stack([torch.randn(shape, generator=each, dtype=torch.float64) for each in generators])

    def _random_step(self, batch: Batch, look: Look, raw: Tensor) -> Tensor:
        """As far as the inner loop went, in a random direction of (seed, index)."""
        assert look.raw is not None
        directions = self._drawn(batch, "random_step", raw.shape[1:])
        moves = raw - look.raw
        unit = normalise(moves, 1)  # a norm has no derivative where a view stays
        length = (moves * unit).sum(-1, keepdim=True)
        moved: Tensor = look.raw + length * (directions / directions.norm(dim=-1, keepdim=True)).to(raw)
        return moved

    def _selected_at(
        self, batch: Batch | None, look: Look, raw: Tensor | None, state: State | None, second: bool = False
    ) -> Tensor:
        """Features ``[B, K, D]`` of S at parameters `raw`, on the tape of what is differentiated next.

        That is `raw` too with `second` or in meta training, else the prompt alone, where it reaches the pixels.
        """
        if raw is None or (raw is look.raw and not raw.requires_grad):
            return self.selected_features(look, state)
        assert batch is not None
        graph = second or self.tape is not None or self.prompt.reaches_pixels
        with torch.set_grad_enabled(torch.is_grad_enabled() and graph):
            return self._encode_selected(batch, look, raw, state, self.original_features(look, state))

    def _encode_selected(self, batch: Batch, look: Look, raw: Tensor, state: State | None, original: Tensor) -> Tensor:
        """Features ``[B, K, D]`` of S at parameters `raw` under a state; the original never moves and is given."""
        assert look.flip is not None
        pixels = [
            views if place is None else torch.cat([views[:place], views[place + 1 :]])
            for views, place in zip(self.warp(batch, raw, look.flip), look.still, strict=True)
        ]
        graphs = self.inner_steps + 1 if self.order == "second" else 1
        moving = [row for row, views in enumerate(pixels) if len(views)]
        under = state if self.prompt.reaches_pixels else None
        theirs = None if under is None else {name: value[moving] for name, value in under.items()}
        encoded = iter(self.prompt.encode_each([pixels[row] for row in moving], theirs, graphs) if moving else [])
        features = []
        for row, place in enumerate(look.still):
            each = next(encoded) if len(pixels[row]) else look.features[row, :0]
            if place is not None:
                # Tied to its parameters, so that where S is the original alone there is a gradient: of zero.
                still = original[row] + 0 * raw[row, place].sum()
                each = torch.cat([each[:place], still, each[place:]])
            features.append(each)
        return torch.stack(features)

    def _predict_views(self, head: Head, original: Tensor, features: Tensor, look: Look) -> Predictions:
        """Predictions for the original ``[B, 1, D]`` and for views of S ``[B, K, D]``."""
        log_probs = [self.log_probs(head, each) for each in (original, features)]
        return Predictions(torch.cat(log_probs, dim=1), features, look.counted)

    def predicted(self, batch: Batch | None, look: Look, learned: Learned, state: State) -> Tensor:
        """Log-probabilities ``[B, C]`` under the tuned prompt."""
        with torch.set_grad_enabled(self.tape is not None):
            features = learned.features
            if self.prompt.reaches_pixels and self.predict == "ensemble":
                features = self._selected_at(batch, look, learned.raw, state)
            original = self.original_features(look, state)
            predictions = self._predict_views(self.prompt.head(state), original, features, look)
            if self.predict == "original":
                return predictions.original[:, 0]
            return self.ensemble(look, predictions.log_probs)


def _check_schedule(schedule: Schedule, order: Order, inner_steps: int, augmentation: Augmentation) -> None:
    if schedule != "joint":
        return
    if order == "second":
        raise ValueError("schedule joint has no inner loop to differentiate through; use order first")
    if inner_steps != 1:
        raise ValueError(
            f"schedule joint steps the views once in each outer step; inner_steps {inner_steps} would do nothing"
        )
    if augmentation == "random_step":
        raise ValueError("schedule joint has no inner loop to replace by a random step; use sequential or nested")


def _check_start(augmentation: Augmentation, view_start: StartKind) -> None:
    drawn = view_start == "drawn"
    if drawn if augmentation == "offline" else augmentation in ("fixed", "online") and not drawn:
        raise ValueError(
            f"augmentation {augmentation} does not go with view_start {view_start}: views that stay at a learned start "
            "are augmentation offline, with view_start distribution or policy"
        )
