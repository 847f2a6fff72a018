"""The small CLIP that the golden files were made with (tests/data/golden/README.md), as a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES: list[str] = json.loads((GOLDEN / "manifest.json").read_text())["classnames"]


def fixture(name: str) -> dict[str, Tensor]:
    """What the official code made."""
    return load_file(GOLDEN / "fixtures" / f"{name}.safetensors")


def originals() -> Tensor:
    """View 0 of the 4 pictures, normalised, ``[4, 1, 3, 32, 32]``."""
    return load_file(GOLDEN / "views.safetensors")["views"].float()[:, :1]


def save_golden(folder: Path) -> Path:
    """Write the model; its preprocessing does not normalise, since the golden views are normalised already."""
    state = {key: value.float() for key, value in load_file(GOLDEN / "weights.safetensors").items()}
    table = torch.zeros(49408, 128)
    table[state.pop("token_embedding.row_ids").long()] = state.pop("token_embedding.rows")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**state, "token_embedding.weight": table}, folder / "open_clip_model.safetensors")
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3}
    vision = {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8, "head_width": 64}
    model = {"embed_dim": 64, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
