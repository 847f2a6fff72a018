"""How many pictures or prompts go through a tower at once, and whether their graph is kept for the backward pass.

Chunks do not depend on how many samples are adapted at once: a rule that looked at their number would cut, and so
round, otherwise at another batch size. Whether a chunk's graph is kept or computed again may depend on it: the numbers
are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .free import free_bytes

_PARTS = 4
_FORWARD_ONLY = 8  # a pass without a graph holds at most about this fraction of what a graph keeps
_FULL = {"cuda": 2**31}  # bytes of a pass without a graph that keep a device busy: larger chunks gain nothing
_FULL_ELSEWHERE = 2**26


class Budget:
    """Memory for activations, in four parts that may all be in use at once.

    One is for the chunk that goes through, and one each for the graphs that wait for their backward pass: of the
    initial prompt, of the samples' prompts, of their pictures.

    Args:
        total: Bytes, about; None for half of what is free on a device when it is first asked for.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._free: dict[torch.device, int] = {}

    def total(self, device: torch.device) -> int:
        """Bytes on a device."""
        if self._total is not None:
            return self._total
        if device not in self._free:
            self._free[device] = free_bytes(device) // 2
        return self._free[device]

    def chunk(self, each: int, device: torch.device, graph: bool = True) -> int:
        """How many go through at once, at least one.

        Args:
            each: Bytes that the graph of one keeps.
            device: Where.
            graph: Whether it is kept; without one more fit.
        """
        passing = max(1, each // _FORWARD_ONLY)
        fit = self.total(device) // _PARTS // max(1, each if graph else passing)
        return max(1, min(fit, _FULL.get(device.type, _FULL_ELSEWHERE) // passing))

    def halve(self, device: torch.device) -> int:
        """Take half of it from now on, on every device; returns the bytes that are left."""
        self._total = max(1, self.total(device) // 2)
        return self._total

    def recompute(self, kept: int, device: torch.device) -> bool:
        """Whether graphs of that many bytes in all are too much to keep until the backward pass."""
        return kept > self.total(device) // _PARTS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on whatever device; for most of them torch raises a plain RuntimeError."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )


def run(encode: Callable[..., Tensor], *inputs: Any, recompute: bool) -> Tensor:
    """What ``encode(*inputs)`` gives, its graph kept, or computed again in the backward pass."""
    if not recompute:
        return encode(*inputs)
    # The reentrant kind cannot be used with autograd.grad; frozen towers draw no random numbers.
    return checkpoint(encode, *inputs, use_reentrant=False, preserve_rng_state=False)


def kept_bytes(encode: Callable[[], tuple[Tensor, int]], frozen: Callable[[], Iterable[Tensor]]) -> int:
    """What autograd keeps for the backward pass of one picture or prompt, measured: it serves any tower.

    Args:
        encode: Gives the features of some, with their graph, and how many they are.
        frozen: Gives the weights, which are there anyway.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), hooks:
        _graph, number = encode()  # held, so that no address is used twice
    weights = {weight.untyped_storage().data_ptr() for weight in frozen()}
    return sum(size for pointer, size in kept.items() if pointer not in weights) // number
