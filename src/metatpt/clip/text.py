"""Class features for a tunable context, through open_clip's own forward: it serves any text tower.

The context is put into the output of the tower's token embedding. :mod:`metatpt.clip.packed` is the quick way with the
same results, for causal towers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from .blocks import BlockHook
from .budget import run
from .tokens import PromptTokens

Guard = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Passes:
    """How much goes through a tower at once, and whether that is computed again in the backward pass."""

    chunk: int
    recompute: bool


def text_tower(model: nn.Module) -> nn.Module:
    """The module that holds the text tower: ``model.text``, or the model itself for OpenAI's layout."""
    tower = getattr(model, "text", model)
    assert isinstance(tower, nn.Module)
    return tower


def token_embedding(model: nn.Module) -> nn.Embedding:
    """The tower's table of token vectors, Hugging Face towers included."""
    tower = text_tower(model)
    table = getattr(tower, "token_embedding", None)
    if table is None:
        table = tower.transformer.get_input_embeddings()  # type: ignore[operator, union-attr]
    assert isinstance(table, nn.Embedding)
    return table


def pool_type(tower: Any) -> str | None:
    """Where the features are taken; in OpenAI's layout the tower is the model, and says that it means the text's."""
    return getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))


def check_context(context: Tensor, tokens: PromptTokens) -> None:
    """Refuse a context that does not fit the prompts.

    Raises:
        ValueError: Its shape is neither ``[B, n, d]`` nor, where no vector is shared, ``[B, U, n, d]``.
    """
    rows, n = tokens.place.shape
    shapes = [(n,), (rows, n)] if tokens.prefix <= tokens.start else [(n,)]
    if tuple(context.shape[1:-1]) not in shapes:
        expected = " or ".join(f"[B, {', '.join(map(str, shape))}, d]" for shape in shapes)
        raise ValueError(f"Expected a context of shape {expected} for these prompts, got {list(context.shape)}")


def put_context(embedded: Tensor, vectors: Tensor, place: Tensor) -> Tensor:
    """Put context vectors in the place of tokens.

    Args:
        embedded: ``[1, T, d]`` or ``[N, T, d]``.
        vectors: ``[N, n, d]``.
        place: Where each stands among the T, ``[1, n]`` or ``[N, n]``.

    Returns:
        ``[N, T, d]``.
    """
    index = place[..., None].expand(len(vectors), -1, vectors.shape[-1])
    return embedded.expand(len(vectors), -1, -1).scatter(1, index, vectors.to(embedded.dtype))


def trimmable(model: nn.Module) -> bool:
    """Whether padding at the end of a row changes nothing, and the tower takes shorter rows.

    Hugging Face towers do, which mask padding. open_clip's own take full rows only, and most of those that are not
    packed (:mod:`metatpt.clip.packed`) attend to padding.
    """
    return isinstance(text_tower(model), HFTextEncoder)


class PlainPrompts:
    """Prompts of one class list, for any tower.

    Args:
        model: An open_clip model.
        tokens: Its prompts.
    """

    takes_hooks = False
    probed = 2

    def __init__(self, model: nn.Module, tokens: PromptTokens) -> None:
        self.model: Any = model
        self.tokens = tokens
        self.row = int(tokens.length.max()) if trimmable(model) else tokens.ids.shape[1]
        self._ids = tokens.ids[:, : self.row]
        self._place = tokens.place

    @property
    def size(self) -> int:
        """Number of rows: what a chunk is counted in."""
        return len(self.tokens.ids)

    def features(self, context: Tensor | None, passes: Passes, guard: Guard, hook: BlockHook) -> Tensor:
        """Text features; see :meth:`metatpt.clip.packed.PackedPrompts.features`. There is no place for a hook."""
        table = token_embedding(self.model)
        device = table.weight.device
        if self._ids.device != device:  # a copy would wait for all work on a GPU
            with torch.inference_mode(False):  # a later backward pass may keep it
                self._ids, self._place = self._ids.to(device), self._place.to(device)
        ids = self._ids
        if context is not None:
            check_context(context, self.tokens)
        batch = 1 if context is None else len(context)
        rows = ids.expand(batch, *ids.shape).flatten(0, 1)
        owner = torch.arange(batch, device=ids.device).repeat_interleave(len(ids))
        number = torch.arange(len(ids), device=ids.device).repeat(batch)

        def encode(rows: Tensor, vectors: Tensor | None, place: Tensor) -> Tensor:
            def embed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                return output if vectors is None else put_context(output, vectors, place)

            handle = table.register_forward_hook(embed)
            try:
                with guard():
                    return self.model.encode_text(rows)  # type: ignore[no-any-return]
            finally:
                handle.remove()

        chunks = []
        for first in range(0, len(rows), passes.chunk):
            part = slice(first, first + passes.chunk)
            row, vectors = number[part], None
            if context is not None:
                vectors = context[owner[part]] if context.ndim == 3 else context[owner[part], row]
            chunks.append(run(encode, rows[part], vectors, self._place[row], recompute=passes.recompute))
        return torch.cat(chunks).reshape(batch, len(ids), -1)
