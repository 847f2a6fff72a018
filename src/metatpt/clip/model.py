"""A CLIP-like model whose weights never change."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metatpt.timing import timed
from metatpt.types import Preprocessing

from .blocks import IDENTITY, BlockHook
from .budget import Budget, kept_bytes, run
from .casting import CastWeights
from .layer_norm import PlainLayerNorm
from .packed import PackedPrompts, packable
from .scaling import GradientScale
from .text import Guard, Passes, PlainPrompts, text_tower, token_embedding
from .tokens import ContextLayout, PromptTokens, Tokenizer, tokenize_prompts
from .vit import encode_pictures, plain_vit

Memory = int | Literal["auto"]

_log = logging.getLogger(__name__)

_MEGABYTE = 2**20
_SECOND_ORDER = 3  # what a gradient with a graph of its own keeps, in graphs of the forward pass, about


class FrozenCLIP(nn.Module):
    """Any open_clip model, in evaluation mode and without trainable weights.

    Args:
        model: The open_clip model.
        tokenizer: Its tokenizer.
        preprocessing: What turns pixels into its input.
        name: How the user named it.
        pretrained: Tag or file of the weights.
        known_words: The words that it was trained on, or None where it knows any.
        memory: Megabytes that activations may take, about; ``auto`` for half of what is free on the device at first
            use. What needs more goes through in chunks, recomputed in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        name: str = "",
        pretrained: str | None = None,
        known_words: frozenset[str] | None = None,
        memory: Memory = "auto",
    ) -> None:
        super().__init__()
        if memory != "auto" and not (isinstance(memory, int) and memory >= 1):
            raise ValueError(f"memory is {memory!r}; expected a number of megabytes of at least 1, or auto")
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.name = name
        self.pretrained = pretrained
        self.known_words = known_words
        self.budget = Budget(None if memory == "auto" else memory * _MEGABYTE)
        self.autocast_dtype: torch.dtype | None = None
        self.double_backward = False
        self._logit_scale = _logit_scale(model)
        self._plain_vit = plain_vit(self.model.visual)
        # open_clip's own forward takes the precision of its tokens from a weight, and would round them.
        plain: list[Any] = [self.model.visual] * self._plain_vit + [text_tower(model)] * packable(model)
        self._cast_weights = CastWeights(*(part.transformer for part in plain))
        self._warned = False
        self._fingerprint: str | None = None
        self._measured: dict[object, int] = {}
        self._normalisation: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stays in evaluation mode: batch statistics and dropout of a frozen model are frozen too."""
        return super().train(False)

    @property
    def context_length(self) -> int:
        """Length of the text tower's token rows."""
        return int(self.model.context_length)

    @property
    def dtype(self) -> torch.dtype:
        """Of the towers' weights."""
        return token_embedding(self.model).weight.dtype

    @property
    def head_dtype(self) -> torch.dtype:
        """Of features, logits and all that is tuned: float32, or float64 where the towers are."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def logit_scale(self) -> float:
        """Factor of the cosine in a logit. A bias on all logits (SigLIP) does not change a softmax and is left out."""
        return self._logit_scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.fingerprint()  # before a cast changes the weights
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def fingerprint(self) -> str:
        """SHA-256 of all weights as they were loaded, whatever they are cast to: what a prompt was made for."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    # Images

    @timed("image_tower")
    def encode_image(self, images: Tensor, hook: BlockHook = IDENTITY, held: int = 1) -> Tensor:
        """Normalised features of pictures.

        Args:
            images: ``[N, 3, R, R]`` in [0, 1], before the model's normalisation.
            hook: What a prompt learner changes inside the tower.
            held: How many such graphs are held at once until the backward pass: the samples that are adapted together.

        Returns:
            ``[N, D]``, of unit length, float32 (float64 where the towers are).

        Raises:
            ValueError: Pictures of another size, or a hook for a tower that has no place for it.
        """
        size = self.preprocessing.size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"Expected images of shape [N, 3, {size}, {size}], got {list(images.shape)}")
        if hook is not IDENTITY and not self._plain_vit:
            raise ValueError(_no_place_for(hook, self.model.visual, "a vision transformer of open_clip's plain blocks"))
        graph = torch.is_grad_enabled() and (images.requires_grad or hook is not IDENTITY)
        each = self._bytes_per_picture(images)
        recompute = graph and self.budget.recompute(len(images) * held * each, images.device)
        scale, guard = self._gradient_scale(graph, hook), self._guard()
        images = scale.enter(images)
        features = []
        for part in images.split(self.budget.chunk(each, images.device, graph)):
            features.append(run(self._encode_image, part, hook, guard, recompute=recompute))
        return scale.leave(torch.cat(features))

    def _encode_image(self, images: Tensor, hook: BlockHook, guard: Guard) -> Tensor:
        mean, std = self._constants(images)
        pixels = ((images - mean) / std).to(self.dtype)
        with guard():
            if self._plain_vit:
                features = encode_pictures(self.model.visual, pixels, hook)
            else:
                features = self.model.encode_image(pixels)
        return _unit(features, self.head_dtype)

    def _constants(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # No buffers: Lightning's "-true" precisions would round them.
        key = (images.device, images.dtype)
        if key not in self._normalisation:
            mean, std = self.preprocessing.mean, self.preprocessing.std
            with torch.inference_mode(False):
                self._normalisation[key] = tuple(  # type: ignore[assignment]
                    torch.tensor(each, dtype=images.dtype, device=images.device).view(3, 1, 1) for each in (mean, std)
                )
        return self._normalisation[key]

    def _bytes_per_picture(self, images: Tensor) -> int:
        """What the graph of one picture keeps."""
        one = images[:1].detach()
        key = ("picture", images.dtype, images.device)
        each = self._measure(
            key, lambda: (self._encode_image(one.clone().requires_grad_(), IDENTITY, self._guard()), 1)
        )
        return each * _SECOND_ORDER if self.double_backward else each

    def _measure(self, what: object, encode: Callable[[], tuple[Tensor, int]]) -> int:
        key = (what, self.autocast_dtype, self.double_backward)
        if key not in self._measured:
            self._measured[key] = kept_bytes(encode, lambda: [*self.model.parameters(), *self._cast_weights.tensors])
        return self._measured[key]

    # Text

    def tokenize(self, template: str, class_names: Sequence[str], layout: ContextLayout | None = None) -> PromptTokens:
        """Prompts for classes; see :func:`metatpt.clip.tokens.tokenize_prompts` for its errors."""
        return tokenize_prompts(self.tokenizer, self.context_length, template, class_names, self.known_words, layout)

    def embed_context(self, tokens: PromptTokens) -> Tensor:
        """Token embeddings ``[n_context, d]`` of the words in whose place the context vectors stand."""
        table = token_embedding(self.model)
        ids = tokens.ids[0, tokens.place[0]]
        return table.weight[ids.to(table.weight.device)].detach().to(self.head_dtype)

    def layout(self, tokens: PromptTokens) -> PackedPrompts | PlainPrompts:
        """Prepare prompts for :meth:`encode_prompts`, once for a class list."""
        return (PackedPrompts if packable(self.model) else PlainPrompts)(self.model, tokens)

    @timed("text_tower")
    def encode_prompts(
        self,
        prompts: PackedPrompts | PlainPrompts,
        context: Tensor | None = None,
        hook: BlockHook = IDENTITY,
        held: int = 1,
    ) -> Tensor:
        """Normalised class features.

        Args:
            prompts: What :meth:`layout` made.
            context: ``[B, n, d]``, or of each prompt ``[B, U, n, d]``, where `prompts` have a place for its vectors; or
                None for the words that stand there.
            hook: What a prompt learner changes inside the tower.
            held: How many such graphs are held at once until the backward pass: the samples that are adapted together.

        Returns:
            ``[B, U, D]`` of unit length, for the U different prompts (B = 1 without a context); float32 (float64
            where the towers are).

        Raises:
            ValueError: A hook for a tower that has no place for it, or a context that does not fit the prompts.
        """
        if hook is not IDENTITY and not prompts.takes_hooks:
            raise ValueError(_no_place_for(hook, text_tower(self.model), "a causal tower of open_clip's plain blocks"))
        device = token_embedding(self.model).weight.device
        graph = torch.is_grad_enabled() and (context is not None or hook is not IDENTITY)
        batch = 1 if context is None else len(context)
        recompute = graph and not self.keeps_graph(prompts, batch * held)
        passes = Passes(self.budget.chunk(self._bytes_of_prompts(prompts), device), recompute)
        scale = self._gradient_scale(graph, hook)
        context = None if context is None else scale.enter(context)
        return scale.leave(_unit(prompts.features(context, passes, self._guard(), hook), self.head_dtype))

    def keeps_graph(self, prompts: PackedPrompts | PlainPrompts, held: int = 1) -> bool:
        """Whether memory allows that so many graphs of these prompts are kept until the backward pass."""
        device = token_embedding(self.model).weight.device
        return not self.budget.recompute(held * prompts.size * self._bytes_of_prompts(prompts), device)

    def contexts_at_once(self, prompts: PackedPrompts | PlainPrompts) -> int:
        """For how many contexts all of these prompts go through the tower at once, at least one."""
        device = token_embedding(self.model).weight.device
        return max(1, self.budget.chunk(self._bytes_of_prompts(prompts), device) // prompts.size)

    @timed("text_tower")
    def _bytes_of_prompts(self, prompts: PackedPrompts | PlainPrompts) -> int:
        """What the graph of one token of packed prompts keeps, or of one row of others; measured on a few rows."""
        few = prompts.tokens.few(prompts.probed)

        def encode() -> tuple[Tensor, int]:
            probe = type(prompts)(self.model, few)
            context = self.embed_context(few)[None].requires_grad_()
            return probe.features(context, Passes(probe.size, False), self._guard(), IDENTITY), probe.size

        return self._measure((type(prompts), prompts.row), encode)

    def _gradient_scale(self, graph: bool, hook: BlockHook) -> GradientScale:
        half = torch.float16 in (self.autocast_dtype, self.dtype)
        possible = hook is IDENTITY and not self.double_backward
        if graph and half and not possible and not self._warned:
            self._warned = True
            _log.warning(
                "Float16 loses small gradients to a prompt inside the towers, and of second order, which are not "
                "scaled here: use bfloat16 (--trainer.precision bf16-mixed)"
            )
        return GradientScale(graph and half and possible)

    def _guard(self) -> Guard:
        """Where a tower runs. What is set now holds in a later recomputation too, which must do the very same."""
        return partial(self._tower, self.autocast_dtype, self.double_backward)

    @contextmanager
    def _tower(self, autocast_dtype: torch.dtype | None, double_backward: bool) -> Iterator[None]:
        """In the trainer's precision, and twice differentiable where that is asked for."""
        device = token_embedding(self.model).weight.device
        with ExitStack() as stack:
            if autocast_dtype is not None:
                stack.enter_context(torch.autocast(device.type, dtype=autocast_dtype))
                stack.enter_context(self._cast_weights.used(autocast_dtype))
            if double_backward:
                # Fused attention has no second derivative; it is enough that the forward ran under the math kernel.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(PlainLayerNorm())
            yield


def _no_place_for(hook: BlockHook, tower: nn.Module, needed: str) -> str:
    return f"{type(hook).__name__} reaches into {needed}, which {type(tower).__name__} is not: use another --model.clip"


def _logit_scale(model: Any) -> float:
    # Once: it is frozen, reading it waits for all work on a GPU, and a later cast to bfloat16 would round it.
    return float(model.logit_scale.double().exp())


def _unit(features: Tensor, dtype: torch.dtype) -> Tensor:
    return F.normalize(features.to(dtype), dim=-1)
