"""A context that each picture moves (CoCoOp, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metatpt.clip import ContextLayout, FrozenCLIP
from metatpt.clip.tokens import Init
from metatpt.rng import run_seed, sample_generator
from metatpt.types import State

from .base import Head, PromptLearner
from .initial import linear
from .text import initial_context


class ConditionalPrompt(PromptLearner):
    """Shared context vectors, all moved by what a small network says to the view's feature: CoCoOp's prompt.

    The network is linear, ReLU, linear, on the normalised image feature ``[D]``, with a hidden width h of D // 16.
    Every view so has class features of its own: all C prompts go through the text tower for each.

    Parameters: ``context`` ``[n_context, d]``, ``net_1_weight`` ``[h, D]``, ``net_1_bias`` ``[h]``, ``net_2_weight``
    ``[d, h]``, ``net_2_bias`` ``[d]``.

    Args:
        clip: The frozen model.
        class_names: The C classes.
        template: Text with ``{}``. The words before it are tuned, or left out with ``init: random``; what follows the
            class name stays.
        n_context: Number of vectors; by default that of the words (tokens), or 16 with ``init: random``. Words that
            fewer vectors leave over stay as they are, behind the vectors.
        init: Start as the ``words``, or ``random`` from N(0, 0.02).

    Raises:
        ValueError: A template with no word before the class name to start from, or more vectors than words.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        class_names: Sequence[str],
        template: str,
        n_context: int | None = None,
        init: Init = "words",
    ) -> None:
        tokens = clip.tokenize(template, class_names, ContextLayout(n_context, init))
        context = initial_context(clip, tokens, template, init)
        super().__init__(clip, tokens.column)
        self._layout = clip.layout(tokens)
        with torch.no_grad():
            width = clip.model.encode_text(tokens.ids[:1].to(context.device)).shape[-1]
        hidden = max(1, width // 16)
        generator = sample_generator(run_seed(), 0, "prompt_net")
        self.learn("context", context)
        for layer, sizes in enumerate([(hidden, width), (context.shape[-1], hidden)], start=1):
            weight, bias = linear(*sizes, generator)
            self.learn(f"net_{layer}_weight", weight.to(context))
            self.learn(f"net_{layer}_bias", bias.to(context))

    def contexts(self, values: State, features: Tensor) -> Tensor:
        """The context of each view.

        Args:
            values: All parameters of one sample, ``[1, ...]`` each.
            features: ``[V, D]``.

        Returns:
            ``[V, n_context, d]``.
        """
        value = {name: each[0] for name, each in values.items()}
        hidden = F.linear(features, value["net_1_weight"], value["net_1_bias"]).relu()
        return value["context"] + F.linear(hidden, value["net_2_weight"], value["net_2_bias"])[:, None]

    def head(self, state: State | None = None) -> Head:
        """See :meth:`PromptLearner.head`. The class features, one set for each view, are computed when it is called."""
        values = self.values(state)

        def logits(features: Tensor) -> Tensor:
            # Sample by sample, so that rounding does not depend on the batch size.
            each = []
            for row, views in enumerate(features):
                own = {name: value[row : row + 1] if len(value) > 1 else value for name, value in values.items()}
                each.append(self._logits(own, views, len(features)))
            return torch.stack(each)

        return logits

    def _logits(self, values: State, features: Tensor, samples: int) -> Tensor:
        """Logits ``[V, C]`` of one sample's views ``[V, D]``, of so many samples whose graphs are held at once."""
        with torch.autocast(features.device.type, enabled=False):
            contexts = self.contexts(values, features)
        at_once = self.clip.contexts_at_once(self._layout)
        held = -(-len(features) // at_once) * samples
        parts = []
        for views, context in zip(features.split(at_once), contexts.split(at_once), strict=True):
            classes = self.clip.encode_prompts(self._layout, context, held=held)
            with torch.autocast(features.device.type, enabled=False):
                parts.append(self.clip.logit_scale * (views[:, None] @ classes.mT)[:, 0])
        return torch.cat(parts)[:, self.column]
