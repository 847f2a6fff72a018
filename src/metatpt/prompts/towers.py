"""What prompt learners ask of the towers that they reach into; each check says what a tower lacks."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import VisionTransformer

from metatpt.clip import FrozenCLIP
from metatpt.clip.blocks import plain_blocks
from metatpt.clip.packed import packable
from metatpt.clip.text import text_tower
from metatpt.clip.vit import plain_vit

_ELSE = "use another --model.clip, or TextPrompt, which goes with every model"


def n_blocks(tower: Any) -> int:
    """Number of blocks of a tower of open_clip's; 0 where it has none."""
    return len(getattr(getattr(tower, "transformer", None), "resblocks", ()))


def check_image_tower(who: str, clip: FrozenCLIP, class_token: bool = False, projection: bool = False) -> None:
    """Refuse a model whose image tower takes no tokens.

    Args:
        who: The learner.
        clip: The model.
        class_token: Whether the tower must pool its class token.
        projection: Whether it must project that.

    Raises:
        ValueError: Saying what the tower lacks.
    """
    visual = clip.model.visual
    if type(visual) is not VisionTransformer:
        lacks = f"{type(visual).__name__} is not open_clip's VisionTransformer"
    elif not plain_blocks(visual.transformer):
        lacks = f"its blocks are not open_clip's plain ones but {type(visual.transformer.resblocks[0]).__name__}"
    elif not plain_vit(visual):
        lacks = "it gives other features than its pooled class token or patches"
    elif class_token and visual.pool_type != "tok":
        lacks = "it does not pool its class token"
    elif projection and visual.proj is None:
        lacks = "it does not project its features"
    else:
        return
    raise ValueError(f"{who} puts tokens into the image tower, where that of {clip.name} takes none: {lacks}; {_ELSE}")


def check_text_tower(who: str, clip: FrozenCLIP) -> None:
    """Refuse a model inside whose text tower no tokens can be put.

    Raises:
        ValueError: Saying what the tower has to be.
    """
    if not packable(clip.model):
        raise ValueError(
            f"{who} puts tokens inside the text tower, which has to be causal, of open_clip's plain blocks and pooled "
            f"at the end token; {type(text_tower(clip.model)).__name__} of {clip.name} is not: {_ELSE}"
        )


def check_depth(depth: int, tower: str, blocks: int) -> None:
    """Refuse a depth that a tower does not have.

    Raises:
        ValueError: Naming the depth and the number of blocks.
    """
    if not 1 <= depth <= blocks:
        raise ValueError(f"depth is {depth}, and the {tower} has {blocks} blocks: choose a depth from 1 to {blocks}")
