"""Deep prompts, plain and slow: open_clip's own forward, with torch's hooks on its modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.clip.text import token_embedding


@contextmanager
def _while(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _put(x: Tensor, tokens: Tensor, first: int) -> Tensor:
    return torch.cat([x[:, :first], tokens.expand(len(x), -1, -1), x[:, first + len(tokens) :]], dim=1)


def image_features(clip: FrozenCLIP, images: Tensor, tokens: Sequence[Tensor]) -> Tensor:
    """Features of pictures with tokens ``[n, w]`` for each of the first blocks at the end of the sequence."""
    visual = clip.model.visual
    handles = [visual.ln_pre.register_forward_pre_hook(lambda m, args: _put(args[0], tokens[0], args[0].shape[1]))]
    for block, own in list(zip(visual.transformer.resblocks, tokens, strict=False))[1:]:
        handles.append(
            block.register_forward_pre_hook(lambda m, args, own=own: _put(args[0], own, args[0].shape[1] - len(own)))
        )
    if visual.pool_type == "avg":  # over the patches alone
        handles.append(visual.transformer.register_forward_hook(lambda m, args, out: out[:, : -len(tokens[0])]))
    mean, std = (torch.tensor(each).to(images).view(3, 1, 1) for each in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))
    with _while(handles):
        return F.normalize(clip.model.encode_image((images - mean) / std), dim=-1)


def class_features(clip: FrozenCLIP, texts: list[str], context: Sequence[Tensor]) -> Tensor:
    """Features of texts whose first words are vectors ``[n, d]``, of their own for each of the first blocks."""
    tower = getattr(clip.model, "text", clip.model)
    handles = [token_embedding(clip.model).register_forward_hook(lambda m, args, out: _put(out, context[0], 1))]
    for block, own in list(zip(tower.transformer.resblocks, context, strict=False))[1:]:
        handles.append(block.register_forward_pre_hook(lambda m, args, own=own: _put(args[0], own, 1)))
    with _while(handles):
        return F.normalize(clip.model.encode_text(clip.tokenizer(texts)), dim=-1)
