"""The small CLIP that the golden files were made with (tests/data/golden/README.md)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.types import Preprocessing

from .learners import tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES: list[str] = json.loads((GOLDEN / "manifest.json").read_text())["classnames"]


def fixture(name: str) -> dict[str, Tensor]:
    """What the official code made."""
    return load_file(GOLDEN / "fixtures" / f"{name}.safetensors")


@functools.cache
def _model() -> torch.nn.Module:
    state = {key: value.float() for key, value in load_file(GOLDEN / "weights.safetensors").items()}
    table = torch.zeros(49408, 128)
    table[state.pop("token_embedding.row_ids").long()] = state.pop("token_embedding.rows")
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3}
    vision = {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8, "head_width": 64}
    model = open_clip.CLIP(embed_dim=64, quick_gelu=True, vision_cfg=vision, text_cfg=text)
    model.load_state_dict({**state, "token_embedding.weight": table})
    return model


def golden_clip() -> FrozenCLIP:
    """Frozen; its pictures are normalised already."""
    return FrozenCLIP(_model(), tokenizer(), Preprocessing(32, (0.0,) * 3, (1.0,) * 3), "golden")


@functools.cache
def originals() -> Tensor:
    """View 0 of the 4 pictures, ``[4, 3, 32, 32]``."""
    return load_file(GOLDEN / "views.safetensors")["views"].float()[:, 0]
