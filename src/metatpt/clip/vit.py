"""The image tower of open_clip's plain vision transformers, with each token and each gradient once.

open_clip's modules in parts (:mod:`metatpt.clip.blocks`) on fused attention; where the class token is pooled, the last
block computes that token alone (and those that a hook pools). The same features and gradients as ``encode_image``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor

from .blocks import BlockHook, finish, plain_blocks, project


def plain_vit(visual: Any) -> bool:
    """Whether :func:`encode_pictures` computes what this image tower does."""
    return (
        type(visual) is VisionTransformer
        and plain_blocks(visual.transformer)
        and visual.attn_pool is None
        and visual.pool_type in ("tok", "avg")
        and not visual.output_tokens
    )


def encode_pictures(visual: Any, pixels: Tensor, hook: BlockHook) -> Tensor:
    """Image features.

    Args:
        visual: A tower for which :func:`plain_vit` holds.
        pixels: ``[N, 3, R, R]``, as the model takes them.
        hook: What a prompt learner changes on the way.

    Returns:
        ``[N, D]``, or what the hook pools; not normalised.
    """
    x = visual._embeds(pixels)
    blocks = visual.transformer.resblocks
    for number, block in enumerate(blocks):
        x = hook.enter(number, x)
        pooled = slice(0, hook.n_pooled) if number + 1 == len(blocks) and visual.pool_type == "tok" else None
        query, key, value = project(block, number, x, hook, pooled)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = finish(block, number, x if pooled is None else x[:, pooled], attended, hook)
    return hook.pool(visual, x)
