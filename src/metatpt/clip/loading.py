"""Loading a CLIP-like model: by name and tag, from a folder, from a file, or the bundled one.

Right weights with the wrong preprocessing, tokenizer or activation lose points without a word, so each mismatch is an
error here.
"""

from __future__ import annotations

import difflib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg, is_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from metatpt.types import Preprocessing

from .model import FrozenCLIP, Memory
from .tokens import Tokenizer

_BUILTIN = Path(__file__).parent / "builtin"
_CONFIG = "open_clip_config.json"
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")


def load_clip(name: str = "builtin", pretrained: str | None = None, memory: Memory = "auto") -> FrozenCLIP:
    """Load a model and freeze it.

    Args:
        name: ``builtin``; a name that open_clip knows (``ViT-B-16-quickgelu``); ``hf-hub:<repository>``; or a folder
            with ``open_clip_config.json`` and weights.
        pretrained: With a name: one of its tags (downloaded once), or a file of weights (safetensors, or a PyTorch
            file, of which no code is run).
        memory: Megabytes for activations, or ``auto``; see :class:`FrozenCLIP`.

    Raises:
        ValueError: An unknown name or tag (the nearest ones are named), weights that need QuickGELU under a name
            without it or the reverse, a file that does not fit, or preprocessing that cannot be known.
        FileNotFoundError: A folder or file that is not there.
        ImportError: A tokenizer whose package is not installed.
    """
    if name == "builtin":
        if pretrained is not None:
            raise ValueError(
                f"the bundled model has its own weights: leave out --model.pretrained {pretrained}, or set it to null"
            )
        return _load_builtin(memory)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    known = name in open_clip.list_models() and not (folder / _CONFIG).is_file()
    if folder.is_dir() and not known:  # a folder that happens to be called as a model does not hide the model
        if pretrained is not None:
            raise ValueError(
                f"{folder} holds the model's weights: leave out --model.pretrained {pretrained}, or set it to null"
            )
        return _load_folder(folder, memory)
    if name.startswith("hf-hub:"):
        if pretrained is not None:
            raise ValueError(
                f"{name} names its weights too: leave out --model.pretrained {pretrained}, or set it to null"
            )
        return _finish(name, None, _create(name, None), name, memory)
    return _load_named(name.replace("/", "-"), name, pretrained, memory)


def _load_builtin(memory: Memory) -> FrozenCLIP:
    config = json.loads((_BUILTIN / _CONFIG).read_text())
    model = open_clip.CLIP(**config["model_cfg"])
    weights = {key: value.float() for key, value in load_file(_BUILTIN / "weights.safetensors").items()}
    # Only the rows of the words that its captions use are stored.
    rows, ids = weights.pop("token_embedding.rows"), weights.pop("token_embedding.row_ids").long()
    table = torch.zeros_like(model.token_embedding.weight)
    weights["token_embedding.weight"] = table.index_copy(0, ids, rows)
    model.load_state_dict(weights)
    preprocessing = _preprocessing(config["preprocess_cfg"], model)
    tokenizer = SimpleTokenizer(context_length=model.context_length)
    return FrozenCLIP(model, tokenizer, preprocessing, "builtin", None, frozenset(config["words"]), memory)


def _load_folder(folder: Path, memory: Memory) -> FrozenCLIP:
    config = _read_config(folder / _CONFIG)
    if not config.get("preprocess_cfg"):
        raise ValueError(_no_preprocessing(folder / _CONFIG, "it has no preprocess_cfg"))
    if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in folder.iterdir()):
        raise FileNotFoundError(f"no weights in {folder}; expected open_clip_model.safetensors beside {_CONFIG}")
    name = f"local-dir:{folder}"
    return _finish(str(folder), None, _create(name, None), name, memory)


def _load_named(name: str, given: str, pretrained: str | None, memory: Memory) -> FrozenCLIP:
    known = open_clip.list_models()
    if name not in known:
        if "/" in given or given.startswith((".", "~")):
            raise FileNotFoundError(f"no folder {given} (expected {_CONFIG} and weights in it)")
        raise ValueError(f"no model is called {given!r}; {_nearest(name, [*known, 'builtin'])}")
    tags = list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ValueError(
            f"{name} needs weights: --model.pretrained with one of its tags ({', '.join(tags) or 'it has none'}) "
            "or a file"
        )
    architecture = open_clip.get_model_config(name)
    if is_pretrained_cfg(name, pretrained):
        tag = get_pretrained_cfg(name, pretrained)
        _check_activation(name, architecture, tag, f"the tag {pretrained!r}")
        return _finish(name, pretrained, _create(name, pretrained), name, memory)
    file = Path(pretrained).expanduser()
    if not file.is_file():
        raise ValueError(f"{pretrained!r} is neither a tag of {name} nor a file; {_nearest(pretrained, tags)}")
    beside = file.parent / _CONFIG
    config = _read_config(beside) if beside.is_file() else {}
    if config:
        _check_activation(name, architecture, config["model_cfg"], str(beside))
    preprocess = config.get("preprocess_cfg") or _shared_preprocessing(name, tags, file)
    model = _create(name, str(file))
    return _finish(name, str(file), model, name, memory, preprocess)


