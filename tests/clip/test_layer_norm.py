"""Layer norm with all its derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metatpt.clip.layer_norm import PlainLayerNorm, plain_layer_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gives_what_torch_gives(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ([3, 5, 8], [8], [8]))
    for given in ((None, None), (weight, None), (weight, bias)):
        torch.testing.assert_close(plain_layer_norm(x, (8,), *given), F.layer_norm(x, (8,), *given))
    with PlainLayerNorm():
        torch.testing.assert_close(torch.nn.LayerNorm(8, dtype=dtype)(x), F.layer_norm(x, (8,)))


def test_third_derivative_agrees_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x, factors, way, along = (torch.randn(2, 8, generator=generator, dtype=torch.float64) for _ in range(4))

    def size_of_jacobian_product(x: Tensor, create_graph: bool = True) -> Tensor:
        at = x if x.requires_grad else x.clone().requires_grad_()
        cotangent = factors.clone().requires_grad_()
        (back,) = torch.autograd.grad((F.layer_norm(at, (8,)) * cotangent).sum(), at, create_graph=True)
        (forth,) = torch.autograd.grad((back * way).sum(), cotangent, create_graph=create_graph)
        return forth.square().sum()

    def error() -> float:
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(size_of_jacobian_product(at), at)
        values = [float(size_of_jacobian_product(x + sign * 1e-6 * along, False).detach()) for sign in (1, -1)]
        return abs(float((gradient * along).sum()) / ((values[0] - values[1]) / 2e-6) - 1)

    with PlainLayerNorm():
        assert error() < 1e-6
