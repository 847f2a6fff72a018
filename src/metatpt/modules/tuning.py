"""The outer loop: a prompt is tuned on the views of one picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metatpt.functional import outer_step
from metatpt.prompts import Part
from metatpt.types import State

from .checks import check_choice, check_number
from .views import ViewModule

Tape = Literal["first", "second"]
OuterOptimizer = Literal["adamw", "sgd", "normalised_sgd"]


class PromptTuningModule(ViewModule):
    """Base of methods that tune the prompt on views.

    Args:
        outer_lr: Learning rate of the prompt, absolute; it wins where it is given.
        outer_lr_relative: Learning rate in standard deviations of the entries of each initial parameter; one whose
            entries are all equal (a bias of zeros) stays.
        outer_steps: Steps on the prompt.
        outer_optimizer: ``adamw``, ``sgd`` or ``normalised_sgd`` (each sample's gradient at a root mean square of 1).
        tuned_part: What of the prompt is tuned: ``text``, ``visual`` or ``both``.
        **kwargs: See :class:`ViewModule`.
    """

    tape: Tape | None = None
    """In meta training the steps stay on the tape: with the gradients that they take, or with these as constants."""

    def __init__(
        self,
        outer_lr: float | None = None,
        outer_lr_relative: float | None = 0.5,
        outer_steps: int = 1,
        outer_optimizer: OuterOptimizer = "adamw",
        tuned_part: Part = "both",
        **kwargs: Any,
    ) -> None:
        if outer_lr is None and outer_lr_relative is None:
            raise ValueError("outer_lr and outer_lr_relative are both null; give one of them")
        for name, value in (("outer_lr", outer_lr), ("outer_lr_relative", outer_lr_relative)):
            if value is not None:
                check_number(name, value, 0)
        check_number("outer_steps", outer_steps, 0)
        check_choice("outer_optimizer", outer_optimizer, get_args(OuterOptimizer))
        check_choice("tuned_part", tuned_part, get_args(Part))
        super().__init__(**kwargs)
        if not self.prompt.tuned:
            raise ValueError(
                f"{type(self).__name__} tunes a prompt, and {type(self.prompt).__name__} has nothing to tune"
            )
        self.prompt.choose_part(tuned_part)
        self.outer_lr = outer_lr
        self.outer_lr_relative = outer_lr_relative
        self.outer_steps = outer_steps
        self.outer_optimizer: OuterOptimizer = outer_optimizer

    def rates(self, state: State) -> State:
        """The resolved learning rate of each entry of a state, ``[1, ...]``."""
        spread = {} if self.outer_lr is not None else self.prompt.spread()
        return {
            name: torch.full(
                (1,) * value.ndim,
                self.outer_lr if self.outer_lr is not None else (self.outer_lr_relative or 0.0) * spread[name],
                dtype=value.dtype,
                device=value.device,
            )
            for name, value in state.items()
        }

    def start_state(self, batch_size: int) -> State:
        """See :meth:`AdaptationModule.start_state`; in meta training on the tape of the prompt's parameters."""
        if self.tape is None:
            return super().start_state(batch_size)
        live = self.prompt.live_state(batch_size)
        return {name: live[name] for name in self.prompt.state_names}

    def tune(self, state: State, loss: Callable[[State, int], Tensor]) -> tuple[State, dict[str, Tensor]]:
        """Take the outer steps.

        Args:
            state: Where B samples start.
            loss: Values ``[B]`` under a state, at a step counted from 1.

        Returns:
            The tuned state, and as diagnostics the first and the last loss and the resolved rate.
        """
        steps = PromptSteps(self, state)
        for step in range(1, self.outer_steps + 1):
            at = steps.differentiated()
            steps.take(at, loss(at, step))
        return steps.finish()

    def gradients(self, loss: Tensor, state: State, keep: bool = False) -> State:
        """Gradients of a loss by a state; zero for what it does not depend on (a bias that no view meets, say).

        Args:
            loss: Scalar.
            state: What it was computed under.
            keep: Whether the graph is used again.

        Raises:
            RuntimeError: The state changes how pictures are encoded, and they were not encoded under it.
        """
        taped = self.tape is not None
        found = torch.autograd.grad(
            loss,
            list(state.values()),
            retain_graph=keep or taped,
            create_graph=self.tape == "second",
            allow_unused=True,
        )
        given = dict(zip(state, found, strict=True))
        encoded = self.prompt.encoded_names
        if encoded and all(given[name] is None for name in encoded):
            raise RuntimeError(
                f"{type(self.prompt).__name__} changes how pictures are encoded, and {type(self).__name__} did not "
                "encode its views under the state: take their features from original_features and selected_features"
            )
        return {name: torch.zeros_like(state[name]) if each is None else each for name, each in given.items()}


class PromptSteps:
    """The prompt of B samples on its way down a loss.

    Args:
        module: Says how steps are taken; with a `tape` they stay on it.
        state: Where the samples start.
    """

    def __init__(self, module: PromptTuningModule, state: State) -> None:
        self.module = module
        self.state = state
        self.visited: list[State] = []
        """Where each step was taken from."""
        self._rates = module.rates(state)
        self._memory: dict[str, State] = {}
        self._losses: list[Tensor] = []

    def differentiated(self) -> State:
        """The state for a loss whose gradient a step takes. With a tape the state behind it is another node of it.

        So what was computed from :attr:`state` itself has no part in that gradient, but in that of the whole way.
        """
        if self.module.tape is None:
            return {name: value.detach().requires_grad_() for name, value in self.state.items()}
        return {name: value.view_as(value) for name, value in self.state.items()}

    def take(self, at: State, loss: Tensor, keep: bool = False) -> None:
        """One step.

        Args:
            at: What :meth:`differentiated` gave.
            loss: ``[B]``, under it.
            keep: Whether the loss's graph is used again.
        """
        module = self.module
        gradients = module.gradients(loss.sum(), at, keep)
        self._losses.append(loss.detach())
        self.visited.append(self.state)
        before = at if module.tape is None else self.state
        number = len(self._losses)
        self.state = outer_step(module.outer_optimizer, before, gradients, self._memory, self._rates, number)

    def finish(self) -> tuple[State, dict[str, Tensor]]:
        """The tuned state, and as diagnostics ``[B]`` the first and last loss and each parameter's resolved rate."""
        state = self.state
        if self.module.tape is None:
            state = {name: value.detach() for name, value in state.items()}
        if not self._losses:
            return state, {}
        size = len(self._losses[0])
        rates = {
            "outer_lr" if len(self._rates) == 1 else f"outer_lr_{name}": rate.detach().mean().expand(size)
            for name, rate in self._rates.items()
        }
        return state, {"first_loss": self._losses[0], "last_loss": self._losses[-1], **rates}
