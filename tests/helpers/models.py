"""Small random open_clip models of the kinds that the package must serve."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file

from metatpt.clip import FrozenCLIP
from metatpt.clip.text import token_embedding
from metatpt.types import Preprocessing

_VIT = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}

CONFIGS: dict[str, dict[str, Any]] = {
    # OpenAI's: QuickGELU, causal, pooled at the end token
    "openai_vit": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "modified_resnet": {
        "embed_dim": 24,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 64},
        "text_cfg": {**_TEXT, "width": 48, "heads": 3},
    },
    # CustomTextCLIP: a text tower of its own, biased projection, pooled at the first end token
    "custom_text": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": _VIT,
        "text_cfg": {**_TEXT, "pool_type": "eos", "eos_id": 49407, "proj_bias": True},
    },
    # SigLIP's kind: bidirectional, padded to full length, pooled at the last token, a bias on the logits
    "bidirectional": {
        "embed_dim": 24,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": _VIT,
        "text_cfg": {**_TEXT, "context_length": 24, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
    # CoCa's text tower: a class token of its own behind the text
    "class_token": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": _VIT,
        "text_cfg": {**_TEXT, "context_length": 24, "embed_cls": True},
    },
    # image tower pooled over all patches, with layer scale
    "average_pool": {
        "embed_dim": 24,
        "vision_cfg": {**_VIT, "pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.3},
        "text_cfg": {**_TEXT, "ls_init_value": 0.3},
    },
    # open_clip's custom blocks in both towers
    "custom_blocks": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {**_VIT, "qk_norm": True},
        "text_cfg": {**_TEXT, "qk_norm": True, "scale_heads": True, "ls_init_value": 0.3},
    },
    # a Hugging Face text tower
    "hugging_face": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {**_VIT, "no_ln_pre": True},
        "text_cfg": {
            "context_length": 24,
            "width": 32,
            "hf_model_name": str(Path(__file__).parents[1] / "data" / "bert"),
            "hf_model_pretrained": False,
        },
    },
    # timm's image tower
    "timm": {
        "embed_dim": 24,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_model_pretrained": False, "image_size": 160},
        "text_cfg": {**_TEXT, "context_length": 16},
    },
}


def build(kind: str, seed: int = 0) -> torch.nn.Module:
    """A random model whose features depend on their input as a trained one's do."""
    config = copy.deepcopy(CONFIGS[kind])
    config.pop("custom_text", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        custom = CONFIGS[kind].get("custom_text", False)
        model = (open_clip.model.CustomTextCLIP if custom else open_clip.CLIP)(**config)
        tower = getattr(model, "text", model)
        # open_clip's small initial values make all texts alike
        torch.nn.init.normal_(token_embedding(model).weight, std=0.3)
        for name, positions in tower.named_parameters():
            if name.endswith("position_embeddings.weight") or name == "positional_embedding":
                torch.nn.init.normal_(positions, std=0.3)
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.1)
        model.logit_scale.data.fill_(3.0)
    return model.eval()


@cache
def tokenizer(context_length: int) -> SimpleTokenizer:
    """OpenAI's, whose vocabulary takes a while to read."""
    return SimpleTokenizer(context_length=context_length)


def frozen(kind: str, seed: int = 0, memory: int | str = 4096) -> FrozenCLIP:
    """A small random model, frozen."""
    model = build(kind, seed)
    size = CONFIGS[kind]["vision_cfg"]["image_size"]
    preprocessing = Preprocessing(size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    return FrozenCLIP(
        model, tokenizer(CONFIGS[kind]["text_cfg"]["context_length"]), preprocessing, kind, None, None, memory
    )


def save_folder(kind: str, folder: Path, seed: int = 0, **preprocess: Any) -> Path:
    """The model as a folder that open_clip and this package load."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": CONFIGS[kind], "preprocess_cfg": {**cfg, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {key: value.contiguous().clone() for key, value in build(kind, seed).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder
