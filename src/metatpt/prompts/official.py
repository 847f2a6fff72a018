"""Checkpoints of the official trainers of CoOp, CoCoOp, MaPLe, MMRL, UPT and VPT, as our prompt learners."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metatpt.clip.tokens import Position

TEMPLATE = "a photo of a {}."

_NAME = r"\b(?:attn\.(?:in_proj_|out_proj\.)|ln_[12]\.|mlp\.c_(?:fc|proj)\.)(?:weight|bias)"
_OF_CLIP = re.compile(
    rf"(?:image|text)_encoder\.(?:transformer\.resblocks\.\d+\.{_NAME}|class_embedding|positional_embedding|proj"
    r"|text_projection|conv1\.weight|ln_(?:pre|post|final)\.(?:weight|bias))|logit_scale"
)
_OF_CLASSES = re.compile(r"(?:prompt_learner\.)?token_(?:prefix|suffix)|prompt_embeddings")


@dataclass(frozen=True)
class OfficialPrompt:
    """What an official checkpoint holds.

    Attributes:
        method: Whose it is.
        class_path: The learner that computes the same.
        options: Its options.
        parameters: Its parameters, under our names, in float32.
        template: The text that it goes with.
        n_vectors: Number of context vectors; 0 where the words of the template stay.
        fixed_words: Whether words of the template that the vectors leave over stay; else all are left out.
        position: Of the class name.
        details: What else there is to tell: numbers, depths, widths.
        ignored: The keys that are left out, in groups: what they hold, and how many they are.
        n_classes: How many classes it was trained on, where the file tells.
        n_blocks: In how many of a tower's blocks its tokens stand, where the file does not tell in which.
        needs_classes: Why it cannot be used without the names of these classes, in words; None where it can.
        start_token: ``[d]``: embedding of the start token of the CLIP that it was made with, where the file has it.
    """

    method: str
    class_path: str
    options: dict[str, Any]
    parameters: dict[str, Tensor]
    template: str = TEMPLATE
    n_vectors: int = 0
    fixed_words: bool = False
    position: Position = "end"
    details: str = ""
    ignored: tuple[str, ...] = ()
    n_classes: int | None = None
    n_blocks: int | None = None
    needs_classes: str | None = None
    start_token: Tensor | None = None

    @property
    def layout(self) -> str:
        """The class prompts, token by token, in words.

        >>> prompt = OfficialPrompt("MaPLe", "", {}, {}, n_vectors=2, fixed_words=True)
        >>> prompt.layout
        'start, 2 learned vectors, the fixed words "of a", the name, ".", end'
        """
        before, _, after = self.template.partition("{}")
        words = before.split()
        kept = words[self.n_vectors :] if self.fixed_words or not self.n_vectors else []
        first = {"end": self.n_vectors, "middle": self.n_vectors // 2, "front": 0}[self.position]
        vectors = [f"{n} learned vector{'s' * (n != 1)}" if n else "" for n in (first, self.n_vectors - first)]
        fixed = f'the fixed word{"s" * (len(kept) > 1)} "{" ".join(kept)}"' if kept else ""
        parts = ["start", vectors[0], fixed, "the name", vectors[1], f'"{after.strip()}"' * bool(after.strip()), "end"]
        return ", ".join(part for part in parts if part)


def read_official(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without running code.

    Raises:
        ValueError: It is no checkpoint of an official trainer; says what was expected and what was found.
        FileNotFoundError: It is not there.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; the official trainers write model-best.pth.tar")
    expected = "expected the dictionary with a state_dict that the official trainers write (model-best.pth.tar)"
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "weights only" not in str(error).lower():
            raise ValueError(f"{file} is no file of PyTorch; {expected}") from error
        raise ValueError(
            f"{file} holds more than tensors and plain values and is not loaded, since that may run code; {expected}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(f"{file} is no whole file of PyTorch ({first}); {expected}") from error
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        found = f"a dictionary with {_some(list(map(str, content)))}" if isinstance(content, Mapping) else None
        raise ValueError(f"{file}: {expected}, found {found or f'an object of type {type(content).__name__}'}")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{file}: {key} in its state_dict is of type {type(value).__name__}; expected tensors")
    return {str(key): value for key, value in state.items()}


def recognise(
    state: Mapping[str, Tensor],
    template: str | None = None,
    position: Position | None = None,
) -> OfficialPrompt:
    """What method a state dict is of, and our learner for it.

    Args:
        state: As :func:`read_official` gives it.
        template: In place of the one that the official code has by default.
        position: CoOp's CLASS_TOKEN_POSITION, which its files do not tell; ``end`` by default.

    Raises:
        ValueError: It is of no method that is known here, has keys that are not known, or lacks some.
    """
    state = {re.sub(r"^upt_proj", "mvlpt_proj", key): value for key, value in state.items()}  # of older files
    read = next((read for sign, read in _METHODS.items() if any(re.match(sign, key) for key in state)), None)
    if read is None:
        raise ValueError(
            "this is of no method that is known here: expected a key ctx (CoOp, CoCoOp), prompt_learner.ctx (MaPLe), "
            "representation_learner.compound_rep_tokens (MMRL), uni_ctx or vpt_embeddings (UPT), or image_encoder.VPT "
            f"(VPT); found {_some(list(state))}"
        )
    keys = _Keys(state)
    found = read(keys)
    keys.check_all_taken(found.method)
    if template is not None:
        found = replace(found, template=template)
    if position is not None:
        if found.method != "CoOp":
            raise ValueError(
                f"the place of the class name (position) is an option of CoOp's files; this is {found.method}"
            )
        found = replace(found, position=position, options={**found.options, "position": position})
    prefix = next((value for key, value in state.items() if re.search("token_prefix$|^prompt_embeddings$", key)), None)
    n_classes = found.n_classes if prefix is None else len(prefix)
    start = prefix[0, 0].float() if prefix is not None and prefix.ndim == 3 else None  # of the first class's prompt
    return replace(found, ignored=keys.ignored(), n_classes=n_classes, start_token=start)


class _Keys:
    """A state dict whose keys are taken one by one."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._left = dict(state)
        self._clip = [key for key in state if _OF_CLIP.fullmatch(key)]
        self._classes = [key for key in state if _OF_CLASSES.fullmatch(key)]
        for key in (*self._clip, *self._classes):
            del self._left[key]

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, *ndims: int) -> Tensor:
        """A tensor of that key, in float32."""
        if key not in self._left:
            raise ValueError(f"the file lacks {key}; it has {_some(list(self._left))}")
        value = self._left.pop(key)
        if value.ndim not in ndims or not value.numel():
            expected = " or ".join(map(str, ndims))
            raise ValueError(f"{key} has shape {list(value.shape)}; expected {expected} dimensions, none of size 0")
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{key} of type {value.dtype} does not hold finite numbers only")
        return value.float()

    def linear(self, key: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer."""
        return self.take(f"{key}.weight", 2), self.take(f"{key}.bias", 1)

    def several(self, pattern: str, take: Callable[[str], Tensor], first: int = 0) -> list[Tensor]:
        """What is numbered from `first` on, as ``name.{}.weight``."""
        found: list[Tensor] = []
        while pattern.format(first + len(found)) in self:
            found.append(take(pattern.format(first + len(found))))
        if any(each.shape != found[0].shape for each in found):
            raise ValueError(f"{pattern.format('i')} differ in shape: {[list(each.shape) for each in found]}")
        return found

    def check_all_taken(self, method: str) -> None:
        if self._left:
            raise ValueError(
                f"the file looks like {method}'s, but has keys that are not known there: {_some(list(self._left))}"
            )

    def ignored(self) -> tuple[str, ...]:
        groups = [_some(self._classes)] if self._classes else []
        if self._clip:
            groups.append(f"{len(self._clip)} weights of the frozen CLIP ({_some(self._clip)})")
        return tuple(groups)


def _coop(keys: _Keys) -> OfficialPrompt:
    context = keys.take("ctx", 2, 3)
    n_classes = len(context) if context.ndim == 3 else None
    n, width = context.shape[-2:]
    options = {"n_context": n, "init": "random"}
    details = f"width {width}"
    if n_classes is not None:
        options["per_class"] = True
        details += f", {n_classes} classes with vectors of their own"
    return OfficialPrompt(
        method="CoOp",
        class_path="metatpt.prompts.TextPrompt",
        options=options,
        parameters={"context": context},
        n_vectors=n,
        details=details,
        n_classes=n_classes,
        needs_classes=None if n_classes is None else "each class has a context of its own",
    )


def _cocoop(keys: _Keys) -> OfficialPrompt:
    context = keys.take("ctx", 2)
    parameters = {"context": context}
    for number in (1, 2):
        weight, bias = keys.linear(f"meta_net.linear{number}")
        parameters |= {f"net_{number}_weight": weight, f"net_{number}_bias": bias}
    n, width = context.shape
    hidden, features = parameters["net_1_weight"].shape
    return OfficialPrompt(
        method="CoCoOp",
        class_path="metatpt.prompts.ConditionalPrompt",
        options={"n_context": n, "init": "random"},
        parameters=parameters,
        n_vectors=n,
        details=f"width {width}; a network of widths {features}, {hidden}, {width} moves the vectors for each picture",
    )


def _maple(keys: _Keys) -> OfficialPrompt:
    name = "prompt_learner."
    context = keys.take(f"{name}ctx", 2)
    deep = keys.several(f"{name}compound_prompts_text.{{}}", lambda key: keys.take(key, 2))
    first = keys.linear(f"{name}proj")
    maps = f"{name}compound_prompt_projections."
    weights = [first[0], *keys.several(f"{maps}{{}}.weight", lambda key: keys.take(key, 2))]
    biases = [first[1], *keys.several(f"{maps}{{}}.bias", lambda key: keys.take(key, 1))]
    n, depth = len(context), 1 + len(deep)
    if {len(weights), len(biases)} != {depth}:
        raise ValueError(f"{depth - 1} compound_prompts_text, but {len(weights) - 1} compound_prompt_projections")
    parameters = {
        "context": context, "coupling_weight": _stack(weights), "coupling_bias": _stack(biases)
    }  # fmt: skip
    if deep:
        parameters["context_deep"] = _stack(deep)
    # The official code takes words for up to 4 vectors, and random ones in place of all words for more.
    template = TEMPLATE if n <= 4 else f"{'X ' * n}{{}}."
    return OfficialPrompt(
        method="MaPLe",
        class_path="metatpt.prompts.MultiModalPrompt",
        options={"n_context": n, "depth": depth},
        parameters=parameters,
        template=template,
        n_vectors=n,
        fixed_words=True,
        details=f"depth {depth}; width {context.shape[1]}, mapped to {weights[0].shape[0]} in the image tower",
    )


def _mmrl(keys: _Keys) -> OfficialPrompt:
    name = "representation_learner.compound_rep_tokens"
    tokens = keys.take(name, 2)
    parameters = {"tokens": tokens, "projection": keys.take("image_encoder.proj_rep", 2)}
    for tower, maps in (("text", "r2tproj"), ("image", "r2vproj")):
        weights = keys.several(f"{name}_{maps}.{{}}.weight", lambda key: keys.take(key, 2))
        biases = keys.several(f"{name}_{maps}.{{}}.bias", lambda key: keys.take(key, 1))
        if not weights or len(weights) != len(biases):
            raise ValueError(f"{name}_{maps} has {len(weights)} weights and {len(biases)} biases")
        parameters |= {f"to_{tower}_weight": _stack(weights), f"to_{tower}_bias": _stack(biases)}
    n_blocks = {len(parameters[f"to_{tower}_weight"]) for tower in ("text", "image")}
    if len(n_blocks) != 1:
        raise ValueError(f"{name} has maps into {sorted(n_blocks)} blocks; expected as many for both towers")
    blocks = n_blocks.pop()
    return OfficialPrompt(
        method="MMRL",
        class_path="metatpt.prompts.RepresentationPrompt",
        options={"n_tokens": len(tokens), "width": tokens.shape[1]},
        parameters=parameters,
        details=f"{len(tokens)} representation tokens of width {tokens.shape[1]} in {blocks} blocks of both towers",
        n_blocks=blocks,
        needs_classes="it predicts the classes that it was trained on otherwise than new ones",
    )


_BLOCK = ("attention_in", "attention_out", "norm_1", "norm_2", "hidden", "out")


def _upt(keys: _Keys) -> OfficialPrompt:
    rows = keys.take("uni_ctx", 3)
    if rows.shape[0] != 1 or rows.shape[1] % 2:
        raise ValueError(f"uni_ctx has shape {list(rows.shape)}; expected [1, 2 n, d], half of the rows for each tower")
    n, width = rows.shape[1] // 2, rows.shape[2]
    parameters = {"text_rows": rows[0, :n], "visual_rows": rows[:, n:]}
    theirs = ("self_attn.in_proj", "self_attn.out_proj", "norm1", "norm2", "linear1", "linear2")
    parameters |= _block(keys, theirs)
    parameters["visual_out_weight"], parameters["visual_out_bias"] = keys.linear("mlp")
    return OfficialPrompt(
        method="UPT",
        class_path="metatpt.prompts.UnifiedPrompt",
        options={"variant": "upt", "mixing": "token", "n_context": n},
        parameters=parameters,
        n_vectors=n,
        details=f"{n} visual tokens; width {width}, mapped to {len(parameters['visual_out_bias'])} in the image tower",
    )


def _mvlpt(keys: _Keys) -> OfficialPrompt:
    context, visual = keys.take("ctx", 2), keys.take("vpt_embeddings", 3)
    if "vpt_embeddings_deep" in keys:
        visual = torch.cat([visual, keys.take("vpt_embeddings_deep", 3)])
    n = len(context)
    if visual.shape[1] != n:
        raise ValueError(
            f"{n} context vectors and {visual.shape[1]} visual tokens; UnifiedPrompt has as many of either"
        )
    parameters = {"text_rows": context, "visual_rows": visual}
    block = "mvlpt_proj.resblocks.0"
    theirs = ("attn.in_proj", "attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    parameters |= _block(keys, tuple(f"{block}.{each}" for each in theirs))
    for ours, official in (("text", "coop"), ("visual", "vpt")):
        for end, key in (("in", "pre"), ("out", "post")):
            if f"mvlpt_proj_ctx_{official}_{key}.weight" in keys:  # none where the widths are equal
                weight, bias = keys.linear(f"mvlpt_proj_ctx_{official}_{key}")
                parameters |= {f"{ours}_{end}_weight": weight, f"{ours}_{end}_bias": bias}
    width = len(parameters["norm_1_weight"])
    return OfficialPrompt(
        method="UPT of MVLPT",
        class_path="metatpt.prompts.UnifiedPrompt",
        options={"variant": "mvlpt", "mixing": "token", "n_context": n, "width": width, "depth": len(visual)},
        parameters=parameters,
        n_vectors=n,
        position="middle",
        details=(
            f"{n} visual tokens in each of {len(visual)} blocks; widths {context.shape[1]} and {visual.shape[2]}, "
            f"mapped to {width} and back"
        ),
    )


def _vpt(keys: _Keys) -> OfficialPrompt:
    first = keys.take("image_encoder.VPT", 2)
    pattern = "image_encoder.transformer.resblocks.{}.VPT_shallow"
    deep = keys.several(pattern, lambda key: keys.take(key, 2), first=1)
    parameters = {"visual": first} | ({"visual_deep": _stack(deep)} if deep else {})
    return OfficialPrompt(
        method="VPT",
        class_path="metatpt.prompts.VisualPrompt",
        options={"n_visual": len(first), "depth": 1 + len(deep)},
        parameters=parameters,
        details=f"{len(first)} visual tokens of width {first.shape[1]}, depth {1 + len(deep)}",
    )


def _block(keys: _Keys, theirs: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters of a transformer block, of which the two codes name the layers otherwise."""
    found = {}
    for ours, key in zip(_BLOCK, theirs, strict=True):
        join = "_" if key.endswith("in_proj") else "."
        ndim = 1 if ours.startswith("norm") else 2
        found[f"{ours}_weight"] = keys.take(f"{key}{join}weight", ndim)
        found[f"{ours}_bias"] = keys.take(f"{key}{join}bias", 1)
    return found


def _stack(tensors: list[Tensor]) -> Tensor:
    if any(each.shape != tensors[0].shape for each in tensors):
        raise ValueError(f"layers that belong together differ in shape: {[list(each.shape) for each in tensors]}")
    return torch.stack(tensors)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


# What a method's files are known by, the most telling first: several have a ctx.
_METHODS: dict[str, Callable[[_Keys], OfficialPrompt]] = {
    r"prompt_learner\.(ctx|compound_prompts_text\.0)$": _maple,
    r"representation_learner\.": _mmrl,
    r"uni_ctx$": _upt,
    r"(vpt_embeddings|mvlpt_proj)": _mvlpt,
    r"meta_net\.": _cocoop,
    r"ctx$": _coop,
    r"image_encoder\.VPT$": _vpt,
}
