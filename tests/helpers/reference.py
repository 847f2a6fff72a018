"""MetaTPT for one picture, plain and slow: all views on the tape, torch's own optimisers, first order only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metatpt.modules import MetaTPTModule
from metatpt.types import Batch
from metatpt.views import affine, bounded, sample_views, warp


def entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def metatpt(module: MetaTPTModule, batch: Batch) -> Tensor:
    """Probabilities ``[C]`` of the one picture of a batch (schedules, fixed views, both predictions)."""
    clip, tokens = module.clip, module.clip.tokenize("a photo of a {}.", module.class_names)
    start, n = tokens.start, tokens.n_context
    raw0, flip = sample_views("crop", module.bounds, module.n_views - 1, batch.aspect, batch.index.tolist(), 0)
    raw0 = raw0.to(clip.head_dtype)

    def classes(context: Tensor) -> Tensor:
        embedded = clip.model.token_embedding(tokens.ids)
        embedded = torch.cat([embedded[:, :start], context.expand(len(embedded), -1, -1), embedded[:, start + n :]], 1)
        x = clip.model.transformer(embedded + clip.model.positional_embedding, attn_mask=clip.model.attn_mask)
        x = clip.model.ln_final(x)[torch.arange(len(x)), tokens.ids.argmax(1)] @ clip.model.text_projection
        return F.normalize(x, dim=-1)

    def look(raw: Tensor) -> Tensor:
        pixels = warp(batch.canvas, affine(bounded(raw, module.bounds), flip, batch.aspect), clip.preprocessing.size)
        return clip.encode_image(torch.cat([batch.image.to(raw.dtype), pixels[0]]))

    def probs(features: Tensor, context: Tensor) -> Tensor:
        return (clip.logit_scale * features @ classes(context).T).softmax(-1)

    context0 = clip.model.token_embedding.weight[tokens.ids[0, start : start + n]].detach().clone()
    first = probs(look(raw0), context0).detach()
    chosen = entropy(first).argsort()[: max(1, int(module.selection * module.n_views + 1e-9))]
    union = sorted({0, *chosen.tolist()})

    def inner(features: Tensor, context: Tensor) -> Tensor:
        return entropy(probs(features, context)[chosen].mean(0))

    def outer(features: Tensor, context: Tensor, q: Tensor) -> Tensor:
        return -(q * probs(features, context)[union].log()).sum(-1).mean()

    def learn(context: Tensor) -> Tensor:
        raw = raw0.clone().requires_grad_()
        for _ in range(module.inner_steps if module.augmentation == "episodic" else 0):
            (gradient,) = torch.autograd.grad(inner(look(raw), context.detach()), raw)
            length = gradient.norm(dim=-1, keepdim=True)
            raw = (raw - module.inner_lr * gradient / length.clamp(min=1e-300)).detach().requires_grad_()
        return raw.detach()

    context = context0.clone().requires_grad_()
    rate = module.outer_lr if module.outer_lr is not None else module.outer_lr_relative * float(context0.std())
    adam = torch.optim.AdamW([context], lr=rate, weight_decay=0.01)
    raw, q = (raw0.clone().requires_grad_() if module.schedule == "joint" else learn(context)), None
    for _ in range(module.outer_steps):
        if module.schedule == "nested":
            raw = learn(context)
        features = look(raw) if module.schedule == "joint" else look(raw).detach()
        if q is None:
            q = probs(features, context)[union].mean(0).detach()
        loss = outer(features, context, q)
        if module.schedule == "joint":
            loss = loss + inner(features, context)
            gradient, context.grad = torch.autograd.grad(loss, [raw, context])
            length = gradient.norm(dim=-1, keepdim=True)
            raw = (raw - module.inner_lr * gradient / length.clamp(min=1e-300)).detach().requires_grad_()
        else:
            (context.grad,) = torch.autograd.grad(loss, context)
        adam.step()
    final = probs(look(raw), context).detach()
    if module.predict == "original":
        return final[0]
    weights = (-entropy(final[union]) / module.ensemble_temperature).softmax(0)
    return (weights[:, None] * final[union]).sum(0)
