"""The inner loop's optimiser: steps on view parameters that can stay on the tape. All of `higher` is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import higher
import torch
from torch import Tensor, nn

from metatpt.functional import normalise

InnerOptimizer = Literal["normalised_sgd", "sgd", "adam"]
ViewSteps = tuple[Callable[[], Tensor], Callable[[Tensor], None]]


class _Views(nn.Module):
    """Raw view parameters ``[B, K, 6]`` as a module, which is what `higher` takes."""

    def __init__(self, raw: Tensor) -> None:
        super().__init__()
        self.raw = nn.Parameter(raw.detach().clone())

    def forward(self) -> Tensor:
        return self.raw


@contextmanager
def view_steps(
    raw: Tensor,
    optimizer: InnerOptimizer,
    lr: float | Tensor,
    momentum: float,
    differentiable: bool,
    constant_gradients: bool = False,
) -> Iterator[ViewSteps]:
    """A fresh inner optimiser for the views of a batch.

    Args:
        raw: ``[B, K, 6]``: where the views start; where it has a graph, the steps go on from it.
        optimizer: ``normalised_sgd`` (the gradient of each view scaled to length 1), ``sgd``, or ``adam``.
        lr: In units of raw parameters; as a tensor (a scalar, or ``[6]``) it may be learned.
        momentum: Of the two kinds of SGD.
        differentiable: Keep the steps on the tape, so that what follows can be differentiated through them.
        constant_gradients: Keep them there, but take their gradients as constants.

    Yields:
        Where the views are now, ``[B, K, 6]``, as a function without arguments; and a function that steps down the
        gradient of a loss, summed over samples.
    """
    views = _Views(raw)
    base: torch.optim.Optimizer
    # torch's optimisers take numbers alone; a tensor takes its place in those of `higher`.
    number, override = (1.0, {"lr": [lr]}) if isinstance(lr, Tensor) else (lr, None)
    if optimizer == "adam":
        base = torch.optim.Adam(views.parameters(), lr=number)
    else:
        base = torch.optim.SGD(views.parameters(), lr=number, momentum=momentum)
    # copy_initial_weights=False keeps the tape connected to the start; what is stepped is a copy all the same.
    loop = higher.innerloop_ctx(
        views, base, copy_initial_weights=False, track_higher_grads=differentiable, override=override
    )
    with loop as (functional, fast):
        if differentiable and raw.requires_grad:
            functional.update_params([raw])

        def prepare(gradients: list[Tensor]) -> list[Tensor]:
            if constant_gradients:
                gradients = [each.detach() for each in gradients]
            return [normalise(each, 1) for each in gradients] if optimizer == "normalised_sgd" else gradients

        def step(loss: Tensor) -> None:
            fast.step(loss, grad_callback=prepare)

        yield functional, step
