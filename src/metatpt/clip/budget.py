"""How many pictures or prompts go through a tower at once, and what is kept for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def bytes_per_token(width: int, n_blocks: int, dtype: torch.dtype) -> int:
    """What a transformer keeps of a token for its backward pass, about: norms, q k v, attention, two dense layers."""
    return 20 * width * n_blocks * dtype.itemsize


@dataclass(frozen=True)
class Budget:
    """Memory for activations, shared out without a look at how many samples are adapted at once.

    Samples are encoded one after the other, and what they keep is held together until the backward pass. A rule that
    looked at their number would cut chunks, and so round, otherwise at another batch size.

    Args:
        total: Bytes, about, with up to 8 samples at once.
    """

    total: int

    def chunk(self, each: int) -> int:
        """How many go through at once, of `each` bytes: they may fill half of the total."""
        return max(1, self.total // 2 // max(1, each))

    def recompute(self, n: int, each: int) -> bool:
        """Whether n of `each` bytes are too much to keep until the backward pass: 8 samples share the other half."""
        return n * each > self.total // 16
