"""What holds for every prompt learner, checked on small towers."""

from __future__ import annotations

import copy
import functools
from unittest.mock import patch

import torch
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.clip.budget import Budget
from metatpt.prompts import PromptLearner
from metatpt.types import Preprocessing, State

from .models import CONFIGS, build, tokenizer

CLASSES = ["cat", "golden retriever", "ox"]


@functools.cache
def _sized(text: int, image: int) -> torch.nn.Module:
    config = copy.deepcopy(CONFIGS["openai_vit"])
    config["vision_cfg"] |= {"width": image, "layers": 3}
    config["text_cfg"] |= {"width": text}
    with patch.dict(CONFIGS, {"sized": config}):
        return build("sized")


def sized(text: int = 64, image: int = 96, dtype: torch.dtype = torch.float32) -> FrozenCLIP:
    """Towers of these widths with three blocks each; in float32 they share their weights."""
    model = _sized(text, image)
    model = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    preprocessing = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    return FrozenCLIP(model, tokenizer(77), preprocessing, "sized", memory=4096)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    """Random ones, ``[*shape, 3, 32, 32]``."""
    return torch.rand(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def moved(learner: PromptLearner, size: int, seed: int = 0) -> State:
    """States of as many samples, each somewhere else."""
    generator = torch.Generator().manual_seed(seed)

    def near(value: Tensor) -> Tensor:
        noise = torch.randn(size, *value.shape, generator=generator, dtype=value.dtype)
        return (value.detach() + 0.1 * noise).requires_grad_()

    return {name: near(learner.tuned[name]) for name in learner.state_names}


def gradients(learner: PromptLearner, state: State, views: Tensor) -> tuple[Tensor, State]:
    """Logits ``[B, V, C]``, and the gradient of the sum of their squared entropies."""
    features = learner.encode(views, state)
    logits = learner.head(state)(features)
    p = logits.softmax(-1)
    entropy = -(p * logits.log_softmax(-1)).sum(-1)
    found = torch.autograd.grad(entropy.square().sum(), list(state.values()))
    return logits.detach(), dict(zip(state, found, strict=True))


def assert_samples_are_alone(learner: PromptLearner) -> None:
    """The states of several samples together give what each gives alone, to the last bit."""
    state, views = moved(learner, 3), pictures(3, 2)
    logits, together = gradients(learner, state, views)
    for row in range(3):
        one = {name: value[row : row + 1].detach().requires_grad_() for name, value in state.items()}
        its_logits, its_gradient = gradients(learner, one, views[row : row + 1])
        assert torch.equal(its_logits[0], logits[row])
        for name, value in its_gradient.items():
            assert torch.equal(value[0], together[name][row]), name


def assert_chunks_change_nothing(learner: PromptLearner) -> None:
    """Logits and gradients with every picture and prompt a chunk of its own, recomputed in the backward pass."""
    state, views = moved(learner, 2), pictures(2, 3)
    logits, expected = gradients(learner, state, views)
    learner.clip.budget = Budget(1)
    its_logits, found = gradients(learner, state, views)
    torch.testing.assert_close(its_logits, logits, atol=1e-4, rtol=0)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def assert_finite_differences(learner: PromptLearner, tolerance: float = 1e-6) -> None:
    """The gradient of the training loss along a random direction of each parameter; the learner is in float64."""
    images, labels = pictures(3).double(), torch.tensor([0, 2, 1])
    loss, _ = learner.training_loss(images, labels)
    found = torch.autograd.grad(loss, list(learner.tuned.values()))
    generator = torch.Generator().manual_seed(1)
    for (name, value), gradient in zip(learner.tuned.items(), found, strict=True):
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        step, losses = 1e-5 / float(direction.norm()), []
        start = value.detach().clone()
        for sign in (1, -1):
            with torch.no_grad():
                value.copy_(start + sign * step * direction)
                losses.append(float(learner.training_loss(images, labels)[0]))
        with torch.no_grad():
            value.copy_(start)
        numeric = (losses[0] - losses[1]) / (2 * step)
        analytic = float((gradient * direction).sum())
        scale = float(gradient.norm() * direction.norm()) + 1e-12
        assert abs(numeric - analytic) <= tolerance * scale + 1e-8 * (1 + abs(losses[0])), (name, numeric, analytic)
