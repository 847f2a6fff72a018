"""Representation tokens in the upper blocks of both towers, with a feature of their own (MMRL, CVPR 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.clip.blocks import BlockHook
from metatpt.clip.text import text_tower, token_embedding
from metatpt.rng import run_seed, sample_generator
from metatpt.types import State

from .base import Head, Part, PromptLearner, class_head, plain_names
from .initial import linear, normal
from .tokens import TokenHook
from .towers import check_image_tower, check_text_tower, n_blocks

Prediction = Literal["auto", "fused", "plain"]


class RepresentationPrompt(PromptLearner):
    """K tokens in a shared space, mapped by a linear map for each block into the upper blocks of both towers.

    In either tower they stand behind the first token (start token, class token) from block `first_block` on, and are
    replaced before each later block up to `last_block`. The words of the template stay. The image tower then gives two
    features: that of the class token, and that of the mean of the representation tokens, which has a projection of its
    own. The logits of the two are fused with weights alpha and 1 - alpha.

    Parameters: of the part "both" ``tokens`` ``[K, r]``; of the part "text" ``to_text_weight`` ``[L, d, r]`` and
    ``to_text_bias`` ``[L, d]``; of the part "visual" ``to_image_weight`` ``[L, w, r]``, ``to_image_bias`` ``[L, w]``
    and ``projection`` ``[w, D]``. As in the official code the tokens start from N(0, 0.02), the L maps into a tower
    from one draw of a linear layer, the projection from N(0, 1 / w).

    Args:
        clip: The frozen model: an image tower of plain blocks that projects its class token, and a causal text tower.
        class_names: The C classes.
        template: Text with one ``{}``.
        n_tokens: Their number K.
        width: Of the shared space, r.
        first_block: Where the tokens are inserted, counted from 1.
        last_block: The last block that has tokens of its own.
        alpha: Weight of the class token's logits, in predictions and in the loss.
        regularisation: Weight of the terms that hold class token and class features to the frozen model's. 0.5 is the
            official code's for ImageNet; for other data sets it has 0.01 (EuroSAT) to 7 (Stanford Cars).
        prediction: ``fused``; ``plain`` for the class token's logits alone; or ``auto``: plain where the parameters
            were loaded from training on another set of classes, else fused.

    Raises:
        ValueError: Towers that take no such tokens, blocks that they do not have, or an option out of its range.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        class_names: Sequence[str],
        template: str,
        n_tokens: int = 5,
        width: int = 512,
        first_block: int = 6,
        last_block: int = 12,
        alpha: float = 0.7,
        regularisation: float = 0.5,
        prediction: Prediction = "auto",
    ) -> None:
        who = type(self).__name__
        check_image_tower(who, clip, class_token=True, projection=True)
        check_text_tower(who, clip)
        _check_blocks(clip, first_block, last_block)
        for name, value in (("n_tokens", n_tokens), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; expected a weight from 0 to 1")
        if not regularisation >= 0:
            raise ValueError(f"regularisation is {regularisation}; expected a weight of at least 0")
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction is {prediction!r}; expected one of {', '.join(get_args(Prediction))}")
        tokens = clip.tokenize(template, class_names)
        super().__init__(clip, tokens.column)
        self.n_tokens, self.first_block, self.alpha = n_tokens, first_block, alpha
        self.regularisation, self.prediction = regularisation, prediction
        self._layout = clip.layout(tokens)
        self._classes = frozenset(plain_names(class_names))
        self._other_classes = False
        self._zero_shot: tuple[object, Tensor] | None = None
        table, visual = token_embedding(clip.model).weight, clip.model.visual
        generator = sample_generator(run_seed(), 0, "prompt")

        def learn(name: str, value: Tensor, part: Part) -> None:
            self.learn(name, value.to(table.device, clip.head_dtype), part)

        learn("tokens", normal((n_tokens, width), generator), "both")
        image_width, blocks = len(visual.class_embedding), last_block - first_block + 1
        maps: list[tuple[str, Part, int]] = [("to_text", "text", table.shape[1]), ("to_image", "visual", image_width)]
        for name, part, outputs in maps:
            weight, bias = linear(outputs, width, generator)
            learn(f"{name}_weight", weight.expand(blocks, -1, -1), part)
            learn(f"{name}_bias", bias.expand(blocks, -1), part)
        projection = torch.randn(visual.proj.shape, generator=generator, dtype=torch.float32)
        learn("projection", projection * image_width**-0.5, "visual")

    def head(self, state: State | None = None) -> Head:
        """See :meth:`PromptLearner.head`; encoded views hold both features, ``[B, V, 2 D]``."""
        keep = self.clip.keeps_graph(self._layout)
        classes = self.class_features(state, self._compute, keep)
        logits = class_head(classes, self.clip.logit_scale, self.column)
        plain = self.prediction == "plain" or (self.prediction == "auto" and self._other_classes)
        alpha = 1.0 if plain else self.alpha

        def fused(features: Tensor) -> Tensor:
            of_class_token, of_tokens = _apart(features)
            return logits(alpha * of_class_token + (1 - alpha) * of_tokens)  # logits are linear in features

        return fused

    def image_hook(self, values: State) -> BlockHook:
        """See :meth:`PromptLearner.image_hook`."""
        return _RepresentationHook(self._tokens(values, "to_image"), values["projection"][0])

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies of both logits, and the cosine distances to the frozen model's features.

        With T and T0 the class features and those of the frozen model, f and f0 the class token's features:
        alpha CE(f T) + (1 - alpha) CE(r T) + regularisation ((1 - mean f.f0) + (1 - mean T.T0)).

        See :meth:`PromptLearner.training_loss`; the logits that it returns are the fused ones.
        """
        self._other_classes = False
        state = self.live_state(1)
        classes = self.class_features(state, self._compute)
        plain, of_tokens = _apart(self.encode(images[None], state))
        head = class_head(classes, self.clip.logit_scale, self.column)
        both = head(plain)[0], head(of_tokens)[0]
        with torch.no_grad():
            frozen = self.clip.encode_image(images), self._frozen_classes()
        away = 2 - sum(
            F.cosine_similarity(moved, held, dim=-1).mean()
            for moved, held in ((plain[0], frozen[0]), (classes[0][self.column], frozen[1][self.column]))
        )
        own = self.alpha * F.cross_entropy(both[0], labels) + (1 - self.alpha) * F.cross_entropy(both[1], labels)
        return own + self.regularisation * away, self.alpha * both[0] + (1 - self.alpha) * both[1]

    def trained_on(self, class_names: Sequence[str]) -> None:
        """See :meth:`PromptLearner.trained_on`; other classes may follow, in plain logits."""
        self._other_classes = frozenset(plain_names(class_names)) != self._classes

    def _compute(self, state: State, held: int) -> Tensor:
        hook = TokenHook(self._tokens(state, "to_text"), self._layout.tokens.start)
        return self.clip.encode_prompts(self._layout, hook=hook, held=held)

    def _tokens(self, values: State, name: str) -> dict[int, Tensor]:
        """The tokens ``[1, K, width of the tower]`` of each block."""
        weight, bias = values[f"{name}_weight"], values[f"{name}_bias"]
        mapped = values["tokens"][:, None] @ weight.mT + bias[:, :, None]
        return dict(enumerate(mapped.unbind(1), start=self.first_block - 1))

    def _frozen_classes(self) -> Tensor:
        """Class features ``[U, D]`` of the frozen model."""
        key = self.column.device, self.clip.dtype, self.clip.autocast_dtype
        if self._zero_shot is None or self._zero_shot[0] != key:
            self._zero_shot = key, self.clip.encode_prompts(self._layout)[0]
        return self._zero_shot[1]


class _RepresentationHook(TokenHook):
    """The tokens of an image tower, and both of its features."""

    def __init__(self, tokens: dict[int, Tensor], projection: Tensor) -> None:
        super().__init__(tokens)
        self.projection = projection
        self.n_pooled = 1 + next(iter(tokens.values())).shape[1]

    def pool(self, visual: Any, x: Tensor) -> Tensor:
        """``[N, 2, D]``; see :meth:`BlockHook.pool`."""
        of_tokens = visual.ln_post(x[:, 1:]).mean(1) @ self.projection.to(x.dtype)
        return torch.stack([super().pool(visual, x[:, :1]), of_tokens], dim=1)


def _apart(features: Tensor) -> tuple[Tensor, Tensor]:
    """The two features ``[B, V, D]`` of unit length that stand side by side in encoded views ``[B, V, 2 D]``."""
    of_class_token, of_tokens = (math.sqrt(2) * features).chunk(2, dim=-1)
    return of_class_token, of_tokens


def _check_blocks(clip: FrozenCLIP, first: int, last: int) -> None:
    blocks = {"text": n_blocks(text_tower(clip.model)), "image": n_blocks(clip.model.visual)}
    fewest = min(blocks.values())
    if not 1 <= first <= last <= fewest:
        has = " and ".join(f"{number} in the {name} tower" for name, number in blocks.items())
        raise ValueError(
            f"first_block is {first} and last_block is {last}, and {clip.name} has {has}: choose both from 1 to "
            f"{fewest}, first_block not above last_block (the official code has the upper half, here "
            f"{(fewest + 1) // 2} to {fewest})"
        )
