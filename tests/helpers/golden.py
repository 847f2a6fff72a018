"""The golden files (tests/data/golden/README.md) and the model that they were made with."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.types import Preprocessing

from .models import tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "golden"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
NAMES: list[str] = MANIFEST["classnames"]


@cache
def _weights() -> dict[str, Tensor]:
    weights = {key: value.float() for key, value in load_file(FOLDER / "weights.safetensors").items()}
    rows, ids = weights.pop("token_embedding.rows"), weights.pop("token_embedding.row_ids")
    table = torch.zeros(49408, 128)
    table[ids.long()] = rows
    return {**weights, "token_embedding.weight": table}


def golden_clip() -> FrozenCLIP:
    """The golden CLIP, frozen; its pictures are normalised already."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3}
    vision = {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8, "head_width": 64}
    model = open_clip.CLIP(embed_dim=64, quick_gelu=True, vision_cfg=vision, text_cfg=text)
    model.load_state_dict(_weights())
    return FrozenCLIP(model, tokenizer(77), Preprocessing(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "golden")


def golden_views() -> Tensor:
    """``[4, 64, 3, 32, 32]``."""
    return load_file(FOLDER / "views.safetensors")["views"].float()


def fixture(name: str, variant: str = "") -> dict[str, Tensor]:
    """The tensors of a fixture, or those whose names begin with a variant's, without it."""
    tensors = load_file(FOLDER / "fixtures" / f"{name}.safetensors")
    return {key.removeprefix(variant): value for key, value in tensors.items() if key.startswith(variant)}


def checkpoint(name: str) -> dict[str, Tensor]:
    """The parameters in a checkpoint of an official trainer."""
    return torch.load(FOLDER / "checkpoints" / name / "model-best.pth.tar", weights_only=True)["state_dict"]
