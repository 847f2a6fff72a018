"""The causal text tower for prompts that share their beginning: each token is computed once.

All class prompts begin with the start token and, mostly, the same context. Attention is causal, so the keys and values
of that prefix do not depend on what follows: they are computed once per sample, and every class attends to them. Behind
the prefix the classes are packed without padding; dense layers run on the packed tokens, attention runs per group of
classes of equal length, and the last block computes each class's end token alone. All of this is exact. Context vectors
that stand behind class names, or that each class has of its own, are tokens behind the prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BlockHook, finish, plain_blocks, project
from .budget import run
from .text import Guard, Passes, check_context, pool_type, put_context, text_tower
from .tokens import PromptTokens


def packable(model: nn.Module) -> bool:
    """Whether the tower is causal, of open_clip's plain blocks, and pooled at the end token."""
    tower: Any = text_tower(model)
    return (
        plain_blocks(getattr(tower, "transformer", None))
        and getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "cls_emb", None) is None  # CoCa's extra token attends to padding
        and pool_type(tower) in ("argmax", "eos")
    )


@dataclass(frozen=True)
class _Chunk:
    """Classes that go through together, T tokens in all.

    Attributes:
        ids: ``[T]``.
        position: ``[T]``: place of each token in its prompt.
        ends: Place of each class's end token among the T.
        rows: The classes.
        place: ``[1, classes * m]``: place of each one's m own context vectors among the T.
        groups: ``(length, number of classes)`` of each run of equal lengths.
    """

    ids: Tensor
    position: Tensor
    ends: Tensor
    rows: Tensor
    place: Tensor
    groups: list[tuple[int, int]]


