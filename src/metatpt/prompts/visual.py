"""Tunable tokens in the image tower (VPT, ECCV 2022), as the prompt learners of CLIP place them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.clip.blocks import BlockHook
from metatpt.rng import run_seed, sample_generator
from metatpt.types import State

from .initial import normal
from .template import TemplatePrompt
from .tokens import TokenHook
from .towers import check_depth, check_image_tower, n_blocks


class AppendedTokens(TokenHook):
    """Tokens at the end of an image tower's sequence.

    Those of block 0 are normalised as the patches are (by the tower's ``ln_pre``, which works on each token alone);
    those of later blocks take the places of what the block before them made of the tokens, as they are. A tower that
    pools over its patches goes on doing so: the mean, which its projection was trained on, leaves the tokens out.

    Args:
        clip: A model whose image tower takes them (:func:`check_takes_tokens`).
        tokens: ``[1, depth, n, w]``: those of blocks 0 to ``depth - 1``; later blocks go on with the last ones.
    """

    def __init__(self, clip: FrozenCLIP, tokens: Tensor) -> None:
        normalised = clip.model.visual.ln_pre(tokens[:, 0].to(clip.dtype))
        super().__init__({0: normalised, **{block: tokens[:, block] for block in range(1, tokens.shape[1])}}, None)
        self._n_tokens = tokens.shape[2]

    def pool(self, visual: Any, x: Tensor) -> Tensor:
        """See :meth:`BlockHook.pool`."""
        return super().pool(visual, x[:, : -self._n_tokens] if visual.pool_type == "avg" else x)


class VisualPrompt(TemplatePrompt):
    """Tokens in the image tower, and the template as it is.

    Parameters, all of the part "visual": ``visual`` ``[n_visual, w]``, the tokens that are appended before ``ln_pre``;
    with a depth above 1 also ``visual_deep`` ``[depth - 1, n_visual, w]``, those that replace them in blocks 1 to
    ``depth - 1``. They start from N(0, 0.02).

    Args:
        clip: The frozen model.
        class_names: The C classes.
        template: Text with one ``{}``.
        n_visual: Number of tokens.
        depth: Blocks that have tokens of their own: 1 is VPT's shallow kind, all blocks its deep one.

    Raises:
        ValueError: An image tower that takes no tokens, fewer than one of them, or a depth that its blocks do not have.
    """

    def __init__(
        self, clip: FrozenCLIP, class_names: Sequence[str], template: str, n_visual: int = 4, depth: int = 1
    ) -> None:
        check_image_tower(type(self).__name__, clip)
        if n_visual < 1:
            raise ValueError(f"n_visual is {n_visual}; expected at least 1")
        check_depth(depth, "image tower", n_blocks(clip.model.visual))
        super().__init__(clip, class_names, [template])
        start = clip.model.visual.class_embedding
        generator = sample_generator(run_seed(), 0, "prompt")
        tokens = normal((depth, n_visual, len(start)), generator).to(start.device, clip.head_dtype)
        self.learn("visual", tokens[0], part="visual")
        if depth > 1:
            self.learn("visual_deep", tokens[1:], part="visual")

    def image_hook(self, values: State) -> BlockHook:
        """See :meth:`PromptLearner.image_hook`."""
        first = values["visual"][:, None]
        deep = values.get("visual_deep")
        return AppendedTokens(self.clip, first if deep is None else torch.cat([first, deep], dim=1))
