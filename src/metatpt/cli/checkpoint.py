"""``--ckpt_path``: what a checkpoint was made with, beside what it is run with."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import UsageError

_INTERNAL = ("_instantiator", "_class_path", "class_names")


def read_options(path: str) -> dict[str, Any]:
    """The options that a checkpoint's model was made with.

    Raises:
        UsageError: There is no such file, or it is no checkpoint.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--ckpt_path {path}: there is no such file.")
    try:
        checkpoint = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if "weights" in reason.lower():  # torch's advice to load it nevertheless
            reason = "it holds more than tensors and plain values"
        raise UsageError(f"--ckpt_path {path}: not a checkpoint that loads without running code: {reason}.") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UsageError(f"--ckpt_path {path}: not a checkpoint of Lightning (it has no state_dict).")
    options = checkpoint.get("hyper_parameters", {})
    if not isinstance(options, dict):
        raise UsageError(f"--ckpt_path {path}: not a checkpoint of metatpt (its hyper_parameters are no options).")
    return options


def differences(
    saved: Mapping[str, Any], class_path: str, options: Mapping[str, Any], class_names: list[str]
) -> list[str]:
    """What is run otherwise than the checkpoint was made, a line each.

    Args:
        saved: The checkpoint's options.
        class_path: Class of the model that runs.
        options: Its options.
        class_names: The classes that it runs on.
    """
    lines = []
    if saved.get("_class_path") not in (None, class_path):
        lines.append(f"model: {class_path} (checkpoint: {saved['_class_path']})")
    for name in dict.fromkeys([*options, *saved]):
        if name in _INTERNAL or name not in options or name not in saved:
            continue
        if options[name] != saved[name]:
            lines.append(f"model.{name}: {options[name]} (checkpoint: {saved[name]})")
    theirs = list(saved.get("class_names") or class_names)
    if theirs != class_names:
        lines.append(f"class names: {_some(class_names)} (checkpoint: {_some(theirs)})")
    return lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
