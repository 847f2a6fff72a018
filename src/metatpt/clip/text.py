"""Class features for a tunable context, by the way that the text tower's own properties allow.

Two ways, with the same results: :func:`hooked_features` runs open_clip's own ``encode_text`` and puts the context into
the output of its token embedding, so it serves any tower; :class:`metatpt.clip.packed.PackedPrompts` computes
every token once, where attention is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .budget import Budget
from .tokens import PromptTokens

Guard = Callable[[], AbstractContextManager[None]]


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


def hooked_features(
    model: Any, tokens: PromptTokens, context: Tensor | None, bytes_per_row: int, budget: Budget, guard: Guard
) -> Tensor:
    """Text features through open_clip's own forward.

    Args:
        model: An open_clip model.
        tokens: Prompts of U different classes.
        context: ``[B, n_context, d]``, or None for the words of the prompts themselves.
        bytes_per_row: What the graph of a prompt keeps.
        budget: Of memory; what needs more goes through in chunks that are recomputed in the backward pass.
        guard: Context manager to run the tower in, in the recomputation as well.

    Returns:
        ``[B, U, D]``, not normalised (B = 1 without a context).
    """
    table = token_embedding(model)
    ids = tokens.ids.to(table.weight.device)
    n_prompts, length = ids.shape
    batch = 1 if context is None else context.shape[0]
    rows = ids.expand(batch, n_prompts, length).reshape(-1, length)
    owner = torch.arange(batch, device=ids.device).repeat_interleave(n_prompts)

    def encode(rows: Tensor, vectors: Tensor | None) -> Tensor:
        def put_context(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if vectors is None:
                return output
            before, after = tokens.start, tokens.start + tokens.n_context
            return torch.cat([output[:, :before], vectors.to(output.dtype), output[:, after:]], dim=1)

        handle = table.register_forward_hook(put_context)
        try:
            with guard():
                return model.encode_text(rows)  # type: ignore[no-any-return]
        finally:
            handle.remove()

    rows_per_chunk = budget.chunk(bytes_per_row)
    recompute = torch.is_grad_enabled() and context is not None and budget.recompute(len(rows), bytes_per_row)
    chunks = []
    for first in range(0, len(rows), rows_per_chunk):
        part = slice(first, first + rows_per_chunk)
        vectors = None if context is None else context[owner[part]]
        if recompute:
            # Non-reentrant: the reentrant kind cannot be used with autograd.grad.
            chunks.append(checkpoint(encode, rows[part], vectors, use_reentrant=False))
        else:
            chunks.append(encode(rows[part], vectors))
    return torch.cat(chunks).reshape(batch, n_prompts, -1)
