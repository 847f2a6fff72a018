"""Prompts of both towers out of one small block that they share (UPT, 2022), in both published codes' variants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor

from metatpt.clip import ContextLayout, FrozenCLIP
from metatpt.clip.blocks import BlockHook
from metatpt.clip.text import token_embedding
from metatpt.rng import run_seed, sample_generator
from metatpt.types import State

from .base import Head, Part, PromptLearner, class_head
from .initial import linear, normal, uniform
from .tokens import TokenHook
from .towers import check_depth, check_image_tower, n_blocks

Variant = Literal["upt", "mvlpt"]
Mixing = Literal["attention", "token"]
Dropout = Callable[[Tensor], Tensor]

_DROPOUT, _WIDTH = 0.1, 128  # by default
_quick_gelu = QuickGELU()


class UnifiedPrompt(PromptLearner):
    """Rows that pass through one transformer block and become context vectors and tokens of the image tower.

    The paper lets the rows attend to each other: ``mixing: attention``. Both published codes hand them to the attention
    as sequences of length 1, so that every row passes alone and the query and key projections have no effect:
    ``mixing: token``, which is what the codes' own checkpoints were trained with.

    ``variant: upt`` is the authors' code: rows of the text tower's width, a block that normalises behind its attention,
    with one ReLU layer of the same width; the visual rows are mapped to the image tower's width and inserted behind
    the class token, before ``ln_pre``; the class name stands at the end. ``variant: mvlpt`` is MVLPT's: rows of the
    towers' own widths, mapped to `width` and back (not where a tower has that very width), one block of CLIP's kind
    with one head; visual rows of their own for each of `depth` blocks, behind the class token, after ``ln_pre``; the
    class name stands in the middle of the context.

    Parameters, r the block's width and h that of its hidden layer (upt: r = h = d; mvlpt: r = `width`, h = 4 r):

    - of the part "text" ``text_rows`` ``[n, d]``, and in mvlpt ``text_in_weight`` ``[r, d]``, ``text_in_bias``,
      ``text_out_weight`` ``[d, r]``, ``text_out_bias``
    - of the part "visual" ``visual_rows`` ``[depth, n, w]`` (upt: ``[1, n, d]``), in mvlpt ``visual_in_weight``
      ``[r, w]``, ``visual_in_bias``, and ``visual_out_weight`` ``[w, r]``, ``visual_out_bias``
    - of the part "both" ``attention_in_weight`` ``[3 r, r]`` (query, key, value), ``attention_in_bias``,
      ``attention_out_weight`` ``[r, r]``, ``attention_out_bias``, ``norm_1_weight``, ``norm_1_bias``,
      ``norm_2_weight``, ``norm_2_bias`` ``[r]``, ``hidden_weight`` ``[h, r]``, ``hidden_bias``, ``out_weight``
      ``[r, h]``, ``out_bias``

    They start as those of the codes: rows from N(0, 0.02), mvlpt's visual ones as VPT's; layers as torch starts them.

    Args:
        clip: The frozen model: an image tower of plain blocks that is pooled at its class token, and any text tower.
        class_names: The C classes.
        template: Text with one ``{}``; in place of its words before the ``{}`` stand the context vectors.
        variant: ``upt`` or ``mvlpt``.
        mixing: ``attention`` or ``token``.
        n_context: Number n of context vectors, and of tokens in each block of the image tower.
        dropout: Of upt, while training: the share of attention weights, of what the attention gives, of hidden and of
            outgoing features that is set to 0; by default 0.1. Drawn from the run's seed and the number of training
            steps before, which a checkpoint holds as ``step``.
        width: Of mvlpt's block; by default 128.
        depth: Of mvlpt: blocks of the image tower that have rows of their own; by default all.

    Raises:
        ValueError: A tower that takes no such tokens, an option of the other variant, or one out of its range.
    """

    step: Tensor

    def __init__(
        self,
        clip: FrozenCLIP,
        class_names: Sequence[str],
        template: str,
        variant: Variant = "upt",
        mixing: Mixing = "attention",
        n_context: int = 4,
        dropout: float | None = None,
        width: int | None = None,
        depth: int | None = None,
    ) -> None:
        check_image_tower(type(self).__name__, clip, class_token=True)
        _check_options(variant, mixing, dropout, width, depth)
        blocks, upt = n_blocks(clip.model.visual), variant == "upt"
        depth = 1 if upt else blocks if depth is None else depth
        check_depth(depth, "image tower", blocks)
        layout = ContextLayout(n_context, "random", position="end" if upt else "middle")
        tokens = clip.tokenize(template, class_names, layout)
        super().__init__(clip, tokens.column)
        self.variant, self.mixing, self.n_context = variant, mixing, n_context
        self.dropout = (_DROPOUT if dropout is None else dropout) if upt else 0.0
        self._layout = clip.layout(tokens)
        table = token_embedding(clip.model).weight
        if self.dropout:
            self.register_buffer("step", torch.tensor(0, device=table.device))
        self._start(table, depth, table.shape[1] if upt else _WIDTH if width is None else width)

    def head(self, state: State | None = None) -> Head:
        """See :meth:`PromptLearner.head`."""
        keep = self.clip.keeps_graph(self._layout)
        return class_head(self.class_features(state, self._compute, keep), self.clip.logit_scale, self.column)

    def image_hook(self, values: State) -> BlockHook:
        """See :meth:`PromptLearner.image_hook`."""
        return self._hook(self.prompts(values)[1])

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`PromptLearner.training_loss`; in training mode with dropout, the same in both towers."""
        context, tokens = self.prompts(self.live_state(1), self._next_dropout())
        features = self._features(images, self._hook(tokens), 1)
        classes = self.clip.encode_prompts(self._layout, context[None])
        logits = class_head(classes, self.clip.logit_scale, self.column)(features[None])[0]
        return F.cross_entropy(logits, labels), logits

    def prompts(self, values: State, drop: Dropout = lambda x: x) -> tuple[Tensor, Tensor]:
        """What the block makes of the rows.

        Args:
            values: All parameters of one sample, ``[1, ...]`` each.
            drop: Dropout.

        Returns:
            The context vectors ``[n, d]``, and tokens ``[depth, n, w]`` of the image tower.
        """
        values = {name: value[0] for name, value in values.items()}
        visual = values["visual_rows"]
        rows = torch.cat(
            [_map(values, "text_in", values["text_rows"]), _map(values, "visual_in", visual.flatten(0, 1))]
        )
        if self.variant == "upt":
            rows = _norm(values, "norm_1", rows + drop(self._attend(values, rows, drop)))
            hidden = drop(F.relu(_map(values, "hidden", _norm(values, "norm_2", rows))))
        else:
            rows = rows + self._attend(values, _norm(values, "norm_1", rows), drop)
            hidden = _quick_gelu(_map(values, "hidden", _norm(values, "norm_2", rows)))
        rows = rows + drop(_map(values, "out", hidden))
        n = self.n_context
        context, tokens = _map(values, "text_out", rows[:n]), _map(values, "visual_out", rows[n:])
        return context, tokens.unflatten(0, visual.shape[:2])

    def _attend(self, values: State, x: Tensor, drop: Dropout) -> Tensor:
        """One head over all rows ``[R, r]``, or over each alone."""
        query, key, value = _map(values, "attention_in", x).chunk(3, dim=-1)
        if self.mixing == "attention":
            attended = drop((query @ key.mT / math.sqrt(x.shape[-1])).softmax(-1)) @ value
        else:
            attended = drop(torch.ones_like(value[:, :1])) * value
        return _map(values, "attention_out", attended)

    def _compute(self, state: State, held: int) -> Tensor:
        return self.clip.encode_prompts(self._layout, self.prompts(state)[0][None], held=held)

    def _hook(self, tokens: Tensor) -> BlockHook:
        if self.variant == "upt":
            tokens = self.clip.model.visual.ln_pre(tokens.to(self.clip.dtype))
        return TokenHook({block: each[None] for block, each in enumerate(tokens)})

    def _next_dropout(self) -> Dropout:
        """The dropout of the next training step."""
        share = self.dropout
        if not (self.training and share):
            return lambda x: x
        generator = sample_generator(run_seed(), int(self.step), "dropout")
        self.step += 1

        def drop(x: Tensor) -> Tensor:
            # On the CPU: the same on every device.
            kept = torch.rand(x.shape, generator=generator, dtype=torch.float32) >= share
            return x * kept.to(x.device) / (1 - share)

        return drop

    def _start(self, table: Tensor, depth: int, width: int) -> None:
        """Make the parameters, where the token embeddings are."""
        visual = self.clip.model.visual
        text_width, image_width = table.shape[1], len(visual.class_embedding)
        generator = sample_generator(run_seed(), 0, "prompt")
        upt, mixed, n = self.variant == "upt", self.mixing == "attention", self.n_context

        def learn(name: str, value: Tensor, part: Part = "both", before_block: bool = True) -> None:
            reaches = part == "both" or (mixed and before_block)
            value = value.to(table.device, self.clip.head_dtype)
            self.learn(name, value, part, part == "visual" or reaches, part == "text" or reaches)

        def learn_map(name: str, outputs: int, inputs: int, part: Part = "both", before_block: bool = True) -> None:
            for kind, value in zip(("weight", "bias"), linear(outputs, inputs, generator), strict=True):
                learn(f"{name}_{kind}", value, part, before_block)

        learn("text_rows", normal((n, text_width), generator), "text")
        if upt:
            learn("visual_rows", normal((1, n, text_width), generator), "visual")
        else:
            patch = math.prod(visual.conv1.weight.shape[1:])
            bound = math.sqrt(6 / (patch + image_width))
            learn("visual_rows", uniform((depth, n, image_width), bound, generator), "visual")
            if text_width != width:
                learn_map("text_in", width, text_width, "text")
                learn_map("text_out", text_width, width, "text", before_block=False)
            if image_width != width:
                learn_map("visual_in", width, image_width, "visual")
        if upt or image_width != width:
            learn_map("visual_out", image_width, width, "visual", before_block=False)
        learn("attention_in_weight", uniform((3 * width, width), math.sqrt(6 / (4 * width)), generator))
        learn("attention_in_bias", torch.zeros(3 * width))
        learn("attention_out_weight", linear(width, width, generator)[0])
        learn("attention_out_bias", torch.zeros(width))
        for name in ("norm_1", "norm_2"):
            learn(f"{name}_weight", torch.ones(width))
            learn(f"{name}_bias", torch.zeros(width))
        hidden = width if upt else 4 * width
        learn_map("hidden", hidden, width)
        learn_map("out", width, hidden)


def _map(values: State, name: str, x: Tensor) -> Tensor:
    """A linear map of the rows, where there is one of that name."""
    weight = values.get(f"{name}_weight")
    return x if weight is None else F.linear(x, weight, values[f"{name}_bias"])


def _norm(values: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], values[f"{name}_weight"], values[f"{name}_bias"])


def _check_options(
    variant: Variant, mixing: Mixing, dropout: float | None, width: int | None, depth: int | None
) -> None:
    for name, value, choices in (("variant", variant, get_args(Variant)), ("mixing", mixing, get_args(Mixing))):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    of_other = {"width": width, "depth": depth} if variant == "upt" else {"dropout": dropout}
    for name, given in of_other.items():
        if given is not None:
            other = "mvlpt" if variant == "upt" else "upt"
            raise ValueError(f"{name} is {given}, and variant {variant} has no such option, only {other}: leave it out")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected a share of at least 0 and below 1")
    if width is not None and width < 1:
        raise ValueError(f"width is {width}; expected at least 1")
