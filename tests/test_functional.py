"""Pure functions against torch's own and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from metatpt.functional import (
    diversity,
    entropy,
    entropy_weighted_mean,
    kl_divergence,
    log_mean,
    marginal_entropy,
    n_selected,
    normalise,
    outer_step,
    select_confident,
    take_views,
    uniform_weights,
)


@pytest.fixture
def log_probs() -> torch.Tensor:
    torch.manual_seed(0)
    return (3 * torch.randn(4, 10, 6, dtype=torch.float64)).log_softmax(-1)


def test_entropies(log_probs: torch.Tensor) -> None:
    reference = torch.distributions.Categorical(logits=log_probs).entropy()
    torch.testing.assert_close(entropy(log_probs), reference)
    mean = log_probs.exp().mean(1)
    torch.testing.assert_close(log_mean(log_probs).exp(), mean)
    torch.testing.assert_close(marginal_entropy(log_probs), torch.distributions.Categorical(probs=mean).entropy())
    certain = torch.tensor([[0.0, -math.inf]], requires_grad=True)
    assert float(entropy(certain)) == 0
    (gradient,) = torch.autograd.grad(entropy(certain.log_softmax(-1)).sum(), certain)
    assert not gradient.isnan().any()


def test_weights_leave_views_out(log_probs: torch.Tensor) -> None:
    mask = torch.rand(4, 10) < 0.6
    mask[:, 0] = True
    weighted = log_mean(log_probs, uniform_weights(mask, torch.float64))
    ensemble = entropy_weighted_mean(log_probs, 0.3, mask)
    for row in range(4):
        kept = log_probs[row, mask[row]]
        torch.testing.assert_close(weighted[row].exp(), kept.exp().mean(0))
        weight = (-entropy(kept) / 0.3).softmax(0)
        torch.testing.assert_close(ensemble[row].exp(), (weight[:, None] * kept.exp()).sum(0))


def test_kl_divergence(log_probs: torch.Tensor) -> None:
    target = log_probs[:, :1]
    reference = torch.nn.functional.kl_div(log_probs, target.expand_as(log_probs), reduction="none", log_target=True)
    torch.testing.assert_close(kl_divergence(target, log_probs), reference.sum(-1))


def test_diversity_is_the_mean_over_pairs() -> None:
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(2, 5, 7, dtype=torch.float64), dim=-1)
    for row in range(2):
        pairs = [1 - float(z[row, i] @ z[row, j]) for i in range(5) for j in range(i)]
        assert float(diversity(z)[row]) == pytest.approx(sum(pairs) / len(pairs))
    assert diversity(z[:, :1]).tolist() == [0, 0]


@pytest.mark.parametrize("n_views", range(1, 10))
def test_selection(log_probs: torch.Tensor, n_views: int) -> None:
    views = log_probs[:, :n_views]
    for share in (0.1, 0.3, 1.0):
        chosen = select_confident(views, share)
        assert chosen.shape == (4, max(1, int(share * n_views + 1e-9)))
        for row in range(4):
            ranked = sorted(range(n_views), key=lambda v: float(entropy(views)[row, v]))
            assert chosen[row].tolist() == ranked[: chosen.shape[1]]
    torch.testing.assert_close(take_views(views, chosen)[1, 0], views[1, chosen[1, 0]])


def test_number_of_selected_views() -> None:
    assert [n_selected(64, s) for s in (0.1, 0.3, 1.0)] == [6, 19, 64]
    assert n_selected(1, 0.1) == 1


def test_ties_go_to_the_lower_index() -> None:
    same = torch.zeros(1, 40, 3).log_softmax(-1)
    assert select_confident(same, 0.2).tolist() == [list(range(8))]


@pytest.mark.parametrize("steps", [1, 5])
def test_adamw_is_torchs(steps: int) -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 4, 5, dtype=torch.float64)
    target = torch.randn_like(start)
    parameter = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.01)
    state, memory = {"context": start}, {}
    rates = {"context": torch.full((1, 1, 1), 0.1, dtype=torch.float64)}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (parameter - target).pow(4).sum().backward()
        optimizer.step()
        gradient = 4 * (state["context"] - target).pow(3)
        state = outer_step("adamw", state, {"context": gradient}, memory, rates, step)
    torch.testing.assert_close(state["context"], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_normalised_sgd_moves_entries_by_the_rate() -> None:
    gradient = torch.tensor([[[1e-6, -1e-6], [1e-6, 1e-6]], [[3.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
    rates = {"context": torch.full((1, 1, 1), 0.1, dtype=torch.float64)}
    moved = outer_step("normalised_sgd", {"context": torch.zeros_like(gradient)}, {"context": gradient}, {}, rates, 1)
    torch.testing.assert_close(
        moved["context"].square().mean((1, 2)).sqrt(), torch.full((2,), 0.1, dtype=torch.float64)
    )
    sgd = outer_step("sgd", {"context": torch.zeros_like(gradient)}, {"context": gradient}, {}, rates, 1)
    torch.testing.assert_close(sgd["context"], -0.1 * gradient)


def test_a_gradient_is_normalised_and_stays_differentiable_at_zero() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]], dtype=torch.float64, requires_grad=True)
    unit = normalise(gradient, 1)
    torch.testing.assert_close(unit.detach(), torch.tensor([[0.6, 0.8], [0, 0], [1, 0]], dtype=torch.float64))
    (second,) = torch.autograd.grad(unit[0].sum(), gradient)
    assert torch.isfinite(second).all()


def test_weights_do_not_follow_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        weights = uniform_weights(torch.ones(1, 20, dtype=torch.bool), torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(weights.exp().sum()) == pytest.approx(1, abs=1e-12)
