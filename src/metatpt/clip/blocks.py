"""open_clip's transformer block in parts, around attention that a tower computes its own way.

The weights are frozen, so that a backward pass through these parts carries activations only.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

Projection = Literal["query", "key", "value", "out"]


class BlockHook:
    """What a prompt learner changes inside a tower; as it stands, nothing.

    Deep prompts override :meth:`enter`, low-rank updates :meth:`project`, tokens with features of their own
    :meth:`pool` and `n_pooled`.
    """

    n_pooled: int = 1
    """Leading tokens of a picture that the last block computes where the class token is pooled: what `pool` needs."""

    def enter(self, block: int, x: Tensor) -> Tensor:
        """The tokens that go into a block.

        Args:
            block: Its number, from 0.
            x: ``[N, T, d]``: all tokens of pictures, the class token first; of prompts only those of their common
                beginning, the context included.

        Returns:
            ``[N, T', d]``, with the class token still first, or with the class names still behind.
        """
        return x

    def project(self, block: int, which: Projection, x: Tensor, y: Tensor) -> Tensor:
        """What a projection of a block's attention gives: ``y`` ``[N, T, d]`` for its input ``x`` ``[N, T, d]``."""
        return y

    def pool(self, visual: Any, x: Tensor) -> Tensor:
        """Features ``[N, D]``, or several of each picture ``[N, F, D]``, from what the last block gives.

        Args:
            visual: The image tower, one of :func:`metatpt.clip.vit.plain_vit`.
            x: ``[N, n_pooled, d]`` where the class token is pooled, else all tokens.
        """
        pooled, _ = visual._pool(x)
        return pooled if visual.proj is None else pooled @ visual.proj  # type: ignore[no-any-return]


IDENTITY = BlockHook()


def plain_blocks(transformer: object) -> bool:
    """Whether a transformer is made of open_clip's plain blocks, which is what the functions here compute."""
    blocks: Any = getattr(transformer, "resblocks", None)
    return blocks is not None and all(type(block) is ResidualAttentionBlock for block in blocks)


def project(
    block: Any, number: int, x: Tensor, hook: BlockHook, queries: slice | Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[N, H, T, d / H]`` of a block's input ``[N, T, d]``.

    Args:
        block: The block.
        number: Which it is, for the hook.
        x: Its input.
        hook: What may change the projections.
        queries: The tokens that need queries, along T; all by default.
    """
    attention, width = block.attn, x.shape[-1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    x = block.ln_1(x)
    if queries is None:
        asking = x
        query, key, value = F.linear(x, weight, bias).chunk(3, dim=-1)
    else:
        asking = x[:, queries]
        query = F.linear(asking, weight[:width], bias[:width])
        key, value = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
    query = hook.project(number, "query", asking, query)
    key, value = hook.project(number, "key", x, key), hook.project(number, "value", x, value)
    split = (attention.num_heads, -1)
    return tuple(each.unflatten(-1, split).transpose(1, 2) for each in (query, key, value))


def finish(block: Any, number: int, x: Tensor, attended: Tensor, hook: BlockHook) -> Tensor:
    """The rest of a block, behind its attention: ``[N, T, d]`` from its input and what its heads give."""
    out = hook.project(number, "out", attended, block.attn.out_proj(attended))
    x = x + block.ls_1(out)
    return x + block.ls_2(block.mlp(block.ln_2(x)))  # type: ignore[no-any-return]
