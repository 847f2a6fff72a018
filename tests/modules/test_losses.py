"""Each loss by its formula, written out in plain numbers."""

from __future__ import annotations

import pytest
import torch

from metatpt.modules.losses import INNER, OUTER, Predictions, combine, teacher

V0_IN_S = [True, False]


def numbers(v0_in_s: bool) -> tuple[Predictions, list[list[float]], list[list[float]], list[float], list[list[float]]]:
    """Predictions of one sample, and as lists: p of S, p of v0 and S with v0 counted once, p_v0, features of S."""
    torch.manual_seed(4)
    original = (2 * torch.randn(1, 1, 3, dtype=torch.float64)).log_softmax(-1)
    others = (2 * torch.randn(1, 3, 3, dtype=torch.float64)).log_softmax(-1)
    selected = torch.cat([others[:, :1], original, others[:, 1:]], 1) if v0_in_s else others
    features = torch.nn.functional.normalize(torch.randn(1, selected.shape[1], 4, dtype=torch.float64), dim=-1)
    counted = torch.ones(1, 1 + selected.shape[1], dtype=torch.bool)
    if v0_in_s:
        counted[0, 2] = False
    p = Predictions(torch.cat([original, selected], 1), features, counted)
    p.teacher = teacher(p.log_probs, counted)
    s, v0, z = selected[0].exp().tolist(), original[0, 0].exp().tolist(), features[0].tolist()
    return p, s, [v0, *others[0].exp().tolist()], v0, z


def log(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).log())


def entropy(p: list[float]) -> float:
    return -sum(x * log(x) for x in p)


def kl(p: list[float], q: list[float]) -> float:
    return sum(x * (log(x) - log(y)) for x, y in zip(p, q, strict=True))


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def average(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("v0_in_s", V0_IN_S)
def test_inner_losses(v0_in_s: bool) -> None:
    p, s, _, v0, z = numbers(v0_in_s)
    pairs = [1 - sum(a * b for a, b in zip(z[i], z[j], strict=True)) for i in range(len(z)) for j in range(i)]
    consistency = average([kl(each, mean(s)) for each in s])
    expected = {
        "marginal_entropy": entropy(mean(s)),
        "entropy": average([entropy(each) for each in s]),
        "anchor": average([kl(v0, each) for each in s]),
        "consistency": consistency,
        "diversity": -average(pairs),
        "adversarial": -consistency,
    }
    assert set(expected) == set(INNER)
    found = {name: float(loss(p)) for name, loss in INNER.items()}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("v0_in_s", V0_IN_S)
def test_outer_losses(v0_in_s: bool) -> None:
    p, s, union, v0, _ = numbers(v0_in_s)
    q = mean(union)
    expected = {
        "consistency": average([-sum(a * log(b) for a, b in zip(q, each, strict=True)) for each in union]),
        "marginal_entropy": entropy(mean(s)),
        "kl": average([kl(v0, each) for each in s]),
        "js": entropy(mean(union)) - average([entropy(each) for each in union]),
    }
    assert set(expected) == set(OUTER)
    assert {name: float(loss(p)) for name, loss in OUTER.items()} == pytest.approx(expected)


def test_weights_add_up() -> None:
    p, *_ = numbers(True)
    found = combine({"entropy": 0.5, "diversity": 2.0}, INNER, p)
    torch.testing.assert_close(found, 0.5 * INNER["entropy"](p) + 2 * INNER["diversity"](p))


def test_what_stops_gradients() -> None:
    p, *_ = numbers(False)
    original = p.log_probs[:, :1].clone().requires_grad_()
    moved = Predictions(torch.cat([original, p.selected], 1), p.features, p.counted, p.teacher)
    for loss in (INNER["anchor"], OUTER["kl"]):
        (gradient,) = torch.autograd.grad(loss(moved).sum(), original)
        assert not gradient.any()
    assert not teacher(moved.log_probs, p.counted).requires_grad
