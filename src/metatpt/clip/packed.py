"""The causal text tower for prompts that share their beginning: each token is computed once.

All class prompts begin with the start token and the same context. Attention is causal, so the keys and values of that
prefix do not depend on what follows: they are computed once per sample, and every class attends to them. Behind the
prefix the classes are packed without padding; dense layers run on the packed tokens, attention runs per group of
classes of equal length, and the last block computes each class's end token alone. All of this is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .budget import Budget, bytes_per_token
from .text import Guard, text_tower
from .tokens import PromptTokens


def packable(model: nn.Module) -> bool:
    """Whether the tower is causal, of open_clip's plain blocks, and pooled at the end token."""
    tower: Any = text_tower(model)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    return (
        blocks is not None
        and all(type(block) is ResidualAttentionBlock for block in blocks)
        and getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "cls_emb", None) is None  # CoCa's extra token attends to padding
        and _pool(tower) in ("argmax", "eos")
    )


def _pool(tower: Any) -> str | None:
    """Where the features are taken; in OpenAI's layout the tower is the model, and says that it means the text's."""
    return getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))


class PackedPrompts:
    """Prompts of one class list, laid out for one tower.

    Args:
        model: An open_clip model for which :func:`packable` holds.
        tokens: Its prompts.
    """

    def __init__(self, model: nn.Module, tokens: PromptTokens) -> None:
        self.tower: Any = text_tower(model)
        self.tokens = tokens
        ids = tokens.ids
        if _pool(self.tower) == "eos":
            eos: int = getattr(self.tower, "eos_id", getattr(self.tower, "text_eos_id", -1))
            end = ids.eq(eos).int().argmax(1)
        else:
            end = ids.argmax(1)
        self.prefix = min(tokens.start + tokens.n_context, int(end.min()))
        tail = (end + 1 - self.prefix).tolist()
        self.order = sorted(range(len(tail)), key=lambda row: tail[row])
        self.tail = [tail[row] for row in self.order]
        self.tail_ids = [ids[row, self.prefix : self.prefix + tail[row]] for row in self.order]

    def features(self, context: Tensor | None, budget: Budget, guard: Guard) -> Tensor:
        """Text features.

        Args:
            context: ``[B, n_context, d]``, or None for the words of the prompts themselves.
            budget: Of memory; where all classes need more they go through in chunks that are recomputed in the
                backward pass.
            guard: Context manager to run the tower in, in the recomputation as well.

        Returns:
            ``[B, U, D]``, not normalised (B = 1 without a context).
        """
        tower = self.tower
        device = tower.token_embedding.weight.device
        embedded = tower.token_embedding(self.tokens.ids[:1, : self.prefix].to(device))
        batch = 1
        if context is not None:
            batch = context.shape[0]
            before, after = self.tokens.start, self.tokens.start + self.tokens.n_context
            whole = embedded.expand(batch, -1, -1)
            embedded = torch.cat([whole[:, :before], context.to(embedded.dtype), whole[:, after:]], dim=1)
        with guard():
            cached = self._encode_prefix(embedded + tower.positional_embedding[: self.prefix].to(embedded.dtype))
        per_token = batch * bytes_per_token(embedded.shape[-1], len(tower.transformer.resblocks), embedded.dtype)
        recompute = torch.is_grad_enabled() and context is not None and budget.recompute(sum(self.tail), per_token)

        def encode(first: int, last: int, *cached: Tensor) -> Tensor:
            with guard():
                return self._encode_tails(first, last, *cached)

        results = []
        for first, last in self._chunks(budget.chunk(per_token)):  # the same with and without a graph, to the last bit
            if recompute:
                # Non-reentrant: the reentrant kind cannot be used with autograd.grad.
                results.append(checkpoint(encode, first, last, *cached, use_reentrant=False))
            else:
                results.append(encode(first, last, *cached))
        sorted_features = torch.cat(results, dim=1)
        back = torch.tensor(self.order, device=device).argsort()
        return sorted_features[:, back]

    def _chunks(self, tokens: int) -> list[tuple[int, int]]:
        chunks, first, held = [], 0, 0
        for row, length in enumerate(self.tail):
            if held + length > tokens and row > first:
                chunks.append((first, row))
                first, held = row, 0
            held += length
        return [*chunks, (first, len(self.tail))]

    def _encode_prefix(self, x: Tensor) -> list[Tensor]:
        """Keys and values of the prefix in every block, ``[B, H, P, d / H]`` each, keys first."""
        cached: list[Tensor] = []
        blocks = self.tower.transformer.resblocks
        for number, block in enumerate(blocks):
            query, key, value = _project(block, x)
            cached += [key, value]
            if number + 1 < len(blocks):
                attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
                x = _finish(block, x, attended.transpose(1, 2).flatten(2))
        return cached

    def _encode_tails(self, first: int, last: int, *cached: Tensor) -> Tensor:
        tower = self.tower
        lengths = self.tail[first:last]
        device = cached[0].device
        ids = torch.cat(self.tail_ids[first:last]).to(device)
        position = torch.cat([torch.arange(length) for length in lengths]).to(device) + self.prefix
        x = tower.token_embedding(ids) + tower.positional_embedding[position].to(tower.token_embedding.weight.dtype)
        x = x.expand(cached[0].shape[0], -1, -1)
        groups = _groups(lengths)
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        blocks = tower.transformer.resblocks
        for number, block in enumerate(blocks):
            query, key, value = _project(block, x)
            only_ends = number + 1 == len(blocks)
            attended = _attend(query, key, value, cached[2 * number], cached[2 * number + 1], groups, only_ends)
            x = _finish(block, x[:, ends] if only_ends else x, attended)
        x = tower.ln_final(x)
        projection = tower.text_projection
        if isinstance(projection, nn.Linear):
            x = projection(x)
        elif projection is not None:
            x = x @ projection
        assert isinstance(x, Tensor)
        return x


def _groups(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """``(length, number of classes)`` of each run of equal lengths."""
    groups: list[tuple[int, int]] = []
    for length in lengths:
        if groups and groups[-1][0] == length:
            groups[-1] = (length, groups[-1][1] + 1)
        else:
            groups.append((length, 1))
    return groups


def _project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, T, d / H]`` of a block's input ``[B, T, d]``."""
    attention = block.attn
    packed = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = packed.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value


def _finish(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block, behind its attention."""
    x = x + block.ls_1(block.attn.out_proj(attended))
    return x + block.ls_2(block.mlp(block.ln_2(x)))  # type: ignore[no-any-return]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    groups: list[tuple[int, int]],
    only_ends: bool,
) -> Tensor:
    """Attention of packed tokens ``[B, H, T, h]`` to the prefix and to their own class, as ``[B, T or classes, d]``."""
    batch, heads, _, head_width = query.shape
    prefix = prefix_key.shape[2]
    attended, first = [], 0
    for length, classes in groups:
        part = slice(first, first + length * classes)
        first += length * classes
        shape = (batch, heads, classes, length, head_width)
        q, k, v = (each[:, :, part].reshape(shape).transpose(1, 2) for each in (query, key, value))
        shared = (batch, classes, heads, prefix, head_width)
        k = torch.cat([prefix_key[:, None].expand(shared), k], dim=3)
        v = torch.cat([prefix_value[:, None].expand(shared), v], dim=3)
        if only_ends:
            q, mask = q[:, :, :, -1:], None
        else:
            place = torch.arange(prefix + length, device=query.device)
            mask = place <= place[prefix:, None]
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask)
        attended.append(out.transpose(1, 2).reshape(batch, -1, heads * head_width))
    return torch.cat(attended, dim=1)
