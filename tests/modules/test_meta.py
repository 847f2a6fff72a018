"""Meta training against finite differences, and against its own equalities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.batches import NAMES, make_batch
from helpers.models import save_folder
from torch import Tensor

from metatpt.modules import MetaTPTModule, MetaTrainingModule
from metatpt.types import Batch

LOSSES = {"inner_loss": {"marginal_entropy": 1.0, "entropy": 0.3}, "outer_loss": {"js": 1.0, "marginal_entropy": 0.5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder("openai_vit", tmp_path_factory.mktemp("clip"))


def make(folder: Path, **options: Any) -> MetaTrainingModule:
    """In double precision; without a frozen teacher and a rate relative to the prompt: finite differences move both."""
    defaults = {"n_views": 5, "selection": 0.6, "outer_steps": 2, "outer_lr": 0.1, **LOSSES}
    return MetaTrainingModule(clip=str(folder), class_names=NAMES, **{**defaults, **options}).double()


def gradients(module: MetaTrainingModule, batch: Batch) -> list[Tensor]:
    """Of the meta objective by each trained parameter."""
    module.zero_grad()
    parameters = module.trained_parameters()
    found = torch.autograd.grad(module.meta_loss(batch)[0].sum(), parameters, allow_unused=True)
    return [torch.zeros_like(at) if each is None else each for at, each in zip(parameters, found, strict=True)]


def check_finite_differences(module: MetaTrainingModule, batch: Batch) -> None:
    """Each trained parameter along a random direction; in short steps, since bilinear pixels have kinks."""
    torch.manual_seed(0)
    for parameter, gradient in zip(module.trained_parameters(), gradients(module, batch), strict=True):
        direction = torch.nn.functional.normalize(torch.randn_like(parameter).flatten(), dim=0).view_as(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 3e-8 * direction
            values.append(float(module.meta_loss(batch)[0].detach().sum()))
            with torch.no_grad():
                parameter -= sign * 3e-8 * direction
        numeric = (values[0] - values[1]) / 6e-8
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-4, abs=1e-6)


LEARNED = {"learned_rates": "per_parameter", "learned_loss_weights": True}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "nested", **LEARNED},
        {"schedule": "nested", "order": "second", "learned_rates": "one"},
        {"order": "second", "view_start": "distribution", **LEARNED},
        {"view_start": "policy", "inner_steps": 2, "inner_momentum": 0.5},
        {"view_start": "policy", "augmentation": "offline"},
        {"augmentation": "fixed", "outer_optimizer": "sgd", "outer_lr": 0.05, "predict": "original"},
        {"augmentation": "random_step", "view_start": "distribution"},
        {"inner_optimizer": "sgd", "inner_lr": 1.0, "learned_rates": "per_parameter"},
    ],
    ids=str,
)
def test_the_meta_gradient_agrees_with_finite_differences(folder: Path, options: dict[str, Any]) -> None:
    module = make(folder, **options)
    with torch.no_grad():  # a policy that starts at zero has no gradient in its first layer
        for each in module.view_start.parameters() if module.view_start is not None else ():
            each += 0.05 * torch.randn(each.shape, generator=torch.Generator().manual_seed(1), dtype=each.dtype)
    check_finite_differences(module, make_batch(2, 32))


@pytest.mark.parametrize("meta", ["maml", "fomaml", "reptile"])
def test_without_rates_all_are_multitask(folder: Path, meta: str) -> None:
    batch = make_batch(2, 32)
    still = make(folder, meta=meta, outer_lr=0.0, inner_lr=0.0)
    multitask = make(folder, meta="multitask")
    torch.testing.assert_close(gradients(still, batch), gradients(multitask, batch), atol=1e-9, rtol=1e-7)


def test_one_step_of_reptile_is_multitask(folder: Path) -> None:
    batch = make_batch(2, 32)
    options = {"augmentation": "fixed", "predict": "original"}
    once, multitask = (make(folder, meta=meta, outer_steps=1, **options) for meta in ("reptile", "multitask"))
    torch.testing.assert_close(gradients(once, batch), gradients(multitask, batch), atol=1e-9, rtol=1e-7)
    twice = make(folder, meta="reptile", outer_steps=2, **options)
    assert not torch.allclose(gradients(twice, batch)[0], gradients(multitask, batch)[0], rtol=1e-3)


def test_fomaml_is_the_labelled_gradient_at_the_adapted_prompt(folder: Path) -> None:
    batch = make_batch(1, 32)
    module = make(folder, meta="fomaml", augmentation="fixed", predict="original")
    found = gradients(module, batch)[0]
    # The same steps at test time, then the labelled loss at the prompt that they end at.
    tester = MetaTPTModule(
        clip=str(folder), class_names=NAMES, n_views=5, selection=0.6, outer_steps=2, augmentation="fixed", outer_lr=0.1,
        outer_optimizer="normalised_sgd", predict="original", **LOSSES,
    ).double()  # fmt: skip
    tester.adapt(batch)
    assert tester._final is not None
    context = tester._final["context"].requires_grad_()
    head = tester.prompt.head({"context": context})
    log_probs = tester.log_probs(head, tester.prompt.encode(batch.image[:, None].double()))[:, 0]
    (expected,) = torch.autograd.grad(-log_probs[0, batch.label[0]], context)
    torch.testing.assert_close(found, expected[0], atol=1e-9, rtol=1e-7)
    assert not torch.allclose(
        found, gradients(make(folder, augmentation="fixed", predict="original"), batch)[0], rtol=1e-3
    )


def test_a_batch_is_the_sum_of_its_samples(folder: Path) -> None:
    module = make(folder, view_start="policy", **LEARNED)
    batch = make_batch(3, 32)
    together = gradients(module, batch)
    alone = [gradients(module, batch.select([row])) for row in range(3)]
    torch.testing.assert_close(together, [sum(each) for each in zip(*alone, strict=True)], atol=1e-9, rtol=1e-7)


def test_views_are_of_seed_epoch_and_index(folder: Path) -> None:
    module = make(folder, view_start="distribution")
    batch = make_batch(2, 32)
    first = module.meta_loss(batch)[0].detach()
    torch.testing.assert_close(module.meta_loss(batch)[0].detach(), first)
    batch.epoch += 1
    assert not torch.allclose(module.meta_loss(batch)[0].detach(), first, atol=1e-4)


def test_memory_is_shared_among_the_graphs_of_all_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    for steps in (1, 4):
        module = make(folder, outer_steps=steps)
        kept: list[int] = []
        monkeypatch.setattr(module.clip.budget, "recompute", lambda size, device, kept=kept: kept.append(size) or False)
        module.meta_loss(make_batch(2, 32))
        largest.append(max(kept))
    assert largest[1] == 3 * largest[0]  # 2 x 4 + 1 graphs for 2 x 1 + 1


def test_an_untrained_module_is_the_method_itself(folder: Path) -> None:
    batch = make_batch(2, 32)
    options: dict[str, Any] = {"n_views": 6, "outer_optimizer": "normalised_sgd"}
    plain = MetaTPTModule(clip=str(folder), class_names=NAMES, **options).process(batch)
    trained = MetaTrainingModule(clip=str(folder), class_names=NAMES, view_start="policy", **LEARNED, **options)
    torch.testing.assert_close(trained.process(batch).log_probs, plain.log_probs, atol=1e-6, rtol=0)


def test_training_learns_to_be_adapted(folder: Path) -> None:
    module = make(folder, augmentation="fixed", predict="original", outer_steps=1, lr=0.02)
    batch = make_batch(4, 32)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = module.meta_loss(batch)[0].mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(each.grad is None for each in module.clip.parameters())


def test_everything_that_is_trained_takes_part(folder: Path) -> None:
    for start in ("distribution", "policy"):
        found = gradients(make(folder, view_start=start, **LEARNED), make_batch(4, 32))
        zero = [bool((each == 0).all()) for each in found]
        # the policy's last layer starts at zero, so the first one waits for its first step
        assert sum(zero) == (2 if start == "policy" else 0)


def test_a_step_that_is_not_finite_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = make(folder)
    module.prompt.tuned["context"].grad = torch.full_like(module.prompt.tuned["context"], torch.nan)
    module.on_before_optimizer_step(torch.optim.SGD(module.parameters(), 1.0))
    assert module.prompt.tuned["context"].grad is None
    assert "not finite" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outer_optimizer": "adamw"}, "outer_optimizer adamw"),
        ({"schedule": "joint"}, "schedule joint"),
        ({"augmentation": "online"}, "augmentation online"),
        ({"inner_optimizer": "adam"}, "inner_optimizer adam"),
        ({"augmentation": "offline"}, "augmentation offline does not go with view_start drawn"),
        ({"augmentation": "fixed", "view_start": "policy"}, "augmentation fixed does not go with view_start policy"),
        ({"meta": "mamal"}, "did you mean 'maml'"),
    ],
)
def test_what_cannot_be_trained_through_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaTrainingModule(clip=str(folder), class_names=NAMES, **options)
