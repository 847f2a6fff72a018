"""A CLIP-like model whose weights never change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from metatpt.types import Preprocessing

from .budget import Budget, bytes_per_token
from .packed import PackedPrompts, packable
from .text import hooked_features, token_embedding
from .tokens import PromptTokens, Tokenizer, tokenize_prompts

_MEGABYTE = 2**20
_FORWARD_ONLY = 8  # a pass without a graph holds at most about this fraction of what the graph keeps


class FrozenCLIP(nn.Module):
    """Any open_clip model, in evaluation mode and without trainable weights.

    Args:
        model: The open_clip model.
        tokenizer: Its tokenizer.
        preprocessing: What turns pixels into its input.
        name: How the user named it.
        pretrained: Tag or file of the weights.
        known_words: The words that it was trained on, or None where it knows any.
        memory: Megabytes that activations may take, about, with up to 8 samples at once. What needs more goes through
            in chunks, recomputed in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        name: str = "",
        pretrained: str | None = None,
        known_words: frozenset[str] | None = None,
        memory: int = 4096,
    ) -> None:
        super().__init__()
        if memory < 1:
            raise ValueError(f"memory is {memory}; expected a number of megabytes of at least 1")
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.name = name
        self.pretrained = pretrained
        self.known_words = known_words
        self.budget = Budget(memory * _MEGABYTE)
        self.autocast_dtype: torch.dtype | None = None
        self.double_backward = False
        self._measured: dict[torch.dtype, int] = {}
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
        return float(self.model.logit_scale.double().exp())

    def fingerprint(self) -> str:
        """SHA-256 of all weights: what a checkpoint of a prompt was made for."""
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # Images

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised features of pictures.

        Args:
            images: ``[N, 3, R, R]`` in [0, 1], before the model's normalisation.

        Returns:
            ``[N, D]``, of unit length, float32 (float64 where the towers are).
        """
        size = self.preprocessing.size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"Expected images of shape [N, 3, {size}, {size}], got {list(images.shape)}")
        graph = torch.is_grad_enabled() and images.requires_grad
        each = self._bytes_per_picture(images)
        recompute = graph and self.budget.recompute(len(images), each)
        features = []
        for part in images.split(self.budget.chunk(each if graph else each // _FORWARD_ONLY)):
            if recompute:
                features.append(checkpoint(self._encode_image, part, use_reentrant=False))
            else:
                features.append(self._encode_image(part))
        return torch.cat(features)

    def _encode_image(self, images: Tensor) -> Tensor:
        mean, std = self._constants(images)
        with self._tower():
            features = self.model.encode_image(((images - mean) / std).to(self.dtype))
        return _unit(features, self.head_dtype)

    def _constants(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # No buffers: Lightning's "-true" precisions would round them.
        key = (images.device, images.dtype)
        if key not in self._normalisation:
            mean, std = self.preprocessing.mean, self.preprocessing.std
            self._normalisation[key] = images.new_tensor(mean).view(3, 1, 1), images.new_tensor(std).view(3, 1, 1)
        return self._normalisation[key]

    def _bytes_per_picture(self, images: Tensor) -> int:
        """What autograd keeps for one picture, measured: it serves every tower."""
        if images.dtype not in self._measured:
            kept: dict[int, int] = {}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            weights = {weight.untyped_storage().data_ptr() for weight in self.model.parameters()}
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with torch.inference_mode(False), torch.enable_grad(), hooks:
                self._encode_image(images[:1].detach().clone().requires_grad_())
            self._measured[images.dtype] = sum(size for pointer, size in kept.items() if pointer not in weights)
        return self._measured[images.dtype]

    # Text

    def tokenize(self, template: str, class_names: Sequence[str]) -> PromptTokens:
        """Prompts for classes; see :func:`metatpt.clip.tokens.tokenize_prompts` for its errors."""
        return tokenize_prompts(self.tokenizer, self.context_length, template, class_names, self.known_words)

    def embed_context(self, tokens: PromptTokens) -> Tensor:
        """Token embeddings ``[n_context, d]`` of the words before the class name."""
        table = token_embedding(self.model)
        ids = tokens.ids[0, tokens.start : tokens.start + tokens.n_context]
        return table.weight[ids.to(table.weight.device)].detach().to(self.head_dtype)

    def layout(self, tokens: PromptTokens) -> PackedPrompts | PromptTokens:
        """Prepare prompts for :meth:`encode_prompts`, once for a class list."""
        return PackedPrompts(self.model, tokens) if packable(self.model) else tokens

    def encode_prompts(self, prompts: PackedPrompts | PromptTokens, context: Tensor | None = None) -> Tensor:
        """Normalised class features.

        Args:
            prompts: What :meth:`layout` made.
            context: ``[B, n_context, d]`` in place of the words before the class name, or None for these.

        Returns:
            ``[B, U, D]`` of unit length, for the U different prompts (B = 1 without a context); float32 (float64
            where the towers are).
        """
        if isinstance(prompts, PackedPrompts):
            features = prompts.features(context, self.budget, self._tower)
        else:
            each = self._bytes_per_prompt(prompts)
            features = hooked_features(self.model, prompts, context, each, self.budget, self._tower)
        return _unit(features, self.head_dtype)

    def _bytes_per_prompt(self, tokens: PromptTokens) -> int:
        table = token_embedding(self.model).weight
        blocks = sum(1 for name, _ in self.model.named_modules() if name.endswith(("ln_2", "output.LayerNorm")))
        return tokens.ids.shape[1] * bytes_per_token(table.shape[1], max(1, blocks), table.dtype)

    @contextmanager
    def _tower(self) -> Iterator[None]:
        """Where a tower runs: in the trainer's precision, and twice differentiable where that is asked for."""
        device = token_embedding(self.model).weight.device
        with ExitStack() as stack:
            if self.autocast_dtype is not None:
                stack.enter_context(torch.autocast(device.type, dtype=self.autocast_dtype))
            if self.double_backward:
                # Fused attention has no second derivative; it is enough that the forward ran under the math kernel.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


def _unit(features: Tensor, dtype: torch.dtype) -> Tensor:
    return F.normalize(features.to(dtype), dim=-1)