class PackedPrompts:
    """Prompts of one class list, laid out for one tower.

    Args:
        model: An open_clip model for which :func:`packable` holds.
        tokens: Its prompts.
    """

    takes_hooks = True
    probed = 32
    """Rows on which memory is measured."""

    def __init__(self, model: nn.Module, tokens: PromptTokens) -> None:
        self.tower: Any = text_tower(model)
        self.tokens = tokens
        ids = tokens.ids
        if pool_type(self.tower) == "eos":
            eos: int = getattr(self.tower, "eos_id", getattr(self.tower, "text_eos_id", -1))
            end = ids.eq(eos).int().argmax(1)
        else:
            end = ids.argmax(1)
        self.prefix = tokens.prefix
        self.n_shared = tokens.n_shared
        tail = (end + 1 - self.prefix).tolist()
        self.order = sorted(range(len(tail)), key=lambda row: tail[row])
        self.tail = [tail[row] for row in self.order]
        self._prefix_ids = ids[:1, : self.prefix]
        self._prefix_place = tokens.place[:1, : self.n_shared]
        self._laid_out: tuple[object, list[_Chunk], Tensor] | None = None

    @property
    def size(self) -> int:
        """Number of tokens behind the prefix: what a chunk is counted in."""
        return sum(self.tail)

    @property
    def row(self) -> int:
        """What the memory of a token hangs on: the length of the prefix."""
        return self.prefix

    def features(self, context: Tensor | None, passes: Passes, guard: Guard, hook: BlockHook) -> Tensor:
        """Text features.

        Args:
            context: ``[B, n, d]``, or ``[B, U, n, d]`` where no vector is shared, or None for the words of the prompts
                themselves.
            passes: How the classes go through, `passes.chunk` counting tokens.
            guard: Context manager to run the tower in, in the recomputation as well.
            hook: What a prompt learner changes on the way.

        Returns:
            ``[B, U, D]``, not normalised (B = 1 without a context).
        """
        tower = self.tower
        device = tower.token_embedding.weight.device
        if self._prefix_ids.device != device:  # a copy would wait for all work on a GPU
            with torch.inference_mode(False):  # a later backward pass may keep it
                self._prefix_ids, self._prefix_place = self._prefix_ids.to(device), self._prefix_place.to(device)
        embedded = tower.token_embedding(self._prefix_ids)
        if context is not None:
            check_context(context, self.tokens)
            shared = context.flatten(1, -2)[:, : self.n_shared]
            embedded = put_context(embedded, shared, self._prefix_place)
        with guard():
            position = tower.positional_embedding[: self.prefix]
            cached = self._encode_prefix(embedded + position.to(embedded.dtype), hook)

        own = context if self.n_shared < self.tokens.n_context else None

        def encode(chunk: _Chunk, own: Tensor | None, *cached: Tensor) -> Tensor:
            with guard():
                return self._encode_tails(chunk, own, cached, hook)

        results = []
        chunks, back = self._lay_out(max(1, passes.chunk // len(embedded)), device)
        for chunk in chunks:  # the same with and without a graph, to the last bit
            results.append(run(encode, chunk, own, *cached, recompute=passes.recompute))
        return torch.cat(results, dim=1)[:, back]

    def _lay_out(self, size: int, device: torch.device) -> tuple[list[_Chunk], Tensor]:
        """Chunks of at most `size` tokens where a class has no more, and each class's place among their results."""
        key = (size, device)
        if self._laid_out is None or self._laid_out[0] != key:
            bounds, first, held = [], 0, 0
            for row, length in enumerate(self.tail):
                if held + length > size and row > first:
                    bounds.append((first, row))
                    first, held = row, 0
                held += length
            bounds.append((first, len(self.tail)))
            with torch.inference_mode(False):  # a later backward pass may keep them
                back = torch.tensor(self.order).argsort().to(device)
                self._laid_out = key, [self._chunk(*each, device) for each in bounds], back
        return self._laid_out[1:]

    def _chunk(self, first: int, last: int, device: torch.device) -> _Chunk:
        lengths, rows = self.tail[first:last], self.order[first:last]
        position = torch.cat([torch.arange(length) for length in lengths]) + self.prefix
        row = torch.tensor(rows).repeat_interleave(torch.tensor(lengths))
        begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)[:, None] - self.prefix
        place = self.tokens.place[rows, self.n_shared :] + begins
        return _Chunk(
            ids=self.tokens.ids[row, position].to(device),
            position=position.to(device),
            ends=(torch.tensor(lengths).cumsum(0) - 1).to(device),
            rows=torch.tensor(rows).to(device),
            place=place.flatten()[None].to(device),
            groups=_groups(lengths),
        )

    def _encode_prefix(self, x: Tensor, hook: BlockHook) -> list[Tensor]:
        """Keys and values of the prefix in every block, ``[B, H, P, d / H]`` each, keys first."""
        cached: list[Tensor] = []
        blocks = self.tower.transformer.resblocks
        for number, block in enumerate(blocks):
            x = hook.enter(number, x)
            query, key, value = project(block, number, x, hook)
            cached += [key, value]
            if number + 1 < len(blocks):
                attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
                x = finish(block, number, x, attended.transpose(1, 2).flatten(2), hook)
        return cached

    def _encode_tails(self, chunk: _Chunk, own: Tensor | None, cached: Sequence[Tensor], hook: BlockHook) -> Tensor:
        """Features ``[B, classes, D]`` of a chunk; `own` is the context where vectors of it stand there."""
        tower = self.tower
        table = tower.token_embedding
        x = table(chunk.ids)
        if own is not None:
            # Copies of shared vectors, so that the backward pass adds up their gradients in a fixed order.
            of_each = own[:, None].expand(-1, len(chunk.rows), -1, -1) if own.ndim == 3 else own[:, chunk.rows]
            x = put_context(x[None], of_each[:, :, self.n_shared :].flatten(1, 2), chunk.place)
        x = x + tower.positional_embedding[chunk.position].to(table.weight.dtype)
        x = x.expand(cached[0].shape[0], -1, -1)
        blocks = tower.transformer.resblocks
        for number, block in enumerate(blocks):
            last = number + 1 == len(blocks)
            query, key, value = project(block, number, x, hook, chunk.ends if last else None)
            attended = _attend(query, key, value, cached[2 * number], cached[2 * number + 1], chunk.groups, last)
            x = finish(block, number, x[:, chunk.ends] if last else x, attended, hook)
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


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    groups: list[tuple[int, int]],
    only_ends: bool,
) -> Tensor:
    """Attention of packed tokens ``[B, H, T, h]`` to the prefix and to their own class, as ``[B, T or classes, d]``.

    With `only_ends` there is one query for each class, that of its end token.
    """
    query = query / math.sqrt(query.shape[-1])
    to_prefix = query @ prefix_key.mT  # all classes in one product, with no copy of the prefix for each
    longest = groups[-1][0]
    later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu(1)
    sizes = [length * classes for length, classes in groups]
    asking = [classes for _, classes in groups] if only_ends else sizes
    # Split, not sliced: the backward pass of a slice fills the whole with zeros.
    parts = (query.split(asking, 2), to_prefix.split(asking, 2), key.split(sizes, 2), value.split(sizes, 2))
    prefix_weights, from_own = [], []
    for (length, classes), *part in zip(groups, *parts, strict=True):
        q, prefix_scores, k, v = (each.unflatten(2, (classes, -1)) for each in part)
        scores = q @ k.mT
        if not only_ends:
            scores = scores.masked_fill(later[:length, :length], -math.inf)
        weights = torch.cat([prefix_scores, scores], dim=-1).softmax(-1)
        of_prefix, of_own = weights.split([prefix_scores.shape[-1], length], dim=-1)
        prefix_weights.append(of_prefix.flatten(2, 3))
        from_own.append((of_own @ v).flatten(2, 3))
    attended = torch.cat(prefix_weights, dim=2) @ prefix_value + torch.cat(from_own, dim=2)
    return attended.transpose(1, 2).flatten(2)