def _create(name: str, pretrained: str | None) -> nn.Module:
    try:
        model: nn.Module = open_clip.create_model(name, pretrained, require_pretrained=True, weights_only=True)
        return model
    except pickle.UnpicklingError as error:
        raise ValueError(_holds_code(pretrained or name)) from error
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"{pretrained or name} is no whole file of weights: {error}") from error
    except (RuntimeError, OSError, KeyError, AttributeError, ValueError, AssertionError) as error:
        first = " ".join(str(error).split())[:600].rstrip(".")
        if "allow_pickle" in first:  # numpy's, of an .npz or .npy file
            raise ValueError(_holds_code(pretrained or name)) from error
        if "TorchScript" in first:
            hint = "it is a TorchScript archive, which can hold code: use the tag `openai`, or its state dict"
        elif "input_resolution" in first or "size mismatch" in first or "Missing key" in first or "changed" in first:
            hint = f"the weights are of another architecture than {name}: check --model.clip"
        else:
            hint = (
                "if there is no network here, download the weights elsewhere and name the file "
                "(--model.pretrained FILE) or their folder (--model.clip FOLDER)"
            )
        raise ValueError(
            f"could not load {name} with weights {pretrained or '(its own)'}: {first.rstrip('.')}. {hint}"
        ) from error


def _holds_code(weights: str) -> str:
    return (
        f"{weights} holds more than tensors and is not loaded, since that may run code; save its state dict as "
        "safetensors"
    )


def _finish(
    name: str,
    pretrained: str | None,
    model: nn.Module,
    tokenizer_name: str,
    memory: Memory,
    preprocess: Mapping[str, Any] | None = None,
) -> FrozenCLIP:
    visual: Any = model.visual
    preprocessing = _preprocessing(preprocess or visual.preprocess_cfg, model)
    return FrozenCLIP(model, _tokenizer(tokenizer_name, model), preprocessing, name, pretrained, None, memory)


def _tokenizer(name: str, model: Any) -> Tokenizer:
    try:
        text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
        # transformers runs a tokenizer's own code where a config tells it to, or else asks on the terminal.
        options = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
        tokenizer = open_clip.get_tokenizer(name, **options)
    except (ImportError, NameError, TypeError) as error:  # open_clip leaves the name undefined, or None, without it
        raise ImportError(
            f"the tokenizer of {name} needs the package transformers: pip install transformers ({error})"
        ) from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer of {name} is code of its own, which is not run: choose a model whose tokenizer "
                "transformers has"
            ) from error
        raise ValueError(f"could not load the tokenizer of {name}: {error}") from error
    if tokenizer.context_length != model.context_length:
        raise ValueError(
            f"the tokenizer of {name} makes rows of {tokenizer.context_length} tokens, its text tower takes "
            f"{model.context_length}"
        )
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {model.vocab_size}, CLIP's own tokenizer {tokenizer.vocab_size}: set "
            f"model_cfg.text_cfg.hf_tokenizer_name in its {_CONFIG}"
        )
    return tokenizer  # type: ignore[no-any-return]


def _preprocessing(config: Mapping[str, Any], model: Any) -> Preprocessing:
    defaults = PreprocessCfg()
    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width:
        raise ValueError(f"the model takes pictures of {height} x {width}; only square ones are supported")
    mean, std = (tuple(config.get(key) or getattr(defaults, key)) for key in ("mean", "std"))
    return Preprocessing(
        size=int(height),
        mean=mean,
        std=std,
        interpolation=config.get("interpolation") or defaults.interpolation,
        resize_mode=config.get("resize_mode") or defaults.resize_mode,
        fill_color=int(config.get("fill_color") or 0),
    )


def _shared_preprocessing(name: str, tags: list[str], file: Path) -> dict[str, Any]:
    """The preprocessing that all tags of an architecture agree on: a file alone does not tell its own."""
    defaults = PreprocessCfg()
    found: dict[str, list[str]] = {}
    for tag in tags:
        config = get_pretrained_cfg(name, tag)
        values = {key: config.get(key) or getattr(defaults, key) for key in _PREPROCESS_KEYS}
        found.setdefault(json.dumps(values), []).append(tag)
    if len(found) == 1:
        return json.loads(next(iter(found)))  # type: ignore[no-any-return]
    choices = "; ".join(f"{', '.join(tags)}: {values}" for values, tags in found.items())
    why = f"the tags of {name} differ in it ({choices})" if found else f"{name} has no tags to take it from"
    raise ValueError(_no_preprocessing(file.parent / _CONFIG, why))


def _no_preprocessing(config: Path, why: str) -> str:
    return (
        f"the preprocessing of these weights is not known: {why}. Wrong preprocessing costs many points without a "
        f'word. Write it into {config}, for instance "preprocess_cfg": {{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, '
        '0.5], "interpolation": "bicubic", "resize_mode": "squash"}'
    )


def _check_activation(name: str, architecture: Mapping[str, Any], weights: Mapping[str, Any], source: str) -> None:
    has, needs = bool(architecture.get("quick_gelu")), bool(weights.get("quick_gelu"))
    if has == needs:
        return
    other = f"{name}-quickgelu" if needs else name.removesuffix("-quickgelu")
    hint = f"use --model.clip {other}" if other in open_clip.list_models() else "choose another architecture"
    raise ValueError(
        f"{name} has {'QuickGELU' if has else 'GELU'}, but {source} was trained with "
        f"{'QuickGELU' if needs else 'GELU'}: accuracy would drop by several points; {hint}"
    )


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; a model folder holds it beside the weights")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if "model_cfg" not in config:
        raise ValueError(f"{file} has no model_cfg; its keys are {sorted(config)}")
    return config  # type: ignore[no-any-return]


def _nearest(given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(given, known, n=4, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
