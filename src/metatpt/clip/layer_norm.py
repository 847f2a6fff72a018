"""Layer norm for derivatives of any order.

torch's own is right up to the second. From the third on (meta training through a second-order inner loop) it takes the
mean and the deviation in its double backward pass as constants: a vector-Jacobian-vector product is off by a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PlainLayerNorm(TorchFunctionMode):
    """In here layer norms are computed from elementary operations, each of which has all its derivatives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (plain_layer_norm if func is F.layer_norm else func)(*args, **(kwargs or {}))


def plain_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """What :func:`torch.nn.functional.layer_norm` gives, computed in at least single precision as there."""
    axes = tuple(range(-len(normalized_shape), 0))
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = x - x.mean(axes, keepdim=True)
    x = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(input.dtype)
