"""Prompts of both towers, those of the image tower mapped from those of the text tower (MaPLe, CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.clip.blocks import IDENTITY, BlockHook
from metatpt.clip.text import text_tower
from metatpt.rng import run_seed, sample_generator
from metatpt.types import State

from .base import Head, PromptLearner, class_head
from .initial import normal, uniform
from .tokens import TokenHook
from .towers import check_depth, check_image_tower, check_text_tower, n_blocks
from .visual import AppendedTokens


class MultiModalPrompt(PromptLearner):
    """Context vectors in the first blocks of the text tower, and a linear map of each to tokens in the image tower.

    The first words of the template start the context; its other words before the class name stay. In the text tower the
    vectors of blocks 1 to ``depth - 1`` replace what the block before them made of the context (of the words that stay
    nothing is replaced); in the image tower they do as VPT's do (:class:`AppendedTokens`).

    Parameters: of the part "text", which reach the pixels through the couplings, ``context`` ``[n_context, d]`` and
    with a depth above 1 ``context_deep`` ``[depth - 1, n_context, d]``, from N(0, 0.02); of the part "visual"
    ``coupling_weight`` ``[depth, w, d]`` and ``coupling_bias`` ``[depth, w]``, one map for each block, from the
    distribution that a linear layer of torch starts from. (The official code starts all maps but the first from one
    draw.)

    Args:
        clip: The frozen model.
        class_names: The C classes.
        template: Text with one ``{}`` and at least `n_context` words before it.
        n_context: Number of vectors, and of tokens in the image tower.
        depth: Blocks that have vectors of their own, in both towers.

    Raises:
        ValueError: Towers that take no tokens, or fewer blocks or words than asked for.
    """

    fixed: Tensor

    def __init__(
        self, clip: FrozenCLIP, class_names: Sequence[str], template: str, n_context: int = 2, depth: int = 9
    ) -> None:
        who, model = type(self).__name__, clip.model
        check_image_tower(who, clip)
        check_text_tower(who, clip)
        text = text_tower(model)
        tower, blocks = min(("text tower", n_blocks(text)), ("image tower", n_blocks(model.visual)), key=lambda t: t[1])
        check_depth(depth, tower, blocks)
        tokens = clip.tokenize(template, class_names)
        if not 1 <= n_context <= tokens.n_context:
            raise ValueError(
                f"n_context is {n_context}, and template {template!r} has {tokens.n_context} tokens before the class "
                f"name, where the context starts: choose from 1 to that many, or a longer template"
            )
        super().__init__(clip, tokens.column)
        self._layout = clip.layout(tokens)
        words = clip.embed_context(tokens)
        self.register_buffer("fixed", words[n_context:], persistent=False)
        self.learn("context", words[:n_context], reaches_pixels=True)
        generator = sample_generator(run_seed(), 0, "prompt")
        text_width, image_width = words.shape[1], len(model.visual.class_embedding)
        if depth > 1:
            deep = normal((depth - 1, n_context, text_width), generator)
            self.learn("context_deep", deep.to(words), reaches_pixels=True)
        for name, shape in (("weight", (depth, image_width, text_width)), ("bias", (depth, image_width))):
            start = uniform(shape, text_width**-0.5, generator)
            self.learn(f"coupling_{name}", start.to(words), part="visual")

    def head(self, state: State | None = None) -> Head:
        """See :meth:`PromptLearner.head`."""
        keep = self.clip.keeps_graph(self._layout)
        return class_head(self.class_features(state, self._compute, keep), self.clip.logit_scale, self.column)

    def image_hook(self, values: State) -> BlockHook:
        """See :meth:`PromptLearner.image_hook`."""
        return AppendedTokens(self.clip, self.visual_tokens(values))

    def visual_tokens(self, values: State) -> Tensor:
        """What the couplings make of the context of each block.

        Args:
            values: All parameters, ``[B, ...]`` or ``[1, ...]`` each.

        Returns:
            ``[B, depth, n_context, w]``.
        """
        vectors = values["context"][:, None]
        if "context_deep" in values:
            size = max(len(vectors), len(values["context_deep"]))
            both = (vectors, values["context_deep"])
            vectors = torch.cat([each.expand(size, -1, -1, -1) for each in both], dim=1)
        return vectors @ values["coupling_weight"].mT + values["coupling_bias"][:, :, None]

    def _compute(self, state: State, held: int) -> Tensor:
        context = torch.cat([state["context"], self.fixed.expand(len(state["context"]), -1, -1)], dim=1)
        hook = IDENTITY
        if "context_deep" in state:
            deep = dict(enumerate(state["context_deep"].unbind(1), start=1))
            hook = TokenHook(deep, self._layout.tokens.start, inserted=False)
        return self.clip.encode_prompts(self._layout, context, hook, held)
