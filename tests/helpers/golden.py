"""The golden files (tests/data/golden/README.md) and the small CLIP that they were made with."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.types import Preprocessing

from .models import tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
NAMES: list[str] = MANIFEST["classnames"]

_CONFIG = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
}


@cache
def _weights() -> dict[str, Tensor]:
    weights = {key: value.float() for key, value in load_file(GOLDEN / "weights.safetensors").items()}
    rows, ids = weights.pop("token_embedding.rows"), weights.pop("token_embedding.row_ids")
    table = torch.zeros(49408, 128)
    table[ids.long()] = rows
    return {**weights, "token_embedding.weight": table}


def golden_clip() -> FrozenCLIP:
    """The golden CLIP, frozen; its pictures are normalised already."""
    model = open_clip.CLIP(**_CONFIG)
    model.load_state_dict(_weights())
    return FrozenCLIP(model, tokenizer(77), Preprocessing(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "golden")


def save_golden(folder: Path) -> Path:
    """The same as a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": _CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@cache
def golden_views() -> Tensor:
    """``[4, 64, 3, 32, 32]``, normalised; view 0 is the original."""
    return load_file(GOLDEN / "views.safetensors")["views"].float()


def originals() -> Tensor:
    """View 0 of the 4 pictures, ``[4, 1, 3, 32, 32]``."""
    return golden_views()[:, :1]


def fixture(name: str, variant: str = "") -> dict[str, Tensor]:
    """The tensors of a fixture, or those whose names begin with a variant's, without it."""
    tensors = load_file(GOLDEN / "fixtures" / f"{name}.safetensors")
    return {key.removeprefix(variant): value for key, value in tensors.items() if key.startswith(variant)}


def checkpoint(name: str) -> dict[str, Tensor]:
    """The parameters in a checkpoint of an official trainer."""
    return torch.load(GOLDEN / "checkpoints" / name / "model-best.pth.tar", weights_only=True)["state_dict"]
