"""Prompt tokens inside a tower."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metatpt.clip.blocks import BlockHook


class TokenHook(BlockHook):
    """Tokens that stand among those of a tower from some block on, replaced before later blocks.

    Args:
        tokens: Block number to the tokens ``[1, n, d]`` (or ``[N, n, d]``) that stand there from it on. Blocks that it
            leaves out go on with what the block before them made of the tokens.
        start: Place of the first one; None for the end.
        inserted: Whether those of the lowest block are inserted; else they replace what stands there already.
    """

    def __init__(self, tokens: Mapping[int, Tensor], start: int | None = 1, inserted: bool = True) -> None:
        self.tokens = tokens
        self.start = start
        self.inserted_at = min(tokens) if inserted and tokens else None

    def enter(self, block: int, x: Tensor) -> Tensor:
        """See :meth:`BlockHook.enter`."""
        if block not in self.tokens:
            return x
        tokens = self.tokens[block].to(x.dtype).expand(len(x), -1, -1)
        replaced = 0 if block == self.inserted_at else tokens.shape[1]
        start = x.shape[1] - replaced if self.start is None else self.start
        return torch.cat([x[:, :start], tokens, x[:, start + replaced :]], dim=1)
