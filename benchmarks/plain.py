"""Test-time prompt tuning as the official code does it: the plain thing that the measuring scripts compare with.

After https://github.com/azshue/TPT: every class at 77 tokens through open_clip's own modules, at every step; views
encoded once; one image at a time; after the step view 0 is encoded again, and so are all classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metatpt.clip import FrozenCLIP, PromptTokens


class PlainTPT:
    """One step of TPT on one image.

    Args:
        clip: Holds the open_clip model, in OpenAI's layout.
        tokens: The class prompts.
    """

    def __init__(self, clip: FrozenCLIP, tokens: PromptTokens) -> None:
        self.clip = clip
        self.model: Any = clip.model
        self.tokens = tokens
        self.context = clip.embed_context(tokens).clone()

    def text_features(self, context: Tensor, classes: slice = slice(None)) -> Tensor:
        """``[U, D]``: each class's row of 77 tokens, with the context in its place."""
        model, tokens = self.model, self.tokens
        ids = tokens.ids[classes]
        rows = model.token_embedding(ids)
        before, after = tokens.start, tokens.start + tokens.n_context
        rows = torch.cat([rows[:, :before], context.expand(len(ids), -1, -1), rows[:, after:]], dim=1)
        x = model.transformer(rows + model.positional_embedding, attn_mask=model.attn_mask)
        x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]
        return F.normalize(x @ model.text_projection, dim=-1)

    def image_features(self, views: Tensor) -> Tensor:
        """``[V, D]`` of pixels as the model takes them."""
        with torch.no_grad():
            return F.normalize(self.model.encode_image(views), dim=-1)

    def step(self, views: Tensor, selection: float = 0.1, chunk: int | None = None) -> Tensor:
        """Logits ``[C]`` of view 0 after one step.

        Args:
            views: ``[V, 3, R, R]``, as the model takes them, view 0 the original.
            selection: Share of confident views.
            chunk: Classes that go through the text tower at once. With a chunk the gradient that the loss sends to
                the class features is replaced by a constant one: the same work, without all classes' graphs at once.
        """
        context = self.context.clone().requires_grad_()
        optimizer = torch.optim.AdamW([context], lr=5e-3)
        image = self.image_features(views)
        classes = len(self.tokens.ids)
        if chunk is None:
            log_probs = (self.clip.logit_scale * image @ self.text_features(context).T).log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            confident = log_probs[entropy.argsort()[: max(1, int(len(views) * selection))]]
            mean = confident.logsumexp(0) - torch.tensor(float(len(confident))).log()
            (-(mean.exp() * mean).sum()).backward()
        else:
            for first in range(0, classes, chunk):
                features = self.text_features(context, slice(first, first + chunk))
                features.backward(torch.full_like(features, 1e-3))
        optimizer.step()
        with torch.no_grad():
            original = self.image_features(views[:1])
            size = chunk or classes
            text = torch.cat([self.text_features(context, slice(f, f + size)) for f in range(0, classes, size)])
            return (self.clip.logit_scale * original @ text.T)[0]
